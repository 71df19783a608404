"""How fast each backend of each op is on inputs of a moderate size: the column of `mambaseq doctor`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambaseq.benchmarking.inputs import MAKERS, normal_of
from mambaseq.benchmarking.timing import Attempt, attempt, measure
from mambaseq.mixers.mamba import Mamba
from mambaseq.ops.blocks.mamba import why_not as why_not_whole
from mambaseq.ops.dispatch import Op, leaves, relative_rms_error

# batch, length, channels: definitions loop over the length, so it is not long
SIZES = {"cuda": (4, 1024, 1024), "cpu": (1, 128, 128)}


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
    make = MAKERS.get(op.name)
    if make is None:
        return next(iter(op.samples(device)))
    return f"{batch} x {length} x {channels}", make(normal_of(device), batch, length, channels)
