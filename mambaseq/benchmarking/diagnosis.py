"""Which backend each op would use on this machine, whether it is right, and how fast it is."""

from __future__ import annotations

import functools
import getpass
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from mambaseq import __version__
from mambaseq.benchmarking.backends import WholeBlock, speeds
from mambaseq.benchmarking.timing import Attempt, attempt, on
from mambaseq.compiled import folder_of_numba
from mambaseq.domain import catalog
from mambaseq.ops import OPS
from mambaseq.ops.dispatch import PACKAGES, Backend, Op, check, explain
from mambaseq.ops.gpu import nvrtc
from mambaseq.resources import cache_dir, why_unsafe
from mambaseq.runs.devices import choose_device

# float32 against float64: anything above is a broken backend, not rounding
LIMIT = 1e-4
# the same of half precision
LIMIT_OF_HALF = 1e-2


def diagnose(device: str | None) -> int:
    """Print the findings. Returns 1 if a backend that would run is wrong or one of ours raises, otherwise 0."""
    place = choose_device(device)
    with on(place):
        return _diagnose(place)


def _diagnose(place: torch.device) -> int:
    what = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine()
    print(f"mambaseq {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"device {place} ({what}), {torch.get_num_threads()} threads\n")
    failed = False
    for op in OPS.values():
        failed |= _op_failed(op, place)
    failed |= _block_failed(place)
    for line in _caches():
        print(line)
    for point, reason in catalog().broken.items():
        print(f"broken plugin {point}: {reason}")
    return 1 if failed else 0


def _caches() -> list[str]:
    """A line for each folder of compiled code: where it is, and why it is not used or what is wrong with it."""
    ours = nvrtc.kernel_folder()
    found = [f"cache folder {cache_dir()}", _cache("kernels", ours, why_unsafe(ours), "not used")]
    numba, reason = folder_of_numba()
    found.append(_cache("numba", numba or Path("-"), reason, "not used"))
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    inductor = Path(
        os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    )
    for name, folder, variable in (
        ("triton", triton, "TRITON_CACHE_DIR"),
        ("inductor", inductor, "TORCHINDUCTOR_CACHE_DIR"),
    ):
        otherwise = f"UNSAFE, and the package's own: set {variable} to a folder of yours"
        found.append(_cache(name, folder, why_unsafe(folder), otherwise))
    return [*found, ""]


def _user() -> str:
    """The user's name as PyTorch uses it in folder names."""
    try:
        name = getpass.getuser()
    except (KeyError, ImportError, OSError):  # a user id without a name
        name = f"uid_{os.getuid()}"
    return re.sub(r'[\\/:*?"<>|]', "_", name)


def _cache(name: str, folder: Path, reason: str | None, otherwise: str) -> str:
    return f"  {name:<10} {folder}" + (f"  {otherwise}: {reason}" if reason else "")


def _op_failed(op: Op, place: torch.device) -> bool:
    """Print the findings about an op. Returns whether a backend that would run is wrong or one of ours raises."""
    label, arguments = next(iter(op.samples(place)))
    what, times = speeds(op, place)
    print(f"{op.name}  (for {label}; forward + backward of {what} in fp32)")
    picked = failed = False
    half = op.in_half() if place.type != "cpu" else None  # kernels of half precision are a GPU's
    taking_half = [] if half is None else [name for name, why in explain(half, _first(half, place)) if why is None]
    half_times = speeds(op, place, in_half=True)[1] if taking_half else {}
    for backend, (name, reason) in zip(op.backends, explain(op, arguments), strict=True):
        mark = "runs" if reason is None and not picked else "ready" if reason is None else "no"
        picked |= reason is None
        tried, timed, limit, note = op, times, LIMIT, ""
        if reason is not None and half is not None and name in taking_half:
            tried, timed, limit, note = half, half_times, LIMIT_OF_HALF, "  (in bfloat16, which it runs)"
            mark, reason = "half", None
        if reason is None:
            checked = attempt(functools.partial(_error, tried, backend, place))
            status, reason = _verdict(checked, timed.get(name), limit)
            failed |= status == "wrong" or (status == "failed" and name not in PACKAGES)
        print(f"  {mark:<6} {name:<12} {reason}{note}")
    print()
    return failed


def _first(op: Op, place: torch.device) -> Any:
    return next(iter(op.samples(place)))[1]


def _block_failed(place: torch.device) -> bool:
    """Print whether a Mamba block would run as one operator. Returns whether it would but is wrong or raises."""
    whole, status = WholeBlock(place), "ok"
    reason = whole.why_not()
    mark = "no"
    if reason is None:
        mark = "runs"
        status, reason = _verdict(attempt(whole.error), attempt(whole.ms))
    print(f"mamba_block  (a whole block; forward + backward of {whole.what} in fp32)")
    print(f"  {mark:<6} {'as one':<12} {reason}\n")
    return status in ("wrong", "failed")


def _error(op: Op, backend: Backend, place: torch.device) -> float | str:
    return check(op._replace(backends=(backend, op.backends[-1])), place)[backend.name]


def _verdict(checked: Attempt, timed: Attempt | None, limit: float = LIMIT) -> tuple[str, str]:
    """The outcome of attempts to check and time something: "ok", "wrong", or how it failed; and what to print."""
    status, note, error = checked
    if status != "ok":
        return status, note
    if isinstance(error, str):  # it cannot compute gradients
        return "ok", error
    if not error <= limit:
        return "wrong", f"relative error {error:.1e} WRONG"
    status, note, ms = timed or ("ok", "", None)
    right = f"relative error {error:.1e} ok    "
    return status, (right + (note if ms is None else f"{ms:10.3f} ms")).rstrip()
