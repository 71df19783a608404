"""`bench block`: forward and backward of a Mamba block with one set of weights, under bf16 autocast on a GPU: end to
end, where short calls take as long as their launches, and the GPU's work alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from mambaseq.benchmarking import peers
from mambaseq.benchmarking.cases import training_dtype
from mambaseq.benchmarking.report import OURS, Column, Report, Row
from mambaseq.benchmarking.timing import measure, peak_bytes, release
from mambaseq.mixers.mamba import Mamba
from mambaseq.ops.dispatch import relative_rms_error

COLUMNS = (
    Column("forward_ms", "forward ms"),
    Column("both_ms", "both ms"),
    Column("gpu_ms", "both, GPU alone ms"),
    Column("peak_mib", "peak MiB", 0),
)
D_MODEL = {"full": 768, "small": 128, "tiny": 8}
# batch, length
SHAPES = {"full": [(8, 2048), (1, 65536)], "small": [(2, 256), (1, 2048)], "tiny": [(2, 33), (1, 65)]}
# positions that are checked against float64
CHECKED = 256
# tolerated RMS error of the output, under autocast and in fp32; gradients may have twice that
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def run(device: torch.device, scale: str, repeats: int) -> Report:
    """Measure; prints as it goes."""
    report = Report("block", device, scale, COLUMNS)
    report.head(f"Mamba block, d_model {D_MODEL[scale]}, forward + backward" + _how(device))
    torch.manual_seed(0)
    ours = Mamba(D_MODEL[scale]).to(device)
    module, absent = peers.find("mamba_ssm", device)
    for batch, length in SHAPES[scale]:
        shape = {"batch": batch, "length": length}
        generator = torch.Generator(device).manual_seed(1)
        x = torch.randn(batch, length, D_MODEL[scale], generator=generator, device=device, dtype=training_dtype(device))
        exact = reference(ours, x[:2, :CHECKED])
        report.attempted("block", shape, OURS, lambda x=x, exact=exact: _row(OURS, ours, x, exact, repeats))  # type: ignore[misc]
        release()
        if module is None:
            report.add(Row("block", shape, "mamba-ssm", status="absent", note=absent))
            continue
        theirs = module.Mamba(D_MODEL[scale], device=device)
        theirs.load_state_dict(ours.state_dict())
        report.attempted(
            "block",
            shape,
            "mamba-ssm",
            lambda x=x, exact=exact, theirs=theirs: _row("mamba-ssm", theirs, x, exact, repeats),  # type: ignore[misc]
        )
        del theirs
        release()
    return report


def _how(device: torch.device) -> str:
    return ", bf16 autocast" if device.type == "cuda" else ", fp32"


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU; a CPU computes in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def reference(block: Mamba, x: Tensor) -> list[Tensor]:
    """Output and gradients (of x, then of the parameters by name) of the definition in float64."""
    exact = copy.deepcopy(block).double()
    exact.backend = "reference"
    return results(exact, x.double(), len(x), x.shape[1])


def results(block: Any, x: Tensor, sequences: int, length: int) -> list[Tensor]:
    """Output and gradients of the first positions of the first sequences; the block runs on all."""
    leaf = x.detach().requires_grad_()
    with autocast(x.device) if x.dtype != torch.float64 else torch.autocast(x.device.type, enabled=False):
        y = block(leaf)
    part = y[:sequences, :length]
    generator = torch.Generator(x.device).manual_seed(2)
    cotangent = torch.randn(part.shape, generator=generator, device=x.device).bfloat16()
    weights = dict(block.named_parameters())
    found = torch.autograd.grad(part, [leaf, *(weights[name] for name in sorted(weights))], cotangent.to(part.dtype))
    return [part.detach(), found[0][:sequences, :length], *found[1:]]


def _row(contender: str, block: Any, x: Tensor, exact: list[Tensor], repeats: int) -> Row:
    row = Row("block", {"batch": x.shape[0], "length": x.shape[1]}, contender)
    limit = TOLERANCE[x.dtype]
    actual = results(block, x, *exact[0].shape[:2])
    names = ["y", "dx", *(f"d{name}" for name in sorted(name for name, _ in block.named_parameters()))]
    found = {name: relative_rms_error(a, e) for name, a, e in zip(names, actual, exact, strict=True)}
    del actual
    row.error = max(found.values())
    for name, error in found.items():
        if not error <= (limit if name == "y" else 2 * limit):
            row.status, row.note, row.error = "wrong", f"{name} is off by {error:.1e}", error
            return row
    leaf = x.detach().requires_grad_()
    wanted = [leaf, *block.parameters()]
    cotangent = torch.randn_like(x)

    def forward() -> Tensor:
        with autocast(x.device):
            return block(leaf)

    def both() -> None:
        y = forward()
        torch.autograd.grad(y, wanted, cotangent.to(y.dtype))

    row.values["both_ms"] = measure(both, x.device, repeats, budget_s=1.0).ms
    if x.is_cuda:
        row.values["gpu_ms"] = measure(both, x.device, repeats, budget_s=1.0, hold=True).ms
    with torch.no_grad():
        row.values["forward_ms"] = measure(forward, x.device, repeats, budget_s=1.0).ms
    peak = peak_bytes(both, x.device)
    if peak is not None:
        row.values["peak_mib"] = peak / 2**20
    if contender == "mamba-ssm" and peers.find("causal_conv1d", x.device)[0] is None:
        row.note = "without causal-conv1d, which its fast path needs"
    return row
