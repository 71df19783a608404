"""What a recipe is run with, and what it has found already: a run that was interrupted goes on."""

from __future__ import annotations

import dataclasses
import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import torch
from tqdm import tqdm

from mambaseq.atomic import atomic_file
from mambaseq.errors import UserError, did_you_mean
from mambaseq.reproduction.tables import Table

Scale = Literal["full", "small", "tiny"]
SCALES: tuple[Scale, ...] = ("full", "small", "tiny")

_T = TypeVar("_T")


@dataclasses.dataclass
class Context:
    """Device, sizes, seeds, and the folder in which finished trials are kept.

    scale: "full" is what is reported, on a GPU; "small" takes minutes on a CPU; "tiny" seconds, and learns nothing.
    only: names of lines, or of what else a recipe lets choose; empty for all of them.
    hardware: what trials run on. used: what those that were asked for had run on, in earlier runs too.
    """

    device: torch.device
    scale: Scale
    seeds: list[int]
    folder: Path
    only: list[str] = dataclasses.field(default_factory=list)
    hardware: str = ""
    used: set[str] = dataclasses.field(default_factory=set)

    def at(self, *, full: _T, small: _T, tiny: _T) -> _T:
        """The one of three values that belongs to the scale."""
        return {"full": full, "small": small, "tiny": tiny}[self.scale]

    def wanted(self, names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
        """Those of a recipe's lines that were asked for; all where none was.

        others: what else can be asked for, by a call of its own: columns, say.
        Raises UserError where what was asked for is in neither.
        """
        own = list(names)
        known = [*own, *others]
        for name in self.only:
            if name not in known:
                raise UserError(
                    f"--only names {name!r}, which this recipe has not.{did_you_mean(name, known)} "
                    f"It has: {', '.join(map(repr, known))}."
                )
        return [name for name in own if name in self.only] or own

    def trial(self, name: str, run: Callable[[Path], Mapping[str, float]]) -> dict[str, float]:
        """What `run` found, given the file for its checkpoint; or what it found when it ran before.

        name: tells the trial from all others of the recipe, its seed included.
        run: may write more checkpoints, with another part before the suffix: `checkpoint.with_suffix(".1.pt")`.
        """
        stem = re.sub(r"[^\w.=-]+", "_", name)
        result, checkpoint = self.folder / "trials" / f"{stem}.json", self.folder / "trials" / f"{stem}.pt"
        known = result.exists()
        if known:
            record = json.loads(result.read_text(encoding="utf-8"))
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            record = {"hardware": self.hardware, "values": dict(run(checkpoint))}
            with atomic_file(result) as file:
                file.write(json.dumps(record, indent=1).encode())
        for path in (checkpoint, *result.parent.glob(f"{glob.escape(stem)}.*.pt")):
            path.unlink(missing_ok=True)
        self.used.add(record["hardware"])
        found: dict[str, float] = record["values"]
        if known:
            return found
        shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
        tqdm.write(f"{name}: {shown}")
        return found

    def over_seeds(self, name: str, run: Callable[[int, Path], Mapping[str, float]]) -> dict[str, list[float]]:
        """A trial for each seed: what each of their values was, a list in the order of the seeds."""
        found = [
            self.trial(f"{name} seed={seed}", lambda checkpoint, seed=seed: run(seed, checkpoint))  # type: ignore[misc]
            for seed in self.seeds
        ]
        return {
            key: [one[key] for one in found if key in one] for key in dict.fromkeys(k for one in found for k in one)
        }


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `mambaseq reproduce` runs: a function from a context to tables, and how many seeds it takes if not told."""

    run: Callable[[Context], list[Table]]
    seeds: int = 3
