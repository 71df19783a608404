"""The context of a recipe: its settings, and finished trials, so that an interrupted run continues."""

from __future__ import annotations

import dataclasses
import glob
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tqdm import tqdm

from mambaseq.atomic import atomic_file, json_text
from mambaseq.data.cache import fingerprint
from mambaseq.errors import UserError, did_you_mean, shown
from mambaseq.plain import read_json
from mambaseq.reproduction.tables import Table

Scale = Literal["full", "small", "tiny"]
SCALES: tuple[Scale, ...] = ("full", "small", "tiny")
FINISHED = "finished"
"""In place of names, in recipes that know it: what earlier runs have finished, and nothing is trained."""

_T = TypeVar("_T")


@dataclasses.dataclass
class Context:
    """Device, sizes, seeds, and the folder in which finished trials are kept.

    scale: "full" gives the reported results, on a GPU; "small" is sized for a CPU; "tiny" takes seconds and learns
        nothing.
    only: names of lines, or of other choices of a recipe, or `FINISHED` where it knows that; empty for all.
    hardware: what trials run on. records: of the requested trials, by name.
    data: the folder with files that users bring (see `brought`).
    minutes: of training of each contender, in recipes that train by the clock; None for the recipe's own.
    steps: of training of each contender, in recipes that leave it open; None for the recipe's own.
    """

    device: torch.device
    scale: Scale
    seeds: list[int]
    folder: Path
    only: list[str] = dataclasses.field(default_factory=list)
    hardware: str = ""
    records: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    data: Path | None = None
    minutes: float | None = None
    steps: int | None = None

    def brought(self, name: str, sha256: str | None, source: str) -> Path:
        """A file of the folder `--data` that the project may not ship, or a folder in it.

        sha256: of a file's contents as it lies there; None for a folder, which is not checked. source: where it comes
            from and how it is made, for the message.
        Raises UserError that says what to put where, if it is not there or is another.
        """
        told = f"This recipe needs the {'folder' if sha256 is None else 'file'} {name}: {source}"
        if self.data is None:
            raise UserError(f"{told.rstrip('.')}. Name the folder that it is in with --data FOLDER.")
        path = self.data / name
        if not (path.is_dir() if sha256 is None else path.is_file()):
            raise UserError(f"There is no {path}. {told.rstrip('.')}. Put it there.")
        if sha256 is not None and fingerprint(path)["sha256"] != sha256:
            raise UserError(
                f"{path} is not the file that the published figures were made with: its sha256 is not {sha256}. {told}"
            )
        return path

    def at(self, *, full: _T, small: _T, tiny: _T) -> _T:
        """The value for the scale, out of three."""
        return {"full": full, "small": small, "tiny": tiny}[self.scale]

    @property
    def used(self) -> set[str]:
        """The hardware of the requested trials, also in earlier runs."""
        return {hardware for record in self.records.values() for hardware in record["hardware"]}

    @property
    def seconds(self) -> float:
        """Seconds that they took together, without those of a killed run."""
        return sum(record["seconds"] for record in self.records.values())

    def wanted(self, names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
        """The requested lines of a recipe; all if none was named.

        others: further names that may be requested, in a separate call, such as columns; `FINISHED` of a recipe whose
            trials are all `over_seeds` and whose tables may lack any of their values.
        Raises UserError for a name in neither.
        """
        own = list(names)
        known = [*own, *others]
        for name in self.only:
            if name not in known:
                raise UserError(
                    f"--only names {shown(name)}, which this recipe has not.{did_you_mean(name, known)} "
                    f"It has: {', '.join(map(repr, known))}."
                )
        return [name for name in own if name in self.only] or own

    def trial(self, name: str, run: Callable[[Path], Mapping[str, float]]) -> dict[str, float]:
        """The result of `run`, which gets the file for its checkpoint; or its earlier result.

        name: identifies the trial in the recipe, including its seed.
        run: may write more checkpoints, with another part before the suffix: `checkpoint.with_suffix(".1.pt")`.
        """
        stem = re.sub(r"[^\w.=-]+", "_", name)
        result, checkpoint = self.folder / "trials" / f"{stem}.json", self.folder / "trials" / f"{stem}.pt"
        known = result.exists()
        record = _read(result) if known else self._run(stem, name, run)
        if (other := record.get("name", name)) != name:
            raise UserError(f"{result} is of the trial {shown(other)}, whose file {shown(name)} would share.")
        for path in (checkpoint, *result.parent.glob(f"{glob.escape(stem)}.*.pt"), self._begun(stem)):
            path.unlink(missing_ok=True)
        self.records[name] = record
        found: dict[str, float] = record["values"]
        if known:
            return found
        told = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
        tqdm.write(f"{name}: {told}")
        return found

    def finished(self, name: str) -> dict[str, float] | None:
        """The result of a trial that an earlier run has finished; None if there is none, and nothing is run."""
        stem = re.sub(r"[^\w.=-]+", "_", name)
        return self.trial(name, _unfinished) if (self.folder / "trials" / f"{stem}.json").exists() else None

    def _begun(self, stem: str) -> Path:
        """Hardware on which an interrupted trial has run."""
        return self.folder / "trials" / f"{stem}.begun"

    def _run(self, stem: str, name: str, run: Callable[[Path], Mapping[str, float]]) -> dict[str, Any]:
        begun, result = self._begun(stem), self.folder / "trials" / f"{stem}.json"
        record: dict[str, Any] = {"name": name, "hardware": [], "seconds": 0.0}
        if begun.exists():
            record = _read(begun)
        before, start = record["seconds"], time.perf_counter()
        record["hardware"] = sorted({*record["hardware"], self.hardware})
        _write(begun, record)  # before anything is run, so that a continued trial records this machine
        try:
            values = dict(run(result.with_suffix(".pt")))
        except BaseException:
            _write(begun, {**record, "seconds": before + time.perf_counter() - start})
            raise
        record |= {"seconds": before + time.perf_counter() - start, "values": values}
        _write(result, record)
        return record

    def over_seeds(self, name: str, run: Callable[[int, Path], Mapping[str, float]]) -> dict[str, list[float]]:
        """A trial for each seed: a list of each value, in the order of the seeds. Of `FINISHED` those that are."""
        found = []
        for seed in self.seeds:
            of = f"{name} seed={seed}"
            if FINISHED not in self.only:
                found.append(self.trial(of, lambda checkpoint, seed=seed: run(seed, checkpoint)))  # type: ignore[misc]
            elif (one := self.finished(of)) is not None:
                found.append(one)
        return {
            key: [one[key] for one in found if key in one] for key in dict.fromkeys(k for one in found for k in one)
        }

    def note(self, values: Mapping[str, list[float]]) -> str:
        """For a line whose values are `over_seeds`: of how few seeds the one with the fewest is; "" if of all."""
        fewest = min(map(len, values.values()), default=0)
        return "" if fewest == len(self.seeds) else f"{fewest or 'none'} of {len(self.seeds)} seeds"


def _unfinished(checkpoint: Path) -> dict[str, float]:
    raise UserError(f"{checkpoint.with_suffix('.json')} was there a moment ago. Start this again.")


def _write(path: Path, record: dict[str, Any]) -> None:
    """Write a record; numbers that are not finite become null."""
    with atomic_file(path) as file:
        file.write(json_text(record, indent=1).encode())


def _read(path: Path) -> dict[str, Any]:
    """A saved record, with NaN for null. Raises UserError for a damaged file."""
    remedy = "Remove it, and the trial is run again."
    record = read_json(path, remedy)
    hardware, seconds, values = record.get("hardware"), record.get("seconds"), record.get("values", {})
    if not (
        isinstance(hardware, list)
        and all(isinstance(name, str) for name in hardware)
        and type(seconds) in (int, float)
        and isinstance(values, dict)
        and all(value is None or type(value) in (int, float) for value in values.values())
        and (path.suffix != ".json" or "values" in record)
    ):
        raise UserError(
            f"{path} is not what a trial wrote: hardware, seconds and values are wrong or missing. {remedy}"
        )
    if "values" in record:
        record["values"] = {key: math.nan if value is None else value for key, value in values.items()}
    return record


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `mambaseq reproduce` runs: a function from a context to tables, and how many seeds it takes if not told.

    brings: whether it needs files that users bring (`Context.brought`). by_clock: whether it trains by the clock
        (`Context.minutes`). by_steps: whether users may say for how many steps it trains (`Context.steps`). settings:
        the modules whose source finished trials belong to; () for the recipe's own and those that it takes from.
        configs: names of the configurations whose settings finished trials belong to as well.
    """

    run: Callable[[Context], list[Table]]
    seeds: int = 3
    brings: bool = False
    by_clock: bool = False
    by_steps: bool = False
    settings: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
