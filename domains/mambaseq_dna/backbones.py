"""A backbone that reads codons: each step of its layers is three bases, and each base has an answer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mambaseq.backbones.bidirectional import BidirectionalStack
from mambaseq.backbones.graphed import CudaGraph
from mambaseq.backbones.patterns import MakeMixer
from mambaseq.backbones.stateless import StatelessBackbone
from mambaseq.encoders import output_bounds
from mambaseq.errors import ConfigError
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.norm import RMSNorm
from mambaseq.ops import sequences
from mambaseq.ops.chunks import padded


class CodonStack(StatelessBackbone):
    """Layers that read both ways over groups of bases, three by default: `(batch, length, d_model)` to the same.

    The vectors of a group are joined by a linear map into one, the layers run over the groups, and another linear map
    gives every base of a group its own output, which is added to its input. So a base's place in a reading frame is
    known, the layers have a third of the positions, and there is still one output a base. Groups begin at a sequence's
    first base; the last one is filled up with zeros. There is no state, so nothing can be generated or continued.

    Args:
        make_mixer: makes the mixer of layer i (see `MakeMixer`).
        n_layers: number of layers; MLPs come on top.
        group: bases that are read as one.
        shared: both directions of a layer have one mixer.
        pattern: names of mixers, repeated over the layers: `[mamba, mamba, attention*]` (see `ResidualStack`).
        mlp: follow each mixer by a residual layer of the `mlp` mixer; None: as the mixer's class says (see
            `ResidualStack`).
        norm_eps: epsilon of the RMSNorms.
        dropout: probability with which a layer's contribution is dropped, element by element, in training.
        checkpoint: recompute each layer's activations in the backward pass instead of keeping them.
        cuda_graph: replay training steps as CUDA graphs, except packed and padded batches (see `ResidualStack`).
    """

    called: ClassVar[str] = "dna/codons"
    takes_mask: ClassVar[bool] = True

    def __init__(
        self,
        make_mixer: MakeMixer,
        n_layers: int = 4,
        group: int = 3,
        shared: bool = False,
        pattern: list[str] | None = None,
        mlp: bool | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        checkpoint: bool = False,
        cuda_graph: CudaGraph = "auto",
    ) -> None:
        super().__init__()
        if not 1 <= group <= 64:
            raise ConfigError(f"model.backbone.group must be from 1 to 64, not {group}.")
        self.group = group
        self.stack = BidirectionalStack(
            make_mixer,
            n_layers=n_layers,
            shared=shared,
            pattern=pattern,
            mlp=mlp,
            norm_eps=norm_eps,
            dropout=dropout,
            checkpoint=checkpoint,
            cuda_graph=cuda_graph,
        )
        self.d_model = self.stack.d_model
        self.join = nn.Linear(group * self.d_model, self.d_model, bias=False)
        self.part = nn.Linear(self.d_model, group * self.d_model, bias=False)
        self.norm_f = RMSNorm(self.d_model, norm_eps)

    def mixers(self) -> list[Mixer]:
        """The mixers of the layers over groups."""
        return self.stack.mixers()

    def forward(
        self,
        x: Tensor,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x `(batch, length, d_model)` to the same. mask: `(batch, length)` bool, of real positions; no other position
        sees the padding on the right. For packed sequences the host waits for the number of groups.

        Raises ConfigError if a state is given or wanted.
        """
        self.refuse_states(state, return_state)
        batch, length, d_model = x.shape
        if cu_seqlens is None:
            real = x if mask is None else x * mask[..., None]
            groups = padded(real, 1, length + -length % self.group).reshape(batch, -1, self.group * d_model)
            padding = {} if mask is None else {"mask": mask[:, :: self.group]}
            y = self.part(self.stack(self.join(groups), **padding))
            y = y.reshape(batch, -1, d_model)[:, :length]
        else:
            place, bounds = self._places(cu_seqlens, length)
            slots = x.new_zeros(int(bounds[-1]) * self.group, d_model).index_copy(0, place, x[0])
            y = self.stack(self.join(slots.reshape(1, -1, self.group * d_model)), cu_seqlens=bounds)
            y = self.part(y).reshape(-1, d_model)[place][None]
        y, _ = self.norm_f(y, x.float())
        return y

    def _places(self, cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """`(length,)` where each base of packed sequences stands among the groups' bases, and the bounds of the
        sequences in groups."""
        sequences.check(cu_seqlens, 1, length)
        bounds = output_bounds(cu_seqlens, self.group)
        shift = bounds[:-1].long() * self.group - cu_seqlens[:-1].long()
        positions = torch.arange(length, device=cu_seqlens.device)
        return positions + shift[sequences.of_positions(cu_seqlens, length)], bounds
