"""The ops of causal mixers over a rank's piece of sequences. Where ranks run a layer at once (see `ends`), what comes
from the ranks before is gathered; else they are the ops themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq import ops
from mambaseq.ops import ends as matrices
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.lti import discretize
from mambaseq.ops.lti import ends as systems
from mambaseq.ops.selective_scan import ends as scans
from mambaseq.parallel.ends import Ends, Enter, Halo, current


class Recurrence(Protocol):
    """What a stretch of time does to a state; without gradients."""

    def behind(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The state `(sequences, ...)` that these rows of time make from zeros, and what they decay one by."""

    def before(self, dy: Tensor, rows: slice) -> Tensor:
        """The gradient of the state before them that dy, of these rows, makes."""

    def decay(self, rows: slice) -> Tensor:
        """What they decay a state by."""


class ScanRecurrence:
    """Of the selective scan; arguments as there."""

    def __init__(
        self,
        x: Tensor | None,
        dt: Tensor,
        A: Tensor,
        B: Tensor | None,
        C: Tensor,
        z: Tensor | None,
        bias: Tensor | None,
        softplus: bool,
    ) -> None:
        self.x, self.dt, self.A, self.B, self.C, self.z = x, dt, A, B, C, z
        self.bias, self.softplus = bias, softplus

    def behind(self, rows: slice) -> tuple[Tensor, Tensor]:
        assert self.x is not None
        assert self.B is not None
        B = self.B if self.B.ndim == 2 else self.B[:, rows]
        return scans.state_behind(self.x[:, rows], self.dt[:, rows], self.A, B, self.bias, self.softplus)

    def before(self, dy: Tensor, rows: slice) -> Tensor:
        C, z = self.C if self.C.ndim == 2 else self.C[:, rows], None if self.z is None else self.z[:, rows]
        return scans.gradient_before(dy[:, rows], self.dt[:, rows], self.A, C, z, self.bias, self.softplus)

    def decay(self, rows: slice) -> Tensor:
        return scans.decay(self.dt[:, rows], self.A, self.bias, self.softplus)


class MatrixRecurrence:
    """Of the state-space dual and of gated linear attention: of values, keys, queries and logarithms of decays, see
    `mambaseq.ops.ends`."""

    def __init__(self, values: Tensor | None, keys: Tensor | None, queries: Tensor, log_decay: Tensor) -> None:
        self.values, self.keys, self.queries, self.log_decay = values, keys, queries, log_decay

    def behind(self, rows: slice) -> tuple[Tensor, Tensor]:
        assert self.values is not None
        assert self.keys is not None
        return matrices.state_behind(self.values[:, rows], self.keys[:, rows], self.log_decay[:, rows])

    def before(self, dy: Tensor, rows: slice) -> Tensor:
        return matrices.gradient_before(dy[:, rows], self.queries[:, rows], self.log_decay[:, rows])

    def decay(self, rows: slice) -> Tensor:
        return matrices.decay(self.log_decay[:, rows])


class ConstantRecurrence:
    """Of a time-invariant system, in discrete time."""

    def __init__(self, x: Tensor | None, log_decay: Tensor, B: Tensor | None, C: Tensor, z: Tensor | None) -> None:
        self.x, self.log_decay, self.B, self.C, self.z = x, log_decay, B, C, z

    def behind(self, rows: slice) -> tuple[Tensor, Tensor]:
        assert self.x is not None
        assert self.B is not None
        return systems.state_behind(self.x[:, rows], self.log_decay, self.B), self._decay(self.x[:, rows])

    def before(self, dy: Tensor, rows: slice) -> Tensor:
        z = None if self.z is None else self.z[:, rows]
        self._dy = dy
        return systems.gradient_before(dy[:, rows], self.log_decay, self.C, z)

    def decay(self, rows: slice) -> Tensor:
        return self._decay(self._dy[:, rows])

    def _decay(self, x: Tensor) -> Tensor:
        return systems.decay(self.log_decay, x.shape[1]).expand(len(x), *self.log_decay.shape)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Any = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mambaseq.ops.causal_conv`."""
    if (ends := current()) is not None:
        width = weight.shape[1] - 1
        x, before = Halo.apply(ends, x, last_inputs(ends, x, initial_state, width))
        if ends.arrives:
            if initial_state is None:
                initial_state = before.new_zeros(ends.n, *before.shape[1:])
            initial_state = torch.cat(
                [before.to(torch.promote_types(before.dtype, initial_state.dtype)), initial_state[ends.arriving.stop :]]
            )
    return ops.causal_conv(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_state,
        return_final_state=return_final_state,
        cu_seqlens=cu_seqlens,
    )


def last_inputs(ends: Ends, x: Tensor, state: Tensor | None, width: int) -> Tensor:
    """The last inputs `(rows, channels, width)` of what leaves a rank's piece; zeros if nothing does.

    x `(batch, length, channels)`: this rank's, or the last of them. state: what came before what leaves, where that
    begins here.
    """
    channels, skipped = x.shape[-1], ends.length - x.shape[1]
    if not ends.leaves:
        return x.new_zeros(ends.rows, channels, width)
    found = x[:, max(ends.end - skipped, x.shape[1] - width, 0) :].transpose(1, 2)
    missing = width - found.shape[-1]
    if missing:
        given = None if state is None or ends.goes_through else state[ends.leaving, :, width - missing :]
        before = found.new_zeros(ends.rows, channels, missing) if given is None else given.to(found.dtype)
        found = torch.cat([before, found], -1)
    return found


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mambaseq.ops.selective_scan`."""

    def run(state: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor]:
        return ops.selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_state=state,
            return_final_state=wanted,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )

    if (ends := current()) is None:
        return run(initial_state, return_final_state)

    def again(dt: Tensor, A: Tensor, C: Tensor, z: Tensor | None, bias: Tensor | None) -> Recurrence:
        return ScanRecurrence(None, dt, A, None, C, z, bias, dt_softplus)

    recurrence = ScanRecurrence(x, dt, A, B, C, z, dt_bias, dt_softplus)
    like = torch.zeros((ends.rows, *A.shape), dtype=working_dtype(x, A), device=x.device)
    return _between(ends, recurrence, like, like, run, initial_state, return_final_state, again, (dt, A, C, z, dt_bias))


def lti_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    discretization: Literal["zoh", "bilinear"] = "zoh",
    mode: Literal["fft", "scan"] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mambaseq.ops.lti_scan`."""

    def run(state: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor]:
        return ops.lti_scan(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            initial_state=state,
            return_final_state=wanted,
            cu_seqlens=cu_seqlens,
            discretization=discretization,
            mode=mode,
        )

    if (ends := current()) is None:
        return run(initial_state, return_final_state)
    wide = working_dtype(x, A)
    with torch.no_grad():
        log_decay, Bbar = discretize(dt.to(working_dtype(x)), A.to(wide), B.to(wide), discretization)
    like = torch.zeros((ends.rows, *A.shape), dtype=wide, device=x.device)
    return _between(
        ends,
        ConstantRecurrence(x, log_decay, Bbar, C, z),
        like,
        like,
        run,
        initial_state,
        return_final_state,
        lambda log_decay, C, z: ConstantRecurrence(None, log_decay, None, C, z),
        (log_decay, C, z),
    )


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mambaseq.ops.ssd`."""

    def run(state: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor]:
        return ops.ssd(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_state=state,
            return_final_state=wanted,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            backend=backend,
        )

    if (ends := current()) is None:
        return run(initial_state, return_final_state)
    wide = working_dtype(x)
    with torch.no_grad():
        steps = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
        steps = F.softplus(steps) if dt_softplus else steps
        log_decay = steps * A.to(wide)
        recurrence = MatrixRecurrence(x.to(wide) * steps[..., None] if ends.leaves else None, B, C, log_decay)
    like = torch.zeros(ends.rows, *x.shape[2:], B.shape[3], dtype=wide, device=x.device)
    return _between(
        ends,
        recurrence,
        like,
        like[..., :1, :1],
        run,
        initial_state,
        return_final_state,
        lambda C, log_decay: MatrixRecurrence(None, None, C, log_decay),
        (C, log_decay),
    )


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mambaseq.ops.delta_rule`; without corrections, which no decay of a state says."""

    def run(state: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor]:
        return ops.delta_rule(
            q,
            k,
            v,
            g,
            initial_state=state,
            return_final_state=wanted,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            backend=backend,
        )

    if (ends := current()) is None:
        return run(initial_state, return_final_state)
    like = torch.zeros(ends.rows, v.shape[2], v.shape[3], k.shape[3], dtype=working_dtype(v), device=v.device)
    return _between(
        ends,
        MatrixRecurrence(v, k, q, g),
        like,
        like[:, :, :1] if g.ndim == 4 else like[..., :1, :1],
        run,
        initial_state,
        return_final_state,
        lambda q, g: MatrixRecurrence(None, None, q, g),
        (q, g),
    )


def summary(ends: Ends, recurrence: Recurrence, like: Tensor, like_decay: Tensor, given: Tensor | None) -> list[Tensor]:
    """What this rank tells all others of its positions: what they add to a state, and what they decay one by."""
    if not ends.leaves:
        return [like, like_decay]
    with torch.no_grad():
        local, decay = recurrence.behind(slice(ends.end, None))
        if given is not None and not ends.goes_through:
            local = local + decay * given[ends.leaving].to(local.dtype)
        return [local.to(like.dtype), decay.to(like_decay.dtype)]


def gradient_summary(
    ends: Ends, recurrence: Recurrence, dy: Tensor, dfinal: Tensor | None, like: Tensor
) -> list[Tensor]:
    """The same of the gradient of what enters this rank's piece: as far as its positions make it, and the states of
    sequences that end here."""
    if not ends.arrives:
        return [torch.zeros_like(like)]
    g = recurrence.before(dy, slice(0, ends.begin))
    if dfinal is not None and not ends.goes_through:
        g = g + recurrence.decay(slice(0, ends.begin)).conj() * dfinal[ends.arriving]
    return [g.to(like.dtype).contiguous()]


def _between(
    ends: Ends,
    recurrence: Recurrence,
    like: Tensor,
    like_decay: Tensor,
    run: Callable[[Tensor | None, bool], tuple[Tensor, Tensor]],
    initial: Tensor | None,
    wanted: bool,
    again: Callable[..., Recurrence],
    needed: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """Run a recurrence from what the ranks before this one leave. again: makes, of the tensors that are needed, what
    the backward pass asks."""
    begun = None if ends.replays else ends.begin_gather(summary(ends, recurrence, like, like_decay, initial))
    everyone = ends.gathered(begun)
    entering = ends.entering(everyone)
    if entering is not None:
        given = entering.new_zeros(ends.n, *entering.shape[1:]) if initial is None else initial
        initial = Enter.apply(ends, given, entering)
    y, final = run(initial, wanted or ends.leaves)
    if torch.is_grad_enabled():
        decays = [decay for _, decay in everyone]
        y, final = _Leave.apply(ends, again, decays, like, y, final, *needed)
    return y, final


class _Leave(torch.autograd.Function):
    """Outputs and last states, whose gradient is that of all ranks behind this one."""

    @staticmethod
    def forward(
        ctx: Any,
        ends: Ends,
        again: Callable[..., Recurrence],
        decays: list[Tensor],
        like: Tensor,
        y: Tensor,
        final: Tensor,
        *needed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.ends, ctx.again, ctx.decays, ctx.like = ends, again, decays, like
        ctx.y, ctx.final = (y.shape, y.dtype), (final.shape, final.dtype)
        ctx.save_for_backward(*needed)
        ctx.set_materialize_grads(False)
        return y.view_as(y), final.view_as(final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        ends: Ends = ctx.ends
        shape, dtype = ctx.final
        needed = ctx.saved_tensors
        if dy is None:
            dy = ctx.like.new_zeros(ctx.y[0], dtype=ctx.y[1])
        told = gradient_summary(ends, ctx.again(*needed), dy, dfinal, ctx.like)
        everyone = ends.context.begin_gather(told).wait()
        leaving = ends.gradient_of_leaving([g for (g,) in everyone], ctx.decays)
        if leaving is not None:
            dfinal = leaving.new_zeros(shape, dtype=dtype) if dfinal is None else dfinal.clone()
            dfinal[ends.leaving] = leaving.to(dtype)
        return None, None, None, None, dy, dfinal, *(None for _ in needed)
