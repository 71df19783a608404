"""What a run has generated while it trained: a folder of clips, which stays small, and the section that plays them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mambaseq.atomic import atomic_file, json_text
from mambaseq.errors import UserError
from mambaseq.plain import read_json
from mambaseq.reporting import Section
from mambaseq.reporting.page import write_page
from mambaseq_audio.io import encode_wav
from mambaseq_audio.players import FORMAT, Clip, grid, scales, thumbnail

KEPT = 12
"""Steps whose clips a run keeps; see `thinned`."""
EMBEDDED = 8 * 2**20
"""Bytes of sound that a run's page holds itself."""


def thinned(steps: Sequence[int], most: int = KEPT) -> list[int]:
    """Which of these steps, in ascending order, are kept: all up to so many; then those go whose neighbours are nearest
    by their ratio. The first and the last stay.

    >>> thinned([1, 2, 3, 4, 8], most=4)
    [1, 2, 4, 8]
    """
    kept = list(steps)
    while len(kept) > max(most, 2):
        ratios = [kept[i + 1] / max(kept[i - 1], 1) for i in range(1, len(kept) - 1)]
        del kept[1 + ratios.index(min(ratios))]
    return kept


class Samples:
    """The folder `samples/` of a run: `real/`, a folder for each step, `samples.json` with what they are, and a page.
    Each clip is a sound file with its picture beside it."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / "samples"
        self.record: dict[str, Any] = {}
        if (self.path / "samples.json").is_file():
            with contextlib.suppress(UserError):
                self.record = read_json(self.path / "samples.json")

    def begin(self, settings: dict[str, Any], reals: Sequence[np.ndarray], step: int) -> None:
        """Write the recordings; keep of what is there what a run at this step has made by these settings. Raises
        UserError for a full disk."""
        seconds, peak = scales(reals, settings["sample_rate"])
        settings = {**settings, "seconds": max(seconds, settings["seconds"]), "peak": peak}
        same = self.record.get("settings") == settings
        for one in self.steps():
            if one > step or not same:
                self._remove(one)
        of = self.record.get("steps", {})
        kept = {str(one): of[str(one)] for one in self.steps() if same and one <= step}
        self.record = {"settings": settings, "steps": kept}
        self._write("real", reals)
        self._save()

    def steps(self) -> list[int]:
        found = self.record.get("steps", {})
        return sorted(int(name) for name in found if name.isdecimal()) if isinstance(found, dict) else []

    def has(self, step: int) -> bool:
        return step in self.steps() and not self.record["steps"][str(step)].get("failed")

    def add(self, step: int, signals: Sequence[np.ndarray], seconds: float) -> None:
        """Write the clips of a step, remove those of steps that are not kept, and write the page. Raises UserError for
        a full disk."""
        self._write(f"step-{step}", signals)
        self.record["steps"][str(step)] = {"seconds": round(seconds, 2)}
        for one in set(self.steps()) - set(thinned(self.steps())):
            self._remove(one)
            del self.record["steps"][str(one)]
        self._save()

    def failed(self, step: int, reason: str) -> None:
        self.record["steps"][str(step)] = {"failed": reason}
        self._save()

    def _remove(self, step: int) -> None:
        shutil.rmtree(self.path / f"step-{step}", ignore_errors=True)

    def _write(self, name: str, signals: Sequence[np.ndarray]) -> None:
        settings = self.record["settings"]
        (self.path / name).mkdir(parents=True, exist_ok=True)
        for number, signal in enumerate(signals):
            with atomic_file(self.path / name / f"{number}.{FORMAT}") as file:
                file.write(encode_wav(signal, settings["sample_rate"], FORMAT))
            with atomic_file(self.path / name / f"{number}.png") as file:
                file.write(thumbnail(signal, settings["sample_rate"], settings["seconds"], settings["peak"]))

    def _save(self) -> None:
        with atomic_file(self.path / "samples.json", "w", encoding="utf-8") as file:
            file.write(json_text(self.record, indent=1) + "\n")
        if (section := self.section(beside=True)) is not None:
            write_page(self.path / "index.html", f"{self.run.name}: as it learns", section.summary, [section])

    def section(self, beside: bool = False) -> Section | None:
        """The clips, a row for each recording, a column for each step; None where there are none. The page holds at
        most 8 MiB of sound, and has links to the files of what is more. beside: for a page in the folder itself, which
        holds none."""
        settings, steps = self.record.get("settings"), self.steps()
        if not isinstance(settings, dict) or not steps:
            return None
        names = [str(name) for name in settings["names"]]
        folders = {"real": "real", **{f"step {step:,}": f"step-{step}" for step in steps}}
        left, linked = 0 if beside else EMBEDDED, 0
        cells: dict[str, list[Clip | str]] = {}
        # the recordings, the last and the first step are what is to be heard in any case
        for column in sorted(folders, key=lambda one: one not in (*list(folders)[:2], list(folders)[-1])):
            folder = self.path / folders[column]
            files = [folder / f"{number}.{FORMAT}" for number in range(len(names))]
            size = sum(file.stat().st_size for file in files if file.is_file())
            inside = size <= left
            left, linked = left - inside * size, linked + (not inside)
            missing = self.record["steps"].get(column.removeprefix("step ").replace(",", ""), {}).get("failed")
            base = "" if beside else "samples/"
            cells[column] = [
                _clip(file, f"{base}{folders[column]}/{file.name}", inside, settings["seconds"])
                or missing
                or "Its file is missing."
                for file in files
            ]
        outside = "" if beside or not linked else f" The sounds of {linked} columns are in samples/, beside this page."
        took = self.record["steps"][str(steps[-1])].get("seconds")
        begun = f", each goes on from {settings['prompt']:,} samples of the recording" if settings.get("prompt") else ""
        body = (
            f"<p>Each time the same conditions, and the same seed ({settings['seed']}) and temperature "
            f"({float(settings['temperature']):g}){begun}. All pictures have one scale of time and loudness, that of "
            f"the recordings. At most {KEPT} steps are kept, early ones nearer to each other."
            + (f" The last one took {took:.1f} s." if took is not None else "")
            + ("" if beside else ' While a run trains, <a href="samples/index.html">samples/index.html</a> has them.')
            + outside
            + "</p>"
        )
        rows = [(name, {column: cells[column][number] for column in folders}) for number, name in enumerate(names)]
        summary = f"{len(names)} clips after each of {len(steps)} steps, up to {steps[-1]:,}, beside real recordings"
        return Section("As it learns to speak", summary, body + grid(rows, list(folders), name="clips as it learns"))


def _clip(file: Path, link: str, inside: bool, seconds: float) -> Clip | None:
    """A clip that has been written; None where it is not there."""
    try:
        own = soundfile.info(file).duration
        sound = file.read_bytes() if inside else link
        return Clip(sound, file.with_suffix(".png").read_bytes(), own, min(own / seconds, 1.0))
    except (soundfile.SoundFileError, OSError):
        return None
