"""A stack of pre-norm residual layers."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mambaseq.backbones.base import Backbone, ContextStates, ResidualLayer, positions_of_layers, step_layers_
from mambaseq.backbones.graphed import CudaGraph
from mambaseq.backbones.graphed_steps import Part
from mambaseq.backbones.patterns import MakeMixer, make_mixers, scale_residual_
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.norm import NormName, make_norm

MOST_PARTS = 4  # of a captured training step, where several processes sum their gradients


class ResidualStack(Backbone):
    """`n_layers` pre-norm residual layers of one mixer or of a pattern of several, and a last norm.

    Called like a mixer over embeddings: a list of states in, a list out. The output has the parameters' dtype, or
    autocast's if it is on (see `RMSNorm`).

    Args:
        make_mixer: makes the mixer of layer i (see `MakeMixer`).
        n_layers: number of layers; MLPs come on top.
        pattern: names of mixers, repeated over the layers: `[mamba, mamba, attention]`. A name with a star
            (`attention*`) is one mixer that all of its layers share (norms and states are a layer's own). Options of
            the model's own mixer are under `model.mixer`, those of others under `model.mixers.NAME`.
        mlp: follow each mixer by a residual layer of the `mlp` mixer (options: `model.mixers.mlp`). None: as the
            mixer's class says (attention has one, mamba does not), unless the pattern contains MLPs itself.
        norm: the norms, rms (RMSNorm) or layer (LayerNorm with a bias).
        norm_eps: epsilon of the norms.
        dropout: probability with which a layer's contribution is dropped, element by element, in training.
        checkpoint: recompute each layer's activations in the backward pass instead of keeping them.
        chunk_length: run longer sequences in chunks of this many positions, and recompute each chunk's activations in
            the backward pass: memory a token then does not grow with the layers (see `backbones/chunks.py`). None runs
            them whole.
        cuda_graph: replay the forward and backward of training steps as CUDA graphs, one pair for each shape of input
            (see `backbones/graphed_steps.py`): faster where kernels are shorter than their launches. With chunk_length,
            the layers of each chunk between two messages (see `backbones/staged.py`). Calls with states, packed
            sequences or checkpoints, with hooks inside, or not on CUDA run as usual. auto: if it changes no number and
            is faster (see `backbones/automatic.py`).
        context_parallel: how many processes share every training sequence, each with a part of its positions (see
            `mambaseq.parallel`); trainer.devices is a multiple of it. With chunk_length, they share each chunk.
        context_states: how they get the states between their parts. relayed: each layer's go from one to the next; a
            process is one layer behind the one before it. gathered: all run a layer at once, after each has told all
            what its part does to a state; for mixers whose states are decayed sums (mamba, mamba2, gla, s4d), without
            chunks, which are always relayed. auto: what keeps processes waiting less.
    """

    splits_time: ClassVar[bool] = True
    one_stack: ClassVar[bool] = True

    def __init__(
        self,
        make_mixer: MakeMixer,
        n_layers: int = 4,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        checkpoint: bool = False,
        chunk_length: int | None = None,
        cuda_graph: CudaGraph = "auto",
        pattern: list[str] | None = None,
        mlp: bool | None = None,
        norm: NormName = "rms",
        context_parallel: int = 1,
        context_states: ContextStates = "auto",
    ) -> None:
        super().__init__(dropout, checkpoint, chunk_length, cuda_graph, context_parallel)
        self.context_states = context_states
        mixers = make_mixers(make_mixer, n_layers, pattern, mlp)
        self.layers = nn.ModuleList(ResidualLayer(mixer, norm_eps, dropout, norm) for mixer in mixers)
        scale_residual_(mixers)
        self.d_model = mixers[0].d_model
        self.norm_f = make_norm(norm, self.d_model, norm_eps)
        self.check_chunks()

    def mixers(self) -> list[Mixer]:
        """The mixer of each residual layer, the first layer's first; a shared one at each of its layers."""
        return [layer.mixer for layer in self.layers]  # type: ignore[misc]

    def _run(
        self, x: Tensor, state: list[Any] | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, list[Any]]:
        branch, residual, states = self._through(self.layers, x.float(), state, cu_seqlens, return_state)
        y, _ = self.norm_f(branch, residual)
        return y, states

    def _parts(self) -> list[Part]:
        """Half of the layers are the last part, half of the others the one before: the sum of a part's gradients is
        hidden by the backward pass of fewer layers, and few gradients are left for the end."""
        remaining: list[Any] = list(self.layers)
        parts: list[Part] = []
        while remaining:
            first = 0 if len(parts) == MOST_PARTS - 1 else len(remaining) // 2
            layers, remaining = remaining[first:], remaining[:first]
            modules = layers if parts else [*layers, self.norm_f]
            parts.append(Part(functools.partial(self._part, layers, not parts), modules))
        return parts[::-1]

    def _part(self, layers: list[Any], is_last: bool, residual: Tensor, branch: Tensor | None = None) -> list[Tensor]:
        states = [None] * len(layers)
        branch, residual, _ = self._stage(layers, None, None, branch, residual.float(), states, False)
        return [self.norm_f(branch, residual)[0]] if is_last else [residual, branch]

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[Any]:
        """States of an empty history, a list with one for each layer."""
        return [mixer.init_state(batch_size, max_length, dtype, device) for mixer in self.mixers()]

    def step_(self, x: Tensor, state: list[Any]) -> Tensor:
        """x `(batch, 1, d_model)`; changes the states in place."""
        self._check_states(state)
        branch, residual = step_layers_(self.layers, x.float(), state)
        y, _ = self.norm_f(branch, residual)
        return y

    def positions(self, x: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]] | None:
        """See `Mixer.positions`; None where one of the mixers has none."""
        self._check_states(state)
        found = positions_of_layers(self.layers, x.float(), state)
        if found is None:
            return None
        branch, residual, states = found
        y, _ = self.norm_f(branch, residual)
        return y, states
