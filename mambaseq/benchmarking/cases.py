"""One op at one shape by several contenders: compared with float64 first, then timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mambaseq.benchmarking.report import OURS, Column, Report, Row
from mambaseq.benchmarking.timing import attempt, measure, peak_bytes, release
from mambaseq.ops import OPS
from mambaseq.ops.dispatch import PACKAGES, explain, leaf, relative_rms_error

Pass = Literal["forward", "backward", "both"]

COLUMNS = (
    Column("forward_ms", "forward ms"),
    Column("backward_ms", "backward ms"),
    Column("both_ms", "both ms"),
    Column("peak_mib", "peak MiB", 0),
    Column("host_ms", "host ms", compared=False),
)


def training_dtype(device: torch.device) -> torch.dtype:
    """The dtype that models are trained in on this device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def tolerance(device: torch.device) -> float:
    """The tolerance of a relative RMS error against float64: rounding of results in `training_dtype`, and of fp32
    sums."""
    return 4e-3 if device.type == "cuda" else 1e-4


def output_of(op: Callable[..., tuple[Tensor, Tensor]], **options: Any) -> Callable[..., Tensor]:
    """An op like its peers: with the output only, without the final state. options: further arguments of the op."""
    return lambda *args, **given: op(*args, **given, **options, return_final_state=False)[0]


def our_backend(op: str, arguments: Any) -> str:
    """Our backend that would run; those of other packages are left out."""
    return next(name for name, why in explain(OPS[op], arguments) if why is None and name not in PACKAGES)


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def channels_first(tensor: Tensor) -> Tensor:
    """Between `(batch, length, channels)` and `(batch, channels, length)`, either way; other tensors stay."""
    return tensor.transpose(1, 2).contiguous() if tensor.ndim == 3 else tensor


@dataclasses.dataclass(frozen=True)
class Contender:
    """What runs a case: `run(**inputs)` gives a tensor or a tuple of tensors.

    layout: from the case's layout to its own and back (it is its own inverse), applied before anything is timed.
    absent: why it cannot take part; empty if it can.
    """

    name: str
    run: Callable[..., Any]
    backend: str = ""
    layout: Callable[[Tensor], Tensor] = as_it_is
    absent: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An op at a shape.

    inputs: tensors by name; real and complex ones get gradients.
    reference: the definition, `reference(**inputs)`, run in float64 on `part` of the inputs.
    part: a view of the inputs for the reference; its outputs depend on no other inputs. The contenders run at full
        size, and gradients of these outputs are compared.
    tolerance: of the relative RMS error of each output and gradient.
    """

    op: str
    shape: dict[str, int]
    inputs: dict[str, Tensor]
    reference: Callable[..., Any]
    contenders: Sequence[Contender]
    tolerance: float
    part: Callable[[Tensor], Tensor] = as_it_is
    passes: tuple[Pass, ...] = ("forward", "backward", "both")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A case whose inputs are made only when it runs, and the data of its row if there is no memory for them."""

    op: str
    shape: dict[str, int]
    make: Callable[[], Case]
    contender: str = OURS


def compare(plan: Plan, report: Report, repeats: int) -> None:
    """A row for each contender: its times if outputs and gradients are right, otherwise what is wrong."""
    status, note, case = attempt(plan.make)
    if case is None:
        report.add(Row(plan.op, plan.shape, plan.contender, status=status, note=note))
        return
    status, note, expected = attempt(lambda: reference_results(case))
    for contender in case.contenders:
        if contender.absent:
            report.add(Row(case.op, case.shape, contender.name, status="absent", note=contender.absent))
            continue
        if expected is None:
            note = f"there is no reference to check it with: {note}"
            report.add(Row(case.op, case.shape, contender.name, contender.backend, status, note))
            continue

        def run(contender: Contender = contender, expected: Results = expected) -> Row:
            return _row(case, contender, expected, report.device, repeats)

        report.attempted(case.op, case.shape, contender.name, run)
        release()


@dataclasses.dataclass
class Results:
    """Cotangents of the outputs, then outputs and gradients by name."""

    cotangents: list[Tensor]
    values: dict[str, Tensor]


def reference_results(case: Case) -> Results:
    """The reference in float64, with pseudo-random cotangents that bf16 represents exactly."""
    leaves = {name: leaf(case.part(value), double=True) for name, value in case.inputs.items()}
    outputs = _tuple(case.reference(**leaves))
    cotangents = []
    for index, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(index + 1)
        noise = torch.randn(output.shape, generator=generator, device=output.device)
        cotangents.append(noise.bfloat16().double() if output.ndim else torch.ones_like(output))
    return Results(cotangents, _named(leaves, outputs, cotangents))


def errors(case: Case, contender: Contender, expected: Results) -> dict[str, float]:
    """Relative RMS error of every output and gradient of a contender at the case's own shape."""
    leaves = _leaves(case, contender)
    outputs = _tuple(contender.run(**leaves))
    cotangents = []
    for output, noise in zip(outputs, expected.cotangents, strict=True):
        whole = torch.zeros_like(contender.layout(output.detach()))
        case.part(whole).copy_(noise)
        cotangents.append(contender.layout(whole))
    actual = _named(leaves, outputs, cotangents)
    found = {
        name: relative_rms_error(case.part(contender.layout(value)), expected.values[name])
        for name, value in actual.items()
    }
    return {name: error if math.isfinite(error) else math.inf for name, error in found.items()}


def _row(case: Case, contender: Contender, expected: Results, device: torch.device, repeats: int) -> Row:
    row = Row(case.op, case.shape, contender.name, contender.backend)
    found = errors(case, contender, expected)
    worst = max(found, key=lambda name: found[name])
    row.error = found[worst]
    if not row.error <= case.tolerance:
        row.status, row.note = "wrong", f"{worst} is off by {row.error:.1e}"
        return row
    leaves = _leaves(case, contender)
    wanted = [value for value in leaves.values() if value.requires_grad]
    with torch.no_grad():
        outputs = _tuple(contender.run(**leaves))
        cotangents = [torch.randn_like(output) if output.ndim else torch.ones_like(output) for output in outputs]
    del outputs

    def forward() -> None:
        with torch.no_grad():
            contender.run(**leaves)

    def both() -> None:
        torch.autograd.grad(_tuple(contender.run(**leaves)), wanted, cotangents)

    if "backward" in case.passes:
        row.values["backward_ms"] = _backward_ms(_tuple(contender.run(**leaves)), wanted, cotangents, device, repeats)
    if "forward" in case.passes:
        row.values["forward_ms"] = measure(forward, device, repeats, hold=True).ms
    if "both" in case.passes:
        row.values["both_ms"], host = measure(both, device, repeats, hold=True)
        if device.type == "cuda":
            row.values["host_ms"] = host
    peak = peak_bytes(both, device)
    if peak is not None:
        row.values["peak_mib"] = peak / 2**20
    return row


def _backward_ms(
    outputs: tuple[Tensor, ...], wanted: list[Tensor], cotangents: list[Tensor], device: torch.device, repeats: int
) -> float:
    def backward() -> None:
        torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True)

    return measure(backward, device, repeats, hold=True).ms


def _leaves(case: Case, contender: Contender) -> dict[str, Tensor]:
    return {name: leaf(contender.layout(value)) for name, value in case.inputs.items()}


def _named(leaves: dict[str, Tensor], outputs: tuple[Tensor, ...], cotangents: list[Tensor]) -> dict[str, Tensor]:
    wanted = {name: value for name, value in leaves.items() if value.requires_grad}
    like = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), like)
    names = ["y", *(f"output {index}" for index in range(1, len(outputs)))]
    return dict(zip(names, (output.detach() for output in outputs), strict=False)) | {
        f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)
    }


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
