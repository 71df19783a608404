"""All recipes that need no files of the user over all GPUs of a machine, then docs/reproduction.md: `python
benchmarks/reproduce_all.py`.

What is timed has a GPU to itself; the small trainings that are not timed come after it, several to a GPU (`--each`;
with CUDA's multi-process service running they share it without taking turns). Started again it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from mambaseq_synthetic.recipes import induction_heads, lra, recall, selection, selective_copying, state_tracking
from mambaseq_text.recipes import ablations, mixers
from tqdm import tqdm

from mambaseq.reproduction.tables import Report

KEPT = Path(__file__).parent / "reproduction"
SEEDS = (0, 1, 2)
BASELINE = ("Mamba with S6",)  # of the ablations, which all of its lines need


class Job(NamedTuple):
    """A part of a recipe: `--only` and `--seed`; all where there are none."""

    recipe: str
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    def command(self, scale: str, device: str, out: Path) -> list[str]:
        folder = str(out / f"{self.recipe}-{scale}")
        command = [sys.executable, "-m", "mambaseq.cli.main", "reproduce", self.recipe, "--scale", scale]
        command += ["--device", device, "--out", folder]
        command += ["--only", *self.only] if self.only else []
        return command + (["--seed", *map(str, self.seeds)] if self.seeds else [])

    def log(self, out: Path) -> Path:
        name = "-".join([self.recipe, *self.only, *map(str, self.seeds)])
        return out / "logs" / f"{name.replace('/', '_')}.log"


def timed() -> list[Job]:
    """What a GPU has for itself, one by one."""
    jobs = [Job("induction_heads", (name,), (0,)) for name in induction_heads.MODELS if name != "mamba"]
    jobs += [Job("induction_heads", ("mamba",), (seed,)) for seed in SEEDS]
    for name, (_, _, _, wanted) in selective_copying.MODELS.items():  # a line of which nothing is wanted has one seed
        jobs += [Job("selective_copying", (name,), (seed,)) for seed in (SEEDS if wanted else SEEDS[:1])]
    return [*jobs, *(Job("mixers", (name,)) for name in mixers.MIXERS)]


def untimed() -> list[Job]:
    """Each training once, whatever number of lines it is in."""
    jobs = [Job("lra", (mixer, task)) for mixer in lra.MIXERS for task in lra.TASKS]
    jobs += [Job("selection", (name,), (seed,)) for name in selection.LINES for seed in SEEDS]
    jobs += [
        Job("state_tracking", (name, task), (seed,))
        for name in state_tracking.MODELS
        for task in state_tracking.TASKS
        for seed in SEEDS
    ]
    jobs += [Job("recall", (name,), (seed,)) for name in recall.MODELS for seed in SEEDS]
    jobs += [Job("species_length", (), (seed,)) for seed in SEEDS]
    seen = []
    for entry in (entry for group in ablations.GROUPS for entry in group.entries):
        if (entry.mixer, entry.all_options()) not in seen:
            seen.append((entry.mixer, entry.all_options()))
            jobs.append(Job("ablations", (entry.name,)))
    return jobs


def run(jobs: list[Job], gpus: list[str], each: int, scale: str, device: str, out: Path) -> list[Job]:
    """So many at a time on each GPU. Returns those that failed."""
    if not jobs:
        return []
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus * each:
        free.put(gpu)
    (out / "logs").mkdir(parents=True, exist_ok=True)

    def one(job: Job) -> bool:
        gpu = free.get()
        try:
            with job.log(out).open("w") as log:
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2"}
                command = job.command(scale, device, out)
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
        finally:
            free.put(gpu)
        return done.returncode == 0

    with ThreadPoolExecutor(len(gpus) * each) as pool:
        fine = list(tqdm(pool.map(one, jobs), total=len(jobs), unit="part"))
    return [job for job, ok in zip(jobs, fine, strict=True) if not ok]


def visible() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them."""
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    return outer.split(",") if outer else [str(i) for i in range(torch.cuda.device_count())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="trials, reports and logs")
    parser.add_argument("--recipes", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--each", type=int, default=3, help="trainings that are not timed, to a GPU")
    parser.add_argument("--scale", choices=("full", "small", "tiny"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    gpus = visible() if arguments.device == "cuda" else [""]
    if not gpus:
        parser.error("there is no GPU here")
    first, second = (
        [job for job in jobs if not arguments.recipes or job.recipe in arguments.recipes]
        for jobs in (timed(), untimed())
    )
    names = list(dict.fromkeys(job.recipe for job in [*first, *second]))
    if not names or not {*arguments.recipes} <= {*names}:
        parser.error(f"--recipes must be of {', '.join(dict.fromkeys(job.recipe for job in [*timed(), *untimed()]))}")
    where = (arguments.scale, arguments.device, arguments.out)
    # what others wait for: the baseline of the ablations, and examples that all mixers learn from
    before = [job for job in second if job.only == BASELINE or job.only[:1] == (next(iter(lra.MIXERS)),)]
    failed = run(first, gpus, 1, *where)
    failed += run(before, gpus, arguments.each, *where)
    failed += run([job for job in second if job not in before], gpus, arguments.each, *where)
    whole = [Job(name) for name in names if all(job.recipe != name for job in failed)]
    failed += run(whole, gpus[:1], 1, *where)
    for job in failed:
        print(f"failed: see {job.log(arguments.out)}")
    if arguments.scale == "full":
        for name in (job.recipe for job in whole if job not in failed):
            for part in KEPT.glob(f"{name}-*.json"):
                part.unlink()
            folder = arguments.out / f"{name}-full"
            if arguments.each > 1 and any(job.recipe == name for job in second):  # seconds of a shared GPU say nothing
                dataclasses.replace(Report.read(folder / "report.json"), seconds=None).write(folder)
            shutil.copy(folder / "report.json", KEPT / f"{name}.json")
        subprocess.run([sys.executable, Path(__file__).parent / "reproduction.py"], check=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
