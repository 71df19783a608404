"""Next-token prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.ops.linear import apply_linear

# tokens x vocabulary above which the loss is taken in chunks: 2^24 fp32 logits are 64 MiB
CHUNK_ELEMENTS = 1 << 24


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=-100, reduction="sum")


class LMHead(nn.Module):
    """Linear map to the vocabulary, and cross-entropy over the labels that are not -100.

    The weight may be the embedding's own (tied): `SequenceModel` does this by assigning it.

    Args:
        d_model: width of the backbone's output.
        vocab_size: number of token ids.
    """

    per_token = True

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.linear.weight, std=0.02)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(batch, length)` int64 already shifted, -100 where nothing is to
        be predicted. Returns (loss, logits): the mean loss in nats a label or None, and logits `(batch, length,
        vocab_size)` fp32 or None. Without `return_logits` large losses are taken in chunks, so that the logits of
        a whole batch never exist."""
        if return_logits:
            logits = apply_linear(self.linear, hidden[:, 0])[:, None] if hidden.shape[1] == 1 else self.linear(hidden)
            logits = logits.float()
            if labels is None:
                return None, logits
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            return total / (labels != -100).sum().clamp(min=1), logits
        if labels is None:
            return None, None
        return self._chunked(hidden.flatten(0, 1), labels.flatten()), None

    def _chunked(self, hidden: Tensor, labels: Tensor) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // self.linear.out_features)
        if len(labels) <= rows:
            total = _chunk_loss(hidden, self.linear.weight, labels)
        else:
            total = hidden.new_zeros((), dtype=torch.float32)
            for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
                total = total + torch.utils.checkpoint.checkpoint(
                    _chunk_loss, h, self.linear.weight, y, use_reentrant=False
                )
        return total / (labels != -100).sum().clamp(min=1)
