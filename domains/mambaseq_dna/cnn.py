"""A small convolutional network: the baseline that beats state-space models on many short tasks (arXiv:2502.18538)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.models import ModelOutput


class SmallCNN(nn.Module):
    """Two convolutions with pooling over one-hot bases, the largest of each feature over positions, and two linear
    layers, as DanQ's and DeepSEA's first halves.

    Args:
        n_classes: number of labels.
        width: channels of the first convolution; the second has as many.
        vocab_size: number of token ids.
        positions: length of the windows, if a feature's place matters: the pooled features of 8 equal parts of the
            window are then read apart; 0 reads the largest over the whole window.
    """

    def __init__(self, n_classes: int, width: int = 128, vocab_size: int = 6, positions: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.parts = vocab_size, 8 if positions else 1
        self.first = nn.Conv1d(vocab_size, width, 15, padding=7)
        self.second = nn.Conv1d(width, width, 7, padding=3)
        self.hidden = nn.Linear(width * self.parts, 64)
        self.out = nn.Linear(64, n_classes)
        self.dropout = nn.Dropout(0.3)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> ModelOutput:
        """inputs `(batch, length)` int64, labels `(batch,)` int64; loss and logits `(batch, n_classes)` fp32."""
        x = (inputs[..., None] == torch.arange(self.vocab_size, device=inputs.device)).transpose(1, 2)
        x = self.dropout(F.gelu(self.first(x.to(self.first.weight.dtype))))  # (batch, width, length)
        x = F.gelu(self.second(F.max_pool1d(x, 3)))  # (batch, width, length // 3)
        x = F.adaptive_max_pool1d(x.float(), self.parts).flatten(1)  # (batch, width * parts)
        logits = self.out(self.dropout(F.gelu(self.hidden(self.dropout(x))))).float()
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ModelOutput(loss, logits)

    def n_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())
