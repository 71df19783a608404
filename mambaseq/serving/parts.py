"""Parts of prompts, read several at once, each from its own state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mambaseq.generation.decoder import can_capture
from mambaseq.models import SequenceModel
from mambaseq.ops import sequences
from mambaseq.ops.gpu.capture import Replay
from mambaseq.serving.states import Groups, Layout, copy_rows_, joined, row_of


class Parts:
    """Reads parts of prompts in one row, where nothing passes from one to another.

    sizes: tokens that rows are filled up to, the smallest that is enough; on a GPU each size has a CUDA graph. What
        fills them is a sequence of its own. None leaves rows as they are. most: tokens at once, where there are no
        sizes. together: sequences at once, for which rows of fixed sizes have room.

    Attributes:
        tokens, sequences: the most that may be read at once.
    """

    def __init__(
        self, model: SequenceModel, layout: Layout, most: int, sizes: Sequence[int] | None, together: int
    ) -> None:
        self._model, self._layout, self.sizes = model, layout, sizes
        self._device = next(model.parameters()).device
        self.tokens = most if sizes is None else sizes[-1]
        self.sequences = together
        if sizes is None:
            return
        # where the sequences begin, and the row ends; the last position of each; their tokens
        count = self.sequences
        self._given = torch.zeros(2 * count + 2 + self.tokens, dtype=torch.int64, device=self._device)
        self._states = layout.room(count + 1)
        self._layers = layout.layers(self._states)
        self._made = [group.contiguous() for group in layout.room(count + 1)]  # by whichever size is read
        self._others = 0  # states of the last call
        self._calls: dict[int, Replay] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def read(self, parts: Sequence[np.ndarray], states: Sequence[Groups | None]) -> tuple[list[Groups], Tensor]:
        """The state behind each of some parts, `(length,)` whole numbers, and the backbone's outputs at their last
        positions, `(parts, 1, d_model)`; new ones. states: those before them, None for an empty history."""
        if self.sizes is None:
            return self._as_they_are(parts, states)
        count = self.sequences
        ends = np.cumsum([len(part) for part in parts])
        size = next(size for size in self.sizes if size >= ends[-1])
        given = np.zeros(2 * count + 2 + size, dtype=np.int64)
        given[1 : len(parts) + 1] = ends
        given[len(parts) + 1 : count + 2] = size
        given[count + 2 :][: len(parts)] = ends - 1
        given[2 * count + 2 :][: ends[-1]] = np.concatenate(parts)
        self._given[: len(given)].copy_(torch.from_numpy(given), non_blocking=True)
        # what is left of the last call may be no numbers, which some mixers take from one sequence of a row to others
        rest = [None] * (self._others - len(parts))
        copy_rows_(self._states, 0, [self._layout.empty if state is None else state for state in (*states, *rest)])
        self._others = len(parts)
        hidden, *made = self._call(size)()
        return [_owned(made, row) for row in range(len(parts))], hidden[: len(parts)].clone()

    def warm_up(self, size: int) -> str | None:
        """Compile and capture what a row of a size needs. Returns why it is not captured on a GPU, if so."""
        if self.sizes is None:
            for parts in ([size], [max(size - 1, 1), 1]):
                tokens = [np.zeros(part, dtype=np.int64) for part in parts]
                states, _ = self.read(tokens, [None] * len(parts))
                self.read(tokens, states)
            return None
        for _ in range(2):  # the first runs, the second is captured
            self.read([np.zeros(size, dtype=np.int64)], [None])
        return self._call(size).why_not if self._device.type == "cuda" else None

    def _call(self, size: int) -> Replay:
        if size not in self._calls:
            call = Replay(lambda: self._run(size), self._device, self._pool)
            if call.why_not is None and not can_capture(self._model, self._layers, self._given):
                call.why_not = "what the model does at a step cannot be captured"
            self._calls[size] = call
        return self._calls[size]

    def _run(self, size: int) -> tuple[Tensor, ...]:
        """Of a row of a size, as it was given: the outputs at the last positions, and the groups of new states."""
        count = self.sequences
        bounds, last = self._given[: count + 2].int(), self._given[count + 2 : 2 * count + 2]
        hidden, state = self._through(self._given[2 * count + 2 :][:size], bounds, self._layers)
        return hidden[0, last][:, None], *self._layout.grouped(state, self._made)

    def _as_they_are(self, parts: Sequence[np.ndarray], states: Sequence[Groups | None]) -> tuple[list[Groups], Tensor]:
        ends = np.cumsum([len(part) for part in parts])
        row = torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(self._device, non_blocking=True)
        bounds = None
        if len(parts) > 1:
            bounds = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(self._device, non_blocking=True)
        layers = None
        if any(state is not None for state in states):
            layers = self._layout.layers(joined([self._layout.empty if one is None else one for one in states]))
        hidden, state = self._through(row, bounds, layers)
        made = self._layout.grouped(state)
        return [row_of(made, number) for number in range(len(parts))], hidden[0, ends - 1][:, None]

    def _through(self, row: Tensor, bounds: Tensor | None, layers: list | None) -> tuple[Tensor, list]:
        with sequences.shared_tables():  # which each layer would make anew
            x = self._model.encoder(row[None], None, bounds)
            hidden, state = self._model.backbone(x, state=layers, cu_seqlens=bounds, return_state=True)
        return hidden, state


def _owned(groups: Groups, row: int) -> Groups:
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in row_of(groups, row)]
