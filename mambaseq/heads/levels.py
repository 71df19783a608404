"""Predicts ids in order, such as 16-bit samples, in two steps: a coarse part, then the fine part given the coarse one
(after Kalchbrenner et al., "Efficient Neural Audio Synthesis", arXiv:1802.08435, section 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive
from mambaseq.heads.base import Head, Kind, check_targets
from mambaseq.limits import TOKEN_IDS
from mambaseq.ops.embedding import Embedding


def level_sizes(vocab_size: int, fine: int, where: str) -> int:
    """How many coarse parts ids have. where: the part of a configuration, for messages. Raises ConfigError unless
    `fine` divides the number of ids, UserError for more of them than `limits.TOKEN_IDS`."""
    check_positive(where, vocab_size=vocab_size, fine=fine)
    if vocab_size % fine:
        raise ConfigError(f"{where}.fine must divide the number of ids, {vocab_size:,}; it is {fine:,}.")
    TOKEN_IDS.check(vocab_size, f"{where} (vocab_size)")
    return vocab_size // fine


class LevelsHead(Head):
    """p(id | past) = p(coarse | past) p(fine | past, coarse), with coarse = id // fine and fine = id % fine. Nothing is
    approximated: any distribution over ids can be written so, and the loss is the negative log likelihood of an id.
    65,536 ids take two outputs of 256.

    The second step sees the past and the coarse part through one hidden layer.

    Args:
        d_model: width of the backbone's output.
        vocab_size: number of ids.
        fine: ids that share a coarse part.
        width: of the hidden layer; null for d_model.
    """

    per_token: ClassVar[bool] = True
    learns: ClassVar[Kind | None] = "labels"
    continues: ClassVar[Literal["tokens", "values", ""] | None] = "tokens"
    position_wise: ClassVar[bool] = True

    def __init__(self, d_model: int, vocab_size: int, fine: int = 256, width: int | None = None) -> None:
        super().__init__()
        coarse, width = level_sizes(vocab_size, fine, "model.head"), width or d_model
        check_positive("The levels head", d_model=d_model, width=width)
        self.n_coarse, self.n_fine, self.n_labels = coarse, fine, vocab_size
        self.coarse = nn.Linear(d_model, coarse, bias=False)
        self.inner = nn.Linear(d_model, width)
        self.given = Embedding(coarse, width)
        self.fine = nn.Linear(width, fine, bias=False)
        for layer in (self.coarse, self.fine):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.normal_(self.given.weight, std=0.5)  # of the size of what it is added to

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden `(batch, length, d_model)`, labels `(batch, length)` int64 already shifted, -100 where there is
        nothing to predict. Returns (loss, logits): the mean loss in nats an id or None, and the log probabilities of
        all ids, `(batch, length, vocab_size)` fp32, or None; they cost far more than the loss. Raises ConfigError for
        labels that are not one int64 for each position."""
        loss = None
        if labels is not None:
            check_targets(self, labels, tuple(hidden.shape[:2]))
            loss = self.losses(hidden, labels).sum() / (labels != -100).sum().clamp(min=1)
        return loss, self._joint(hidden) if return_logits else None

    def _joint(self, hidden: Tensor) -> Tensor:
        coarse = self.coarse(hidden).float().log_softmax(-1)
        fine = self._fine(self.inner(hidden)[..., None, :], self.given.weight).log_softmax(-1)
        return (coarse[..., None] + fine).flatten(-2)

    def _fine(self, inner: Tensor, given: Tensor) -> Tensor:
        return self.fine(F.silu(inner + given)).float()

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """See `Head.losses`."""
        ids, unknown = labels.clamp(min=0), labels == -100
        coarse, fine = ids // self.n_fine, ids % self.n_fine
        logits = self.coarse(hidden).float(), self._fine(self.inner(hidden), self.given(coarse))
        nats = [
            F.cross_entropy(one.transpose(1, 2), part.masked_fill(unknown, -100), reduction="none")
            for one, part in zip(logits, (coarse, fine), strict=True)
        ]
        return nats[0] + nats[1]

    def told(self, hidden: Tensor) -> Tensor:
        """The coarse logits, and what the fine ones are made of: `(batch, length, coarse + width)` fp32."""
        return torch.cat([self.coarse(hidden).float(), self.inner(hidden).float()], -1)

    def draw(self, told: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Head.draw`; the coarse part is picked first."""
        coarse = pick(told[..., : self.n_coarse])
        inner = told[..., self.n_coarse :].to(self.fine.weight.dtype)
        return coarse * self.n_fine + pick(self._fine(inner, self.given(coarse)))
