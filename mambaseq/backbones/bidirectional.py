"""A stack whose layers all read the sequence both ways: for classification and masked modelling."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mambaseq import parallel
from mambaseq.backbones import relay
from mambaseq.backbones.graphed import CudaGraph
from mambaseq.backbones.patterns import MakeMixer, make_mixers
from mambaseq.backbones.stateless import StatelessBackbone
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

    def over_part(
        self,
        strands: list[tuple[Tensor | None, Tensor]],
        part: parallel.Part,
        order: Tensor | None,
        cu_seqlens: Tensor | None,
        checkpoint: bool,
    ) -> list[tuple[Tensor, Tensor]]:
        """The same over a rank's part of split sequences, of one strand, or of two, the second of which is reversed and
        runs from the last rank to the first. What comes early to this rank is run first, so that the ranks of one half
        read ahead while those of the other read back."""
        normed = [self.norm(x, residual) for x, residual in strands]
        ys = [y for y, _ in normed]
        if self.ahead.position_wise:
            outputs = [self.ahead(y, cu_seqlens=cu_seqlens) for y in ys]
            return [(self.dropout(y), residual) for y, (_, residual) in zip(outputs, normed, strict=True)]
        back = self.ahead if self.back is None else self.back
        # whether time runs backwards, the strand, and whether it is read back
        runs = [(bool(strand) != turned, strand, turned) for strand in range(len(ys)) for turned in (False, True)]
        late = part.context.rank >= part.context.size / 2
        found: dict[tuple[int, bool], Tensor] = {}
        for backwards, strand, turned in sorted(runs, key=lambda run: run[0] != late):
            y = reverse(ys[strand], order) if turned else ys[strand]
            one = relay.Relay(part, part.mine[0], backwards=backwards)
            run = functools.partial(_read, back if turned else self.ahead, cu_seqlens, checkpoint)
            y, _, _ = one.run(back if turned else self.ahead, run, None, y, None, False)
            found[strand, turned] = reverse(y, order) if turned else y
        both = [
            found[s, False] + found[s, True] if self.combine == "add" else found[s, False] * found[s, True]
            for s in range(len(ys))
        ]
        return [(self.dropout(y), residual) for y, (_, residual) in zip(both, normed, strict=True)]


def _read(
    mixer: Mixer, cu_seqlens: Tensor | None, checkpoint: bool, branch: None, x: Tensor, state: Any, return_state: bool
) -> tuple[Tensor, Tensor, Any]:
    """A mixer as a layer of a relay."""
    if checkpoint and torch.is_grad_enabled():
        y = torch.utils.checkpoint.checkpoint(mixer, x, state, cu_seqlens, return_state, use_reentrant=False)
    else:
        y = mixer(x, state, cu_seqlens, return_state)
    return (y[0], x, y[1]) if return_state else (y, x, None)


def _tie(ahead: Mixer, back: Mixer) -> None:
    """Give the second mixer the parameters of the first one's in_proj and out_proj.

    Raises ConfigError for a mixer without them.
    """
    for name in ("in_proj", "out_proj"):
        one, other = (getattr(mixer, name, None) for mixer in (ahead, back))
        if not isinstance(one, nn.Linear) or not isinstance(other, nn.Linear):
            raise ConfigError(
                f"tie_projections needs mixers with in_proj and out_proj; {type(ahead).__name__} has not. Leave it "
                "out, or take mamba, mamba2 or mamba3."
            )
        other.weight, other.bias = one.weight, one.bias


def reverse(x: Tensor, order: Tensor | None) -> Tensor:
    """x `(batch, length, ...)` backwards. order: from `sequences.reversal`."""
    return x.flip(1) if order is None else x.flatten(0, 1).index_select(0, order).view_as(x)  # (batch, length, d_model)


class BidirectionalStack(StatelessBackbone):
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
        context_parallel: how many processes share every training sequence (see `ResidualStack`). Half of them read
            ahead while the others read back: two work as fast as each can, more wait for each other.
    """

    called: ClassVar[str] = "bidirectional"
    takes_mask: ClassVar[bool] = True
    splits_time: ClassVar[bool] = True

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
        context_parallel: int = 1,
    ) -> None:
        super().__init__(dropout, checkpoint, None, cuda_graph, context_parallel)
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
        self.refuse_states(state, return_state)
        if (part := parallel.current()) is not None and part.context.size > 1:
            self.check_part(part, x, cu_seqlens)
            refuse_padding(mask)
            order = sequences.reversal(x.shape[0], x.shape[1], cu_seqlens)
            (y,) = self.over_part([x], part, order, cu_seqlens)
            return y
        order = sequences.reversal(x.shape[0], x.shape[1], cu_seqlens, mask)
        if self.cuda_graph and order is None and not (self.checkpoint or torch.compiler.is_compiling()):
            replayed = self.graphs(self, lambda x: self._both(x, None, None), x)
            if replayed is not None:
                return replayed
        return self._both(x, order, cu_seqlens)

    def over_part(
        self, strands: list[Tensor], part: parallel.Part, order: Tensor | None, cu_seqlens: Tensor | None
    ) -> list[Tensor]:
        """The stack over a rank's part of each strand (see `BidirectionalLayer.over_part`)."""
        streams: list[tuple[Tensor | None, Tensor]] = [(None, x.float()) for x in strands]
        for layer in self.layers:
            streams = layer.over_part(streams, part, order, cu_seqlens, self.checkpoint)  # type: ignore[operator]
        return [self.norm_f(*stream)[0] for stream in streams]

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


def refuse_padding(mask: Tensor | None) -> None:
    """Raise ConfigError for padded sequences that are split over ranks: a reversed one begins at its end, on whichever
    rank that is."""
    if mask is not None:
        raise ConfigError(
            "Padded sequences cannot be read backwards where they are split over ranks (context parallel). Pack them "
            "(loader.pack: true), or let all have one length."
        )
