"""Classification of DNA windows by species."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mambaseq.batch import Batch
from mambaseq.data.baselines import Baseline
from mambaseq.data.windows import GridWindows, RandomWindows, group_label
from mambaseq.errors import ConfigError
from mambaseq_dna.base import FastaData, Names
from mambaseq_dna.tokenizer import BaseTokenizer, fold_case

SHIPPED: dict[str, list[str] | str] = {
    name: [f"mambaseq:data/encode/{name}.*.fa.gz"] for name in ("human", "galago", "mouse", "cow", "dog")
}
SHIPPED_TEST: Names = ["*.ENm002.fa.gz"]


@dataclasses.dataclass(frozen=True)
class _LabelledWindow:
    """Tokens of a window → ids in upper case, possibly of the other strand, and the species as the label."""

    tokenizer: BaseTokenizer
    augment: bool

    def __call__(self, tokens: np.ndarray, group: int, rng: np.random.Generator) -> Batch:
        ids = fold_case(tokens)
        if self.augment and rng.random() < 0.5:
            ids = self.tokenizer.reverse_complement(ids)
        return group_label(ids, group, rng)


class SpeciesData(FastaData):
    """Windows of genomes, labelled with their species.

    Training windows are drawn uniformly over species, then over records, then over positions. Validation and test
    windows are tiles without overlap, the same at every call, and equally many for each species. Case is folded and N
    left out, because masking and gaps differ between genomes and would reveal the label.

    Args:
        species: name of each species to its FASTA files (paths, patterns, `fetched:` or `mambaseq:` names). The default
            is the five mammals of the ENCODE regions that ship with the project.
        test_records: patterns for the names of the records or files that are test data.
        options: see `FastaData`.
    """

    def __init__(
        self,
        species: dict[str, list[str] | str] | None = None,
        test_records: Names = None,
        **options: Any,
    ) -> None:
        if species is None:
            species = SHIPPED
            if test_records is None:
                test_records = SHIPPED_TEST
        if len(species) < 2:
            raise ConfigError(f"Classification needs two species or more; data.species names {len(species)}.")
        files = {name: [of] if isinstance(of, str) else of for name, of in species.items()}
        super().__init__(files=files, test_records=test_records, **options)
        self.tokenizer = BaseTokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        self.class_names = list(species)

    def train(self) -> RandomWindows:
        make = _LabelledWindow(self.tokenizer, self.reverse_complement)
        return self._random(self.length, make, by_position=False)

    def validation(self) -> GridWindows | None:
        return self._tiles("validation", self.length, _LabelledWindow(self.tokenizer, augment=False))

    def test(self) -> GridWindows | None:
        return self._tiles("test", self.length, _LabelledWindow(self.tokenizer, augment=False))

    def baselines(self) -> dict[str, Baseline]:
        """Fitted to the tiles of the training regions, all species weighing alike."""
        from mambaseq_dna.baselines.offered import baselines_of

        tiles = GridWindows(self.splits.train, self.length, group_label, what="training set", length=self.length)
        return baselines_of(self, tiles, balanced=True)
