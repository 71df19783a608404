"""A stack whose layers all read the sequence both ways: for classification and masked modelling."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn

from mambaseq.backbones.base import Backbone
from mambaseq.backbones.graphed import CudaGraph
from mambaseq.backbones.patterns import MakeMixer, make_mixers
from mambaseq.errors import ConfigError, shown
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.norm import NormName, make_norm
from mambaseq.ops import sequences

Combine = Literal["add", "multiply"]


class BidirectionalLayer(nn.Module):
    """ahead(x) + reversed(back(reversed(x))) of the normed residual stream, or their product; see `ResidualLayer` for
    who adds what.

    back: None takes `ahead` itself; a position-wise mixer (an MLP) has one direction.
    """

    def __init__(
        self,
        ahead: Mixer,
        back: Mixer | None,
        norm_eps: float,
        dropout: float,
        norm: NormName = "rms",
        combine: Combine = "add",
    ) -> None:
        super().__init__()
        self.norm = make_norm(norm, ahead.d_model, norm_eps)
        self.combine = combine
        self.ahead, self.back = ahead, back
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor | None, residual: Tensor, order: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, residual = self.norm(x, residual)
        both = self.ahead(y, cu_seqlens=cu_seqlens)
        if not self.ahead.position_wise:
            back = self.ahead if self.back is None else self.back
            turned = reverse(back(reverse(y, order), cu_seqlens=cu_seqlens), order)
            both = both + turned if self.combine == "add" else both * turned
        return self.dropout(both), residual


def _tie(ahead: Mixer, back: Mixer) -> None:
    """Give the second mixer the parameters of the first one's in_proj and out_proj.

    Raises ConfigError for a mixer without them.
    """
    for name in ("in_proj", "out_proj"):
        one, other = (getattr(mixer, name, None) for mixer in (ahead, back))
        if not isinstance(one, nn.Linear) or not isinstance(other, nn.Linear):
            raise ConfigError(
                f"tie_projections needs mixers with in_proj and out_proj; {type(ahead).__name__} has not."
            )
        other.weight, other.bias = one.weight, one.bias


def reverse(x: Tensor, order: Tensor | None) -> Tensor:
    """x `(batch, length, ...)` backwards. order: from `sequences.reversal`."""
    return x.flip(1) if order is None else x.flatten(0, 1).index_select(0, order).view_as(x)  # (batch, length, d_model)


class BidirectionalStack(Backbone):
    """Pre-norm residual layers that run their mixer over the sequence and over the sequence reversed, and add the two
    (as BiMamba, arXiv:2403.03234, section 3.1, and Vision Mamba, arXiv:2401.09417, do).

    A packed sequence is reversed within its own bounds, a padded one within its mask. There is no state, so nothing can
    be generated or continued.

    Args:
        make_mixer: makes the mixer of layer i (see `MakeMixer`).
        n_layers: number of layers; MLPs come on top.
        shared: both directions have one mixer; otherwise each has its own.
        tie_projections: each direction has a mixer of its own, but the two have one in_proj and one out_proj (as
            Caduceus has); for mixers with such maps.
        combine: add the two directions, or multiply them element by element.
        pattern: names of mixers, repeated over the layers: `[mamba, mamba, attention*]` (see `ResidualStack`). A mixer
            with a star is shared among layers, within each direction.
        mlp: follow each mixer by a residual layer of the `mlp` mixer; None: as the mixer's class says (see
            `ResidualStack`).
        norm: the norms, rms (RMSNorm) or layer (LayerNorm with a bias).
        norm_eps: epsilon of the norms.
        dropout: probability with which a layer's contribution is dropped, element by element, in training.
        checkpoint: recompute each layer's activations in the backward pass instead of keeping them.
        cuda_graph: replay training steps as CUDA graphs, except packed and padded batches (see `ResidualStack`).
    """

    takes_mask: ClassVar[bool] = True

    def __init__(
        self,
        make_mixer: MakeMixer,
        n_layers: int = 4,
        shared: bool = False,
        pattern: list[str] | None = None,
        mlp: bool | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        checkpoint: bool = False,
        cuda_graph: CudaGraph = "auto",
        tie_projections: bool = False,
        combine: Combine = "add",
        norm: NormName = "rms",
    ) -> None:
        super().__init__(checkpoint=checkpoint, cuda_graph=cuda_graph, dropout=dropout)
        if combine not in ("add", "multiply"):
            raise ConfigError(f"combine must be add or multiply, not {shown(combine)}.")
        if shared and tie_projections:
            raise ConfigError("shared: true gives both directions one mixer, so tie_projections has nothing to tie.")
        ahead: list[Mixer] = make_mixers(make_mixer, n_layers, pattern, mlp)
        back = [None] * len(ahead) if shared else make_mixers(make_mixer, n_layers, pattern, mlp)
        self.layers = nn.ModuleList(
            BidirectionalLayer(one, None if one.position_wise else other, norm_eps, dropout, norm, combine)
            for one, other in zip(ahead, back, strict=True)
        )
        for mixer in dict.fromkeys(self.mixers()):
            # a layer writes the sum of this many outputs
            directions = 1 if mixer.position_wise or combine == "multiply" else 2
            mixer.scale_residual_((len(self.layers) * directions) ** -0.5)
        if tie_projections:
            for layer in self.layers:
                if layer.back is not None:
                    _tie(layer.ahead, layer.back)  # type: ignore[arg-type]
        self.d_model = ahead[0].d_model
        self.norm_f = make_norm(norm, self.d_model, norm_eps)

    def mixers(self) -> list[Mixer]:
        """The mixers of each layer; one for the reversed sequence, if it is separate, comes second."""
        pairs = [(layer.ahead, layer.back) for layer in self.layers]
        return [mixer for pair in pairs for mixer in pair if mixer is not None]  # type: ignore[misc]

    @property
    def causal(self) -> bool:
        return False

    def forward(
        self,
        x: Tensor,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x `(batch, length, d_model)` to the same. mask: `(batch, length)` bool, of real positions; no other position
        sees the padding on the right.

        Raises ConfigError if a state is given or wanted.
        """
        if state is not None or return_state:
            refuse_states("bidirectional")
        order = sequences.reversal(x.shape[0], x.shape[1], cu_seqlens, mask)
        if self.cuda_graph and order is None and not (self.checkpoint or torch.compiler.is_compiling()):
            replayed = self.graphs(self, lambda x: self._both(x, None, None), x)
            if replayed is not None:
                return replayed
        return self._both(x, order, cu_seqlens)

    def _both(self, x: Tensor, order: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        branch: Tensor | None = None
        residual = x.float()
        for layer in self.layers:
            if self.checkpoint and torch.is_grad_enabled():
                branch, residual = torch.utils.checkpoint.checkpoint(
                    layer, branch, residual, order, cu_seqlens, use_reentrant=False
                )
            else:
                branch, residual = layer(branch, residual, order, cu_seqlens)
        y, _ = self.norm_f(branch, residual)
        return y

    def init_state(self, *arguments: Any, **options: Any) -> NoReturn:
        refuse_states("bidirectional")

    def step_(self, x: Tensor, state: list[Any]) -> NoReturn:
        refuse_states("bidirectional")


def refuse_states(backbone: str) -> NoReturn:
    """Raise ConfigError: a backbone that sees the future has no state."""
    raise ConfigError(
        f"A {backbone} backbone sees whole sequences and keeps no state: it can neither generate nor read a sequence "
        "in parts. Use a causal backbone (residual) for that."
    )
