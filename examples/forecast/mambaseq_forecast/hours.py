"""Hourly values of seven channels in a CSV file with a date column, as in the ETT sets (Zhou et al., AAAI 2021)."""

from __future__ import annotations

from pathlib import Path

import torch

from mambaseq.batch import Batch
from mambaseq.data.cache import fingerprint
from mambaseq.data.module import SequenceData
from mambaseq.data.tables import read_table
from mambaseq.errors import ConfigError, DataError
from mambaseq.resources import find

CHANNELS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]


class Hours(SequenceData):
    """Windows of seven channels: each position asks for the values of the next hour. The first 60 % of the rows are for
    training, the next 20 % for validation, the last 20 % for the test.

    Args:
        path: a CSV file with the columns date, HUFL, HULL, MUFL, MULL, LUFL, LULL, OT; the one that ships if not given.
        length: hours a window.
        step: hours from one training window to the next.
    """

    n_channels = len(CHANNELS)
    reader = writer = "csv"

    def __init__(self, path: Path | None = None, length: int = 168, step: int = 12) -> None:
        if length < 1 or step < 1:
            raise ConfigError(f"length and step must be at least 1, not {length} and {step}.")
        self.length, self.step = length, step
        self.path = find("mambaseq_forecast:hours.csv") if path is None else Path(path)
        self.values = torch.zeros(0, len(CHANNELS))

    def setup(self) -> None:
        self.values = torch.from_numpy(read_table(self.path, CHANNELS, others=True)).float()
        if len(self.values) < 5 * (self.length + 1):
            raise DataError(f"{self.path} has {len(self.values)} rows, too few for windows of {self.length}. Add some.")
        self.bounds = [0, *(round(share * len(self.values)) for share in (0.6, 0.8)), len(self.values)]
        seen = self.values[: self.bounds[1]]
        self.channel_mean, self.channel_std = seen.mean(0).tolist(), seen.std(0).clamp(min=1e-6).tolist()

    def windows(self, part: int, step: int) -> list[Batch]:
        rows = self.values[self.bounds[part] : self.bounds[part + 1]]
        starts = range(0, len(rows) - (1 if part else self.length), step)  # the last to be scored may be shorter
        cut = [rows[None, start : start + self.length + 1] for start in starts]
        return [Batch(inputs=one[:, :-1], targets=one[:, 1:]) for one in cut]

    def train(self) -> list[Batch]:
        return self.windows(0, self.step)

    def validation(self) -> list[Batch]:
        return self.windows(1, self.length)

    def test(self) -> list[Batch]:
        return self.windows(2, self.length)

    def sources(self) -> dict[str, str]:
        return {self.path.name: fingerprint(self.path)["sha256"]}

    def reader_options(self) -> dict[str, list[str]]:
        return {"columns": CHANNELS}

    writer_options = reader_options
