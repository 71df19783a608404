"""The state-space dual at the sizes of a Mamba-2 model, next to mamba-ssm's kernels and the same in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mambaseq.benchmarking import peers
from mambaseq.benchmarking.cases import Case, Contender, Plan, our_backend, output_of, tolerance, training_dtype
from mambaseq.benchmarking.report import OURS
from mambaseq.ops import ssd
from mambaseq.ops.ssd.arguments import SsdArguments

# batch, length, heads, head_dim, d_state
SIZES = {
    "full": [(8, 2048, 24, 64, 128), (1, 65536, 24, 64, 128)],
    "small": [(2, 512, 4, 32, 32)],
    "tiny": [(2, 33, 2, 3, 5)],
}
PEERS_CHUNK = 256  # mamba-ssm's own default


def dual_inputs(shape: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Inputs like those in a Mamba-2 block, with step sizes of 1e-3 … 1e-1 and one group."""
    batch, length, heads, head_dim, d_state = shape.values()
    generator = torch.Generator(device).manual_seed(0)
    dtype = training_dtype(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": normal(batch, length, heads),
        "A": -torch.linspace(1, 16, heads, device=device),
        "B": normal(batch, length, 1, d_state),
        "C": normal(batch, length, 1, d_state),
        "D": torch.ones(heads, device=device),
        "dt_bias": torch.rand(heads, generator=generator, device=device) * 4 - 6,
    }


def beginning(tensor: Tensor) -> Tensor:
    """The part that is checked: the first positions of two sequences."""
    return tensor[:2, :1000] if tensor.ndim > 2 else tensor


def duals(device: torch.device, scale: str) -> Iterator[Plan]:
    """A plan for each size."""
    package, absent = peers.find("mamba_ssm.ops.triton.ssd_combined", device)

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        assert package is not None
        scan = package.mamba_chunk_scan_combined
        return scan(x, dt, A, B, C, PEERS_CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True)

    def case(shape: dict[str, int]) -> Case:
        inputs = dual_inputs(shape, device)
        run = functools.partial(output_of, ssd, dt_softplus=True)
        backend = our_backend("ssd", SsdArguments(**inputs, dt_softplus=True, wants_final_state=False))
        contenders = [
            Contender(OURS, run(backend=backend), backend),
            Contender("mamba-ssm", theirs, absent=absent),
        ]
        if backend != "torch":
            contenders.append(Contender("PyTorch", run(backend="torch"), "torch"))
        return Case(
            op="ssd",
            shape=shape,
            inputs=inputs,
            reference=run(backend="torch"),  # in chunks: a loop over time would take minutes
            contenders=contenders,
            tolerance=tolerance(device),
            part=beginning,
        )

    for sizes in SIZES[scale]:
        shape = dict(zip(("batch", "length", "heads", "head_dim", "d_state"), sizes, strict=True))
        yield Plan("ssd", shape, functools.partial(case, shape))
