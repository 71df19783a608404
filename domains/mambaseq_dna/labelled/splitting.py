"""Which split each labelled sequence belongs to, and what to do about copies in two splits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from mambaseq.errors import ConfigError, DataError, cut_list, did_you_mean, shown
from mambaseq_dna.labelled.texts import numbered, refuse
from mambaseq_dna.split_intervals import SPLIT_WORDS
from mambaseq_dna.splits import SPLITS, Duplicates

TRAIN, VALIDATION, TEST = range(3)
UNKNOWN = -1
_RANK = np.array([2, 1, 0])  # of a split: test is protected most
COPIES, OVERLAPS, GROUPS = (
    "holds the same sequence (or its other strand) as",
    "shares bases with",
    "is of the same group as",
)
"""What records of two splits may have in common."""

logger = logging.getLogger(__name__)


def split_numbers(texts: Sequence[str], where: Callable[[int], str]) -> np.ndarray:
    """The splits that a column names, `(records,)` int64. Raises DataError for another word than those of splits."""
    found, index = numbered(texts)
    splits = [SPLIT_WORDS.get(text.strip().lower()) for text in found]

    def wrong(text: str) -> str:
        return (
            f"{shown(text)} names no split.{did_you_mean(text, SPLIT_WORDS)} Write train, validation (or dev) or test, "
            "or choose another column (data.split; '' is none)."
        )

    refuse(found, index, lambda text: text.strip().lower() not in SPLIT_WORDS, where, wrong)
    return np.array([SPLITS.index(split) for split in splits if split], dtype=np.int64)[index]


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

    def drawn(self, splits: np.ndarray) -> list[int]:
        """The splits that are drawn by the seed, because neither `splits` nor groups give them."""
        return [
            split
            for split, fraction in self.fractions.items()
            if fraction and not self.groups.get(split) and not (splits == split).any()
        ]

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
        wanted = {split: self.fractions[split] for split in self.drawn(splits)}
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
        free = np.isin(splits, (UNKNOWN, TRAIN)) & (numbers != UNKNOWN)
        splits[free] = numbers[free]


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern stands for a name; of chromosomes also with or without `chr`."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"chr{pattern}") or fnmatchcase(f"chr{name}", pattern)


def crossing(units: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """For each record, the number of one of the same unit in a more protected split (test, then validation); -1 if
    there is none. `(records,)` int64. units: -1 is none."""
    rank = _RANK[splits]
    order = np.lexsort((rank, units))  # the most protected record of each unit first
    _, first = np.unique(units[order], return_index=True)
    best = order[np.repeat(first, np.diff(np.append(first, len(order))))]
    found = np.full(len(units), -1, dtype=np.int64)
    found[order] = np.where((rank[best] < rank[order]) & (units[order] >= 0), best, -1)
    return found


def without_copies(
    splits: np.ndarray,
    others: Mapping[str, np.ndarray],
    where: Callable[[int], str],
    duplicates: Duplicates,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """The records to keep, `(records,)` bool: what belongs together is in one split.

    others: by what they have in common (see `COPIES`), for each record the number of one in a more protected split, or
    -1. labels: the class of each record, to say how many copies have another one.
    Raises DataError if there are such records, and they are refused.
    """
    keep = np.all([found < 0 for found in others.values()], axis=0)
    left_out = int((~keep).sum())
    if not left_out:
        return keep
    if duplicates == "refuse":
        row = int(np.argmin(keep))
        what, found = next((what, found) for what, found in others.items() if found[row] >= 0)
        other = int(found[row])
        raise DataError(
            f"{where(row)} ({SPLITS[splits[row]]}) {what} {where(other)} ({SPLITS[splits[other]]}). {left_out:,} such "
            "record(s) are in two splits. Remove them, or set data.duplicates to drop, which leaves them out of "
            "training before validation before test."
        )
    told = [f"{int((found >= 0).sum()):,} {what} another" for what, found in others.items() if (found >= 0).any()]
    copies = np.flatnonzero(others[COPIES] >= 0)
    conflicting = 0 if labels is None else int((labels[copies] != labels[others[COPIES][copies]]).sum())
    logger.warning(
        "data.duplicates: %s record(s) are left out, because of records in a more protected split (test, then "
        "validation): %s%s.",
        f"{left_out:,}",
        "; ".join(told),
        f", {conflicting:,} of them with another label" if conflicting else "",
    )
    return keep
