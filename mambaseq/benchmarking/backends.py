"""How fast each backend of each op is on inputs of a moderate size: the column of `mambaseq doctor`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambaseq.benchmarking.timing import Attempt, attempt, measure
from mambaseq.mixers.mamba import Mamba
from mambaseq.ops.blocks.mamba import why_not as why_not_whole
from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.decays.arguments import DecayArguments
from mambaseq.ops.delta_rule import DeltaArguments
from mambaseq.ops.dispatch import Op, leaves, relative_rms_error
from mambaseq.ops.linear_cross_entropy.arguments import LossArguments
from mambaseq.ops.lti.arguments import LtiArguments
from mambaseq.ops.norm.arguments import AddNormArguments, GatedNormArguments, UnitNormArguments
from mambaseq.ops.selective_scan.arguments import ScanArguments
from mambaseq.ops.ssd.arguments import SsdArguments
from mambaseq.ops.state_space.arguments import StateSpaceArguments
from mambaseq.ops.trapezoid import TrapezoidArguments
from mambaseq.ops.wkv.arguments import WkvArguments

# batch, length, channels: definitions loop over the length, so it is not long
SIZES = {"cuda": (4, 1024, 1024), "cpu": (1, 128, 128)}
VOCABULARY = {"cuda": 16384, "cpu": 1000}
D_STATE = 16
HEAD_DIM = 64

Normal = Callable[..., Tensor]


def speeds(op: Op, device: torch.device, in_half: bool = False) -> tuple[str, dict[str, Attempt]]:
    """A description of the inputs, and for each backend that can run them an attempt with the median milliseconds of
    forward and backward. in_half: in half precision, for an op that takes it."""
    status, note, made = attempt(lambda: moderate(op, device))
    if made is None:
        return "nothing", {backend.name: (status, note, None) for backend in op.backends}
    what, arguments = made
    if in_half and op.half is not None:
        arguments = op.half(arguments)
    found = {}
    for backend in op.backends:
        inputs = leaves(arguments)
        if backend.why_not(inputs) is not None:
            continue
        wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]

        def both(run: Callable[[Any], Any] = backend.run, inputs: Any = inputs, wanted: list[Tensor] = wanted) -> None:
            y = run(inputs)[0]
            torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)

        found[backend.name] = attempt(lambda both=both: measure(both, device, 5, budget_s=0.2, warm_up_s=0.01).ms)  # type: ignore[misc]
    return what, found


class WholeBlock:
    """A Mamba block that runs as one operator where `why_not` is None, in float32, and its input."""

    def __init__(self, device: torch.device) -> None:
        batch, length, channels = SIZES.get(device.type, SIZES["cpu"])
        generator = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(batch, length, channels // 2, generator=generator, device=device)
        self.block = Mamba(channels // 2).to(device)
        self.what = f"{batch} x {length} x {channels // 2}"

    def why_not(self) -> str | None:
        """Why the block would not run as one operator."""
        return why_not_whole(self.block._block_arguments(self.x, None, None, False))

    def error(self) -> float:
        """Largest relative RMS error of its output and gradients against its ops one by one in float64."""
        exact = copy.deepcopy(self.block).double()
        exact.backend = "torch"
        x = self.x[:2, :300].contiguous()
        cotangent = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device)
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            pairs = zip(_run(self.block, x, cotangent), _run(exact, x.double(), cotangent.double()), strict=True)
            errors = [relative_rms_error(a, e) for a, e in pairs]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
        return max(e if math.isfinite(e) else math.inf for e in errors)

    def ms(self) -> float:
        """Median milliseconds of forward and backward."""
        ones = torch.ones_like(self.x)
        return measure(lambda: _run(self.block, self.x, ones), self.x.device, 5, budget_s=0.2, warm_up_s=0.01).ms


def _run(block: Mamba, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = block(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *block.parameters()], cotangent)]


def moderate(op: Op, device: torch.device) -> tuple[str, Any]:
    """Arguments that take about a millisecond, in float32; the op's own small sample if none are known here."""
    batch, length, channels = SIZES.get(device.type, SIZES["cpu"])
    make = _MAKERS.get(op.name)
    if make is None:
        return next(iter(op.samples(device)))
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return f"{batch} x {length} x {channels}", make(normal, batch, length, channels)


def _scan(normal: Normal, batch: int, length: int, channels: int) -> ScanArguments:
    return ScanArguments(
        x=normal(batch, length, channels),
        dt=normal(batch, length, channels),
        A=-normal(channels, D_STATE).abs(),
        B=normal(batch, length, D_STATE),
        C=normal(batch, length, D_STATE),
        D=normal(channels),
        z=normal(batch, length, channels),
        dt_bias=normal(channels) - 4,
        dt_softplus=True,
        wants_final_state=False,
    )


def _conv(normal: Normal, batch: int, length: int, channels: int) -> ConvArguments:
    return ConvArguments(normal(batch, length, channels), normal(channels, 4), normal(channels), "silu")


def _lti(normal: Normal, batch: int, length: int, channels: int) -> LtiArguments:
    decay = -0.1 * normal(channels, D_STATE).abs()
    return LtiArguments(normal(batch, length, channels), decay, normal(channels, D_STATE), normal(channels, D_STATE))


def _state_space(normal: Normal, batch: int, length: int, channels: int) -> StateSpaceArguments:
    A = 0.4 * D_STATE**-0.5 * normal(channels, D_STATE, D_STATE)
    C = normal(channels, 1, D_STATE)
    return StateSpaceArguments(normal(batch, length, channels), A, normal(channels, D_STATE), C)


def _ssd(normal: Normal, batch: int, length: int, channels: int) -> SsdArguments:
    heads = channels // HEAD_DIM
    return SsdArguments(
        x=normal(batch, length, heads, HEAD_DIM),
        dt=normal(batch, length, heads),
        A=-normal(heads).abs(),
        B=normal(batch, length, 1, HEAD_DIM),
        C=normal(batch, length, 1, HEAD_DIM),
        D=normal(heads),
        dt_bias=normal(heads) - 4,
        dt_softplus=True,
        wants_final_state=False,
    )


def _wkv(normal: Normal, batch: int, length: int, channels: int) -> WkvArguments:
    k, v = normal(batch, length, channels), normal(batch, length, channels)
    return WkvArguments(k, v, normal(channels).abs(), normal(channels))


def _delta(normal: Normal, batch: int, length: int, channels: int) -> DeltaArguments:
    heads = channels // HEAD_DIM
    size = (batch, length, heads, HEAD_DIM)
    return DeltaArguments(
        q=normal(*size),
        k=torch.nn.functional.normalize(normal(*size), dim=-1),
        v=normal(*size),
        g=-0.1 * normal(batch, length, heads).abs(),
        beta=normal(batch, length, heads).sigmoid(),
        wants_final_state=False,
    )


def _trapezoid(normal: Normal, batch: int, length: int, channels: int) -> TrapezoidArguments:
    heads = channels // HEAD_DIM
    one, size = (batch, length, heads), (batch, length, heads, 1, HEAD_DIM)
    return TrapezoidArguments(
        x=normal(*size),
        dt=0.1 * normal(*one).abs(),
        A=-normal(*one).abs(),
        trap=normal(*one).sigmoid(),
        B=normal(*size),
        C=normal(*size),
        wants_final_state=False,
    )


def _add_norm(normal: Normal, batch: int, length: int, channels: int) -> AddNormArguments:
    x, residual = normal(batch, length, channels), normal(batch, length, channels)
    return AddNormArguments(x, residual, normal(channels))


def _gated_norm(normal: Normal, batch: int, length: int, channels: int) -> GatedNormArguments:
    return GatedNormArguments(normal(batch, length, channels), normal(batch, length, channels), normal(channels))


def _unit_norm(normal: Normal, batch: int, length: int, channels: int) -> UnitNormArguments:
    return UnitNormArguments(normal(batch, length, channels), HEAD_DIM)


def _decays(normal: Normal, batch: int, length: int, channels: int) -> DecayArguments:
    return DecayArguments(normal(batch, length, channels), normal(channels // HEAD_DIM), normal(channels))


def _loss(normal: Normal, batch: int, length: int, channels: int) -> LossArguments:
    hidden = normal(batch * length, channels)
    vocabulary = VOCABULARY.get(hidden.device.type, VOCABULARY["cpu"])
    labels = torch.arange(batch * length, device=hidden.device) % vocabulary
    return LossArguments(hidden, normal(vocabulary, channels), labels)


_MAKERS: dict[str, Callable[[Normal, int, int, int], Any]] = {
    "selective_scan": _scan,
    "causal_conv": _conv,
    "lti_scan": _lti,
    "state_space_scan": _state_space,
    "ssd": _ssd,
    "wkv": _wkv,
    "delta_rule": _delta,
    "trapezoidal_scan": _trapezoid,
    "add_rms_norm": _add_norm,
    "gated_rms_norm": _gated_norm,
    "unit_norm": _unit_norm,
    "log_decays": _decays,
    "linear_cross_entropy": _loss,
}
