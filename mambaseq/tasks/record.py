"""What the data of a run are, as it is written into its folder and its checkpoints, so that scores are compared only
where they measure the same, and a run notices that its data changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mambaseq.atomic import plain_values
from mambaseq.errors import cut_path

KEY = "mambaseq"  # of a checkpoint's part that is ours
_NEUTRAL = {"data.cache"}  # says where derived files are kept


@dataclasses.dataclass(frozen=True)
class DataRecord:
    """settings: those that the data follow from, dotted key to plain value. sources: the name of each file to a
    checksum of what it holds (`SequenceData.sources`); empty where the data set does not tell."""

    settings: dict[str, Any]
    sources: dict[str, str]

    @classmethod
    def of(cls, settings: Mapping[str, Any], sources: Mapping[str, str]) -> DataRecord:
        """settings: all of a run's, dotted (`flatten`). Where only a part of the validation set is used, its size is
        among what counts."""
        chosen = {key: value for key, value in settings.items() if key.startswith("data.") and key not in _NEUTRAL}
        part = settings.get("trainer.limit_val_batches")
        if part not in (None, 1.0) or isinstance(part, int):
            chosen["trainer.limit_val_batches"] = part
            chosen["loader.batch_size"] = settings.get("loader.batch_size")
        return cls(chosen, dict(sources))

    @classmethod
    def read(cls, plain: Any) -> DataRecord | None:
        """From plain values (JSON, a checkpoint); None where there is none, or it is damaged."""
        if not isinstance(plain, Mapping):
            return None
        settings, sources = plain.get("settings"), plain.get("sources")
        if not isinstance(settings, Mapping) or not isinstance(sources, Mapping):
            return None
        return cls(dict(settings), {str(name): str(checksum) for name, checksum in sources.items()})

    def plain(self) -> dict[str, Any]:
        """As JSON and checkpoints keep it."""
        return {"settings": plain_values(self.settings), "sources": self.sources}

    def changed_settings(self, now: DataRecord) -> list[str]:
        """Keys whose values differ. One that is missing is as good as one that is unset: versions differ in those."""
        former, new = plain_values(self.settings), plain_values(now.settings)
        return sorted(key for key in former.keys() | new.keys() if former.get(key) != new.get(key))

    def changed_files(self, now: DataRecord) -> list[str]:
        """What became of the files, one phrase each, of 80 characters at most: those behind the same name that hold
        something else; with the same settings also those that came or went."""
        if not self.sources or not now.sources:
            return []  # the one or the other cannot tell
        both = self.sources.keys() & now.sources.keys()
        other = [name for name in sorted(both) if self.sources[name] != now.sources[name]]
        found = [f"{cut_path(name)} holds something else" for name in other]
        if not self.changed_settings(now):
            found += [f"{cut_path(name)} is gone" for name in sorted(self.sources.keys() - both)]
            found += [f"{cut_path(name)} is new" for name in sorted(now.sources.keys() - both)]
        return found

    def same_training(self, now: DataRecord) -> bool:
        """Whether the data are the same, however much of them is validated on and in whatever batches."""
        former, new = (DataRecord(_only_data(record.settings), record.sources) for record in (self, now))
        return former.same(new)

    def same(self, now: DataRecord) -> bool:
        """Whether the validation sets are the same, as far as can be told."""
        return not self.changed_settings(now) and not self.changed_files(now)


def _only_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.startswith("data.")}
