"""The base of datasets of windows over FASTA files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from mambaseq.data.audited import Audited, IntervalSequences
from mambaseq.data.module import SequenceData
from mambaseq.data.windows import GridWindows, MakeBatch, RandomWindows
from mambaseq.errors import ConfigError, shown
from mambaseq_dna.auditing import audited_dna
from mambaseq_dna.splits import SPLITS, Duplicates, SplitRules, Splits
from mambaseq_dna.tokenizer import BaseTokenizer

Names = list[str | int | float | bool] | str | int | float | bool | None
"""Names of records as YAML may read them: `8` becomes a number, and `NO` false."""


def names_of(key: str, names: Names) -> list[str]:
    """Names and patterns as text; a whole number becomes the name with its digits.

    Raises ConfigError for other numbers and for true and false: YAML does not keep how they were written.
    """
    if names is None:
        return []
    found = names if isinstance(names, list) else [names]
    for name in found:
        if isinstance(name, bool | float) or not isinstance(name, str | int):
            raise ConfigError(f"data.{key} holds {shown(name)}, which is not a name. Write names like this in quotes.")
    return [str(name) for name in found]


class FastaData(SequenceData):
    """Windows over groups of FASTA files: random ones in training, tiles in validation and test.

    Args:
        files: name of each group to its FASTA files.
        length: bases a window.
        test_records: patterns (`*`, `?`) for the names of the records or files that are test data, for instance `chr8`.
            `chr2` and `2` mean 2A and 2B too. The default for the data that ship with the project is their region
            ENm002.
        validation_records: the same for validation data.
        train_records: the same for training data, of what neither of those names; the rest is not used. All of it is
            training data if not given.
        validation_fraction: share of each training record, at its end, for validation. Not used with
            `validation_records`.
        drop_n: leave out windows with N in them.
        reverse_complement: turn a training window into the other strand's with probability 1/2.
        samples_per_epoch: training windows that make an epoch.
        n_validation: the most validation windows of a group; all if not given.
        n_test: the most test windows of a group; all if not given.
        duplicates: copies of a record, on either strand, in two splits or groups are refused (`refuse`), or kept only
            in test before validation before training data (`drop`).
        seed: of the random windows; the run's seed is for weights.
        cache: where token stores are kept; MAMBASEQ_CACHE or the platform's cache folder if not given.
    """

    tokenizer: BaseTokenizer
    tokenizer_name = "dna/base"
    reader = "dna/fasta"
    writer = "dna/fasta"

    def __init__(
        self,
        files: Mapping[str, Sequence[str]],
        length: int = 1024,
        test_records: Names = None,
        validation_records: Names = None,
        train_records: Names = None,
        validation_fraction: float = 0.1,
        drop_n: bool = True,
        reverse_complement: bool = True,
        samples_per_epoch: int = 8192,
        n_validation: int | None = None,
        n_test: int | None = None,
        duplicates: Duplicates = "refuse",
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        for key, value in (
            ("length", length),
            ("samples_per_epoch", samples_per_epoch),
            ("n_validation", n_validation),
            ("n_test", n_test),
        ):
            if value is not None and not 1 <= value < sys.maxsize:
                raise ConfigError(f"data.{key} must be at least 1 and below 2^63, not {value}.")
        self.files, self.length, self.seed, self.cache = files, length, seed, cache
        self.rules = SplitRules(
            names_of("test_records", test_records),
            names_of("validation_records", validation_records),
            validation_fraction,
            drop_n,
            duplicates,
            names_of("train_records", train_records),
        )
        self.reverse_complement, self.samples_per_epoch = reverse_complement, samples_per_epoch
        self.n_validation, self.n_test = n_validation, n_test
        self._splits: Splits | None = None

    @property
    def complement(self) -> list[int]:  # type: ignore[override]
        """The id of each base's partner."""
        return self.tokenizer.complement.tolist()

    def setup(self) -> None:
        """Read the FASTA files, or their token stores. Raises DataError (see `SplitRules.apply`)."""
        if self._splits is None:
            self._splits = self.rules.apply(self.files, self.cache)

    def sources(self) -> dict[str, str]:
        return dict(self.splits.sources)

    def audited(self) -> Audited:
        """The intervals of each split, those included that setup would refuse as copies."""
        splits = self._splits or self.rules.apply(self.files, self.cache, refuse_copies=False)
        found = {
            split: IntervalSequences(groups, labelled=len(self.files) > 1 and bool(self.class_names))
            for split in SPLITS
            if (groups := getattr(splits, split))
        }
        case_seen = self.tokenizer.lowercase == "keep"
        return audited_dna(found, length=self.length, case_seen=case_seen)

    @property
    def splits(self) -> Splits:
        """The intervals of each split."""
        self.setup()
        assert self._splits is not None
        return self._splits

    def _random(self, span: int, make: MakeBatch, *, by_position: bool) -> RandomWindows:
        return RandomWindows(
            self.splits.train,
            span,
            make,
            size=self.samples_per_epoch,
            seed=self.seed,
            by_position=by_position,
            length=self.length,
        )

    def _tiles(self, split: str, span: int, make: MakeBatch) -> GridWindows | None:
        groups = getattr(self.splits, split)
        at_most = self.n_validation if split == "validation" else self.n_test
        if not groups:
            return None
        return GridWindows(
            groups,
            span,
            make,
            stride=self.length,
            balanced=True,
            at_most=at_most,
            seed=self.seed,
            what=f"{split} set",
            length=self.length,
        )
