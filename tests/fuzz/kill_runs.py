"""Kills training runs at random moments and in the middle of every kind of write, resumes them without arguments, and
holds what they end with against runs that nobody disturbed.

    python tests/fuzz/kill_runs.py --runs 50 --seed 0

A run counts when its last, best and exported weights equal those of the undisturbed run bit for bit, results.json has
the same keys and values (times aside), curves.png, model.json and data.json are there, the learning curve has all of
its points, and no temporary file is left in the run's folder or the cache. Not collected by pytest: it takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import mambaseq.runs.training
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main as mambaseq
from mambaseq.reporting.runs import RunFolder

TIMED = {"train_seconds", "tokens_per_second", "train_tokens"}  # a killed run trained some steps twice

CONFIG = """
seed: 1
metrics: [bits_per_byte]
data: {{name: text/corpus, files: [{text}], length: 32}}
loader: {{batch_size: 4, num_workers: {workers}}}
model:
  d_model: 8
  backbone: {{name: residual, n_layers: 1, dropout: 0.1}}
  mixer: {{name: mamba, d_state: 4}}
optimizer: {{lr: 1.0e-2, warmup_steps: 3}}
checkpoint: {{every_n_steps: 3, monitor: "{monitor}"}}
trainer: {{max_steps: 24, accelerator: cpu, enable_progress_bar: false, val_check_interval: 4, log_every_n_steps: 2,
  limit_val_batches: 3, check_val_every_n_epoch: null}}
"""


@dataclasses.dataclass
class Kind:
    """A kind of run, and the end of one that nobody disturbed. moments: how many writes it makes. seconds:
    of processor time."""

    workers: int
    monitor: str
    folder: Path
    moments: int = 0
    seconds: float = 0.0


class Moments:
    """Counts the moments of writes in the folders of a run, and sends this process a signal at one of them: before a
    temporary file or folder is made, flushed or put in place, and before anything is removed."""

    def __init__(self, folder: Path, moment: int, number: int) -> None:
        self.folder, self.moment, self.number = folder, moment, number
        self.process, self.counted = os.getpid(), 0

    def count(self, what: str, path: str) -> None:
        if os.getpid() != self.process or str(self.folder) not in path:  # not a loader's, and not of the machine
            return
        self.counted += 1
        if self.counted == self.moment:
            (self.folder.parent / f"{self.folder.name}.moment").write_text(f"{what} {path}")
            os.kill(self.process, self.number)

    def install(self) -> None:
        def before(owner: Any, name: str, path_of: Callable[..., str]) -> None:
            function = getattr(owner, name)

            def wrapped(*arguments: Any, **options: Any) -> Any:
                self.count(name, path_of(*arguments, *options.values()))
                return function(*arguments, **options)

            setattr(owner, name, wrapped)

        for name in ("rename", "replace", "unlink", "mkdir"):
            before(Path, name, lambda path, *rest: str(path))
        before(Path, "open", lambda path, mode="r", *rest: "" if mode in ("r", "rb") else str(path))
        before(shutil, "rmtree", lambda path, *rest: str(path))
        before(os, "fsync", lambda descriptor: str(Path(f"/proc/self/fd/{descriptor}").readlink()))


@dataclasses.dataclass
class Child:
    """A `mambaseq fit` in a forked process, which begins with everything imported. folder: of the run and its cache."""

    pid: int
    folder: Path

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def busy_for(self) -> float | None:
        """Seconds of processor time, which do not depend on what else the machine does; None once it is over."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def output(self) -> str:
        return (self.folder.parent / f"{self.folder.name}.output").read_text(errors="replace")


def start(folder: Path, config: Path, moment: int = 0, number: int = signal.SIGKILL) -> Child:
    """Begin a run, or resume without arguments what has begun."""
    out = folder / "run"
    begun = (out / "config.yaml").is_file()
    which = ["--resume", str(out)] if begun else ["--config", str(config), "--out", str(out)]
    if pid := os.fork():
        return Child(pid, folder)
    code = 1
    try:
        with (folder.parent / f"{folder.name}.output").open("ab", buffering=0) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.environ["MAMBASEQ_CACHE"] = str(folder / "cache")
        moments = Moments(folder, moment, number)
        moments.install()
        code = mambaseq(["fit", *which])
        if moment == 0:
            (folder.parent / f"{folder.name}.count").write_text(str(moments.counted))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["state_dict"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def unnamed_parts(run: RunFolder) -> list[Path]:
    """Folders of parts that neither checkpoint's file names."""
    files = [torch.load(path, weights_only=True) for path in (run.last, run.best) if path.is_file()]
    named = {file["parts"]["folder"] for file in files if "parts" in file}
    return [path for path in run.last.parent.glob("*.parts") if path.name not in named]


def faults(whole: Path, out: Path, cache: Path) -> list[str]:
    """What a finished run lacks beside one that was not disturbed."""
    one, other = RunFolder(whole), RunFolder(out)
    found = []
    for expected, path in ((one.last, other.last), (one.best, other.best)):
        if expected.exists() != path.exists():
            found.append(f"{path.name} is {'there' if path.exists() else 'missing'}")
        elif expected.exists() and not equal(weights(expected), weights(path)):
            found.append(f"{path.name} differs")
    for path in (other.weights, other.model / "model.json", other.curves, other.results, other.data, other.config):
        if not path.is_file():
            found.append(f"{path.name} is missing")
    if found:
        return found
    if not equal(load_file(one.weights), load_file(other.weights)):
        found.append("the exported weights differ")
    if json.loads((one.model / "model.json").read_text()) != json.loads((other.model / "model.json").read_text()):
        found.append("model.json differs")
    if not other.curves.read_bytes().startswith(b"\x89PNG"):
        found.append("curves.png is no picture")
    results, expected = (json.loads(run.results.read_text()) for run in (other, one))
    if results.keys() != expected.keys():
        found.append(f"results.json has {sorted(results.keys() ^ expected.keys())} or lacks it")
    found += [f"{key} differs" for key in expected.keys() - TIMED if results.get(key) != expected[key]]
    for name in ("train/loss", "val/loss"):
        missing = dict(one.curve(name)).items() - dict(other.curve(name)).items()
        if missing:
            found.append(f"the curve of {name} lacks {sorted(missing)[:3]}")
    left = [path for place in (out, cache) for path in place.rglob(".*") if path.name.endswith((".tmp", ".old"))]
    left += [path for place in (out, cache) for path in place.rglob(".*.tmp.*")]
    left += unnamed_parts(other)
    return found + [f"{path} is left" for path in left] + ([".holder is left"] if (out / ".holder").exists() else [])


def disturbed(kind: Kind, folder: Path, rng: random.Random) -> tuple[str, list[str]]:
    """Begin, kill, resume (which may be killed as well): what was done to it, and its faults."""
    config, note = kind.folder / "run.yaml", folder.parent / f"{folder.name}.moment"
    folder.mkdir()
    story = []
    for _ in range(rng.choice([1, 1, 2])):
        number = rng.choices([signal.SIGKILL, signal.SIGINT, signal.SIGTERM], [8, 1, 1])[0]
        at_write = rng.random() < 0.6
        note.unlink(missing_ok=True)
        child = start(folder, config, rng.randrange(1, kind.moments + 1) if at_write else 0, number)
        if not at_write:
            moment = rng.uniform(0.02, 1.0) * kind.seconds
            while (busy := child.busy_for()) is not None and busy < moment:
                time.sleep(0.005)
            os.kill(child.pid, number)
        code = child.wait()
        what = note.read_text().replace(str(folder), "") if note.exists() else "a random time"
        story.append(f"{number.name} at {what}, exit {code}")
        if code not in (-number, 0, 130):
            return "; ".join(story), [f"it ended with {code}: {child.output()[-700:]}"]
    child = start(folder, config)
    if (code := child.wait()) != 0:
        return "; ".join(story), [f"the resume ended with {code}: {child.output()[-700:]}"]
    return "; ".join(story), faults(kind.folder / "run", folder / "run", folder / "cache")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        words = random.Random(0)
        (place / "text.txt").write_text("\n".join("".join(words.choices("abcdefgh ", k=60)) for _ in range(400)))
        kinds = []
        for workers, monitor in ((0, "val/loss"), (2, ""), (0, ""), (2, "val/loss")):
            kind = Kind(workers, monitor, place / f"whole-{workers}-{bool(monitor)}")
            kind.folder.mkdir()
            config = kind.folder / "run.yaml"
            config.write_text(CONFIG.format(text=place / "text.txt", workers=workers, monitor=monitor))
            child = start(kind.folder, config)
            while (busy := child.busy_for()) is not None:
                kind.seconds = busy
                time.sleep(0.01)
            if child.wait() != 0:
                print(child.output())
                return 1
            kind.moments = int((place / f"{kind.folder.name}.count").read_text())
            print(f"{workers} workers, monitor {monitor or 'none'}: {kind.moments} moments of writes", flush=True)
            kinds.append(kind)
        for number in range(arguments.runs):
            kind = kinds[number % len(kinds)]
            folder = place / f"run{number}"
            story, found = disturbed(kind, folder, rng)
            failed += bool(found)
            verdict = "; ".join(found) if found else "whole"
            print(f"{number + 1:3} {kind.workers} workers, {story}: {verdict}", flush=True)
            shutil.rmtree(folder)
    print(f"{arguments.runs - failed} of {arguments.runs} runs ended bit-identical and complete")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
