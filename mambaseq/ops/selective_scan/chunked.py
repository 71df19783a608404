"""The selective scan in PyTorch alone: any device, any dtype, real or complex.

Time is cut into chunks. In a chunk all states are found at once by an associative scan (`mambaseq.ops.recurrence`).
The backward pass recomputes chunk by chunk from the states at the chunks' beginnings, so memory grows with
`length / chunk` states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.recurrence import linear_scan_
from mambaseq.ops.selective_scan.arguments import ScanArguments
from mambaseq.ops.selective_scan.library import scan_operator, wanted

# States held at once, in elements: large enough to keep a GPU busy, small beside its memory.
_ELEMENTS_OF_CHUNK = 2**24


class _Packing(NamedTuple):
    """Where sequences begin and end in the packed row."""

    of_position: Tensor  # (length,) the sequence of each position
    first: Tensor  # (length,) bool, True where a sequence begins
    starts: Tensor  # (sequences,)
    ends: Tensor  # (sequences,)


class _Chunk(NamedTuple):
    """What forward and backward need of positions `start:end`; (b, t, c, n) are the axes of the states."""

    u: Tensor  # x in the working precision (b, t, c)
    raw: Tensor  # dt + dt_bias, before the softplus (b, t, c)
    delta: Tensor  # step sizes (b, t, c)
    B: Tensor  # broadcastable to (b, t, c, n)
    C: Tensor  # broadcastable to (b, t, c, n)
    decay: Tensor  # exp(delta A) (b, t, c, n)
    first: Tensor | None  # (t, 1, 1) bool, True where a packed sequence begins
    entering: Tensor  # h_{t-1}, or the initial state where a sequence begins (b, t, c, n)
    h: Tensor  # (b, t, c, n)


def _forward(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    arguments = _forward_in_time(arguments)
    packing, initial = _packing(arguments), _initial_state(arguments)
    x, D, z, real = arguments.x, arguments.D, arguments.z, working_dtype(arguments.x)
    final = initial
    state = initial if packing is None else torch.zeros_like(initial[:1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start, end in _chunks(arguments):
        chunk = _states(arguments, packing, initial, state, start, end)
        y_here = _read_out(chunk, D)
        if z is not None:
            y_here = y_here * F.silu(z[:, start:end].to(real))
        y[:, start:end] = y_here
        state = chunk.h[:, -1]
        if packing is not None:
            ending, index = _inside(packing, packing.ends - 1, start, end)
            final = torch.where(ending, chunk.h[0, index], final)
    if packing is None:
        final = state
    if arguments.reverse:
        y = y.flip(1)
        final = final if packing is None else final.flip(0)
    return y, final.clone(memory_format=torch.contiguous_format)


def _backward(given: ScanArguments, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    arguments = _forward_in_time(given)
    packing, initial = _packing(arguments), _initial_state(arguments)
    x, _, A, B, C, D, z, dt_bias, dt_softplus, *_ = arguments
    real, wide = working_dtype(arguments.x), working_dtype(arguments.x, arguments.A)
    A = A.to(wide)
    if given.reverse:
        dy = dy.flip(1)
        dfinal = dfinal if packing is None else dfinal.flip(0)

    spans = _chunks(arguments)
    state = initial if packing is None else torch.zeros_like(initial[:1])
    states = []
    for start, end in spans:
        states.append(state)
        if end < x.shape[1]:
            state = _states(arguments, packing, initial, state, start, end).h[:, -1]

    dx, ddt = torch.empty_like(x, dtype=real), torch.empty_like(x, dtype=real)
    dz = None if z is None else torch.empty_like(x, dtype=real)
    dA, dB, dC = (torch.zeros(M.shape, dtype=wide, device=M.device) for M in (A, B, C))
    dD = None if D is None else torch.zeros_like(D, dtype=real)
    # What flows from a chunk into the one before it, and, for packed sequences, into each initial state.
    carry, dinitial = (dfinal, dfinal) if packing is None else (torch.zeros_like(initial[:1]), dfinal)
    for (start, end), state in zip(reversed(spans), reversed(states), strict=True):
        chunk = _states(arguments, packing, initial, state, start, end)
        here = slice(start, end)
        dy_here = dy[:, here].to(real)
        if z is not None and dz is not None:
            gate = z[:, here].to(real)
            sigmoid = torch.sigmoid(gate)
            dz[:, here] = dy_here * _read_out(chunk, D) * sigmoid * (1 + gate * (1 - sigmoid))
            dy_here = dy_here * gate * sigmoid

        # The gradient of the states follows the same recurrence with conjugate decays, back in time.
        dout = (2 * dy_here if A.is_complex() else dy_here)[..., None]  # (b, t, c, 1)
        dh = (dout * chunk.C.conj()).expand_as(chunk.h).contiguous()
        dh[:, -1] += carry
        kept = chunk.decay if chunk.first is None else chunk.decay.masked_fill(chunk.first, 0)
        kept = kept.conj().resolve_conj()
        if packing is not None:
            ending, index = _inside(packing, packing.ends - 1, start, end)
            dh[0].index_add_(0, index, torch.where(ending, dfinal, 0))
        back = torch.cat([torch.zeros_like(kept[:, :1]), kept[:, 1:].flip(1)], dim=1)  # (b, t, c, n), in reverse
        dh = linear_scan_(back, dh.flip(1)).flip(1)
        carry = kept[:, 0] * dh[:, 0]
        if packing is not None:
            starting, index = _inside(packing, packing.starts, start, end)
            dinitial = torch.where(starting, chunk.decay[0, index].conj() * dh[0, index], dinitial)

        dexponent = dh * (chunk.decay * chunk.entering).conj()
        dA += (dexponent * chunk.delta[..., None]).sum((0, 1))  # (c, n)
        ddelta = _real_part((dexponent * A.conj()).sum(-1))
        dinput = _real_part((dh * chunk.B.conj()).sum(-1))  # of delta · x
        ddelta = ddelta + dinput * chunk.u
        ddt[:, here] = ddelta * torch.sigmoid(chunk.raw) if dt_softplus else ddelta
        dx_here = dinput * chunk.delta
        if D is not None and dD is not None:
            dx_here = dx_here + dy_here * D.to(real)
            dD += (dy_here * chunk.u).sum((0, 1))
        dx[:, here] = dx_here
        _accumulate_(dB, dh * (chunk.delta * chunk.u)[..., None], here)
        _accumulate_(dC, dout * chunk.h.conj(), here)

    if packing is None:
        dinitial = carry
    ddt_bias = None if dt_bias is None else ddt.sum((0, 1))
    if given.reverse:
        dx, ddt = dx.flip(1), ddt.flip(1)
        dz = None if dz is None else dz.flip(1)
        dB, dC = (dM if dM.ndim == 2 else dM.flip(1) for dM in (dB, dC))
        dinitial = dinitial if packing is None else dinitial.flip(0)
    found = (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial)
    return tuple(_like(gradient, value) for gradient, value in zip(found, wanted(given), strict=True))


def _forward_in_time(arguments: ScanArguments) -> ScanArguments:
    """The same scan with time running forward."""
    if not arguments.reverse:
        return arguments

    arguments = arguments._replace(
        x=arguments.x.flip(1),
        dt=arguments.dt.flip(1),
        B=arguments.B if arguments.B.ndim == 2 else arguments.B.flip(1),
        C=arguments.C if arguments.C.ndim == 2 else arguments.C.flip(1),
        z=None if arguments.z is None else arguments.z.flip(1),
    )
    if arguments.cu_seqlens is None:
        return arguments
    state = arguments.initial_state
    return arguments._replace(
        cu_seqlens=sequences.flipped(arguments.cu_seqlens),
        initial_state=None if state is None else state.flip(0),
    )


def _packing(arguments: ScanArguments) -> _Packing | None:
    if arguments.cu_seqlens is None:
        return None
    cu_seqlens, length = arguments.cu_seqlens.long(), arguments.x.shape[1]
    of_position = sequences.of_positions(cu_seqlens, length)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    first = starts[of_position] == torch.arange(length, device=cu_seqlens.device)
    return _Packing(of_position, first, starts, ends)


def _chunks(arguments: ScanArguments) -> list[tuple[int, int]]:
    batch, length, channels = arguments.x.shape
    width = max(1, batch * channels * arguments.A.shape[1])
    step = min(256, max(16, _ELEMENTS_OF_CHUNK // width))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _initial_state(arguments: ScanArguments) -> Tensor:
    state, dtype = arguments.initial_state, working_dtype(arguments.x, arguments.A)
    if state is not None:
        return state.to(dtype)
    return arguments.A.new_zeros((arguments.n_sequences, *arguments.A.shape), dtype=dtype)


def _states(
    arguments: ScanArguments,
    packing: _Packing | None,
    initial: Tensor,
    state: Tensor,
    start: int,
    end: int,
) -> _Chunk:
    """All states of positions `start:end`; `state` is that before them, `initial` those of the sequences."""
    real, wide = working_dtype(arguments.x), working_dtype(arguments.x, arguments.A)
    channels = arguments.x.shape[2]
    u = arguments.x[:, start:end].to(real)
    raw = arguments.dt[:, start:end].to(real)
    if arguments.dt_bias is not None:
        raw = raw + arguments.dt_bias.to(real)
    delta = F.softplus(raw) if arguments.dt_softplus else raw
    B, C = (_per_channel(M, start, end, channels).to(wide) for M in (arguments.B, arguments.C))
    decay = torch.exp(delta[..., None] * arguments.A.to(wide))  # (b, t, c, n)
    h = (delta * u)[..., None] * B  # (b, t, c, n)
    if packing is None:
        first = None
        kept = decay.clone()
    else:
        first = packing.first[start:end, None, None]  # (t, 1, 1)
        begin = initial[packing.of_position[start:end]]
        h += torch.where(first, decay[0] * begin, 0)
        kept = decay.masked_fill(first, 0)
        state = torch.where(packing.first[start], 0, state)
    h[:, 0] += kept[:, 0] * state
    spoilt = None
    if packing is not None:  # no sequence takes NaN or infinity from another
        bad = ~(h.isfinite() & kept.isfinite())
        begins = (packing.starts[packing.of_position[start:end]] - start).clamp(min=0)
        if (spoilt := sequences.spoilt(bad, begins, 1)) is not None:
            kept, h = kept.masked_fill(bad, 0), h.masked_fill(bad, 0)
    h = linear_scan_(kept, h)
    if spoilt is not None:
        h = h.masked_fill(spoilt, torch.nan)
    entering = torch.cat([state[:, None], h[:, :-1]], dim=1)  # (b, t, c, n)
    if first is not None:
        entering = torch.where(first, begin, entering)
    return _Chunk(u, raw, delta, B, C, decay, first, entering, h)


def _read_out(chunk: _Chunk, D: Tensor | None) -> Tensor:
    """The output before the gate (b, t, c)."""
    y = (chunk.h * chunk.C).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    return y if D is None else y + D.to(y.dtype) * chunk.u


def _inside(packing: _Packing, points: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Which sequences have their point in `start:end`, (sequences, 1, 1), and where in it, (sequences,)."""
    inside = (packing.ends > packing.starts) & (points >= start) & (points < end)
    return inside[:, None, None], (points - start).clamp(0, end - start - 1)


def _per_channel(M: Tensor, start: int, end: int, channels: int) -> Tensor:
    """B or C at positions `start:end`, broadcastable to (b, t, c, n)."""
    if M.ndim == 2:
        return M[None, None]  # (1, 1, c, n)
    if M.ndim == 3:
        return M[:, start:end, None]  # (b, t, 1, n)
    return M[:, start:end].repeat_interleave(channels // M.shape[2], dim=2)  # (b, t, c, n)


def _accumulate_(total: Tensor, per_channel: Tensor, here: slice) -> None:
    """Add a gradient (b, t, c, n) to that of B or C, whichever of their shapes `total` has."""
    if total.ndim == 2:
        total += per_channel.sum((0, 1))
    elif total.ndim == 3:
        total[:, here] = per_channel.sum(2)
    else:
        total[:, here] = per_channel.unflatten(2, (total.shape[2], -1)).sum(3)  # (b, t, groups, n)


def _real_part(value: Tensor) -> Tensor:
    return value.real if value.is_complex() else value


def _like(gradient: Tensor | None, value: Tensor | None) -> Tensor | None:
    """The gradient in the dtype of the value that it belongs to."""
    if gradient is None or value is None:
        return None
    gradient = gradient if value.is_complex() else _real_part(gradient)
    return gradient.to(value.dtype, memory_format=torch.contiguous_format, copy=True)


run = scan_operator("selective_scan_torch", _forward, _backward)
