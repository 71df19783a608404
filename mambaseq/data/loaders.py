"""SequenceDataModule, the loaders of a dataset for Lightning; apart from the dataset's base, which does without."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData, named_sets, pack_collate
from mambaseq.data.sampler import PositionedBatchSampler
from mambaseq.errors import ConfigError, DataError, shown


class _StreamLoader(DataLoader):
    """Loader of an iterable dataset, which is moved to its place when iteration begins."""

    def __init__(self, dataset: Any, start: Callable[[], None], **options: Any) -> None:
        super().__init__(dataset, **options)
        self._start_stream = start

    def __iter__(self) -> Any:
        self._start_stream()
        return super().__iter__()


class SequenceDataModule(lightning.LightningDataModule):
    """Loaders over a `SequenceData`.

    set_names: for "val" and "test", the names of the sets that the loaders were last made for (see `named_sets`).
    batches_done: how many training batches the run has seen (counted by the task); saved with every checkpoint. The
        order of the data depends only on it and the seed.
    sharing, sharing_validation: how many processes in a row are given the same batches, of training and of validation
        (see `mambaseq.parallel`).
    """

    def __init__(
        self, data: SequenceData, *, batch_size: int = 8, num_workers: int = 0, seed: int = 0, pack: bool = False
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(
                f"batch_size must be at least 1 and num_workers at least 0, not {batch_size} and {num_workers}."
            )
        self.data = data
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.collate = pack_collate if pack else data.collate
        self.batches_done, self.sharing, self.sharing_validation = 0, 1, 1
        self.set_names: dict[str, list[str]] = {}

    def setup(self, stage: str) -> None:
        self.data.setup()

    def state_dict(self) -> dict[str, Any]:
        return {"batches_done": self.batches_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        done = state_dict["batches_done"]
        if not isinstance(done, int) or done < 0:
            raise ValueError(f"batches_done is {shown(done)}")
        self.batches_done = done

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """A GPU is not waited for: Lightning does so for all but plain tensors."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def train_dataloader(self) -> DataLoader:
        dataset = self.data.train()
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        rank, world = rank // self.sharing, world // self.sharing
        if isinstance(dataset, torch.utils.data.IterableDataset):
            place = functools.partial(dataset.place, batch_size=self.batch_size, rank=rank, world_size=world)  # type: ignore[attr-defined]
            start = lambda: place(start_batch=self.batches_done)  # noqa: E731
            return _StreamLoader(dataset, start, batch_size=self.batch_size, drop_last=True, **self._common())
        sampler = PositionedBatchSampler(
            len(dataset),
            self.batch_size,
            seed=self.seed,
            endless=getattr(dataset, "endless", False),
            rank=rank,
            world_size=world,
            position=lambda: self.batches_done,
        )
        if len(sampler) == 0:
            raise DataError(
                f"The training set has {len(dataset)} sequences, fewer than one batch of {self.batch_size} for each of "
                f"{world} process(es). Lower loader.batch_size or add data."
            )
        return DataLoader(dataset, batch_sampler=sampler, **self._common())

    def _common(self) -> Mapping[str, Any]:
        # a generator of its own: worker seeds must not advance the global generator, which a resumed run replays
        return {
            "collate_fn": self.collate,
            "num_workers": self.num_workers,
            "generator": torch.Generator().manual_seed(self.seed),
            "pin_memory": torch.cuda.is_available(),
        }

    def _evaluation_loaders(self, sets: Any | None, stage: str, what: str) -> list[DataLoader]:
        named = named_sets(sets)
        self.set_names[stage] = list(named)
        shared = self.sharing_validation if stage == "val" else 1
        return [self._evaluation_loader(part, f"{what} {name}".rstrip(), shared) for name, part in named.items()]

    def _evaluation_loader(self, dataset: Any, what: str, shared: int) -> DataLoader:
        if len(dataset) == 0:
            raise DataError(f"The {what} set is empty. Check the split settings under data: and the input files.")
        if self.trainer is not None and self.trainer.world_size > 1:  # every item once, for any number of processes
            rank, world = self.trainer.global_rank // shared, self.trainer.world_size // shared
            if len(dataset) < world:
                raise DataError(
                    f"The {what} set has {len(dataset)} sequences, fewer than one for each of {world} processes. Lower "
                    f"trainer.devices, or add data."
                )
            dataset = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
        return DataLoader(dataset, batch_size=self.batch_size, **self._common())

    def val_dataloader(self) -> list[DataLoader]:
        return self._evaluation_loaders(self.data.validation(), "val", "validation")

    def test_dataloader(self) -> list[DataLoader]:
        return self._evaluation_loaders(self.data.test(), "test", "test")
