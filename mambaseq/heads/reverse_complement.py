"""Heads over both strands of DNA (see `backbones/reverse_complement.py`): their predictions do not depend on which of
the two was given. Schiff et al., arXiv:2403.03234, sections 3.2 and 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mambaseq.errors import ConfigError, cut_list
from mambaseq.heads.base import Pool, check_targets, pool
from mambaseq.heads.classification import ClassificationHead
from mambaseq.heads.lm import LMHead
from mambaseq.heads.losses import label_loss


def complement_table(complement: Sequence[int], vocab_size: int) -> Tensor:
    """`(vocab_size,)` int64: the id that each id is paired with. Raises ConfigError for anything but a pairing of the
    vocabulary's ids."""
    ids = list(complement)
    if (
        len(ids) != vocab_size
        or sorted(ids) != list(range(vocab_size))
        or any(ids[ids[i]] != i for i in range(vocab_size))
    ):
        raise ConfigError(
            f"complement must name the partner of each of the {vocab_size} ids (vocab_size), one that has it as "
            f"its own partner, not {cut_list(ids)}."
        )
    return torch.tensor(ids)


class RCLMHead(LMHead):
    """Logits of each base: the sum of the base's logits from one strand and its complement's from the other.

    The logits of the reverse complement are those of the sequence, reversed, with complementary bases exchanged.

    Args:
        d_model: width of one strand.
        vocab_size: number of token ids.
        complement: the id that each id is paired with.
    """

    strands: ClassVar[int] = 2

    def __init__(self, d_model: int, vocab_size: int, complement: list[int]) -> None:
        super().__init__(d_model, vocab_size)
        self.complement: Tensor
        self.register_buffer("complement", complement_table(complement, vocab_size), persistent=False)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, 2 * d_model)`; see `LMHead.forward`. Logits are computed even if only the loss is
        needed: vocabularies with complements are small."""
        if labels is not None:
            check_targets(self, labels, tuple(hidden.shape[:2]))
        elif not return_logits:
            return None, None
        this, other = hidden.chunk(2, dim=-1)
        logits = self.linear(this).float() + self.linear(other).float()[..., self.complement]
        loss = None if labels is None else label_loss(logits, labels)
        return loss, logits if return_logits else None


class RCClassificationHead(ClassificationHead):
    """Classes from the mean of both strands' pooled vectors, which is the same for the reverse complement.

    Its arguments are those of `ClassificationHead`; d_model is the width of one strand, and "last" is the last position
    of each strand in reading order.
    """

    strands: ClassVar[int] = 2

    def _pool(self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        this, other = hidden.chunk(2, dim=-1)
        how: Pool = "first" if self.pooling == "last" else self.pooling
        return (pool(this, self.pooling, mask, cu_seqlens) + pool(other, how, mask, cu_seqlens)) / 2
