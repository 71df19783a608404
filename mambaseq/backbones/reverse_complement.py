"""A backbone that treats the two strands of DNA alike.

Schiff et al., "Caduceus: Bi-Directional Equivariant Long-Range DNA Sequence Modeling", arXiv:2403.03234, section 3.2,
the parameter-sharing model (Caduceus-PS): one half of the channels reads the sequence, the other its reverse
complement, with the same weights, and nothing passes between them. For any weights, the model's output for the other
strand is then its output for this one, reversed. Encoder and head must take part (`rc_tokens`, `rc_lm`,
`rc_classification`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mambaseq import parallel
from mambaseq.backbones.base import Backbone
from mambaseq.backbones.bidirectional import BidirectionalStack, Combine, refuse_padding, reverse
from mambaseq.backbones.graphed import CudaGraph
from mambaseq.backbones.patterns import MakeMixer
from mambaseq.backbones.residual import ResidualStack
from mambaseq.backbones.stateless import StatelessBackbone
from mambaseq.errors import ConfigError
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.norm import NormName
from mambaseq.ops import sequences


class ReverseComplementStack(StatelessBackbone):
    """One stack over both strands, `(batch, length, 2 * d_model)` to the same.

    The first d_model channels of a position belong to its base, the others to the paired base. The second strand is
    read backwards, as strands run, and its output is returned at the positions of the first. A packed sequence is
    reversed within its own bounds, a padded one within its mask. The whole model is not causal, even with causal
    layers, and has no state.

    Args:
        make_mixer: makes the mixer of layer i (see `MakeMixer`).
        n_layers: number of layers; MLPs come on top.
        bidirectional: layers read each strand both ways (see `BidirectionalStack`); false: only in its own direction.
        shared: both directions of a bidirectional layer have one mixer.
        tie_projections: both directions of a bidirectional layer have one in_proj and one out_proj.
        combine: what a bidirectional layer makes of its two directions (see `BidirectionalStack`).
        pattern: names of mixers, repeated over the layers: `[mamba, mamba, attention*]` (see `ResidualStack`).
        mlp: follow each mixer by a residual layer of the `mlp` mixer; None: as the mixer's class says (see
            `ResidualStack`).
        norm: the norms, rms (RMSNorm) or layer (LayerNorm with a bias).
        norm_eps: epsilon of the norms.
        dropout: probability with which a layer's contribution is dropped, element by element, in training.
        checkpoint: recompute each layer's activations in the backward pass instead of keeping them.
        cuda_graph: replay training steps as CUDA graphs, except packed and padded batches (see `ResidualStack`).
        context_parallel: how many processes share every training sequence (see `BidirectionalStack`).
    """

    called: ClassVar[str] = "reverse_complement"
    takes_mask: ClassVar[bool] = True
    splits_time: ClassVar[bool] = True
    strands: ClassVar[int] = 2

    def __init__(
        self,
        make_mixer: MakeMixer,
        n_layers: int = 4,
        bidirectional: bool = True,
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
        super().__init__(context_parallel=context_parallel)
        options: dict[str, Any] = {
            "n_layers": n_layers,
            "pattern": pattern,
            "mlp": mlp,
            "norm": norm,
            "norm_eps": norm_eps,
            "dropout": dropout,
            "checkpoint": checkpoint,
            "cuda_graph": cuda_graph,
        }
        self.stack: Backbone
        if bidirectional:
            self.stack = BidirectionalStack(
                make_mixer, shared=shared, tie_projections=tie_projections, combine=combine, **options
            )
        else:
            if tie_projections or combine != "add":
                raise ConfigError(
                    "tie_projections and combine are for layers that read both ways (bidirectional: true)."
                )
            self.stack = ResidualStack(make_mixer, **options)
        self.d_model = self.stack.d_model

    def mixers(self) -> list[Mixer]:
        """The mixers of the one stack."""
        return self.stack.mixers()

    def check_splits_time(self) -> None:
        """See `Backbone.check_splits_time`."""
        super().check_splits_time()
        if not isinstance(self.stack, BidirectionalStack):
            raise ConfigError(
                "The backbone reverse_complement with bidirectional: false needs whole sequences, so these cannot be "
                "split over ranks (context parallel). Use bidirectional: true, or one rank."
            )

    def forward(
        self,
        x: Tensor,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x `(batch, length, 2 * d_model)` to the same. mask: `(batch, length)` bool, of real positions.

        Raises ConfigError if a state is given or wanted.
        """
        self.refuse_states(state, return_state)
        this, other = x.chunk(2, dim=-1)
        if (part := parallel.current()) is not None and part.context.size > 1:
            self.check_part(part, x, cu_seqlens)
            refuse_padding(mask)
            order = sequences.reversal(x.shape[0], x.shape[1], cu_seqlens)
            assert isinstance(self.stack, BidirectionalStack)  # by check_splits_time
            this, other = self.stack.over_part([this, reverse(other, order)], part, order, cu_seqlens)
            return torch.cat([this, reverse(other, order)], dim=-1)  # (batch, length, 2 d_model)
        order = sequences.reversal(x.shape[0], x.shape[1], cu_seqlens, mask)
        # the strands are separate sequences: more rows of a batch, or more sequences of a packed row
        dim = 0 if cu_seqlens is None else 1
        # (2 batch, length, d_model), or packed (1, 2 length, d_model)
        both = torch.cat([this, reverse(other, order)], dim)
        if cu_seqlens is not None:
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[1:] + cu_seqlens[-1]])  # (2 sequences + 1,)
        # (2 batch, length)
        options = {"mask": torch.cat([mask, mask])} if mask is not None and self.stack.takes_mask else {}
        this, other = self.stack(both, cu_seqlens=cu_seqlens, **options).chunk(2, dim)
        return torch.cat([this, reverse(other, order)], dim=-1)  # (batch, length, 2 d_model)
