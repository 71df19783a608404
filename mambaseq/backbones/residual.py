"""A stack of pre-norm residual layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambaseq.backbones.graphed import StepGraphs
from mambaseq.errors import ConfigError
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.norm import RMSNorm


class ResidualLayer(nn.Module):
    """mixer(norm(residual + x)) and residual + x: the addition of what a layer writes to the residual stream, which is
    kept in fp32, is left to the next norm, which reads both anyway. x is None where there is nothing to add yet."""

    def __init__(self, mixer: Mixer, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(mixer.d_model, norm_eps)
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor | None, residual: Tensor, state: Any, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor, Any]:
        """(what the next norm adds, the residual stream, the state or None)."""
        y, residual = self.norm(x, residual)
        y = self.mixer(y, state=state, cu_seqlens=cu_seqlens, return_state=return_state)
        y, new = y if return_state else (y, None)
        return self.dropout(y), residual, new

    def step_(self, x: Tensor | None, residual: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        y, residual = self.norm(x, residual)
        return self.mixer.step_(y, state), residual


class ResidualStack(nn.Module):
    """`n_layers` pre-norm residual layers of one mixer, and a last norm.

    Called like a mixer over embeddings: a list of states in, a list out. The output has the parameters' dtype, or
    autocast's where it is on (see `RMSNorm`).

    Args:
        make_mixer: makes the mixer of layer i.
        n_layers: number of layers.
        norm_eps: epsilon of the RMSNorms.
        dropout: probability with which a layer's contribution is dropped, element by element, in training.
        checkpoint: recompute each layer's activations in the backward pass instead of keeping them.
        chunk_length: run longer sequences over this many positions at a time, recomputing each chunk's activations in
            the backward pass: the memory of a token no longer grows with the layers (see `backbones/chunks.py`).
        cuda_graph: replay the forward and backward of training steps as CUDA graphs, one pair for each shape of input
            (see `backbones/graphed.py`); for models whose kernels are shorter than their launches. Calls with states,
            packed sequences, chunks or checkpoints, with hooks inside, or not on CUDA run as usual.
    """

    def __init__(
        self,
        make_mixer: Callable[[int], Mixer],
        n_layers: int = 4,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        checkpoint: bool = False,
        chunk_length: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ConfigError(f"n_layers must be at least 1, not {n_layers}.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, not {dropout}.")
        if chunk_length is not None and chunk_length < 1:
            raise ConfigError(f"chunk_length must be at least 1, not {chunk_length}.")
        self.layers = nn.ModuleList(ResidualLayer(make_mixer(i), norm_eps, dropout) for i in range(n_layers))
        for mixer in self.mixers():
            mixer.scale_residual_(n_layers**-0.5)
        self.d_model = self.mixers()[0].d_model
        self.norm_f = RMSNorm(self.d_model, norm_eps)
        self.checkpoint = checkpoint
        self.chunk_length = chunk_length
        self.cuda_graph = cuda_graph
        self.graphs = StepGraphs()
        for mixer in self.mixers() if chunk_length else []:
            if not (mixer.causal and mixer.bounded_state):
                raise ConfigError(
                    f"chunk_length needs causal mixers whose state is bounded, which {type(mixer).__name__} is not."
                )

    def mixers(self) -> list[Mixer]:
        """The mixer of each layer, the first layer's first."""
        return [layer.mixer for layer in self.layers]  # type: ignore[misc]

    @property
    def causal(self) -> bool:
        return all(mixer.causal for mixer in self.mixers())

    def forward(
        self,
        x: Tensor,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """x `(batch, length, d_model)` to the same, or `(y, states)`; see `Mixer.forward`."""
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"The backbone has {len(self.layers)} layers and was given {len(state)} states.")
        if self.chunk_length is None or x.shape[1] <= self.chunk_length:
            may_replay = self.cuda_graph and not (self.checkpoint or return_state or torch.compiler.is_compiling())
            if may_replay and state is None and cu_seqlens is None:
                replayed = self.graphs(self, lambda x: self._run(x, None, None, False)[0], x)
                if replayed is not None:
                    return replayed
            y, states = self._run(x, state, cu_seqlens, return_state)
        else:
            from mambaseq.backbones.chunks import run_in_chunks  # loads the compiler, which most runs do without

            y, states = run_in_chunks(
                self, self._run, self.init_state, x, state, cu_seqlens, return_state, self.chunk_length
            )
        return (y, states) if return_state else y

    def _run(
        self, x: Tensor, state: list[Any] | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, list[Any]]:
        residual, branch = x.float(), None
        states: list[Any] = []
        for index, layer in enumerate(self.layers):
            old = None if state is None else state[index]
            if self.checkpoint and torch.is_grad_enabled():
                branch, residual, new = torch.utils.checkpoint.checkpoint(
                    layer, branch, residual, old, cu_seqlens, return_state, use_reentrant=False
                )
            else:
                branch, residual, new = layer(branch, residual, old, cu_seqlens, return_state)
            states.append(new)
        y, _ = self.norm_f(branch, residual)
        return y, states

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[Any]:
        """States of an empty history, a list of one a layer."""
        return [mixer.init_state(batch_size, max_length, dtype, device) for mixer in self.mixers()]

    def step_(self, x: Tensor, state: list[Any]) -> Tensor:
        """x `(batch, 1, d_model)`; changes the states in place."""
        residual, branch = x.float(), None
        for layer, layer_state in zip(self.layers, state, strict=True):
            branch, residual = layer.step_(branch, residual, layer_state)  # type: ignore[operator]
        y, _ = self.norm_f(branch, residual)
        return y
