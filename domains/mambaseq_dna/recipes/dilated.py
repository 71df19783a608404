"""A convolutional network to compare with: residual blocks of dilated convolutions, an answer a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.backbones.stateless import StatelessBackbone
from mambaseq.heads.positions import TokenClassificationHead
from mambaseq.mixers.base import Mixer
from mambaseq.models import SequenceModel

KERNEL = 5


class _Block(nn.Module):
    """x + out(gelu(dilated(norm(x)))), over `(batch, d_model, length)`."""

    def __init__(self, d_model: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, d_model)
        self.dilated = nn.Conv1d(
            d_model, d_model, KERNEL, padding=dilation * (KERNEL // 2), dilation=dilation, bias=False
        )
        self.out = nn.Conv1d(d_model, d_model, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.out(F.gelu(self.dilated(self.norm(x)))))


class DilatedStack(StatelessBackbone):
    """`(batch, length, d_model)` to the same, for rows of one length. A position sees the sum of all dilations, times
    two, to either side."""

    called: ClassVar[str] = "convolutional"

    def __init__(self, d_model: int, dilations: Sequence[int], dropout: float = 0.1) -> None:
        super().__init__(cuda_graph=False)
        self.d_model = d_model
        self.blocks = nn.Sequential(*(_Block(d_model, dilation, dropout) for dilation in dilations))
        self.norm = nn.GroupNorm(1, d_model)

    def mixers(self) -> list[Mixer]:
        return []

    def forward(
        self, x: Tensor, state: list[Any] | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Tensor:
        self.refuse_states(state, return_state or cu_seqlens is not None)
        return self.norm(self.blocks(x.transpose(1, 2))).transpose(1, 2)


def dilated_cnn(encoder: nn.Module, n_classes: int, d_model: int, dilations: Sequence[int]) -> SequenceModel:
    """An encoder, dilated convolutions, and a class a base."""
    return SequenceModel(encoder, DilatedStack(d_model, dilations), TokenClassificationHead(d_model, n_classes))
