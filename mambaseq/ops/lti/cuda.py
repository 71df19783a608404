"""The time-invariant scan on NVIDIA GPUs: which arguments the kernels take, and calling launches.py with them."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaseq.ops.gpu import portable
from mambaseq.ops.lti import launches, scan
from mambaseq.ops.lti.arguments import SCHEMA, LtiArguments, System, system_of
from mambaseq.ops.lti.launches import STATES, Inputs
from mambaseq.ops.operators import Operator, register
from mambaseq.ops.selective_scan.cuda import as_rows, why_not_on
from mambaseq.ops.selective_scan.launches import CODES


def why_not(arguments: LtiArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    x = arguments.x
    if x.device.type != "cuda":
        return f"the kernels run on CUDA, x is on {x.device}"
    if (reason := why_not_on(x.device)) is not None:
        return reason
    if x.numel() == 0:
        return "x is empty"
    if x.dtype not in CODES:
        return f"x is {x.dtype}, the kernels compute in float32"
    if arguments.log_decay.shape[1] > STATES:
        return f"there are more than {STATES} states a channel"
    return scan.why_not(arguments)


def run(arguments: LtiArguments, decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, D and the gate in it, and the final state. decay: as for `system_of`."""
    y, final = _run(system_of(arguments, decay))
    return y, final


def _inputs(s: System) -> Inputs:
    batch, length, channels = s.x.shape
    dtype = s.x.dtype if s.z is None or s.z.dtype == s.x.dtype else torch.float32
    a, b, c = (value.detach().resolve_conj().contiguous() for value in (s.decay, s.B, s.C))
    return Inputs(
        as_rows(s.x, dtype),
        None if s.z is None else as_rows(s.z, dtype),
        a,
        b,
        c,
        None if s.D is None else s.D.float().contiguous(),
        None if s.initial_state is None else s.initial_state.to(a.dtype).resolve_conj().contiguous(),
        s.cu_seqlens,
        batch,
        length,
        channels,
        s.reverse,
    )


def _forward(s: System, keep: bool) -> tuple[Tensor, ...]:
    with portable.on(s.x):
        y, final, kept = launches.forward(_inputs(s))
    return y.view(s.x.shape).to(s.x.dtype), final, kept  # (batch, length, channels)


def _backward(s: System, dy: Tensor, dfinal: Tensor | None, kept: Tensor) -> tuple[Tensor | None, ...]:
    with portable.on(s.x):
        inputs = _inputs(s)
        dstate = None if dfinal is None else dfinal.resolve_conj().contiguous()
        found = launches.backward(inputs, as_rows(dy, inputs.x.data.dtype), dstate, kept)
    return (
        found.dx.view(s.x.shape).to(s.x.dtype),
        found.da,
        found.db,
        found.dc,
        None if s.initial_state is None else found.dinitial.to(s.initial_state.dtype),
        None if s.D is None or found.dD is None else found.dD.to(s.D.dtype),
        None if s.z is None or found.dz is None else found.dz.view(s.z.shape).to(s.z.dtype),
    )


def _fake(s: System, keep: bool) -> tuple[Tensor, ...]:
    total = launches.n_kept(s.n_sequences, s.x.shape[1], s.decay, s.cu_seqlens is not None, s.x.device)
    y = torch.empty_like(s.x, memory_format=torch.contiguous_format)
    kept = s.decay.new_empty((total, *s.decay.shape) if total else (0,))
    return y, s.decay.new_empty((s.n_sequences, *s.decay.shape)), kept


_run = register(
    Operator(
        "lti_scan_cuda",
        System,
        f"{SCHEMA}, Tensor? D, Tensor? z",
        ("x", "decay", "B", "C", "initial_state", "D", "z"),
        _forward,
        _backward,
        _fake,
        kept=1,
        device_types="cuda",
    )
)
