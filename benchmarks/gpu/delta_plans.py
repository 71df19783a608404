"""Which tiles suit the kernels of the delta rule on this GPU: milliseconds of each kernel under each plan.

`python benchmarks/gpu/delta_plans.py [--of walks pairs gradients] [--rules gated_delta kda] [--shapes 0 1]
[--seconds 120]`: from the repository's root; shapes and inputs are those of `benchmarks/delta_gpu.py`. First the
kernels as planned, then with other tiles of those `--of` which others are wanted; pairs and gradients are those of a
decay a channel. A plan is told only if the outputs and the gradients of the beginning are right.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from delta_gpu import BACKENDS, RULES, SHAPES, TOLERANCE, beginning, expected, inputs

from mambaseq.ops.delta_rule import gpu
from mambaseq.ops.dispatch import leaves, outputs_and_gradients, relative_rms_error

ROWS, WARPS, STAGES = (128, 64, 32), (4, 8), (2, 3, 4)
OTHERS: dict[str, list[dict[str, gpu.Shape]]] = {
    "walks": [
        {"walk": shape, "walk_back": shape}
        for shape in (gpu.Shape(w, s, r) for r, w, s in itertools.product(ROWS, WARPS, STAGES))
    ],
    "pairs": [{"pairs": gpu.Shape(w, 1, 0, c)} for w, c in ((8, 64), (8, 128), (4, 64))],
    "gradients": [
        {"of_channels": gpu.Shape(w, s, r, 64)} for w, s, r in ((4, 1, 64), (8, 2, 64), (8, 1, 128), (16, 1, 64))
    ],
}
KERNELS = ("pairs", "walk", "output", "walk_back", "gradients", "gradients_of_pairs")
TRITON = BACKENDS["triton"]


def errors(rule: str, batch: int, length: int) -> float:
    part = beginning(inputs(rule, batch, length))
    found = outputs_and_gradients(TRITON, part)
    return max(relative_rms_error(a, e) for a, e in zip(found, expected(rule, batch, length), strict=True))


def by_kernel(rule: str, batch: int, length: int, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of each kernel in a forward and a backward pass; `other` is all between them."""
    wanted = leaves(inputs(rule, batch, length))
    values = [value for value in wanted if isinstance(value, torch.Tensor)]
    dy = torch.randn_like(wanted.v)

    def once() -> None:
        torch.autograd.grad(TRITON.run(wanted)[0], values, dy)

    once()
    with profile(activities=[ProfilerActivity.CUDA]) as told:
        for _ in range(repeats):
            once()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in told.key_averages():
        name = event.key.removesuffix("_of_channels")
        found[name if name in KERNELS else "other"] += event.device_time_total / 1000 / repeats
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="nothing is begun when they are over")
    parser.add_argument("--of", nargs="*", choices=OTHERS, default=["walks"], help="which kernels' tiles are varied")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=range(len(SHAPES)))
    options = parser.parse_args()
    own, begin = gpu.plan, time.monotonic()
    for shapes in ({}, *itertools.chain(*(OTHERS[kind] for kind in options.of))):
        plan = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()) or "as planned"
        for rule, number in itertools.product(options.rules, options.shapes):
            if time.monotonic() - begin > options.seconds:
                print(f"{plan} {rule} {SHAPES[number]}: not begun in time", flush=True)
                continue
            gpu.plan = lambda *of, shapes=shapes: own(*of)._replace(**shapes)
            try:
                error = errors(rule, *SHAPES[number])
                told = "wrong" if not error < TOLERANCE else ""
                told = told or ", ".join(f"{k} {v:.3f}" for k, v in by_kernel(rule, *SHAPES[number]).items())
            except torch.AcceleratorError:
                raise  # nothing on this GPU can be believed in this process
            except Exception as failure:  # no room for the tiles
                told = f"{type(failure).__name__}: {str(failure)[:150]}"
            print(f"{plan} {rule} {SHAPES[number]}: {told}", flush=True)


if __name__ == "__main__":
    main()
