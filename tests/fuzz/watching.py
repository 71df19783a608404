"""Runs one command in this process and watches what it does: output, files, processes, memory, time, imports."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mutations import CANARY, SECRET

PATIENCE = 20.0  # seconds, then it is a hang
INTERRUPT = 4.0  # seconds, then Ctrl-C: mutated settings may ask for a long training
MEMORY = 2**30
LONGEST = 1000

_RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"}
_CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hang(BaseException):
    """The command took longer than `PATIENCE`."""


class Refused(OSError):
    """What a case must not do was not done."""


@dataclasses.dataclass
class Outcome:
    """What came of a case. failures: `(kind, group, detail)`; none when it is as it should be."""

    ended: str = ""  # accepted, refused, diverged, interrupted
    code: Any = None
    message: str = ""
    seconds: float = 0.0
    failures: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def fail(self, kind: str, group: str, detail: str = "") -> None:
        if (kind, group) not in {(k, g) for k, g, _ in self.failures}:
            self.failures.append((kind, group, detail[-3000:]))


class Watch:
    """An audit hook that is in force while a command runs in `folder`; hooks cannot be taken out again."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.caches: tuple[str, ...] = ()
        self.port = 0
        self.seen: list[tuple[str, str]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = args
            writes = any(sign in mode for sign in "wax+") if isinstance(mode, str) else (flags or 0) & _WRITES
            if writes and isinstance(path, str | bytes) and not self._inside(os.fsdecode(path)):
                self._refuse("writes outside", os.fsdecode(path))
        elif event in _CHANGES:
            for path in args[:2]:
                if not isinstance(path, str | bytes) or "/" not in os.fsdecode(path):
                    continue
                if event == "os.mkdir" and os.path.isdir(os.fsdecode(path)):  # noqa: PTH112
                    continue  # it is there: asking for it changes nothing
                if not self._inside(os.path.dirname(os.fsdecode(path))):  # noqa: PTH120 - not what a link points to
                    if event in ("os.symlink", "os.link", "shutil.copyfile") and path is args[0]:
                        continue
                    self._refuse("writes outside", f"{event} {os.fsdecode(path)}")
        elif event == "os.fork" and len(multiprocessing.active_children()) < 8:
            return  # workers of a loader: so many at once, since each validation starts its own
        elif event in _RUNS:
            self._refuse("runs a program", f"{event} {args[:2]!r}"[:300])
        elif event == "socket.connect":
            if isinstance(args[1], str) and self._inside(args[1]):
                return  # a worker of a loader hands over what it read
            if not (isinstance(args[1], tuple) and args[1][:2] == ("127.0.0.1", self.port)):
                raise Refused(111, "Connection refused")
        elif event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "localhost"):
            raise Refused(111, "No network")

    def _inside(self, path: str) -> bool:
        assert self.folder is not None
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError):
            return True
        return (
            real.startswith((self.folder + "/", "/dev/null", "/proc/", *self.caches))
            or real == self.folder
            or "/__pycache__" in real
        )

    def _refuse(self, kind: str, what: str) -> None:
        self.seen.append((kind, what))
        raise Refused(13, f"Permission denied: {what}")

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.seen.clear()
        self.folder = os.path.realpath(folder)
        try:
            yield
        finally:
            self.folder = None


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


def _reset_peak() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def limit_memory(more: int) -> None:
    """Let this process take so many bytes of address space beyond what it has: no case is to bring the machine down."""
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + more, resource.RLIM_INFINITY))


@contextlib.contextmanager
def _clean_state(folder: Path) -> Iterator[None]:
    """Put back what settings of a run change in a process."""
    import torch

    environment, here = dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")  # kept from its first use on
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(here)
        tempfile.tempdir = None
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_anomaly_enabled(False)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def _frame(error: BaseException) -> str:
    """Type of an error and where in mambaseq it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if re.search(r"/(mambaseq(_\w+)?)/", f.filename)]
    if not frames:
        return type(error).__name__
    last = frames[-1]
    where = re.search(r"(mambaseq(_\w+)?/.*)", last.filename)
    return f"{type(error).__name__} in {where[1] if where else last.filename}:{last.name}"


def _waits_for_others(seconds: float, worked: float, patience: float) -> bool:
    """Whether it is slow because the machine is busy: it works, and has not had so many seconds of a processor."""
    busy = os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    return busy and 0.02 * seconds < worked < patience and seconds < 3 * PATIENCE


def run_command(watch: Watch, folder: Path, argv: list[str]) -> tuple[Outcome, str, str]:
    """Run a command in `folder`. Returns the outcome so far, its standard output and its standard error."""
    from mambaseq.cli.main import main

    outcome, out, err = Outcome(), io.StringIO(), io.StringIO()
    started, worked = time.monotonic(), time.process_time()
    stage = [INTERRUPT if argv[:1] == ["fit"] else PATIENCE]

    def alarm(number: int, frame: Any) -> None:
        if _waits_for_others(time.monotonic() - started, time.process_time() - worked, stage[0]):
            signal.setitimer(signal.ITIMER_REAL, INTERRUPT)
        elif stage[0] == INTERRUPT:
            stage[0] = PATIENCE
            signal.setitimer(signal.ITIMER_REAL, PATIENCE - INTERRUPT)
            signal.raise_signal(signal.SIGINT)
        else:
            signal.setitimer(signal.ITIMER_REAL, 5)  # again, should this one be swallowed
            raise Hang

    base = _reset_peak()
    with _clean_state(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), watch.over(folder):
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, stage[0])
        try:
            outcome.code = main(argv)
        except SystemExit as error:
            outcome.code = error.code if error.code is not None else 0
        except Hang as error:
            outcome.fail("hang", _frame(error), traceback.format_exc())
        except BaseException as error:
            outcome.fail("traceback", _frame(error), traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    outcome.seconds = time.monotonic() - started
    if (grown := _peak() - base) > MEMORY:
        outcome.fail("memory", f"+{grown / 2**30:.1f} GB in {' '.join(argv[:1])}", f"{grown:,} bytes")
    for kind, what in watch.seen:
        outcome.fail(kind, re.sub(r"[0-9a-f]{6,}|\d+", "N", what.replace(str(folder), "CASE")), what)
    return outcome, out.getvalue(), err.getvalue()


_TOLD = re.compile(r"^mambaseq(?: [\w-]+)?(?: (?:list|info|fetch))?: (?:error: )?", re.MULTILINE)


def check_message(outcome: Outcome, argv: list[str], err: str, wrong: set[str]) -> None:
    """Sort the outcome, and see that a refusal is a paragraph that names what is wrong."""
    if "Traceback (most recent call last)" in err:
        last = err.strip().splitlines()[-1]
        outcome.fail("traceback", f"printed: {last[:120]}", err)
    if SECRET in err:
        outcome.fail("secret", "a password is printed", err)
    from mambaseq.errors import paragraph

    code = outcome.code
    if code is None:
        return
    starts = list(_TOLD.finditer(err))
    outcome.message = err[starts[-1].end() :].strip() if starts else err.strip()[-2000:]
    if code == 0:
        outcome.ended = "accepted"
        return
    if code == 130:
        outcome.ended = "interrupted"
        return
    if code not in (1, 2) or isinstance(code, bool):
        outcome.fail("exit code", f"{str(code)[:60]!r} of {argv[0]}", err)
        return
    outcome.ended = "refused" if code == 2 else "diverged"
    if code == 1 and re.search(r"the run diverged: .*\S", err):  # said before main has a word
        return
    if not starts:
        outcome.fail("no message", f"code {code} of {argv[0]}", err)
        return
    message = outcome.message
    group = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|\d[\d.,e+-]*", "_", " ".join(message.split()))[:90]
    if code == 1:
        outcome.fail("exit code", f"1 without divergence: {group}", message)
    if "\n" in message or "\r" in message:
        outcome.fail("not a paragraph", group, message)
    if len(message) > LONGEST:
        outcome.fail("long message", f"{group}", f"{len(message)} characters: {message}")
    if any(ord(sign) < 32 and sign not in "\n\r\t" for sign in message):
        outcome.fail("control characters", group, message)
    names = {paragraph(name).lower() for name in wrong if name.strip()}
    if code == 2 and not any(name in message.lower() for name in names):
        outcome.fail("unnamed", group, f"none of {sorted(wrong)[:20]} in: {message}")


def check_files(outcome: Outcome, folder: Path) -> None:
    """Nothing half-written is left, nothing that was written is not finite, no canary sang."""
    if CANARY in sys.modules:
        del sys.modules[CANARY]
        outcome.fail("imported", "the canary's module was imported")
    if (folder / "canary").exists():
        outcome.fail("ran", "the canary's file is there")
    for path in sorted(folder.rglob("*")):
        name = path.name
        if name.startswith(".") and ".tmp" in name and outcome.ended:
            outcome.fail("left behind", re.sub(r"\.\d+-[0-9a-f]+", ".N", name), str(path))
    left = [path.name for path in (folder / "tmp").iterdir()]
    if left:
        outcome.fail(
            "left behind", f"in the folder of temporary files: {re.sub(r'[0-9]+|tmp.*', 'N', left[0])}", str(left)
        )
    if outcome.ended != "accepted":
        return
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.stat().st_mtime_ns <= outcome_start(folder):
            continue
        if path.suffix == ".csv":
            _finite_csv(outcome, path)
        elif path.suffix == ".json":
            _finite_json(outcome, path)


def outcome_start(folder: Path) -> int:
    """When the command began: the folder of temporary files is made right before it."""
    return (folder / ".began").stat().st_mtime_ns


def _finite_csv(outcome: Outcome, path: Path) -> None:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.reader(file):
            for cell in row[2:]:
                with contextlib.suppress(ValueError):
                    if not math.isfinite(float(cell)):
                        outcome.fail("not finite", f"in {path.name}", ",".join(row))
                        return


def _finite_json(outcome: Outcome, path: Path) -> None:
    def refuse(text: str) -> None:
        raise ArithmeticError(text)

    try:
        json.loads(path.read_text(encoding="utf-8", errors="replace"), parse_constant=refuse)
    except ArithmeticError as error:
        outcome.fail("not finite", f"in {path.name}", str(error))
    except (ValueError, RecursionError):
        pass


def begin(folder: Path) -> None:
    (folder / ".began").write_bytes(b"")


def empty(folder: Path) -> None:
    """Remove a case's folder, whatever its permissions."""
    if folder.exists():
        for path in folder.rglob("*"):
            if not path.is_symlink() and path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def threads() -> int:
    return threading.active_count()
