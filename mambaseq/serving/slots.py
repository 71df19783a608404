"""The batch: states of a fixed size, one a slot, which sequences enter and leave between any two steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambaseq.backbones.unet import UNet
from mambaseq.errors import ConfigError, cut_list
from mambaseq.generation.decoder import Decoder
from mambaseq.mixers.base import Mixer, State
from mambaseq.models import SequenceModel
from mambaseq.serving.states import Groups, Layout, copy_rows_, row_of


class Slots:
    """States of at most `size` sequences. Those in use are the first ones, so a step computes no others: when one
    leaves, the last takes its place.

    sizes: numbers of sequences that steps are made for, of which each takes the smallest that is enough; on a GPU they
        have a CUDA graph each (see `Decoder`). None makes them for those in use.

    Raises ConfigError for a model with mixers whose state grows.
    """

    def __init__(self, model: SequenceModel, size: int, sizes: Sequence[int] | None = None) -> None:
        mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        if growing := sorted({type(mixer).__name__ for mixer in mixers if not mixer.bounded_state}):
            raise ConfigError(
                f"Only models whose states have a fixed size can be served; those of {cut_list(growing)} grow with the "
                "text. Serve a model of other mixers, such as mamba."
            )
        self._model, self.size, self.used, self.sizes = model, size, 0, sizes
        state = model.init_state(1)
        if not all(isinstance(layer, State) for layer in state):
            raise ConfigError("Only models whose layers' states are of the class State can be served.")
        self.layout = Layout(state)
        self._groups = self.layout.room(size)
        self._device = next(model.parameters()).device
        self._decoders: dict[int, Decoder] = {}

    @property
    def bytes_each(self) -> int:
        """Bytes of one sequence's state."""
        return sum(tensor.nbytes for tensor in self.layout.empty)

    def enter(self, states: Sequence[Groups]) -> None:
        """Copy the states of some sequences behind the others'."""
        copy_rows_(self._groups, self.used, states)
        self.used += len(states)

    def leave(self, slot: int) -> None:
        """Free a slot; the sequence of the last one moves there."""
        self.used -= 1
        if slot != self.used:
            copy_rows_(self._groups, slot, [row_of(self._groups, self.used)])

    def cut(self, count: int) -> None:
        """Free all slots but the first `count`. The device is not used."""
        self.used = count

    def state_of(self, slot: int) -> Groups:
        """A copy of one sequence's state."""
        return [tensor.clone() for tensor in row_of(self._groups, slot)]

    def step(self, tokens: Tensor) -> Tensor:
        """One token of each sequence in use, the first of `(size,)`, to their logits `(used, vocab_size)` fp32, or more
        that mean nothing, up to one of the sizes; the next step may overwrite them."""
        count = self.used if self.sizes is None else next(size for size in self.sizes if size >= self.used)
        told: Tensor = self._decoder(count).step(tokens[:count])
        return told

    def warm_up(self, count: int) -> tuple[Tensor, str | None]:
        """Compile and capture what a step of so many sequences needs; nothing may be in use. Returns what it tells, and
        why it is not captured on a GPU, if so."""
        decoder, tokens = self._decoder(count), torch.zeros(count, dtype=torch.int64, device=self._device)
        for _ in range(2):  # the first runs, the second is captured
            told: Tensor = decoder.step(tokens)
        slow = self._device.type == "cuda" and not decoder.captured
        return told, "a step of the model cannot be captured" if slow else None

    def _decoder(self, count: int) -> Decoder:
        """Of the first `count` slots."""
        if count not in self._decoders:
            views = self.layout.layers(self._groups, count)
            # the graphs of a unet are for sequences that are all at one place of their windows
            graph = not isinstance(self._model.backbone, UNet)
            self._decoders[count] = Decoder(self._model, views, cuda_graph=graph)
        return self._decoders[count]
