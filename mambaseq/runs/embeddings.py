"""Embeddings of records: the backbone's output, or a layer's, at each position or pooled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mambaseq.backbones.bidirectional import BidirectionalStack, reverse
from mambaseq.backbones.residual import ResidualStack
from mambaseq.backbones.reverse_complement import ReverseComplementStack
from mambaseq.checkpoints import LoadedModel
from mambaseq.data.records import Record
from mambaseq.errors import ConfigError, shown
from mambaseq.heads.base import pool
from mambaseq.ops import sequences
from mambaseq.runs.answers import CHUNK, Answer, Found, NotFinite, Span
from mambaseq.runs.tables import Column

Pool = Literal["mean", "last", "positions", "none"]


class Embeddings(Answer):
    """The backbone's output, or that of a layer (the residual stream after it), as columns `embedding_1`, ...

    pool: "mean" over the positions of a record (or window), its "last" one, or "none": a row each,
        which "positions" says too.
    layer: 1 is the first; None takes the backbone's normed output.
    Raises ConfigError for a layer that the backbone does not have, or whose positions are not those of its output.
    """

    gathered = 2**14

    def __init__(self, loaded: LoadedModel, window: int | None, pool: Pool, layer: int | None) -> None:
        super().__init__(loaded, window)
        if pool not in get_args(Pool):
            raise ConfigError(f"Embeddings are pooled by mean, last or none, not by {shown(pool)}.")
        if window is None and not self.in_parts:
            self.window = loaded.card.length or None
        self.pool, self.layer = pool, None if layer is None else self._layer(layer)
        self.each = pool in ("positions", "none")

    def _layer(self, number: int) -> nn.Module:
        backbone = self.model.backbone
        stack = backbone.stack if isinstance(backbone, ReverseComplementStack) else backbone
        layers = list(stack.layers) if isinstance(stack, ResidualStack | BidirectionalStack) else []
        if not layers:
            raise ConfigError(
                f"The layers of the backbone {shown(self.loaded.card.spec['backbone']['name'])} do not follow one "
                "another; only its output can be embedded. Leave --layer out."
            )
        if not 1 <= number <= len(layers):
            raise ConfigError(f"--layer must be 1 to {len(layers)} for this model, not {number}.")
        return layers[number - 1]

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """A list to which the layer's output is added."""
        found: list[Tensor] = []
        if self.layer is None:
            yield found
            return

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            branch, residual = output[0], output[1]
            found.append(residual if branch is None else residual + branch)

        handle = self.layer.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    def hidden(self, inputs: Tensor, condition: Tensor | None = None) -> Tensor:
        """Of whole sequences of one length, `(batch, length, ...)` to `(batch, positions, width)` fp32, not pooled."""
        return self._hidden(inputs, condition)[0]

    def _hidden(
        self, inputs: Tensor, condition: Tensor | None, mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """Inputs `(batch, length, ...)` to hidden `(batch, positions, d_model)` fp32, and the states, if options ask
        for them (see `read`)."""
        with self._watched() as found:
            output = self.read(inputs, condition, mask, **options)
        y, new = output if options else (output, None)
        if self.layer is not None:  # with chunk_length a layer is run once a chunk
            y = torch.cat(found, 1)
            if self.model.backbone.strands == 2:  # the strands are sequences of their own in a layer
                this, other = y.chunk(2)
                order = sequences.reversal(len(this), this.shape[1], mask=mask)
                y = torch.cat([this, reverse(other, order)], -1)
        return y.float(), new

    def _made(self, first: int, stop: int, hidden: Tensor) -> Found | NotFinite:
        """What is found of `(positions, d_model)`: a row for [first, stop), or one for each position."""
        if not hidden.isfinite().all():
            return NotFinite("")
        values = hidden.cpu().numpy()
        if not self.each:
            return Found(first, stop, stop - first, values)
        if len(values) != stop - first:
            raise ConfigError(
                f"The model at {self.loaded.source} has {len(values)} positions for {stop - first} tokens; pool by "
                f"mean or last."
            )
        return Found(first, stop, 1, values)

    def cells(self, values: np.ndarray) -> list[Column]:
        self.columns = [f"embedding_{number}" for number in range(1, values.shape[1] + 1)]
        return list(values.T)

    def turned(self, values: np.ndarray) -> np.ndarray:
        """Models of both strands have a half of the numbers for each."""
        half = values.shape[1] // 2
        return np.roll(values, half, axis=1) if self.model.backbone.strands == 2 else values

    def answers(self, pieces: list[tuple[Record, Span]]) -> list[Found | NotFinite]:
        batch, stride = self.batch(pieces), self.model.stride
        hidden, _ = self._hidden(batch.inputs, batch.condition, batch.mask)
        if self.pool in ("mean", "last"):
            mask = None if batch.mask is None else batch.mask[:, ::stride]
            hidden = pool(hidden, self.pool, mask, None)[:, None]
        return [
            self._made(span.start, span.stop, one[: -(-(span.stop - span.start) // stride)])
            for (_, span), one in zip(pieces, hidden, strict=True)
        ]

    def parts(self, record: Record, span: Span) -> Iterator[Found]:
        """States are passed on, so memory does not grow with the record."""
        state, total, last = None, torch.zeros((), dtype=torch.float64), None
        for start in range(span.start, span.stop, CHUNK):
            stop = min(start + CHUNK, span.stop)
            inputs = self.tensor(record, start, stop)
            hidden, state = self._hidden(inputs, self.condition(record), state=state, return_state=True)
            if self.each:
                found = self._made(start, stop, hidden[0])
                if isinstance(found, NotFinite):
                    raise found
                yield found
            total, last = total.to(hidden.device) + hidden[0].double().sum(0), hidden[0, -1:]
        if self.each:
            return
        whole = last if self.pool == "last" else (total / (span.stop - span.start)).float()[None]
        assert whole is not None
        found = self._made(span.start, span.stop, whole)
        if isinstance(found, NotFinite):
            raise found
        yield found
