"""A record of a run's data, in its folder and checkpoints, so that scores are compared only on the same data, and a run
notices changed data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mambaseq.atomic import plain_values
from mambaseq.errors import cut_path

KEY = "mambaseq"  # name of our part of a checkpoint
_NEUTRAL = {"data.cache"}  # only says where derived files are kept
_BATCH = "loader.batch_size"


@dataclasses.dataclass(frozen=True)
class DataRecord:
    """settings: those that determine the data, dotted key to plain value. sources: the name of each file to a checksum
    of its contents (`SequenceData.sources`); empty if the dataset gives none."""

    settings: dict[str, Any]
    sources: dict[str, str]

    @classmethod
    def of(cls, settings: Mapping[str, Any], sources: Mapping[str, str]) -> DataRecord:
        """settings: all of a run's, dotted (`flatten`). If only a part of the validation set is used, its size counts
        too."""
        chosen = {key: value for key, value in settings.items() if key.startswith("data.") and key not in _NEUTRAL}
        part = settings.get("trainer.limit_val_batches")
        if part not in (None, 1.0) or isinstance(part, int):
            chosen["trainer.limit_val_batches"] = part
            chosen[_BATCH] = settings.get(_BATCH)
        return cls(chosen, dict(sources))

    @classmethod
    def read(cls, plain: Any) -> DataRecord | None:
        """From plain values (JSON, a checkpoint); None if missing or damaged."""
        if not isinstance(plain, Mapping):
            return None
        settings, sources = plain.get("settings"), plain.get("sources")
        if not isinstance(settings, Mapping) or not isinstance(sources, Mapping):
            return None
        return cls(dict(settings), {str(name): str(checksum) for name, checksum in sources.items()})

    def plain(self) -> dict[str, Any]:
        """As plain values, for JSON and checkpoints."""
        return {"settings": plain_values(self.settings), "sources": self.sources}

    def changed_settings(self, now: DataRecord) -> list[str]:
        """Keys whose values differ. A missing key counts as unset, since versions differ in their keys."""
        former, new = plain_values(self.settings), plain_values(now.settings)
        return sorted(key for key in former.keys() | new.keys() if former.get(key) != new.get(key))

    def changed_files(self, now: DataRecord) -> list[str]:
        """How the files changed, a phrase of at most 80 characters for each: files with new contents and, with equal
        settings, files that came or went."""
        if not self.sources or not now.sources:
            return []  # one of them does not know its files
        both = self.sources.keys() & now.sources.keys()
        other = [name for name in sorted(both) if self.sources[name] != now.sources[name]]
        found = [f"{cut_path(name)} has other contents" for name in other]
        if not self.changed_settings(now):
            found += [f"{cut_path(name)} is gone" for name in sorted(self.sources.keys() - both)]
            found += [f"{cut_path(name)} is new" for name in sorted(now.sources.keys() - both)]
        return found

    def same_training(self, now: DataRecord) -> bool:
        """Whether the training data are the same; the size of the validation set and of batches may differ."""
        former, new = (DataRecord(_only_data(record.settings), record.sources) for record in (self, now))
        return former.same(new)

    def same(self, now: DataRecord, processes: tuple[int, int] = (1, 1)) -> bool:
        """Whether the validation sets are the same, as far as is known. processes: that shared one then and now: of a
        part of the set they take so many batches each, together its first sequences."""
        former, new = (one._together(n) for one, n in zip((self, now), processes, strict=True))
        return not former.changed_settings(new) and not former.changed_files(new)

    def other(self, now: DataRecord, processes: tuple[int, int] = (1, 1)) -> str:
        """On what a score was measured that is not `same`, in words."""
        former, new = (one._together(n) for one, n in zip((self, now), processes, strict=True))
        if former.changed_settings(new) == [_BATCH] and not former.changed_files(new):
            sizes = (f"{one.settings.get(_BATCH):,}" for one in (former, new))
            return (
                f"{next(sizes)} validation sequences a batch of all processes, which are {next(sizes)} now, and "
                "trainer.limit_val_batches counts batches: other sequences"
            )
        return "other data"

    def _together(self, processes: int) -> DataRecord:
        """With the batch of all processes."""
        batch = self.settings.get(_BATCH)
        if not isinstance(batch, int):
            return self
        return DataRecord(self.settings | {_BATCH: batch * processes}, self.sources)


def _only_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.startswith("data.")}
