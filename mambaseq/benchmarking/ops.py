"""`bench ops`: every registered op at the sizes of models, and the scan against attention and convolution.

bf16 on a GPU, fp32 on a CPU; each contender in its fastest layout.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.benchmarking import by_length, peers, registered
from mambaseq.benchmarking.cases import (
    COLUMNS,
    Case,
    Contender,
    Plan,
    channels_first,
    compare,
    our_backend,
    output_of,
    tolerance,
    training_dtype,
)
from mambaseq.benchmarking.long_scan import first_channels, long_scan
from mambaseq.benchmarking.report import OURS, Report
from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.ops import add_rms_norm, causal_conv, gated_rms_norm, linear_cross_entropy, selective_scan
from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.linear_cross_entropy.arguments import LossArguments
from mambaseq.ops.norm.arguments import AddNormArguments, GatedNormArguments
from mambaseq.ops.selective_scan.arguments import ScanArguments

BY_LENGTH = "by_length"  # the name of the last table
D_STATE = 16
# batch, channels, length
SCANS = {
    "full": [
        (8, 2048, 2048),
        (8, 2048, 4096),
        (32, 1536, 2048),
        (64, 512, 1024),
        (1, 1536, 8192),
        (1, 2048, 65536),
        (1, 512, 2**20),
    ],
    "small": [(4, 256, 256), (1, 128, 2048)],
    "tiny": [(2, 6, 33), (1, 5, 65)],
}
# batch, channels, length
CONVS = {"full": (8, 2048, 2048), "small": (4, 256, 512), "tiny": (2, 6, 33)}
# batch, length, d_model
NORMS = {"full": (8, 2048, 768), "small": (4, 256, 128), "tiny": (2, 17, 12)}
# rows, d_model, vocabulary
LOSSES = {"full": (16384, 768, 50280), "small": (512, 64, 2000), "tiny": (19, 8, 37)}


def run(device: torch.device, scale: str, repeats: int, only: Sequence[str] = ()) -> Report:
    """Measure; prints as it goes. only: names of ops, or of their variants ("kda"), or "by_length"; none for all.

    Raises ConfigError for other names.
    """
    tables = [
        (title, list(plans))
        for title, plans in (
            ("selective_scan (d_state 16, gate, softplus, D and dt's bias fused)", scans(device, scale)),
            *((f"{timed.name} ({timed.what})", timed.plans(device, scale)) for timed in registered.ALL),
            ("causal_conv (width 4, bias, SiLU)", convs(device, scale)),
            ("add_rms_norm (onto a residual stream in fp32), gated_rms_norm", norms(device, scale)),
            ("linear_cross_entropy", losses(device, scale)),
        )
    ]
    names = [*dict.fromkeys(name for _, plans in tables for plan in plans for name in plan.op.split(", ")), BY_LENGTH]
    if unknown := [name for name in only if name not in names]:
        hint = did_you_mean(unknown[0], names)
        raise ConfigError(f"--only: no op is called {shown(unknown[0])}.{hint} Known: {', '.join(names)}.")
    report = Report("ops", device, scale, COLUMNS)
    for title, plans in tables:
        wanted = [plan for plan in plans if not only or set(only) & set(plan.op.split(", "))]
        if wanted:
            report.head(title)
        for plan in wanted:
            compare(plan, report, repeats)
    if not only or BY_LENGTH in only:
        by_length.run(report, repeats)
    return report


def scan_inputs(batch: int, channels: int, length: int, device: torch.device) -> dict[str, Any]:
    """Inputs like those in a Mamba block, with step sizes of 1e-3 … 1e-1."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = training_dtype(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "x": normal(batch, length, channels),
        "dt": normal(batch, length, channels),
        "A": -torch.arange(1, D_STATE + 1, device=device).float().repeat(channels, 1),
        "B": normal(batch, length, D_STATE),
        "C": normal(batch, length, D_STATE),
        "D": torch.ones(channels, device=device),
        "z": normal(batch, length, channels),
        "dt_bias": torch.rand(channels, generator=generator, device=device) * 4 - 6,
    }


def corner(tensor: Tensor) -> Tensor:
    """The part on which a batched scan or a convolution is checked: 64 channels of two sequences, short enough for a
    loop."""
    return tensor[:2, :1000, :64] if tensor.ndim == 3 else tensor[:64]


def scans(device: torch.device, scale: str) -> Iterator[Plan]:
    """The selective scan at the sizes of models, next to mamba-ssm's kernel."""
    interface, absent = peers.find("mamba_ssm.ops.selective_scan_interface", device)

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
        assert interface is not None
        return interface.selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, True)

    def case(shape: dict[str, int]) -> Case:
        batch, channels, length = shape.values()
        inputs = scan_inputs(batch, channels, length, device)
        backend = our_backend("selective_scan", ScanArguments(**inputs, dt_softplus=True, wants_final_state=False))
        ours = output_of(selective_scan, dt_softplus=True, backend=backend)
        loop = output_of(selective_scan, dt_softplus=True, backend="reference")
        return Case(
            op="selective_scan",
            shape=shape,
            inputs=inputs,
            reference=long_scan if batch == 1 else loop,
            contenders=(
                Contender(OURS, ours, backend),
                Contender("mamba-ssm", theirs, layout=channels_first, absent=absent),
            ),
            tolerance=tolerance(device),
            part=first_channels(length, D_STATE) if batch == 1 else corner,
        )

    for sizes in SCANS[scale]:
        shape = dict(zip(("batch", "channels", "length"), sizes, strict=True))
        yield Plan("selective_scan", shape, functools.partial(case, shape))


def convs(device: torch.device, scale: str) -> Iterator[Plan]:
    """The short convolution next to causal-conv1d's kernel and PyTorch's grouped convolution."""
    package, absent = peers.find("causal_conv1d", device)
    batch, channels, length = CONVS[scale]
    shape = {"batch": batch, "channels": channels, "length": length}

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert package is not None
        return package.causal_conv1d_fn(x, weight, bias, activation="silu")

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width = weight.shape[1]
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=len(weight))[..., : x.shape[-1]])

    def case() -> Case:
        generator = torch.Generator(device).manual_seed(0)
        shapes = {"x": (batch, length, channels), "weight": (channels, 4), "bias": (channels,)}
        inputs: dict[str, Any] = {
            name: torch.randn(shape, generator=generator, device=device, dtype=training_dtype(device))
            for name, shape in shapes.items()
        }
        backend = our_backend("causal_conv", ConvArguments(**inputs, activation="silu"))
        return Case(
            op="causal_conv",
            shape=shape,
            inputs=inputs,
            reference=output_of(causal_conv, activation="silu", backend="reference"),
            contenders=(
                Contender(OURS, output_of(causal_conv, activation="silu", backend=backend), backend),
                Contender("causal-conv1d", theirs, layout=channels_first, absent=absent),
                Contender("PyTorch", plain, layout=channels_first),
            ),
            tolerance=tolerance(device),
            part=corner,
        )

    yield Plan("causal_conv", shape, case)


def norms(device: torch.device, scale: str) -> Iterator[Plan]:
    """The norms next to the same in PyTorch."""
    batch, length, d_model = NORMS[scale]
    dtype = training_dtype(device)
    shape = {"batch": batch, "length": length, "channels": d_model}

    def inputs(second: str, kind: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)
        x, other = (torch.randn(batch, length, d_model, generator=generator, device=device) for _ in range(2))
        return {"x": x.to(dtype), second: other.to(kind), "weight": torch.linspace(0.5, 2, d_model, device=device)}

    def rows(tensor: Tensor) -> Tensor:
        return tensor[:2, :1000] if tensor.ndim == 3 else tensor

    def plain_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return F.rms_norm(total, weight.shape, weight, 1e-5).to(dtype), total

    def plain_gated(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float() * F.silu(z.float()), weight.shape, weight, 1e-5).to(dtype)

    def add() -> Case:
        values = inputs("residual", torch.float32)
        backend = our_backend("add_rms_norm", AddNormArguments(**values, out_dtype=dtype))
        return Case(
            op="add_rms_norm",
            shape=shape,
            inputs=values,
            reference=functools.partial(add_rms_norm, backend="reference"),
            contenders=(
                Contender(OURS, functools.partial(add_rms_norm, out_dtype=dtype, backend=backend), backend),
                Contender("PyTorch", plain_add),
            ),
            tolerance=tolerance(device),
            part=rows,
        )

    def gated() -> Case:
        values = inputs("z", dtype)
        backend = our_backend("gated_rms_norm", GatedNormArguments(**values))
        return Case(
            op="gated_rms_norm",
            shape=shape,
            inputs=values,
            reference=functools.partial(gated_rms_norm, backend="reference"),
            contenders=(
                Contender(OURS, functools.partial(gated_rms_norm, backend=backend), backend),
                Contender("PyTorch", plain_gated),
            ),
            tolerance=tolerance(device),
            part=rows,
        )

    yield Plan("add_rms_norm", shape, add)
    yield Plan("gated_rms_norm", shape, gated)


def losses(device: torch.device, scale: str) -> Iterator[Plan]:
    """The head and its loss next to PyTorch's, which makes the logits."""
    rows, d_model, vocabulary = LOSSES[scale]
    shape = {"rows": rows, "d_model": d_model, "vocabulary": vocabulary}

    def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    def case() -> Case:
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(rows, d_model, generator=generator, device=device)
        weight = 0.02 * torch.randn(vocabulary, d_model, generator=generator, device=device)
        inputs: dict[str, Any] = {
            "hidden": hidden.to(training_dtype(device)),
            "weight": weight.to(training_dtype(device)),
            "labels": torch.randint(vocabulary, (rows,), generator=generator, device=device),
        }
        backend = our_backend("linear_cross_entropy", LossArguments(**inputs))
        return Case(
            op="linear_cross_entropy",
            shape=shape,
            inputs=inputs,
            reference=functools.partial(linear_cross_entropy, backend="torch"),  # in chunks: the logits are 6 GiB
            contenders=(
                Contender(OURS, functools.partial(linear_cross_entropy, backend=backend), backend),
                Contender("PyTorch", plain),
            ),
            tolerance=tolerance(device),
            passes=("forward", "both"),  # ours computes gradients in the forward pass
        )

    yield Plan("linear_cross_entropy", shape, case)
