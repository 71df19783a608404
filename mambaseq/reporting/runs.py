"""A run's folder: where things are, and reading them.

config.yaml   data.json (what the data are)   checkpoints/last.ckpt, best.ckpt   model/ (weights and description)
checkpoints/last.ckpt.TAG.parts/ (the tensors of a sharded run's checkpoint, which last.ckpt names; best.ckpt alike)
logs/version_K/metrics.csv, first_step.json (what the wait for it was for)   tensorboard/
results.json   curves.png   confusion.png
evaluation.json (what the page draws of a test)   report.html (the run's page)   .lock (held while it trains)
samples/ (what a callback has generated while it trained)
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mambaseq.atomic import atomic_file, json_text, write_failed
from mambaseq.errors import ConfigError, UserError, cut_list, shown
from mambaseq.plain import read_json
from mambaseq.resources import near_folder

_OURS = (
    "config.yaml",
    "data.json",
    "left_out.jsonl",
    "checkpoints",
    "model",
    "logs",
    "tensorboard",
    "results.json",
    "evaluation.json",
    "curves.png",
    "report.html",
    "samples",
)
_WAIT = 2.0  # seconds that another process may need to write its results
_WAIT_FOR_THE_DEAD = 20.0  # loader processes notice a killed run only after seconds, and may hold its lock


def rank() -> int:
    """The rank of this process in a run, before Lightning knows it."""
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if (text := os.environ.get(variable, "")).isdecimal():
            return int(text)
    return 0


def default_folder(config: str) -> Path:
    """The default folder of a run: `dna/demo` → `runs/dna-demo`."""
    return Path("runs") / config.replace("/", "-").removesuffix(".yaml")


class Point(NamedTuple):
    """A logged number after an optimizer step (0 is the first), and the tokens and seconds trained until then; None if
    an earlier version did not log those."""

    step: int
    value: float
    tokens: int | None
    seconds: float | None


class RunInUse(UserError):
    """Another process trains in the run's folder."""


class RunFolder:
    """Paths of a run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.last = self.path / "checkpoints" / "last.ckpt"
        self.best = self.path / "checkpoints" / "best.ckpt"
        self.model = self.path / "model"
        self.weights = self.model / "model.safetensors"
        self.logs = self.path / "logs"
        self.results = self.path / "results.json"
        self.evaluation = self.path / "evaluation.json"
        self.curves = self.path / "curves.png"
        self.report = self.path / "report.html"
        self.data = self.path / "data.json"
        self.left_out = self.path / "left_out.jsonl"
        self._lock, self._holder = self.path / ".lock", self.path / ".holder"

    def check_place(self, *, begins: bool) -> None:
        """Raise UserError if no run can start or resume here: an invalid name, a file, a folder without write
        permission, or, for a new run, a folder of runs, or one where other files have a run's names."""
        if "\0" in str(self.path):
            raise UserError(
                f"{shown(self.path, 300)} is not a folder: its name contains a NUL character. Choose another --out."
            )
        try:
            self.path.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.path} cannot be a run's folder: {error.strerror}. Choose another --out.") from error
        if not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder. Choose another --out, or remove it.")
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UserError(
                f"The folder {self.path} cannot be written to. Change its permissions, or copy the run elsewhere."
            )
        if begins and not self.config.is_file() and (runs := self._runs_within()):
            raise UserError(
                f"{self.path} is a folder of runs ({cut_list(runs, 3)}), and a run there would hide them. Give it a "
                f"folder of its own: --out {self.path / 'NAME'}."
            )
        taken = [name for name in _OURS if os.path.lexists(self.path / name)]
        if begins and taken and not self._lock.exists() and not (self.config.is_file() and self.last.is_file()):
            raise UserError(
                f"{self.path} holds {', '.join(taken)} but no run: a run would overwrite it. Choose another --out, or "
                "move it away."
            )

    def _runs_within(self) -> list[str]:
        """The names of the folders in this one that hold a run, as `mambaseq runs` finds them."""
        try:
            names = sorted(os.listdir(self.path))  # noqa: PTH208 - names
        except OSError:
            return []
        inner = (RunFolder(self.path / name) for name in names)
        return [one.path.name for one in inner if one.config.is_file() and one.model.is_dir()]

    def others(self) -> list[str]:
        """The names of what is in the folder and no part of a run; hidden files do not count."""
        try:
            names = sorted(os.listdir(self.path))  # noqa: PTH208 - names
        except OSError:  # nothing is there yet
            return []
        return [name for name in names if name not in _OURS and not name.startswith(".")]

    def check_new(self) -> None:
        """Raise ConfigError if a run is here, which a new one would overwrite. Of several processes only the first
        asks: it may have begun when others do."""
        if rank() == 0 and self.last.exists():
            raise ConfigError(
                f"{self.path} already holds a run. Resume it (`mambaseq fit --resume {self.path}`), give another "
                "--out, or remove it."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process: no other process writes during the block. The kernel releases the lock if the
        process dies. Other processes of a distributed run need no lock.

        Raises UserError that names the process with the lock, or if the folder cannot be written to.
        """
        import filelock

        if rank() != 0:
            yield
            return
        made = [path for path in (self.path, *self.path.parents) if not os.path.lexists(path)]
        begins = not os.path.lexists(self._lock)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._lock)
            deadline, last = time.monotonic() + _WAIT, time.monotonic() + _WAIT_FOR_THE_DEAD
            while True:
                try:
                    lock.acquire(timeout=0.2)
                    break
                except filelock.Timeout:
                    pid, host = self._held_by()
                    dead = host == platform.node() and pid.isdecimal() and not _lives(int(pid))
                    if time.monotonic() > (last if dead else deadline):
                        raise RunInUse(
                            f"{self.path} is in use: process {pid or '?'} on {host or '?'} trains there. Wait until it "
                            "ends, stop it, or choose another --out."
                        ) from None
        except OSError as error:
            told = write_failed(self._lock, error)
            raise (
                told or UserError(f"The folder {self.path} cannot be used: {error.strerror}. Choose another --out.")
            ) from error
        try:
            with contextlib.suppress(OSError):
                self._holder.write_text(f"{os.getpid()} {platform.node()}\n", encoding="utf-8")
            yield
        except BaseException:
            self._holder.unlink(missing_ok=True)
            if begins:
                self._leave(made)
            raise
        finally:
            self._holder.unlink(missing_ok=True)
            lock.release()

    def _leave(self, made: Sequence[Path]) -> None:
        """Remove the lock where nothing else is in the folder, and then the folders that were made for it."""
        with contextlib.suppress(OSError):
            if os.listdir(self.path) == [self._lock.name]:  # noqa: PTH208 - names
                self._lock.unlink()
                for path in made:
                    path.rmdir()

    def _held_by(self) -> tuple[str, str]:
        try:
            pid, _, host = self._holder.read_text(encoding="utf-8").strip().partition(" ")
        except (OSError, UnicodeDecodeError):
            return "", ""
        return pid[:20], host[:80]

    def remove(self) -> None:
        """Remove a run, and nothing else in its folder. Raises UserError if there is no run."""
        self.require()
        self.check_place(begins=True)
        for name in (*_OURS, self._lock.name, self._holder.name):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def require(self) -> RunFolder:
        """Raise UserError unless there is a run here."""
        if "\0" in str(self.path) or not os.path.isfile(self.config):  # noqa: PTH113 - Path's raises for some names
            model = self.path / "model" / "model.json"
            if "\0" not in str(self.path) and os.path.isfile(model):  # noqa: PTH113 - as above
                raise UserError(
                    f"{self.path} holds a model without a run: config.yaml is missing, since it was imported without a "
                    "tokenizer, or the file was removed. Import it again with --tokenizer FILE, or begin a run with "
                    f"the model: mambaseq fit --config NAME --init-from {self.path}"
                )
            near = near_folder(self.path, lambda folder: os.path.isfile(folder / "config.yaml"))  # noqa: PTH113 - as above
            raise UserError(
                f"There is no run at {self.path}: config.yaml is missing.{near} Give the folder that `mambaseq fit` "
                "made."
            )
        return self

    def next_version(self) -> int:
        """Number of the next metrics file: a resumed run writes to a new one, so that none is lost."""
        return sum(1 for _ in self.logs.glob("version_*"))

    def read_results(self) -> dict[str, Any]:
        """The contents of results.json; {} if there is none yet. Raises UserError if it is damaged."""
        if not self.results.is_file():
            return {}
        return read_json(self.results, "Delete it; `mambaseq validate` and `mambaseq test` write their results again.")

    def read_evaluation(self) -> dict[str, Any]:
        """The contents of evaluation.json: what pictures of an evaluation are drawn from. {} if there is none, or a
        damaged one: the next evaluation writes it again."""
        try:
            return read_json(self.evaluation) if self.evaluation.is_file() else {}
        except UserError:
            return {}

    def update_evaluation(self, found: Mapping[str, Any]) -> None:
        """Replace the sets of evaluation.json that `found` has; None removes one. Numbers that are not finite become
        null."""
        merged = {key: value for key, value in {**self.read_evaluation(), **found}.items() if value is not None}
        if merged or self.evaluation.is_file():
            with atomic_file(self.evaluation, "w", encoding="utf-8") as file:
                file.write(json_text(merged) + "\n")

    def update_results(self, remove: Iterable[str] = (), **values: Any) -> None:
        """Merge values into results.json, and remove the keys `remove`. Numbers that are not finite become null.

        Raises UserError if the existing file is damaged.
        """
        merged = {**self.read_results(), **values}
        merged = {key: value for key, value in merged.items() if key not in remove}
        with atomic_file(self.results, "w", encoding="utf-8") as file:
            file.write(json_text(merged, indent=2) + "\n")

    def log(self) -> dict[str, list[Point]]:
        """All metrics that were logged, over all starts of the run, in the order of the steps; a repeated step's last
        value."""
        points: dict[str, dict[int, Point]] = {}
        for path in self.starts():
            text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
            whole = text[: text.rfind("\n") + 1]  # a killed process may have left half a line
            for row in csv.DictReader(io.StringIO(whole)):
                tokens, seconds = _number(row.get("tokens")), _number(row.get("seconds"))
                spent = None if tokens is None else int(tokens), seconds
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    step = int(row["step"])
                    for metric in row.keys() - {None, "epoch", "step", "tokens", "seconds"}:
                        with contextlib.suppress(ValueError, TypeError):
                            if row[metric]:
                                points.setdefault(metric, {})[step] = Point(step, float(row[metric]), *spent)
        return {metric: [its[step] for step in sorted(its)] for metric, its in points.items()}

    def points(self, metric: str) -> list[Point]:
        """A logged metric, as `log` has it; empty where it was not logged."""
        return self.log().get(metric, [])

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a logged metric over all starts of the run. Of a repeated step, the last value counts."""
        return [(point.step, point.value) for point in self.points(metric)]

    def starts(self) -> list[Path]:
        """The metrics files of a run, one for each time that it was begun or gone on with, in their order."""
        return sorted(self.logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))

    def read_parts(self) -> dict[str, Any]:
        """Where the time of a step went when it was last measured (`trainer.profiler parts`); {} if it was not, or the
        file is damaged."""
        for path in reversed(self.starts()):
            if (parts := path.parent / "parts.json").is_file():
                try:
                    return read_json(parts)
                except UserError:
                    return {}
        return {}


def _number(text: str | None) -> float | None:
    """A finite number; None for anything else."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
