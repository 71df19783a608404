"""The delta rule on a GPU: our kernels beside flash-linear-attention's and our chunked PyTorch, in one run.

`python benchmarks/delta_gpu.py [--seconds 60] [--json FILE]`: each contender is first held against the chunked form in
float64, then timed inside of CUDA graphs, so that nothing of Python is counted. Contenders stand in the order in which
they are wanted most; what has not begun when the seconds are over is left out, and said. flash-linear-attention is
called as it documents itself, without our adapter, and tries its configurations first, which takes most of the time.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lti_gpu import milliseconds
from torch import Tensor

from mambaseq.atomic import json_text
from mambaseq.ops import OPS
from mambaseq.ops.delta_rule import DeltaArguments, fla
from mambaseq.ops.dispatch import leaves, outputs_and_gradients, relative_rms_error

HEADS, HEAD_DIM = 12, 128
SHAPES = ((8, 2048), (1, 65536))  # batch, length
CHECKED = 4096  # positions that are held against float64: long sequences are walked in parts
TOLERANCE = 1.6e-2  # relative RMS of outputs and gradients; the package rounds more than ours
BACKENDS = {backend.name: backend for backend in OPS["delta_rule"].backends}
RULES = ("gated_delta", "kda")
CONTENDERS = ("triton", "fla", "torch")


class Row(NamedTuple):
    """Milliseconds; the largest relative RMS error of an output, and of a gradient; what there is to say."""

    rule: str
    batch: int
    length: int
    contender: str
    forward: float | None = None
    both: float | None = None
    error: float | None = None
    error_of_gradients: float | None = None
    note: str = ""


def inputs(rule: str, batch: int, length: int) -> DeltaArguments:
    """As the kernels want them: queries, keys and values in bfloat16, decays and rates in float32."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    size = (batch, length, HEADS, HEAD_DIM)
    g = F.logsigmoid(normal(*(size if rule == "kda" else size[:3])) + 2)
    q, k = (F.normalize(normal(*size), dim=-1).bfloat16() for _ in range(2))
    return DeltaArguments(
        q * HEAD_DIM**-0.5, k, normal(*size).bfloat16(), g, normal(*size[:3]).sigmoid(), wants_final_state=False
    )


def package(arguments: DeltaArguments) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's, with nothing around it."""
    q, k, v, g, beta, *_ = arguments
    assert g is not None
    module, name = fla._KERNELS[g.ndim == 4, True]
    run: Callable[..., tuple[Tensor, Any]] = getattr(importlib.import_module(module), name)
    return run(q=q, k=k, v=v, g=g, beta=beta, scale=1.0)[0], v.new_zeros(0)


def run_of(contender: str) -> Callable[[DeltaArguments], tuple[Tensor, Tensor]]:
    return package if contender == "fla" else BACKENDS[contender].run


def beginning(arguments: DeltaArguments) -> DeltaArguments:
    """Of the first row."""
    names = ("q", "k", "v", "g", "beta")
    return arguments._replace(**{name: getattr(arguments, name)[:1, :CHECKED].contiguous() for name in names})


@functools.cache
def expected(rule: str, batch: int, length: int) -> list[Tensor]:
    """y and the gradients of the beginning."""
    return outputs_and_gradients(BACKENDS["torch"], beginning(inputs(rule, batch, length)), double=True)


def measure(row: Row, forward_only: bool) -> Row:
    run, place = run_of(row.contender), (row.rule, row.batch, row.length)
    arguments = inputs(*place)
    part = beginning(arguments)
    y, *gradients = expected(*place)
    with torch.no_grad():
        if (reason := BACKENDS[row.contender].why_not(part)) is not None:
            return row._replace(note=reason)
        error = relative_rms_error(run(part)[0], y)
        row = row._replace(error=error)
        if not error < TOLERANCE:
            return row._replace(note="wrong, so not timed")
        row = row._replace(forward=milliseconds(lambda: run(arguments)))
    if forward_only:
        return row._replace(note="forward alone")
    wanted = leaves(arguments)
    if (reason := BACKENDS[row.contender].why_not(wanted)) is not None:
        return row._replace(note=f"backward: {reason}")
    found = outputs_and_gradients(BACKENDS[row.contender]._replace(run=run), part)
    errors = [relative_rms_error(a, e) for a, e in zip(found[1:], gradients, strict=True)]
    worst = max(errors, key=lambda error: (math.isnan(error), error))
    row = row._replace(error_of_gradients=worst)
    if not worst < TOLERANCE:
        named = dict(zip(("q", "k", "v", "g", "beta"), (f"{error:.1e}" for error in errors), strict=True))
        return row._replace(note=f"gradients are wrong, so not timed: {named}")
    values = [value for value in wanted if isinstance(value, Tensor)]
    dy = torch.randn_like(arguments.v)
    return row._replace(both=milliseconds(lambda: torch.autograd.grad(run(wanted)[0], values, dy), repeats=10))


def described(row: Row, rows: list[Row]) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    text = (
        f"{row.rule} {row.batch} x {row.length} {row.contender}: {cell(row.forward, '.3f')} / {cell(row.both, '.3f')}; "
        f"{cell(row.error, '.1e')} / {cell(row.error_of_gradients, '.1e')} {row.note}"
    )
    ours = [other for other in rows if other.contender == "triton" and other[:3] == row[:3]]
    if row.contender != "triton" and ours and row.forward is not None and ours[0].forward is not None:
        text += f"; ours forward {row.forward / ours[0].forward:.2f} times as fast"
        if row.both is not None and ours[0].both is not None:
            text += f", both {row.both / ours[0].both:.2f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="nothing is begun when they are over")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=range(len(SHAPES)))
    parser.add_argument("--forward", action="store_true", help="no backward pass")
    parser.add_argument("--json", type=Path, help="where the rows are written, as they come")
    options = parser.parse_args()
    begin, rows = time.monotonic(), []
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{device}; {HEADS} heads of {HEAD_DIM}, bfloat16; ms forward, forward and backward; errors", flush=True)
    for contender in options.contenders:
        for rule in options.rules:
            for batch, length in (SHAPES[number] for number in options.shapes):
                row = Row(rule, batch, length, contender)
                if time.monotonic() - begin > options.seconds:
                    row = row._replace(note="not begun in time")
                else:
                    try:
                        row = measure(row, options.forward)
                    except Exception as error:  # a package's kernels may raise anything
                        row = row._replace(note=f"{type(error).__name__}: {str(error)[:300]}")
                rows.append(row)
                print(described(row, rows), flush=True)
                if options.json is not None:
                    told = {"device": device, "rows": [one._asdict() for one in rows]}
                    options.json.write_text(json_text(told, indent=1) + "\n")
                torch.cuda.empty_cache()  # raises where a kernel has left the GPU in no state to go on


if __name__ == "__main__":
    main()
