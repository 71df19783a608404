"""Fuzzing: `python tests/fuzz/run.py --cases 10000 --jobs 2`; cases again: `--target T --seed S --only N`.

Cases run one after the other in worker processes (`watching.py`); a worker that dies or does not answer is a failure of
its case and is replaced. Ends with 1 when anything failed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import os
import queue
import random
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OPS = HERE.parents[1] / "mambaseq" / "ops"
sys.path.insert(0, str(HERE))

STARTS = 1200.0  # seconds until a worker is ready, where many start at once or the machine has other work
LOST = 90.0  # seconds without an answer, after which a worker is killed
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TQDM_MININTERVAL": "60",
    "MAMBASEQ_MAX_PARAMETERS": "2000000",
    "MAMBASEQ_MAX_LAYERS": "50",
    "MAMBASEQ_MAX_WORKERS": "3",
    "MAMBASEQ_MAX_DEVICES": "1",  # a second one is a second process, and a case must start none
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "agg",
}


def plan(
    cases: int, target: str | None, seed: int, runs: Sequence[str] = (), *, quick: bool = False
) -> list[dict[str, Any]]:
    """The cases, the targets mixed, in an order that depends on nothing but the arguments."""
    from targets import NEEDS, TARGETS

    wanted = {target: 1} if target else {name: share[quick] for name, (_, *share) in TARGETS.items()}
    wanted = {name: share for name, share in wanted.items() if NEEDS.get(name, "dna_lm") in runs or not runs}
    counts = {name: round(cases * share / sum(wanted.values())) for name, share in wanted.items()}
    listed = [{"target": name, "seed": seed, "number": i} for name, count in counts.items() for i in range(count)]
    random.Random(seed).shuffle(listed)
    return listed


def work(world_folder: Path, scratch: Path, runs: Sequence[str]) -> None:
    """A worker: reads cases from standard input, writes outcomes to what was standard output."""
    answers = os.fdopen(os.dup(1), "w")
    log = os.open(scratch / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.dont_write_bytecode = True
    import serving
    import watching
    from targets import WARM
    from world import World, enter, make_world

    made = (world_folder / "elsewhere.txt").exists()
    world = World(world_folder) if made else make_world(world_folder, runs)
    enter(world)
    os.environ["MAMBASEQ_CACHE"] = str(world.cache)
    os.environ["HF_HOME"] = str(scratch / "hf")
    site = serving.serve(world.folder / "served")
    _warm(world, made)
    for name in WARM.keys() & set(runs):
        WARM[name]()
    watch = watching.Watch()
    kept = os.environ.get("NUMBA_CACHE_DIR", scratch / "hf")
    watch.port, watch.caches = site.port, (os.path.realpath(scratch / "hf"), os.path.realpath(kept))
    watching.limit_memory(3 * 2**30)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(one_case(world, scratch / "case", watch, site, **case)), file=answers, flush=True)


def _warm(world: Any, all_of_it: bool) -> None:
    """Everything that is imported or compiled at first use, so that no case pays for it or is blamed for it. all_of_it:
    also what is used while a world is made."""
    from cases import condition, generated_as
    from world import INPUTS, call

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        for name in world.names:
            common = ["--checkpoint", world.run(name), "--device", "cpu", *condition(name)]
            if all_of_it and name in INPUTS:
                call("predict", *common, world.data / INPUTS[name], "--out", Path(folder) / "out.csv")
            if name in ("audio", "dna_lm", "text"):
                call("generate", *common, "-n", 3, "--out", Path(folder) / generated_as(name))
        if all_of_it:
            shutil.copytree(world.run("dna_lm"), Path(folder) / "run")
            call("fit", "--resume", Path(folder) / "run", "--trainer.max_steps", 2)


def one_case(world: Any, folder: Path, watch: Any, site: Any, target: str, seed: int, number: int) -> dict[str, Any]:
    """Make a case, run it, and look at what came of it."""
    import cases
    import targets
    import watching

    watching.empty(folder)
    place = cases.Place(world, folder, random.Random(f"{target} {seed} {number}"), site.url, site.files, number)
    case = targets.TARGETS[target][0](place)
    watching.begin(folder)
    before = dict(os.environ)
    os.environ |= {"MAMBASEQ_CACHE": str(folder / "cache"), **case.environment}
    if "MAMBASEQ_CACHE" not in case.environment and case.argv[0] in ("fit", "test", "validate"):
        shutil.copytree(world.cache, folder / "cache", dirs_exist_ok=True)
    try:
        outcome, out, err = watching.run_command(watch, folder, case.argv)
    finally:
        os.environ.clear()
        os.environ.update(before)
    watching.check_message(outcome, case.argv, err, case.wrong)
    watching.check_files(outcome, folder)
    if case.senseless and outcome.ended in ("accepted", "interrupted", "diverged"):
        outcome.fail("makes no sense", case.senseless, f"{outcome.ended}: {err}")
    if outcome.ended == "accepted" and case.same is not None:
        written, expected = case.same
        differ = cases.runs_differ if written.is_dir() else cases.tables_differ
        if differ(written, expected):
            outcome.fail("silently different", f"{target}: what was harmed was accepted and gives another result", err)
    argv = [argument.replace(str(folder), "CASE")[:200] for argument in case.argv]
    return {**dataclasses.asdict(outcome), "argv": argv, "out": out[-500:], "err": err[-3000:]}


class Worker:
    """A worker process and its pipe."""

    def __init__(self, world: Path, scratch: Path, runs: Sequence[str]) -> None:
        self.world, self.scratch, self.runs = world, scratch, runs
        self.start()

    def start(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "run.py"), "--worker", str(self.world), str(self.scratch), *self.runs]
        environment = {**os.environ, **ENVIRONMENT}
        try:  # where Numba keeps what it compiled, so that no case has to make it
            for folder in {source.parent for source in OPS.rglob("*.py")}:
                (folder / "__pycache__").mkdir(exist_ok=True)
        except OSError:
            environment.setdefault("NUMBA_CACHE_DIR", str(self.scratch.parent / "numba"))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        if self._line(STARTS) != "ready":
            raise SystemExit(f"a worker cannot start: {self._said()}")  # the log may go with its folder

    def _said(self) -> str:
        """The end of the worker's log."""
        log = self.scratch / "log"
        return log.read_bytes()[-1500:].decode(errors="replace") if log.is_file() else "it wrote no log"

    def _line(self, patience: float) -> str | None:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], patience)
        return self.process.stdout.readline().decode().strip() if ready else None

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(case) + "\n").encode())
        self.process.stdin.flush()
        line = self._line(LOST)
        if line:
            return json.loads(line)
        self.process.kill()
        code = self.process.wait()
        said = self._said()
        kind, group = ("hang", "no answer") if line is None else ("died", f"the process ended with {code}")
        self.start()
        return {
            "ended": "",
            "message": "",
            "seconds": LOST,
            "failures": [(kind, f"{group} in {case['target']}", said)],
            "argv": [],
        }

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def again(case: dict[str, Any]) -> str:
    return f"--target {case['target']} --seed {case['seed']} --only {case['number']}"


def run_all(
    cases: list[dict[str, Any]],
    world: Path,
    scratch: Path,
    jobs: int,
    runs: Sequence[str],
    report: Path | None = None,
    report_all: bool = False,
) -> list[dict[str, Any]]:
    """The outcomes of all cases, in the order of their ends; failures are printed and reported as they come, and with
    `report_all` all other outcomes are reported too."""
    if report is not None:
        report.write_text("")
    todo: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for case in cases:
        todo.put(case)
    done: list[dict[str, Any]] = []

    first = Worker(world, scratch / "job0", runs)  # makes the world where there is none

    def go(number: int) -> None:
        worker = Worker(world, scratch / f"job{number}", runs) if number else first
        while True:
            try:
                case = todo.get_nowait()
            except queue.Empty:
                break
            outcome = {**case, **worker.run(case)}
            done.append(outcome)
            for kind, group, _ in outcome["failures"]:
                print(f"{kind}: {group}   [{again(case)}]", flush=True)
            if report is not None and (report_all or outcome["failures"]):
                with report.open("a") as file:
                    file.write(json.dumps(outcome) + "\n")
            if len(done) % 250 == 0:
                print(f"{len(done)} of {len(cases)}", file=sys.stderr, flush=True)
        worker.stop()

    threads = [threading.Thread(target=go, args=(number,)) for number in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(done) < len(cases):  # a worker that cannot start ends alone
        seen = {(outcome["target"], outcome["number"]) for outcome in done}
        failure = {
            "ended": "",
            "message": "",
            "seconds": 0.0,
            "failures": [("not run", "no worker answered for it", "")],
        }
        done += [{**case, **failure, "argv": []} for case in cases if (case["target"], case["number"]) not in seen]
    return done


def summary(done: list[dict[str, Any]], seconds: float) -> str:
    """What came of all cases, and the failures by kind and group, each with the first case that shows it."""
    ends = collections.Counter(outcome["ended"] or "broken" for outcome in done)
    kinds = collections.Counter(kind for outcome in done for kind, _, _ in outcome["failures"])
    longest = max((len(outcome["message"]) for outcome in done if outcome["ended"] == "refused"), default=0)
    if not done:
        return "no case"
    slow = max(done, key=lambda outcome: outcome["seconds"])
    lines = [
        f"{len(done):,} cases in {seconds:,.0f} s ({1000 * seconds / len(done):.0f} ms each): "
        + ", ".join(f"{count:,} {end}" for end, count in ends.most_common()),
        f"longest message {longest} characters; slowest case {slow['seconds']:.1f} s ({again(slow)})",
        "failures: " + (", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "0"),
    ]
    for target in sorted({outcome["target"] for outcome in done}):
        spent = [outcome["seconds"] for outcome in done if outcome["target"] == target]
        lines.append(f"  {target:<14} {len(spent):6,} cases, {1000 * sum(spent) / len(spent):6.0f} ms each")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for outcome in done:
        for kind, group, _ in outcome["failures"]:
            groups.setdefault((kind, group), []).append(outcome)
    for (kind, group), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        first = min(found, key=lambda outcome: (outcome["number"], outcome["target"]))
        lines.append(f"  {len(found):4} x {kind}: {group}   [{again(first)}]")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="one target only")
    parser.add_argument("--only", metavar="NUMBERS", help="these cases of the target, with all that they printed: 3,17")
    parser.add_argument("--runs", nargs="*", default=[], help="runs to begin from (dna_lm text ...); all of them")
    parser.add_argument("--quick", action="store_true", help="mostly cases that take little time")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--world", type=Path, help="a folder that keeps what cases begin from, for the next time")
    parser.add_argument("--report", type=Path, help="write all failures there, a line of JSON each")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy the last case's folder there")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.worker:
        work(Path(arguments.worker[0]), Path(arguments.worker[1]), arguments.worker[2:])
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        world = arguments.world or Path(scratch) / "world"
        cases = plan(arguments.cases, arguments.target, arguments.seed, arguments.runs, quick=arguments.quick)
        if arguments.only is not None:
            cases = [
                {"target": arguments.target, "seed": arguments.seed, "number": int(n)}
                for n in arguments.only.split(",")
            ]
        started = time.monotonic()
        done = run_all(cases, world, Path(scratch), arguments.jobs, arguments.runs, arguments.report)
        seconds = time.monotonic() - started
        if arguments.only is not None:
            print(json.dumps(done, indent=1, ensure_ascii=False).replace("\\n", "\n"))
        if arguments.keep is not None:
            shutil.copytree(Path(scratch) / "job0" / "case", arguments.keep, symlinks=True)
        print(summary(done, seconds))
        return int(any(outcome["failures"] for outcome in done))


if __name__ == "__main__":
    sys.exit(main())
