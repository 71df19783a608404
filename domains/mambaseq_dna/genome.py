"""Pretraining on genomes: predicting the next base, or masked bases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.intervals import Group
from mambaseq.data.masking import MaskedItems, MaskRule, Objective, same_tokens
from mambaseq.data.windows import next_token
from mambaseq.errors import DataError
from mambaseq_dna.base import FastaData, Names
from mambaseq_dna.files.fasta import Lowercase
from mambaseq_dna.species import SHIPPED, SHIPPED_TEST
from mambaseq_dna.split_intervals import Extend
from mambaseq_dna.tokenizer import BaseTokenizer, N, fold_case, is_lowercase

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class _NextBase:
    """Tokens of a window → inputs and next bases; -100 for N, and for lower case that is not scored."""

    lowercase: Lowercase
    augment: bool

    def __call__(self, tokens: np.ndarray, group: int, rng: np.random.Generator) -> Batch:
        if self.augment and rng.random() < 0.5:
            tokens = BaseTokenizer("keep").reverse_complement(tokens)
        batch = next_token(tokens if self.lowercase == "keep" else fold_case(tokens), group, rng)
        assert batch.targets is not None
        batch.targets = batch.targets.masked_fill(torch.from_numpy(_unscored(tokens[1:], self.lowercase)), -100)
        return batch


@dataclasses.dataclass(frozen=True)
class _Bases:
    """Tokens of a window → equal inputs and targets; -100 for N, and for lower case that is not scored."""

    lowercase: Lowercase
    augment: bool

    def __call__(self, tokens: np.ndarray, group: int, rng: np.random.Generator) -> Batch:
        if self.augment and rng.random() < 0.5:
            tokens = BaseTokenizer("keep").reverse_complement(tokens)
        batch = same_tokens(tokens if self.lowercase == "keep" else fold_case(tokens), group, rng)
        assert batch.targets is not None
        batch.targets = batch.targets.masked_fill(torch.from_numpy(_unscored(tokens, self.lowercase)), -100)
        return batch


def _unscored(tokens: np.ndarray, lowercase: Lowercase) -> np.ndarray:
    """Tokens of a store that are never a target; bool."""
    unscored = fold_case(tokens) == N
    return unscored | is_lowercase(tokens) if lowercase == "unscored" else unscored


def _any_scored(groups: Sequence[Group]) -> bool:
    """Whether a base is in upper case."""
    for group in groups:
        for interval in group.intervals:
            ids = interval.store[interval.record]
            for start in range(interval.start, interval.stop, _CHUNK):
                if (ids[start : min(start + _CHUNK, interval.stop)] < N).any():  # nearly always at once
                    return True
    return False


class GenomeData(FastaData):
    """Next-base or masked-base modelling of FASTA files. The metric `bits_per_token` is bits per base.

    Training windows are uniform over positions, so a record counts by its length. Validation and test windows are
    tiles: every base of the region except the first of a stretch is predicted at most once.

    Args:
        fasta: FASTA files (paths, patterns, `fetched:` or `mambaseq:` names). The default is the human ENCODE regions
            that ship with the project.
        test_records: patterns for the names of the records or files that are test data.
        intervals: a BED file whose fourth column says what each interval is for: train, valid or test (the layout of
            Basenji, Enformer and HyenaDNA). Instead of names of records.
        extend: what windows may read beside these intervals. `none`: nothing; intervals of a split that overlap or
            adjoin are one stretch. `within`: the bases between two intervals of one split, too, and up to the ends of
            a sequence. `hyenadna`, `mamba`: as published: windows that are longer than an interval read on into
            whatever is there, other splits too (`mambaseq dna/split-leak` counts what that shows of the test data);
            then N stays in windows.
        lowercase: soft-masked bases are read as upper case (`fold`), have ids of their own (`keep`), or are read as
            upper case and never a target (`unscored`). N is never a target.
        objective: `next_token`, or `masked`: bases are hidden and predicted from both sides, by a backbone that reads
            both ways. The vocabulary then has one more id, the last: the mask token.
        mask_share: share of the bases of a window that are hidden and predicted.
        mask_span: bases that are hidden together.
        mask_replaced: share of those spans that become the mask token.
        mask_random: share of those spans that become random bases; the rest stays as it is.
        options: see `FastaData`.
    """

    def __init__(
        self,
        fasta: list[str] | str | None = None,
        test_records: Names = None,
        intervals: str | None = None,
        extend: Extend = "none",
        lowercase: Lowercase = "fold",
        objective: Objective = "next_token",
        mask_share: float = 0.15,
        mask_span: int = 1,
        mask_replaced: float = 0.8,
        mask_random: float = 0.1,
        **options: Any,
    ) -> None:
        if fasta is None:
            fasta = SHIPPED["human"]
            if test_records is None and intervals is None:
                test_records = SHIPPED_TEST
        super().__init__(
            files={"genome": [fasta] if isinstance(fasta, str) else fasta}, test_records=test_records, **options
        )
        self.lowercase = lowercase
        self.tokenizer = BaseTokenizer("keep" if lowercase == "keep" else "fold")
        rule = MaskRule(mask_share, mask_span, mask_replaced, mask_random)  # checked even where it is not used
        self.rule = rule if objective == "masked" else None
        self.vocab_size = self.tokenizer.vocab_size + (self.rule is not None)
        self.task = objective
        span = self.length + (self.rule is None)
        self.rules = dataclasses.replace(self.rules, intervals=intervals, extend=extend, span=span)

    def setup(self) -> None:
        """As `FastaData.setup`. Raises DataError too if `lowercase: unscored` leaves nothing to learn."""
        super().setup()
        assert self._splits is not None
        if self.lowercase == "unscored" and not _any_scored(self._splits.train):
            raise DataError(
                "All training data are in lower case, of which data.lowercase: unscored makes no target, so there is "
                "nothing to learn. Set data.lowercase to fold, or give a genome whose repeats alone are in lower case."
            )

    @property
    def complement(self) -> list[int]:  # type: ignore[override]
        """The id of each base's partner; the mask token is its own."""
        return [*super().complement, *range(self.tokenizer.vocab_size, self.vocab_size or 0)]

    def _masked(self, windows: Any) -> MaskedItems | None:
        if windows is None or self.rule is None:
            return None
        bases = [i for i in range(self.tokenizer.vocab_size) if fold_case(np.array([i]))[0] != N]
        return MaskedItems(windows, self.rule, self.tokenizer.vocab_size, seed=self.seed, random_ids=bases)

    def train(self) -> Any:
        if self.rule is not None:
            return self._masked(
                self._random(self.length, _Bases(self.lowercase, self.reverse_complement), by_position=True)
            )
        return self._random(self.length + 1, _NextBase(self.lowercase, self.reverse_complement), by_position=True)

    def _held_out(self, split: str) -> Any:
        if self.rule is not None:
            return self._masked(self._tiles(split, self.length, _Bases(self.lowercase, augment=False)))
        return self._tiles(split, self.length + 1, _NextBase(self.lowercase, augment=False))

    def validation(self) -> Any:
        return self._held_out("validation")

    def test(self) -> Any:
        return self._held_out("test")

    def reader_options(self) -> dict[str, Any]:
        return {"lowercase": self.lowercase}
