"""The angles by which the state of Mamba-3 has turned: what each position turns by, added up over time."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.chunks import sums
from mambaseq.ops.eager import wants_reference
from mambaseq.ops.gpu import portable
from mambaseq.ops.operators import Operator, exported, register

_ROWS = 32  # positions of a piece
_PROGRAMS = 2048  # wanted before one takes the gradients of several heads


class AngleArguments(NamedTuple):
    """values `(batch, length, heads or 1, n_angles)`, dt `(batch, length, heads)`; before `(sequences, heads,
    n_angles)` float64: where sequences begin, 0 if None. With cu_seqlens they are packed into one row."""

    values: Tensor
    dt: Tensor
    before: Tensor | None = None
    cu_seqlens: Tensor | None = None


def turns(values: Tensor, dt: Tensor) -> Tensor:
    """What positions turn by, pi tanh(values) dt: `(..., heads, n_angles)` float64 of values `(..., heads or 1,
    n_angles)` and dt `(..., heads)`."""
    return torch.tanh(values).double() * (math.pi * dt.double())[..., None]


def added_up(a: AngleArguments) -> tuple[Tensor, Tensor]:
    """Angles after each position `(batch, length, heads, n_angles)`, and at the end of each sequence `(sequences,
    heads, n_angles)` float64. The first are float64, on a GPU by kernels float32, whole turns taken off."""
    if a.values.is_cuda and not wants_reference() and why_not(a) is None:
        return kernel(a)
    angle, last = _anywhere(a)
    return angle, last


def _added_up(a: AngleArguments) -> tuple[Tensor, Tensor]:
    turn = turns(a.values, a.dt)
    if a.cu_seqlens is not None:
        return _added_up_packed(a, turn, a.cu_seqlens)
    angle = sums(turn.flatten(2)).view(turn.shape)
    angle = angle if a.before is None else angle + a.before[:, None]
    if angle.shape[1]:
        return angle, angle[:, -1]
    return angle, angle.new_zeros(angle.shape[0], *angle.shape[2:]) if a.before is None else a.before.clone()


def _added_up_packed(a: AngleArguments, turn: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The same of packed sequences, by sums over all of the row; none takes NaN or infinity from another."""
    bounds, of_position = cu_seqlens.long(), sequences.of_positions(cu_seqlens, turn.shape[1])
    bad = ~turn.isfinite()
    spoilt = sequences.spoilt(bad, bounds.index_select(0, of_position), 1)
    turn = turn if spoilt is None else turn.masked_fill(bad, 0)
    angle = sums(turn.flatten(2)).view(turn.shape)
    ends = F.pad(angle[0], (0, 0, 0, 0, 1, 0)).index_select(0, bounds)
    start = -ends[:-1] if a.before is None else a.before - ends[:-1]
    angle, last = angle + start.index_select(0, of_position), start + ends[1:]
    if spoilt is not None:
        angle = angle.masked_fill(spoilt, torch.nan)
        filled = (bounds.diff() > 0)[:, None, None]
        at_end = angle[0].index_select(0, (bounds[1:] - 1).clamp(min=0))
        last = torch.where(filled & at_end.isnan(), torch.nan, last)
    return angle, last


def kernel(a: AngleArguments) -> tuple[Tensor, Tensor]:
    """The same by Triton, of what `why_not` is None for."""
    angle, last = _run(a)
    return angle, last


def why_not(a: AngleArguments) -> str | None:
    """The reason why the kernels cannot run, or None."""
    if (reason := portable.why_not(a.values.device.type)) is not None:
        return reason
    if a.values.dtype != torch.float32 or a.dt.dtype != torch.float32:
        return "values or dt are not float32"
    return "there is nothing" if a.values.numel() == 0 or a.dt.numel() == 0 else None


class _Sizes:
    """Of a call: pieces, the grid, strided inputs, and what kernels know when they are compiled."""

    def __init__(self, a: AngleArguments) -> None:
        values = a.values if a.values.stride(3) == 1 else a.values.contiguous()
        self.batch, self.length, self.heads = a.dt.shape
        self.n, self.cu_seqlens = values.shape[3], a.cu_seqlens
        self.shared = values.shape[2] == 1
        self.pieces = -(-self.length // _ROWS)
        self.given = (*values_of(values, self.shared), a.dt, *a.dt.stride())
        self.counts = (self.pieces, self.length, self.heads)
        self.known = {"ANGLES": self.n, "HALF": 1 << (self.n - 1).bit_length(), "ROWS": _ROWS}
        self.sequence = None
        if a.cu_seqlens is not None:
            self.sequence = sequences.shared(sequences.of_positions, a.cu_seqlens, self.length)

    def totals(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Sums before each piece and up to its end `(batch, pieces, heads * n_angles)`, and before each of cu_seqlens
        `(sequences + 1, heads * n_angles)`; float64."""
        ends = sums(self._totals(given, None, self.batch * self.pieces).unflatten(0, (self.batch, self.pieces)))
        before = F.pad(ends[:, :-1], (0, 0, 1, 0))
        if self.cu_seqlens is None:
            return before, ends, ends[0]
        places = self.cu_seqlens.int()
        own = self._totals(given, places, places.shape[0])
        return before, ends, own + before[0].index_select(0, (places // _ROWS).clamp(max=self.pieces - 1))

    def _totals(self, given: tuple[Any, ...], places: Tensor | None, n: int) -> Tensor:
        found = torch.empty(n, self.heads * self.n, dtype=torch.float64, device=self.given[0].device)
        _kernels().totals[(n, self.heads)](*given, places, found, *self.counts, **self.known)
        return found


def values_of(values: Tensor, shared: bool) -> tuple[Any, ...]:
    """Values and their strides; a head apart is none where heads share them."""
    return values, values.stride(0), values.stride(1), 0 if shared else values.stride(2)


def _fake(a: AngleArguments) -> tuple[Tensor, Tensor]:
    batch, length, heads = a.dt.shape
    n = a.values.shape[3]
    angle = torch.empty(batch, length, heads, n, dtype=torch.float32, device=a.dt.device)
    return angle, angle.new_empty(sequences.count(a.dt, a.cu_seqlens), heads, n, dtype=torch.float64)


def _forward(a: AngleArguments) -> tuple[Tensor, Tensor]:
    with portable.on(a.values):
        sizes, (angle, last) = _Sizes(a), _fake(a)
        before, ends, at = sizes.totals(*sizes.given)
        start = None if a.before is None else a.before.double().flatten(1)
        offset = None
        if a.cu_seqlens is not None:
            offset = -at[:-1] if start is None else start - at[:-1]
            end = offset + at[1:]
        elif start is None:
            end = ends[:, -1]
        else:
            before, end = before + start[:, None], ends[:, -1] + start
        _kernels().upto[(sizes.batch * sizes.pieces, sizes.heads)](
            *sizes.given, sizes.sequence, offset, before, angle, *sizes.counts, **sizes.known
        )
        last.copy_(end.view(last.shape))
    return angle, last


def _backward(a: AngleArguments, dangle: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    with portable.on(a.values):
        sizes, dangle, dend = _Sizes(a), dangle.contiguous(), dlast.flatten(1)
        _, ends, at = sizes.totals(*values_of(dangle, False), None, 0, 0, 0)
        whole, offset = ends[:, -1:], None
        after = whole - ends
        if a.cu_seqlens is None:
            after, dstart = after + dend[:, None], None if a.before is None else whole[:, 0] + dend
        else:
            offset, dstart = dend - (whole[:, 0] - at[1:]), at[1:] - at[:-1] + dend
        heads = max(1, min(sizes.heads, sizes.batch * sizes.pieces * sizes.heads // _PROGRAMS))
        parts = -(-sizes.heads // heads)
        shape = (parts, *a.values.shape) if sizes.shared else a.values.shape
        dvalues, ddt = (torch.empty(v, dtype=torch.float32, device=a.dt.device) for v in (shape, a.dt.shape))
        _kernels().backward[(sizes.batch * sizes.pieces, parts)](
            *sizes.given, sizes.sequence, offset, dangle, after, dvalues, ddt, *sizes.counts, heads,
            SHARED=sizes.shared, **sizes.known,
            # threads that hold the same sum would each round it in their own way, and any of them may write it
            enable_fp_fusion=False,
        )  # fmt: skip
        if sizes.shared:
            dvalues = dvalues.squeeze(0) if parts == 1 else dvalues.sum(0)
    return dvalues, ddt, None if a.before is None or dstart is None else dstart.view(dlast.shape).to(a.before.dtype)


def _kernels() -> Any:
    return importlib.import_module("mambaseq.ops.trapezoid.angle_kernels")


_SCHEMA = "Tensor values, Tensor dt, Tensor? before, Tensor? cu_seqlens"
_anywhere = exported(
    "mamba3_angles_torch",
    AngleArguments,
    _SCHEMA,
    _added_up,
    lambda a: tuple(found.double() for found in _fake(a)),
)
_run = register(
    Operator(
        "mamba3_angles",
        AngleArguments,
        _SCHEMA,
        ("values", "dt", "before"),
        _forward,
        _backward,
        _fake,
        zeros=True,
    )
)
