"""Which intervals of an assembly share bases with intervals of another split."""

from __future__ import annotations

import numpy as np


def overlapping(places: np.ndarray, splits: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """For each record, the number of one in a more protected split (test, then validation) whose bases it shares, on
    either strand; -1 for none. `(records,)` int64.

    places: see `Source`. splits: 0 training, 1 validation, 2 test. intervals: `(records,)` bool, which are intervals;
        others share nothing.
    """
    found = np.full(len(places), -1, dtype=np.int64)
    if not intervals.any():
        return found
    span = int(places[:, 3].max()) - min(int(places[:, 2].min()), 0) + 1
    line = places[:, 0] * (int(places[:, 1].max()) + 1) + places[:, 1]  # all sequences on one line, with gaps between
    start, stop = 2 * span * line + places[:, 2], 2 * span * line + places[:, 3]
    for split, others in ((1, (2,)), (0, (1, 2))):
        mine = np.flatnonzero(intervals & (splits == split))
        theirs = np.flatnonzero(intervals & np.isin(splits, others))
        if not len(mine) or not len(theirs):
            continue
        theirs = theirs[np.argsort(start[theirs], kind="stable")]
        # of those that start before mine stops, the one that reaches furthest
        reach = np.maximum.accumulate(stop[theirs])
        furthest = np.maximum.accumulate(np.where(stop[theirs] == reach, np.arange(len(theirs)), 0))
        before = np.searchsorted(start[theirs], stop[mine], side="left") - 1
        meets = (before >= 0) & (reach[np.maximum(before, 0)] > start[mine])
        found[mine[meets]] = theirs[furthest[before[meets]]]
    return found
