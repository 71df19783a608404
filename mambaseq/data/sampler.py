"""The order of training data, which depends only on seed and position, so that a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class PositionedBatchSampler(Sampler[list[int]]):
    """Batches of dataset indices; which indices the k-th batch of a run holds depends on (seed, k) alone.

    A finite dataset has a new permutation in every epoch. An endless one (`dataset.endless`, whose item i depends only
    on i) gets consecutive indices, so no epoch repeats another. Each of `world_size` processes takes its own slice of
    every global batch of `batch_size * world_size` items; the rest at an epoch's end is dropped, so all processes make
    the same number of steps.

    position: called when iteration begins; returns how many batches the run has trained on. Iteration continues from
        there to the end of that epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        endless: bool = False,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], int] = lambda: 0,
    ) -> None:
        self.size, self.batch_size, self.seed, self.endless = size, batch_size, seed, endless
        self.rank, self.world_size = rank, world_size
        self.position = position

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.size // (self.batch_size * self.world_size)

    def _order(self, epoch: int) -> np.ndarray | range:
        if self.endless:  # the length of an epoch is arbitrary
            return range(epoch * self.size, (epoch + 1) * self.size)
        return np.random.default_rng((self.seed, epoch)).permutation(self.size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = divmod(self.position(), len(self))
        order = self._order(epoch)
        per_step = self.batch_size * self.world_size
        for k in range(start, len(self)):
            first = k * per_step + self.rank * self.batch_size
            yield [int(index) for index in order[first : first + self.batch_size]]
