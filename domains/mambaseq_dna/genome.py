"""Which base comes next? Pretraining on genomes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.data.windows import GridWindows, RandomWindows, next_token
from mambaseq_dna.base import FastaData, Names
from mambaseq_dna.fasta import Lowercase
from mambaseq_dna.species import SHIPPED, SHIPPED_TEST
from mambaseq_dna.tokenizer import BaseTokenizer, N, fold_case, is_lowercase


@dataclasses.dataclass(frozen=True)
class _NextBase:
    """Tokens of a window → inputs and next bases; -100 where that is N, or lower case and not scored."""

    lowercase: Lowercase
    augment: bool

    def __call__(self, tokens: np.ndarray, group: int, rng: np.random.Generator) -> Batch:
        if self.augment and rng.random() < 0.5:
            tokens = BaseTokenizer("keep").reverse_complement(tokens)
        batch = next_token(tokens if self.lowercase == "keep" else fold_case(tokens), group, rng)
        unscored = fold_case(tokens[1:]) == N
        if self.lowercase == "unscored":
            unscored |= is_lowercase(tokens[1:])
        assert batch.targets is not None
        batch.targets = batch.targets.masked_fill(torch.from_numpy(unscored), -100)
        return batch


class GenomeData(FastaData):
    """Next-base modelling of FASTA files. Bits per base is the metric `bits_per_token`.

    Training windows are drawn uniformly over positions, so that a record counts by its length. Validation and
    test windows are tiles: every base of the region but the first of a stretch is predicted at most once.

    Args:
        fasta: FASTA files (paths, patterns, `fetched:` or `mambaseq:` names). The default is the human ENCODE
            regions that ship with the project.
        test_records: patterns for the names of the records or files that are test data.
        lowercase: soft-masked bases are read as upper case (`fold`), have ids of their own (`keep`), or are
            read as upper case and never a target (`unscored`). N is never a target.
        options: see `FastaData`.
    """

    def __init__(
        self,
        fasta: list[str] | str | None = None,
        test_records: Names = None,
        lowercase: Lowercase = "fold",
        **options: Any,
    ) -> None:
        if fasta is None:
            fasta = SHIPPED["human"]
            if test_records is None:
                test_records = SHIPPED_TEST
        super().__init__(
            files={"genome": [fasta] if isinstance(fasta, str) else fasta}, test_records=test_records, **options
        )
        self.lowercase = lowercase
        self.tokenizer = BaseTokenizer("keep" if lowercase == "keep" else "fold")
        self.vocab_size = self.tokenizer.vocab_size

    def train(self) -> RandomWindows:
        return self._random(self.length + 1, _NextBase(self.lowercase, self.reverse_complement), by_position=True)

    def validation(self) -> GridWindows | None:
        return self._tiles("validation", self.length + 1, _NextBase(self.lowercase, augment=False))

    def test(self) -> GridWindows | None:
        return self._tiles("test", self.length + 1, _NextBase(self.lowercase, augment=False))

    def reader_options(self) -> dict[str, Any]:
        return {"lowercase": self.lowercase}
