"""The work of `mambaseq doctor`."""

from __future__ import annotations

import platform

import torch

from mambaseq import __version__
from mambaseq.benchmarking.backends import speeds
from mambaseq.benchmarking.timing import on
from mambaseq.cli.devices import choose_device
from mambaseq.domain import catalog
from mambaseq.ops import OPS
from mambaseq.ops.dispatch import check, explain

# float32 against float64: anything above is a broken backend, not rounding
LIMIT = 1e-4


def diagnose(device: str | None) -> int:
    """Print the findings; returns 1 when a backend that would run is wrong, else 0."""
    place = choose_device(device)
    with on(place):
        return _diagnose(place)


def _diagnose(place: torch.device) -> int:
    what = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine()
    print(f"mambaseq {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"device {place} ({what}), {torch.get_num_threads()} threads\n")
    wrong = 0
    for op in OPS.values():
        errors = check(op, place)
        label, arguments = next(iter(op.samples(place)))
        what, times = speeds(op, place)
        print(f"{op.name}  (for {label}; forward + backward of {what} in fp32)")
        picked = False
        for name, reason in explain(op, arguments):
            error = errors.get(name)
            mark = "runs" if reason is None and not picked else "ready" if reason is None else "no"
            picked |= reason is None
            if reason is not None:
                note = reason
            elif isinstance(error, float):
                verdict = "ok" if error <= LIMIT else "WRONG"
                wrong += error > LIMIT or error != error
                speed = f"{times[name]:10.3f} ms" if name in times and verdict == "ok" else ""
                note = f"relative error {error:.1e} {verdict:<6}{speed}".rstrip()
            else:
                note = str(error)
            print(f"  {mark:<6} {name:<12} {note}")
        print()
    for point, reason in catalog().broken.items():
        print(f"broken plugin {point}: {reason}")
    return 1 if wrong else 0
