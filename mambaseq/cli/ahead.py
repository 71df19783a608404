"""The other processes of a run on several devices, started before anything slow is imported, so that they import beside
the first process. Lightning would start them after that.

Each waits, its imports done, for the environment that Lightning starts it with, and then is what Lightning would have
started: this command.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mambaseq.atomic import json_text
from mambaseq.importing import uncollected
from mambaseq.limits import DEVICES

_SCRIPT = "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from mambaseq.cli import ahead; ahead.wait()"
# in the environment of processes that something else starts, on this machine and others
_ELSEWHERE = (
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "SLURM_NTASKS",
    "JSM_NAMESPACE_RANK",
    "OMPI_COMM_WORLD_RANK",
)

Processes = dict[int, "subprocess.Popen[bytes]"]


def count_others(raw: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """How many processes a run will start besides the first; 0 if settings alone do not tell.

    raw: the configuration. overrides: `--key value`, over it.
    """
    trainer = raw.get("trainer")
    given = {**trainer} if isinstance(trainer, Mapping) else {}
    for index, word in enumerate(overrides):
        key, equals, text = word.partition("=")
        if key.startswith("--trainer"):
            given[key.removeprefix("--trainer.")] = text if equals else "".join(overrides[index + 1 : index + 2])
    count = str(given.get("devices", ""))
    most = _most(str(given.get("accelerator", "auto")))
    alone = any(name in os.environ for name in _ELSEWHERE) or str(given.get("num_nodes", 1)) != "1"
    if alone or not count.isdecimal() or not 1 < int(count) <= DEVICES.value:
        return 0
    return min(int(count), most) - 1


def _most(accelerator: str) -> int:
    """Processes that may import at once: more than there are GPUs, or processors, are a mistake to be refused, or are
    started by Lightning."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if accelerator != "cpu" else 0
    return max(1, gpus or (1 if accelerator in ("gpu", "cuda") else os.cpu_count() or 1))


@contextlib.contextmanager
def started(count: int, imports: str = "mambaseq.runs.training") -> Iterator[Processes]:
    """So many processes by their number within the machine, from 1 on. Those that are still there at the end are not
    needed."""
    processes: Processes = {}
    try:
        # until a process can leave Ctrl-C to the first one it is held back, and would else be a traceback
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for number in range(1, count + 1):
                processes[number] = subprocess.Popen(
                    [sys.executable, "-c", _SCRIPT, os.pathsep.join(sys.path), imports],
                    stdin=subprocess.PIPE,
                    env=os.environ | {"LOCAL_RANK": str(number)},  # Lightning reads it when it is imported
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


@contextlib.contextmanager
def taken_by_lightning(processes: Processes) -> Iterator[None]:
    """What Lightning starts meanwhile are these processes, as far as they are there."""
    launching: Any = importlib.import_module("lightning.pytorch.strategies.launchers.subprocess_script")

    def popen(command: Sequence[str], env: Mapping[str, str], cwd: str | None = None) -> subprocess.Popen[bytes]:
        process = processes.pop(int(env.get("LOCAL_RANK", 0)), None)
        if process is not None:
            order = json_text({"environment": dict(env), "argv": sys.argv})
            with contextlib.suppress(OSError):  # it has ended
                assert process.stdin is not None
                process.stdin.write(order.encode() + b"\n")
                process.stdin.close()
                return process
        return subprocess.Popen(command, env=env, cwd=cwd)

    launching.subprocess = SimpleNamespace(Popen=popen)
    try:
        yield
    finally:
        launching.subprocess = subprocess


def wait() -> None:
    """What such a process does."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with uncollected(for_good=True):
        importlib.import_module(sys.argv[2])
    order = sys.stdin.buffer.readline()
    if not order:
        os._exit(0)
    signal.signal(signal.SIGINT, handler)
    given = json.loads(order)
    os.environ.clear()
    os.environ.update(given["environment"])
    sys.argv = given["argv"]
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    from mambaseq.cli.main import main

    sys.exit(main())
