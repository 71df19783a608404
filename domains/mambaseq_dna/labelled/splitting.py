"""Which split each labelled sequence belongs to, and what to do about copies in two splits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import numpy as np

from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown
from mambaseq_dna.labelled.layouts import SPLIT_WORDS
from mambaseq_dna.labelled.texts import first_of, numbered
from mambaseq_dna.splits import SPLITS, Duplicates

TRAIN, VALIDATION, TEST = range(3)
UNKNOWN = -1
_PROTECTED = (TEST, VALIDATION, TRAIN)

logger = logging.getLogger(__name__)


def split_numbers(texts: Sequence[str], where: Callable[[int], str]) -> np.ndarray:
    """The splits that a column names, `(records,)` int64. Raises DataError for another word than those of splits."""
    found, index = numbered(texts)
    numbers = []
    for number, text in enumerate(found):
        split = SPLIT_WORDS.get(text.strip().lower())
        if split is None:
            raise DataError(
                f"{where(first_of(index, number))}: {shown(text)} names no split.{did_you_mean(text, SPLIT_WORDS)} "
                "Write train, validation (or dev) or test, or choose another column (data.split)."
            )
        numbers.append(SPLITS.index(split))
    return np.array(numbers, dtype=np.int64)[index]


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """How records are split that no file, folder or column assigns.

    groups: for validation and test, patterns of names of groups (chromosomes, genes, ...). fractions: for validation
    and test, the share of all other records, those for training; not used for a split that is given otherwise. seed: of
    the draw.

    Raises ConfigError for fractions outside of [0, 1), or that leave nothing.
    """

    groups: dict[int, Sequence[str]]
    fractions: dict[int, float]
    seed: int = 0

    def __post_init__(self) -> None:
        for split, fraction in self.fractions.items():
            if not 0 <= fraction < 1:
                raise ConfigError(f"data.{SPLITS[split]}_fraction must be in [0, 1), not {fraction}.")
        if sum(self.fractions.values()) >= 1:
            raise ConfigError(
                "data.validation_fraction and data.test_fraction leave nothing for training: together they must be "
                f"below 1, not {sum(self.fractions.values()):g}."
            )

    def assign(self, splits: np.ndarray, groups: Sequence[str] | None, units: np.ndarray, strata: np.ndarray) -> None:
        """Fill in the unknown (-1) of `splits`, in place.

        groups: the name of each record's group, which stays together; None if there are none. units: the same number
        for records with equal sequences, which stay together as well. strata: the class of each record: each class is
        split in the same proportions.
        Raises ConfigError for patterns without groups, and DataError for a pattern that fits no group, a group that
        fits patterns of two splits, and a split that gets nothing.
        """
        if any(self.groups.values()):
            if groups is None:
                raise ConfigError(
                    "data.test_groups and data.validation_groups name groups, but the records have none. Name the "
                    "column that holds them: data.group."
                )
            self._by_pattern(splits, groups)
        wanted = {
            split: fraction
            for split, fraction in self.fractions.items()
            if fraction and not self.groups.get(split) and not (splits == split).any()
        }
        splits[splits == UNKNOWN] = TRAIN
        chosen = np.flatnonzero(splits == TRAIN)
        if not wanted or not len(chosen):
            return
        if groups is not None:
            units = numbered(groups)[1]
            strata = np.zeros_like(strata)
        members, first, of = np.unique(units[chosen], return_index=True, return_inverse=True)
        sizes = np.bincount(of.reshape(-1), minlength=len(members))
        assigned = np.zeros(len(members), dtype=np.int64)
        of_stratum = strata[chosen][first]
        rng = np.random.default_rng(self.seed)
        for stratum in np.unique(of_stratum).tolist():
            mine = rng.permutation(np.flatnonzero(of_stratum == stratum))
            middle = np.cumsum(sizes[mine]) - sizes[mine] / 2  # of each unit, on the line of all records
            total, done = int(sizes[mine].sum()), 0.0
            for split, fraction in wanted.items():
                inside = (middle > done) & (middle <= done + fraction * total)
                assigned[mine[inside]] = split
                done += fraction * total
        splits[chosen] = assigned[of.reshape(-1)]
        for split in wanted:
            if not (splits == split).any():
                what = f"groups, of which there are {len(members)}" if groups is not None else "records"
                raise DataError(
                    f"The {SPLITS[split]} set gets no record: data.{SPLITS[split]}_fraction is "
                    f"{self.fractions[split]:g} of the {what}. Raise it, set it to 0 for none, or give files or groups."
                )

    def _by_pattern(self, splits: np.ndarray, groups: Sequence[str]) -> None:
        names, of = numbered(groups)
        taken: dict[str, int] = {}
        for split, patterns in self.groups.items():
            for pattern in patterns:
                fitting = [name for name in names if _fits(name, pattern)]
                if not fitting:
                    raise DataError(
                        f"The pattern {shown(pattern)} of data.{SPLITS[split]}_groups matches no group."
                        f"{did_you_mean(pattern, names[:500])} There are: {cut_list(names, 8)}."
                    )
                for name in fitting:
                    if taken.setdefault(name, split) != split:
                        raise DataError(
                            f"The group {shown(name)} matches both data.test_groups and data.validation_groups. Name "
                            "it in only one."
                        )
        numbers = np.array([taken.get(name, UNKNOWN) for name in names], dtype=np.int64)[of]
        free = (splits == UNKNOWN) & (numbers != UNKNOWN)
        splits[free] = numbers[free]


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern stands for a name; of chromosomes also with or without `chr`."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"chr{pattern}") or fnmatchcase(f"chr{name}", pattern)


def without_copies(
    splits: np.ndarray,
    content: np.ndarray,
    overlaps: np.ndarray,
    where: Callable[[int], str],
    duplicates: Duplicates,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """The records to keep, `(records,)` bool: none of them is in two splits.

    content: the same number for sequences that are equal, or the reverse complement of each other; -1 for none that
    counts. overlaps: the number of a record in another split that shares a part of the assembly, -1 for none. Of
    copies, those of test are kept before those of validation, and these before those of training. labels: the class of
    each record, to say how many copies have another one.
    Raises DataError if there are copies, and they are refused.
    """
    keep = np.ones(len(splits), dtype=bool)
    rank = np.empty(len(splits), dtype=np.int64)
    for place, split in enumerate(_PROTECTED):
        rank[splits == split] = place
    best = np.full(int(content.max(initial=-1)) + 1, len(_PROTECTED))
    np.minimum.at(best, content[content >= 0], rank[content >= 0])
    copies = (content >= 0) & (rank > best[content])
    keep &= ~copies & (overlaps < 0)
    left_out = int((~keep).sum())
    if not left_out:
        return keep
    if duplicates == "refuse":
        row = int(np.argmin(keep))
        other = int(np.flatnonzero((content == content[row]) & (rank < rank[row]))[0]) if copies[row] else overlaps[row]
        what = "holds the same sequence as" if copies[row] else "shares bases with"
        raise DataError(
            f"{where(row)} ({SPLITS[splits[row]]}) {what} {where(int(other))} ({SPLITS[splits[other]]}), or its other "
            f"strand. {left_out:,} such record(s) are in two splits. Remove them, or set data.duplicates to drop, "
            "which leaves them out of training before validation before test."
        )
    conflicting = ""
    if labels is not None and copies.any():
        first = np.full(len(best), -1, dtype=np.int64)
        kept = np.flatnonzero(keep & (content >= 0))[::-1]
        first[content[kept]] = labels[kept]
        number = int((copies & (labels != first[content])).sum())
        conflicting = f"; {number:,} of them have another label than the copy that is kept" if number else ""
    logger.warning(
        "data.duplicates: %s record(s) are left out, because a more protected split (test, then validation) holds "
        "their sequence, its other strand, or a part of it%s.",
        f"{left_out:,}",
        conflicting,
    )
    return keep
