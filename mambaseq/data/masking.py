"""Masked modelling: tokens of a sequence are hidden, and predicted from both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError, DataError

Objective = Literal["next_token", "masked"]
"""What a dataset of tokens asks for: the token after each position, or the masked tokens."""

_STREAM = 0x6D61736B  # masks are drawn independently of the windows


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """Which tokens are hidden, and how.

    share: share of a sequence's positions that are masked, above 0 and below 1; at least one span is.
    span: tokens that are masked together. All placements of spans without overlap are equally likely.
    replaced, random: shares of the spans whose tokens become the mask token, or random tokens; the others stay as they
        are (BERT's rule, Devlin et al., arXiv:1810.04805).

    Raises ConfigError for values out of range.
    """

    share: float = 0.15
    span: int = 1
    replaced: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"data.mask_share must be above 0 and below 1, not {self.share}.")
        if not 1 <= self.span < 2**31:
            raise ConfigError(f"data.mask_span must be at least 1 and below 2^31, not {self.span}.")
        if not (self.replaced >= 0 and self.random >= 0 and self.replaced + self.random <= 1):
            raise ConfigError(
                f"data.mask_replaced and data.mask_random must be shares with a sum of at most 1, not {self.replaced} "
                f"and {self.random}."
            )

    def draw(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Spans of a sequence: positions `(spans, span)` int64, ascending, and what becomes of each, `(spans,)` int64:
        0 the mask token, 1 random tokens, 2 unchanged."""
        span = min(self.span, length)
        count = max(1, min(round(self.share * length / span), length // span))
        # as many of the starts that remain when each span shrinks to one position
        starts = np.sort(rng.choice(length - count * (span - 1), count, replace=False)) + np.arange(count) * (span - 1)
        kinds = np.searchsorted([self.replaced, self.replaced + self.random], rng.random(count), side="right")
        return starts[:, None] + np.arange(span), kinds


class MaskedItems:
    """The items of a dataset of tokens with some tokens masked. The mask of item i depends only on (seed, i), so a run
    resumes exactly.

    items: batches of one. Their `targets`, if any, are the tokens themselves (not shifted), or -100 where one is never
        a target; such a token may still be masked.
    mask_id: the id of the mask token, the last of the vocabulary.
    random_ids: ids of random tokens; all below `mask_id` if not given.
    units: gives, by the item's index, the units of raw data behind each of its tokens, `(length,)` (see
        `Batch.n_units`).
    """

    def __init__(
        self,
        items: Any,
        rule: MaskRule,
        mask_id: int,
        *,
        seed: int = 0,
        random_ids: Sequence[int] | None = None,
        units: Callable[[int], np.ndarray | None] | None = None,
    ) -> None:
        self.items, self.rule, self.mask_id, self.seed, self.units = items, rule, mask_id, seed, units
        self.random_ids = np.arange(mask_id) if random_ids is None else np.asarray(random_ids, dtype=np.int64)
        self.endless = bool(getattr(items, "endless", False))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:
        """Raises DataError for an item that is not a sequence of tokens, or is empty."""
        item: Batch = self.items[index]
        if item.inputs.is_floating_point() or item.inputs.dim() != 2 or not item.inputs.numel():
            raise DataError(
                f"Only tokens can be masked, but item {index} has inputs {tuple(item.inputs.shape)} of "
                f"{item.inputs.dtype}."
            )
        length = item.inputs.shape[1] if item.mask is None else max(int(item.mask.sum()), 1)
        rng = np.random.default_rng((self.seed, index, _STREAM))
        places, kinds = self.rule.draw(length, rng)
        inputs = item.inputs[0].numpy().copy()
        tokens = inputs if item.targets is None else item.targets[0].numpy()
        targets = np.full(len(inputs), -100, dtype=np.int64)
        targets[places] = tokens[places]
        inputs[places[kinds == 0]] = self.mask_id
        random = places[kinds == 1]
        inputs[random] = rng.choice(self.random_ids, random.shape)
        behind = None if self.units is None else self.units(index)
        n_units = None if behind is None else torch.tensor([int(behind[targets != -100].sum(dtype=np.int64))])
        return dataclasses.replace(
            item, inputs=torch.from_numpy(inputs)[None], targets=torch.from_numpy(targets)[None], n_units=n_units
        )


def same_tokens(tokens: np.ndarray, group: int, rng: np.random.Generator) -> Batch:
    """`(length,)` tokens → inputs and equal targets, `(1, length)` int64 each, as `MaskedItems` takes them."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    return Batch(inputs=ids, targets=ids)
