"""Windows of a stream of documents, for data that do not fit into a cache or are not worth one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from mambaseq.batch import Batch
from mambaseq.data.records import Refuse
from mambaseq.errors import DataError, cut_list
from mambaseq_text.left_out import ListedRows
from mambaseq_text.tokenization import TextTokenizer


class StreamedWindows(IterableDataset):
    """Endless next-token windows; the n-th depends only on (seed, n), whichever process reads it.

    Each pass goes through the files in a new random order, lays their documents end to end, cuts them into windows of
    `length` targets (the rest at the end is dropped) and mixes the windows in a buffer.

    Every loader worker goes through the whole stream and keeps every N-th batch, so workers overlap loading with
    training but do not divide the tokenising; resuming a run reads the earlier part without building batches, and skips
    whole passes once it has counted one. A corpus that fits on disk is faster if it is tokenised once.

    files: what to read. read: gives the documents of a file, as text. tokenizer: see `TextTokenizer.document`.
    length: targets a window. shuffle: windows that the buffer holds; 0 keeps their order. seed: of both orders.
    refuse: what `read` calls for rows that cannot be used.
    """

    def __init__(
        self,
        files: Sequence[str],
        read: Callable[[str, Refuse], Iterator[str]],
        tokenizer: TextTokenizer,
        length: int,
        *,
        shuffle: int = 1000,
        seed: int = 0,
        refuse: ListedRows | None = None,
    ) -> None:
        self.refuse = refuse or ListedRows(False)
        self.files, self.read, self.tokenizer, self.length = list(files), read, tokenizer, length
        self.shuffle, self.seed = shuffle, seed
        self.place(batch_size=1)

    def place(self, *, batch_size: int, start_batch: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """Set where iteration starts, and for which process.

        Global batch j consists of the windows `[j * n, (j + 1) * n)`, n = batch_size * world_size, of which
        process `rank` gets its own slice. Iteration begins with batch `start_batch`; a loader must take
        batches of `batch_size`.
        """
        self.batch_size, self.start_batch = batch_size, start_batch
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        which, n_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self.refuse.active = self.rank == 0 and which == 0
        per_step = self.batch_size * self.world_size
        windows = self._windows(self.start_batch * per_step)
        # a loader takes batches from its workers in turn, starting with the first
        for number in itertools.count():
            step = list(itertools.islice(windows, per_step))
            if number % n_workers == which:
                for tokens in step[self.rank * self.batch_size :][: self.batch_size]:
                    ids = torch.from_numpy(tokens.astype(np.int64))
                    yield Batch(inputs=ids[None, :-1], targets=ids[None, 1:])

    def _windows(self, first: int) -> Iterator[np.ndarray]:
        """Windows from number `first` on, `(length + 1,)` each."""
        number, per_pass = 0, 0
        for epoch in itertools.count():
            if per_pass and first - number >= per_pass:
                number += per_pass
                continue
            per_pass = 0
            for tokens in self._pass(epoch):
                per_pass += 1
                if number >= first:
                    yield tokens
                number += 1
            if not per_pass:
                raise DataError(
                    f"All documents of {cut_list(self.files)} together are shorter than one window of "
                    f"{self.length:,} tokens. Lower data.length, or add documents."
                )

    def _pass(self, epoch: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.files)) if self.shuffle else np.arange(len(self.files))
        windows = self._cut(self.files[i] for i in order)
        buffer = list(itertools.islice(windows, self.shuffle))
        for tokens in windows if buffer else ():
            slot = int(rng.integers(len(buffer)))
            buffer[slot], tokens = tokens, buffer[slot]
            yield tokens
        if buffer:
            yield from (buffer[i] for i in rng.permutation(len(buffer)))
        else:
            yield from windows

    def _cut(self, files: Iterator[str]) -> Iterator[np.ndarray]:
        held: list[np.ndarray] = []
        n_held = 0
        for name in files:
            for text in self.read(name, self.refuse):
                for ids, _ in self.tokenizer.document([text], joint="\n"):
                    held.append(ids)
                    n_held += len(ids)
                if n_held > self.length:
                    joined = np.concatenate(held)
                    starts = range(0, n_held - self.length, self.length)
                    yield from (joined[start : start + self.length + 1].copy() for start in starts)
                    held = [joined[len(starts) * self.length :].copy()]
                    n_held = len(held[0])
