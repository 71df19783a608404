"""Ranks of a run, as torchrun starts them, without its start and theirs: they are forked from a server that has
imported everything, and has not run anything."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

IMPORTED = ["mambaseq.runs.training", "mambaseq.cli.fit", "mambaseq.backbones.chunks", "mambaseq.reporting.pictures"]
IMPORTED += ["torch.utils.tensorboard", "launching", "tiny"]


@dataclasses.dataclass
class Ranks:
    """Processes of one command. output: what both streams of each hold."""

    processes: list[Any]
    outputs: list[Path]

    def wait(self, seconds: float) -> list[int | None]:
        """The exit code of each once all have ended, negative for a signal; None for one that has not, and that is then
        killed."""
        deadline = time.monotonic() + seconds
        codes = []
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            codes.append(process.exitcode)
        self.kill(*(rank for rank, code in enumerate(codes) if code is None))
        return codes

    def kill(self, *ranks: int) -> None:
        """SIGKILL some, and wait for their end."""
        for rank in ranks:
            self.processes[rank].kill()
        for rank in ranks:
            self.processes[rank].join()

    def busy_for(self, rank: int) -> float | None:
        """Seconds of processor time, which do not depend on what else the machine does; None once it is over."""
        process = self.processes[rank]
        if not process.is_alive():
            return None
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def told(self, rank: int) -> str:
        return self.outputs[rank].read_text(errors="replace") if self.outputs[rank].is_file() else ""


def start(
    command: Sequence[str] | Callable[[], Any],
    folder: Path,
    *,
    size: int = 2,
    before: Mapping[int, Callable[[], None]] | None = None,
    cache: Path | None = None,
) -> Ranks:
    """Begin `mambaseq COMMAND` on ranks of this machine, or a function of a module that can be imported. folder: where
    they stand, and where their output goes.

    before: what a rank calls first; such functions too.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    environment |= {"MAMBASEQ_CACHE": cache or folder / "cache", "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
    processes, outputs = [], []
    for rank in range(size):
        output = folder / f"rank{rank}.output"
        output.unlink(missing_ok=True)
        own = {key: str(value) for key, value in environment.items()} | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        first = (before or {}).get(rank)
        what = command if callable(command) else list(command)
        process = context.Process(target=_rank, args=(what, str(folder), str(output), own, first))  # type: ignore[attr-defined]
        process.start()
        processes.append(process)
        outputs.append(output)
    return Ranks(processes, outputs)


def _rank(
    command: list[str] | Callable[[], Any],
    folder: str,
    output: str,
    environment: dict[str, str],
    first: Callable[[], None] | None,
) -> None:
    import torch

    from mambaseq.cli.main import main

    os.environ.update(environment)
    os.chdir(folder)
    with Path(output).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    code = 1
    try:
        if first is not None:
            first()
        if callable(command):
            command()
            code = 0
        else:
            code = main(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
