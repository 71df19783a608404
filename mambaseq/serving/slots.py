"""The batch: states of a fixed size, one a slot, which sequences enter and leave between any two steps."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.backbones.unet import UNet
from mambaseq.errors import ConfigError, cut_list
from mambaseq.generation.decoder import Decoder
from mambaseq.mixers.base import Mixer, State
from mambaseq.models import SequenceModel


class Slots:
    """States of at most `size` sequences. Those in use are the first ones, so a step computes no others: when one
    leaves, the last takes its place.

    On a GPU steps are made for a power of two of sequences, each of which has a CUDA graph (see `Decoder`).

    Raises ConfigError for a model with mixers whose state grows.
    """

    def __init__(self, model: SequenceModel, size: int) -> None:
        mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        if growing := sorted({type(mixer).__name__ for mixer in mixers if not mixer.bounded_state}):
            raise ConfigError(
                f"Only models whose states have a fixed size can be served; those of {cut_list(growing)} grow with the "
                "text. Serve a model of other mixers, such as mamba."
            )
        self._model, self.size, self.used = model, size, 0
        state = model.init_state(size)
        if not all(isinstance(layer, State) for layer in state):
            raise ConfigError("Only models whose layers' states are of the class State can be served.")
        self._state: list[State] = [layer.map(_contiguous) for layer in state]
        self._device = next(model.parameters()).device
        self._decoders: dict[int, Decoder] = {}

    @property
    def bytes_each(self) -> int:
        """Bytes of one sequence's state."""
        return sum(tensor.nbytes for layer in self._state for tensor in layer.tensors().values()) // self.size

    def enter(self, state: list[State], row: int = 0) -> None:
        """Copy one of the given states, by its number, behind the others': its slot is the last."""
        mine, given = [], []
        for layer, source in zip(self._state, state, strict=True):
            tensors = source.tensors()
            for name, tensor in layer.tensors().items():
                mine.append(tensor[self.used])
                given.append(tensors[name][row])
        torch._foreach_copy_(mine, given)
        self.used += 1

    def leave(self, slot: int) -> None:
        """Free a slot; the sequence of the last one moves there."""
        self.used -= 1
        if slot != self.used:
            tensors = [tensor for layer in self._state for tensor in layer.tensors().values()]
            torch._foreach_copy_([tensor[slot] for tensor in tensors], [tensor[self.used] for tensor in tensors])

    def cut(self, count: int) -> None:
        """Free all slots but the first `count`. The device is not used."""
        self.used = count

    def state_of(self, slot: int) -> list[State]:
        """A copy of one sequence's state."""
        return [layer.map(lambda tensor: tensor[slot : slot + 1].clone()) for layer in self._state]

    def step(self, tokens: Tensor) -> Tensor:
        """One token of each sequence in use, the first of `(size,)`, to their logits `(used, vocab_size)` fp32, which
        the next step may overwrite."""
        count = self.used
        if self._device.type == "cuda":
            count = min(1 << (count - 1).bit_length(), self.size)
        return self._decoder(count).step(tokens[:count])[: self.used]

    def warm_up(self) -> None:
        """Compile and capture what steps need, for all numbers of sequences; nothing may be in use."""
        counts = [self.size] if self._device.type != "cuda" else []
        if not counts:
            counts = sorted({min(1 << power, self.size) for power in range(self.size.bit_length() + 1)})
        tokens = torch.zeros(self.size, dtype=torch.int64, device=self._device)
        for count in counts:
            for _ in range(2):  # the first runs, the second is captured
                self._decoder(count).step(tokens[:count])

    def _decoder(self, count: int) -> Decoder:
        """Of the first `count` slots."""
        if count not in self._decoders:
            views = [layer.map(lambda tensor: tensor[:count]) for layer in self._state]
            # the graphs of a unet are for sequences that are all at one place of their windows
            graph = not isinstance(self._model.backbone, UNet)
            self._decoders[count] = Decoder(self._model, views, cuda_graph=graph)
        return self._decoders[count]


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
