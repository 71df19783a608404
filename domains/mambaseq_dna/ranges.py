"""Sets of places on a line, as sorted ranges without overlap: `(n, 2)` int64, start and end."""

from __future__ import annotations

import numpy as np


def union(ranges: np.ndarray) -> np.ndarray:
    """The places that are in any of the ranges, which may come in any order, overlap and touch each other."""
    if not len(ranges):
        return np.zeros((0, 2), np.int64)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reached = np.maximum.accumulate(ranges[:, 1])
    begins = np.concatenate(([True], ranges[1:, 0] > reached[:-1]))
    (first,) = np.nonzero(begins)
    return np.stack((ranges[first, 0], reached[np.append(first[1:], len(ranges)) - 1]), axis=1)


def intersection(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places that are in both sets, and which range of `one` each of these is in, `(n,)` int64."""
    first = np.searchsorted(other[:, 1], one[:, 0], side="right")
    last = np.maximum(np.searchsorted(other[:, 0], one[:, 1], side="left"), first)
    of = np.repeat(np.arange(len(one)), last - first)
    which = np.arange(len(of)) - np.repeat(np.cumsum(last - first) - last, last - first)
    starts = np.maximum(one[of, 0], other[which, 0])
    stops = np.minimum(one[of, 1], other[which, 1])
    return np.stack((starts, stops), axis=1), of


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The places of `one` that are not in `other`."""
    if not len(one) or not len(other):
        return one
    lowest, highest = min(one[0, 0], other[0, 0]) - 1, max(one[-1, 1], other[-1, 1]) + 1
    between = np.stack((np.append(lowest, other[:, 1]), np.append(other[:, 0], highest)), axis=1)
    return intersection(one, between[between[:, 1] > between[:, 0]])[0]


def covered(ranges: np.ndarray, by: np.ndarray) -> np.ndarray:
    """How many places of each of the ranges, which may overlap, are in the set `by`; `(n,)` int64."""
    if not len(by):
        return np.zeros(len(ranges), np.int64)
    before = np.concatenate(([0], np.cumsum(by[:, 1] - by[:, 0])))

    def below(places: np.ndarray) -> np.ndarray:
        last = np.maximum(np.searchsorted(by[:, 0], places, side="right") - 1, 0)
        return before[last] + np.clip(places - by[last, 0], 0, by[last, 1] - by[last, 0])

    return below(ranges[:, 1]) - below(ranges[:, 0])
