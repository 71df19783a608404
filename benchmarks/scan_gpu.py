"""The selective scan on one GPU beside mamba-ssm's kernel: `python benchmarks/scan_gpu.py [--json FILE]`.

bf16, d_state 16, gate, softplus, D and dt's bias fused, each in the layout it likes best; medians over CUDA events. No
time is printed for a shape whose outputs and gradients are not those of float64 (on a part of it that fits).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mambaseq.ops import selective_scan
from mambaseq.ops.dispatch import explain
from mambaseq.ops.selective_scan import OP
from mambaseq.ops.selective_scan.arguments import ScanArguments

SHAPES = [
    (8, 2048, 2048),
    (8, 2048, 4096),
    (32, 1536, 2048),
    (64, 512, 1024),
    (1, 1536, 8192),
    (1, 2048, 65536),
    (1, 512, 2**20),
]
BACKENDS = ["cuda", "mamba_ssm"]
# relative RMS error against float64: the rounding of bf16 results, and of fp32 sums
TOLERANCE = 4e-3


def make(batch: int, channels: int, length: int, d_state: int = 16) -> dict[str, Any]:
    """As a Mamba block has them: x, dt and z with rows of their own widths, step sizes of 1e-3 … 1e-1."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_()

    A = -torch.arange(1, d_state + 1, device="cuda").float().repeat(channels, 1)
    return {
        "x": normal(batch, length, channels),
        "dt": normal(batch, length, channels),
        "A": A.requires_grad_(),
        "B": normal(batch, length, d_state),
        "C": normal(batch, length, d_state),
        "D": torch.ones(channels, device="cuda", requires_grad=True),
        "z": normal(batch, length, channels),
        "dt_bias": (torch.rand(channels, generator=generator, device="cuda") * 4 - 6).requires_grad_(),
        "dt_softplus": True,
    }


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    """Of a call among several that follow each other, as in training: the median of `repeats` times five calls."""
    for _ in range(5):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 5)
    return statistics.median(times)


def in_its_layout(values: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """mamba-ssm's own function on tensors of the layout it wants, `(batch, channels, length)`; its leaves in place of
    ours."""
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    theirs = {
        name: v.detach().transpose(1, 2).contiguous().requires_grad_() if getattr(v, "ndim", 0) == 3 else v
        for name, v in values.items()
    }
    values.update(theirs)
    return lambda: scan(
        *(values[name] for name in ("x", "dt", "A", "B", "C")), values["D"], values["z"], values["dt_bias"], True
    )


def errors(values: dict[str, Any], backend: str) -> dict[str, float]:
    """Of y and of every gradient, on the first 64 channels of two sequences of at most 1,000 steps."""
    part: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            part[name] = value
        elif value.ndim == 3:
            part[name] = value.detach()[:2, :1000, :64]
        else:
            part[name] = value.detach()[:64]
    results = []
    for dtype, which in ((None, backend), (torch.float64, "reference")):
        leaves = {
            name: (v.to(dtype) if dtype else v.clone()).requires_grad_() if isinstance(v, torch.Tensor) else v
            for name, v in part.items()
        }
        y = selective_scan(**leaves, backend=which)
        cotangent = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        wanted = [v for v in leaves.values() if isinstance(v, torch.Tensor)]
        results.append([y.detach(), *torch.autograd.grad(y, wanted, cotangent.bfloat16().to(y.dtype))])
    names = ["y", *(f"d{name}" for name, v in part.items() if isinstance(v, torch.Tensor))]
    return {
        name: float((a.double() - e).norm() / e.norm())
        for name, a, e in zip(names, results[0], results[1], strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, d_state 16, milliseconds\n")
    print(f"{'batch, channels, length':<26} {'':<10} {'forward':>9} {'backward':>9} {'peak MiB':>9}")
    for shape in SHAPES:
        values = make(*shape)
        times: dict[str, tuple[float, float]] = {}
        for backend in BACKENDS:
            scan_arguments = ScanArguments(
                *(values[name] for name in ("x", "dt", "A", "B", "C")), wants_final_state=False
            )
            reason = dict(explain(OP, scan_arguments))[backend]
            if reason is not None:
                print(f"{shape!s:<26} {backend:<10} {reason}")
                continue
            found = errors(values, backend)
            worst = max(found, key=lambda name: found[name])
            if not found[worst] <= TOLERANCE:
                print(f"{shape!s:<26} {backend:<10} WRONG: {worst} is off by {found[worst]:.1e}")
                continue

            function: Callable[[], torch.Tensor] = functools.partial(selective_scan, **values, backend=backend)
            if backend == "mamba_ssm":
                function = in_its_layout(values)

            with torch.no_grad():
                fast = milliseconds(function, arguments.repeats)
            y = function()
            dy = torch.randn_like(y)
            wanted = [v for v in values.values() if isinstance(v, torch.Tensor)]
            torch.cuda.reset_peak_memory_stats()
            back = milliseconds(
                lambda y=y, wanted=wanted, dy=dy: torch.autograd.grad(y, wanted, dy, retain_graph=True),
                arguments.repeats,
            )
            times[backend] = (fast, back)
            peak = torch.cuda.max_memory_allocated() / 2**20
            print(f"{shape!s:<26} {backend:<10} {fast:9.3f} {back:9.3f} {peak:9.0f}", flush=True)
            rows.append({"shape": shape, "backend": backend, "forward_ms": fast, "backward_ms": back, "errors": found})
            del y, dy
        if len(times) == 2:
            ratios = [b / a for a, b in zip(times["cuda"], times["mamba_ssm"], strict=True)]
            both = sum(times["mamba_ssm"]) / sum(times["cuda"])
            print(f"{'':<26} {'ratio':<10} {ratios[0]:8.2f}x {ratios[1]:8.2f}x   both {both:.2f}x")
        del values
    if arguments.json:
        arguments.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
