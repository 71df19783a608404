"""What the data sets of windows over FASTA files have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mambaseq.data.module import SequenceData
from mambaseq.data.windows import GridWindows, MakeBatch, RandomWindows
from mambaseq.errors import ConfigError
from mambaseq_dna.splits import SplitRules, Splits
from mambaseq_dna.tokenizer import BaseTokenizer


class FastaData(SequenceData):
    """Windows over groups of FASTA files: random ones to train on, tiles to validate and test on.

    Args:
        files: name of each group to its FASTA files.
        length: bases a window.
        test_records: patterns (`*`, `?`) for the names of the records or files that are test data, for
            instance `chr8`. The default for the data that ship with the project is their region ENm002.
        validation_records: the same for validation data.
        validation_fraction: without `validation_records`, the share of each training record held out at its
            end.
        drop_n: leave out windows with N in them.
        reverse_complement: turn a training window into the other strand's with probability 1/2.
        samples_per_epoch: training windows that make an epoch.
        n_validation: at most this many validation windows a group; all that there are if not given.
        n_test: at most this many test windows a group; all that there are if not given.
        seed: of the draws of windows; the seed of weights is the run's.
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
        test_records: list[str] | None = None,
        validation_records: list[str] | None = None,
        validation_fraction: float = 0.1,
        drop_n: bool = True,
        reverse_complement: bool = True,
        samples_per_epoch: int = 8192,
        n_validation: int | None = None,
        n_test: int | None = None,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        if length < 1 or samples_per_epoch < 1:
            raise ConfigError(f"length and samples_per_epoch must be at least 1, not {length} and {samples_per_epoch}.")
        self.files, self.length, self.seed, self.cache = files, length, seed, cache
        self.rules = SplitRules(test_records or (), validation_records or (), validation_fraction, drop_n)
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
        )
