"""Ops as they are registered: each backend that can run, of ours and of other packages, at the sizes of models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mambaseq.benchmarking import inputs, peers
from mambaseq.benchmarking.cases import Case, Contender, Plan, our_backend, tolerance, training_dtype
from mambaseq.benchmarking.report import OURS
from mambaseq.ops import OPS
from mambaseq.ops.dispatch import PACKAGES, Backend, Op, leaves

# positions of two sequences that are held against the definition, which loops over them
CHECKED = 1000
# names of backends as contenders, where those are others
NAMES = {"torch": "PyTorch", "fft": "FFT", "mamba_ssm": "mamba-ssm"}

Sizes = dict[str, list[tuple[int, ...]]]
# batch, length, channels, channels of a head and of its keys or states; of Mamba-3 inputs a head
OF_HEADS = ("batch", "length", "channels", "head_dim", "d_state", "rank")
HEADS: Sizes = {
    "full": [(8, 2048, 1536, 64, 128), (1, 65536, 1536, 64, 128)],
    "small": [(2, 512, 128, 32, 32), (1, 2048, 64, 32, 32)],
    "tiny": [(2, 33, 9, 3, 5)],
}
DELTA: Sizes = HEADS | {"full": [(8, 2048, 1536, 128, 128), (1, 65536, 1536, 128, 128)]}
RANKS: Sizes = {scale: [(*size, rank) for size in sizes for rank in (1, 4)] for scale, sizes in HEADS.items()}
OF_CHANNELS = ("batch", "length", "channels", "d_state")
CHANNELS: Sizes = {
    "full": [(8, 2048, 1536, 16), (1, 65536, 1536, 16)],
    "small": [(2, 256, 128, 16), (1, 2048, 64, 16)],
    "tiny": [(2, 33, 19, 5)],
}
DENSE: Sizes = CHANNELS | {"full": [(8, 2048, 768, 64), (1, 65536, 768, 64)]}
OF_ROWS = ("batch", "length", "channels", "head_dim")
ROWS: Sizes = {"full": [(8, 2048, 1536, 128)], "small": [(4, 256, 256, 32)], "tiny": [(2, 17, 12, 3)]}


@dataclasses.dataclass(frozen=True)
class Registered:
    """An op of `OPS` as it is timed.

    make: its arguments, as in `inputs`. names: of the sizes that `make` takes, in their order in `sizes`.
    variant: what the arguments make of the op, where it has several rows.
    units: heads or channels that are checked, which know nothing of each other; None for all, as where a gradient is
        one number a head: of two of them, sums in which terms cancel, rounding may be any share.
    limit: of the relative RMS error in bfloat16, where products are rounded more than once.
    chunks: the backend that checks long sequences, in float64.
    theirs: a package's own function, `(device) → (run, "" or why it is absent)` by the contender's name, in place of
        the registered backend that wraps it.
    """

    op: str
    what: str
    make: Callable[..., Any]
    names: tuple[str, ...]
    sizes: Sizes
    variant: str = ""
    units: int | None = 2
    limit: float = 4e-3
    chunks: str = "torch"
    theirs: dict[str, Callable[[torch.device], tuple[Callable[..., Any], str]]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def name(self) -> str:
        return f"{self.op}, {self.variant}" if self.variant else self.op

    def plans(self, device: torch.device, scale: str) -> Iterator[Plan]:
        """A plan for each size."""
        for sizes in self.sizes[scale]:
            shape = dict(zip(self.names, sizes, strict=False))
            yield Plan(self.name, shape, functools.partial(_case, self, shape, device))


def _mamba_ssm(device: torch.device) -> tuple[Callable[..., Any], str]:
    """The dual in chunks of 256, mamba-ssm's own default."""
    package, absent = peers.find("mamba_ssm.ops.triton.ssd_combined", device)

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        assert package is not None
        return package.mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True)

    return run, absent


RULE = "delta_rule"
ALL = (
    Registered(
        "ssd",
        "softplus, D and dt's bias fused",
        inputs.ssd,
        OF_HEADS,
        HEADS,
        units=None,
        theirs={"mamba-ssm": _mamba_ssm},
    ),
    Registered(RULE, "a decay a head", inputs.gated_delta, OF_HEADS, DELTA, "gated_delta", limit=1.6e-2),
    Registered(RULE, "a decay a channel of the keys", inputs.kda, OF_HEADS, DELTA, "kda", limit=1.6e-2),
    Registered(RULE, "the same without the rule", inputs.gla, OF_HEADS, DELTA, "gla", limit=1.6e-2),
    Registered(
        "trapezoidal_scan", "Mamba-3, without its turning", inputs.trapezoidal_scan, OF_HEADS, RANKS, limit=5e-3
    ),
    Registered("lti_scan", "complex", inputs.lti_scan, OF_CHANNELS, CHANNELS, units=16),
    Registered(
        "state_space_scan", "a dense system a channel", inputs.state_space_scan, OF_CHANNELS, DENSE, chunks="blocks"
    ),
    Registered("wkv", "RWKV-4", inputs.wkv, OF_CHANNELS[:3], CHANNELS, units=16),
    Registered("unit_norm", "rows of a head to length 1", inputs.unit_norm, OF_ROWS, ROWS, units=None),
    Registered("log_decays", "of delta rules", inputs.log_decays, OF_ROWS, ROWS, units=None),
)


def _case(timed: Registered, shape: dict[str, int], device: torch.device) -> Case:
    op, places = OPS[timed.op], (shape["batch"], shape["length"])
    arguments = _as_trained(op, timed.make(inputs.normal_of(device), **shape), places, device)
    # a long sequence is checked whole, so that no cut of time is missed: not by a loop, but by chunks in float64, which
    # the other shapes hold against the loop
    whole = shape["batch"] == 1 and shape["length"] > CHECKED
    reference = {backend.name: backend for backend in op.backends}[timed.chunks if whole else "reference"]

    def part(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != places:
            return tensor[: timed.units]
        return tensor[:, :, : timed.units] if whole else tensor[:2, :CHECKED, : timed.units]

    return Case(
        op=timed.name,
        shape=shape,
        inputs={name: value for name, value in arguments._asdict().items() if isinstance(value, Tensor)},
        reference=_output_of(reference, arguments),
        contenders=tuple(_contenders(timed, op, arguments, device)),
        tolerance=max(tolerance(device), timed.limit if training_dtype(device) == torch.bfloat16 else 0.0),
        part=part,
    )


def _as_trained(op: Op, arguments: Any, places: tuple[int, int], device: torch.device) -> Any:
    """What has a value at each place `(batch, length)` in the dtype that models are trained in, or what the op says."""
    dtype = training_dtype(device)
    if dtype == torch.float32:
        return arguments
    if op.half is not None:
        return op.half(arguments)
    given = {name: value for name, value in arguments._asdict().items() if isinstance(value, Tensor)}
    return arguments._replace(**{name: value.to(dtype) for name, value in given.items() if value.shape[:2] == places})


def _contenders(timed: Registered, op: Op, arguments: Any, device: torch.device) -> Iterator[Contender]:
    """Ours that would run, then other backends that can, and those of packages, absent or not; the definition only if
    there is no other."""
    asked = leaves(arguments)
    ours = our_backend(op.name, asked)
    theirs = {name: find(device) for name, find in timed.theirs.items()}
    for backend in sorted(op.backends, key=lambda backend: backend.name != ours):
        name, why = NAMES.get(backend.name, backend.name), backend.why_not(asked)
        run = _output_of(backend, arguments)
        if backend.name == ours:
            yield Contender(OURS, run, ours)
        elif backend.name in PACKAGES and name not in theirs:
            yield Contender(name, run, absent=why or "")
        elif backend.name not in (*PACKAGES, "reference") and why is None:
            yield Contender(name, run, backend.name if name != backend.name else "")
    for name, (run, absent) in theirs.items():
        yield Contender(name, run, absent=absent)


def _output_of(backend: Backend, arguments: Any) -> Callable[..., Tensor]:
    """A backend as a contender: of the tensors among its arguments, to its first output."""
    return lambda **tensors: backend.run(arguments._replace(**tensors))[0]
