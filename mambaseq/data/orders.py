"""In which order the records of a labelled training set come. Both orders are endless, and which record is item i
depends on (seed, i) alone, so that runs resume anywhere, with any number of loader workers."""

from __future__ import annotations

import numpy as np
import torch

from mambaseq.data.drawing import words
from mambaseq.errors import DataError


def random_words(seed: int, items: np.ndarray, n: int) -> np.ndarray:
    """n random 32-bit numbers for each item, `(items, n)` int64; see `drawing.words`."""
    return words(seed, torch.from_numpy(np.asarray(items, dtype=np.int64)), n).numpy()


class Shuffled:
    """Every record once an epoch, in another order in each.

    size: number of records, and the items of an epoch.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.size

    def records(self, items: np.ndarray) -> np.ndarray:
        """The numbers of the records of items, both `(items,)` int64."""
        epochs, places = np.divmod(items, self.size)
        found = np.empty(len(items), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            if epoch != self._epoch:
                self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.size)
            mine = epochs == epoch
            found[mine] = self._order[places[mine]]
        return found


class Balanced:
    """Classes equally often, whatever their sizes: an item is of a class drawn uniformly, then a record of it is.

    labels: `(records,)` the class of each record, from 0; those below 0 (unknown) are never drawn. size: items that
        make an epoch; as many as there are records if not given.
    Raises DataError if no record has a label.
    """

    def __init__(self, labels: np.ndarray, seed: int = 0, size: int | None = None) -> None:
        self.seed = seed
        self.size = len(labels) if size is None else size
        known = np.flatnonzero(labels >= 0)
        if not len(known):
            raise DataError("No training record has a class, so that none can be drawn. Check the labels.")
        self._records = known[np.argsort(labels[known], kind="stable")]
        counts = np.unique(labels[known], return_counts=True)[1]
        self._counts, self._starts = counts, np.cumsum(counts) - counts

    def __len__(self) -> int:
        return self.size

    def records(self, items: np.ndarray) -> np.ndarray:
        """The numbers of the records of items, both `(items,)` int64."""
        drawn = random_words(self.seed, items, 2)
        which = (drawn[:, 0] * len(self._counts)) >> 32
        place = (drawn[:, 1] * self._counts[which]) >> 32
        return self._records[self._starts[which] + place]
