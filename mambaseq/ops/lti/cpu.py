"""The time-invariant scan on CPU: hands PyTorch's tensors to the Numba kernels, on several threads."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaseq.ops.cpu import blocking, threads
from mambaseq.ops.cpu.flat import flat, rows_of, scratch
from mambaseq.ops.lti import scan
from mambaseq.ops.lti.arguments import LtiArguments

# Updates of a state below which starting threads costs more than it saves.
_LITTLE_WORK = 2**16
_ARGUMENTS = "Tensor x, Tensor decay, Tensor B, Tensor C, Tensor? initial_state, Tensor? cu_seqlens, bool reverse"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def why_not(arguments: LtiArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    if arguments.x.device.type != "cpu":
        return f"the kernels run on the CPU, x is on {arguments.x.device}"
    if arguments.x.dtype == torch.float64:
        return "x is float64, the kernels compute in float32"
    return scan.why_not(arguments)


def run(arguments: LtiArguments) -> tuple[Tensor, Tensor]:
    """y and the final state in float32 or complex64."""
    x, log_decay, B, C, state, cu_seqlens, reverse = arguments[:7]
    wide = arguments.state_dtype
    decay = torch.exp(log_decay.to(wide))
    state = None if state is None else state.to(wide)
    y, final = _forward_op(x.float(), decay, B.to(wide), C.to(wide), state, cu_seqlens, reverse)
    return y, final


def _kernels() -> ModuleType:
    """Imported when first needed: Numba takes a second to import."""
    return importlib.import_module("mambaseq.ops.lti.kernels")


def _parts(value: Tensor) -> Tensor:
    """`(…)` → `(…, 2)`: real and imaginary part."""
    if value.is_complex():
        return torch.view_as_real(value.detach().resolve_conj())
    return torch.stack([value, torch.zeros_like(value)], dim=-1)


def _joined(parts: Tensor, complex_: bool) -> Tensor:
    """The reverse of `_parts`, in memory of its own."""
    return (
        torch.view_as_complex(parts.clone(memory_format=torch.contiguous_format)) if complex_ else parts[..., 0].clone()
    )


def _signs(decay: Tensor) -> Tensor:
    """What the kernels' C' is to the parts of C."""
    return torch.tensor([2.0, -2.0] if decay.is_complex() else [1.0, 0.0], dtype=torch.float32)


def _prepare(
    kernels: ModuleType,
    x: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[blocking.Blocks, Any]:
    """The blocks of channels and the kernels' `Inputs`."""
    batch, length, channels = x.shape
    blocks = blocking.of_channels(channels, 1, kernels.WIDTH)
    bounds = blocking.bounds_of(cu_seqlens, batch, length)
    system = torch.cat([_parts(decay), _parts(B), _parts(C) * _signs(decay)], dim=-1)
    inputs = kernels.Inputs(
        blocking.tasks_of(blocks, bounds),
        bounds,
        reverse,
        *rows_of(x),
        flat(blocks.spread(system).permute(0, 2, 3, 1)),
        flat(None if state is None else _parts(state)),
        state is not None,
        channels,
        decay.shape[1],
    )
    return blocks, inputs


def _forward(x: Tensor, decay: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    kernels = _kernels()
    _, inputs = _prepare(kernels, x, decay, *values)
    y = torch.empty(x.shape, dtype=torch.float32)
    final = torch.empty(len(inputs.bounds) - 1, *decay.shape, 2, dtype=torch.float32)
    outputs = y.view(-1).numpy(), final.view(-1).numpy()

    def make_worker() -> Any:
        h = scratch(inputs.d_state * 2 * kernels.WIDTH)
        local = scratch(3 * kernels.CHUNK * kernels.WIDTH)
        return lambda first, end: kernels.forward(first, end, inputs, *outputs, h, local)

    threads.share(len(inputs.tasks), make_worker, serial=x.numel() * inputs.d_state < _LITTLE_WORK)
    return y, _joined(final, decay.is_complex())


def _backward(dy: Tensor, dfinal: Tensor, x: Tensor, decay: Tensor, *values: Any) -> tuple[Tensor, ...]:
    kernels = _kernels()
    width, chunk = kernels.WIDTH, kernels.CHUNK
    blocks, inputs = _prepare(kernels, x, decay, *values)
    d_state, n_tasks, complex_ = inputs.d_state, len(inputs.tasks), decay.is_complex()
    gradients = kernels.Gradients(
        x=torch.empty(x.shape, dtype=torch.float32),
        system=torch.empty(n_tasks, d_state, 6, width, dtype=torch.float32),
        initial=torch.empty(len(inputs.bounds) - 1, *decay.shape, 2, dtype=torch.float32),
    )
    outputs = kernels.Gradients(*(value.view(-1).numpy() for value in gradients))
    given = *rows_of(dy), flat(_parts(dfinal))
    longest = int(np.diff(inputs.bounds).max(initial=0))

    def make_worker() -> Any:
        working = kernels.Scratch(
            h=scratch(d_state * 2 * width),
            local=scratch(3 * chunk * width),
            entering=scratch(-(-longest // chunk) * d_state * 2 * width),
            history=scratch((chunk + 1) * 2 * width),
            dstate=scratch(d_state * 8 * width),
        )
        return lambda first, end: kernels.backward(first, end, inputs, *given, outputs, working)

    threads.share(n_tasks, make_worker, serial=x.numel() * d_state < _LITTLE_WORK)

    # A sum over the tasks of a block, in a fixed order.
    system = gradients.system.view(-1, len(blocks.first), d_state, 6, width).sum(0)
    ddecay, dB, dC = blocks.gather(system.permute(0, 3, 1, 2)).split(2, dim=-1)
    return (
        gradients.x,
        _joined(ddecay, complex_),
        _joined(dB, complex_),
        _joined(dC * _signs(decay), complex_),
        _joined(gradients.initial, complex_) if inputs.has_initial else dy.new_empty(0),
    )


_forward_op = torch.library.custom_op(
    "mambaseq::lti_scan_cpu",
    _forward,
    mutates_args=(),
    device_types="cpu",
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "mambaseq::lti_scan_cpu_backward",
    _backward,
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dy, Tensor dfinal, {_ARGUMENTS}) -> {_GRADIENTS}",
)


@_forward_op.register_fake
def _(
    x: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Any, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    n_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), decay.new_empty((n_sequences, *decay.shape))


@_backward_op.register_fake
def _(
    dy: Tensor, dfinal: Tensor, x: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    dstate = dy.new_empty(0) if state is None else dfinal.new_empty(dfinal.shape)
    return *(value.new_empty(value.shape) for value in (x, decay, B, C)), dstate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    x, decay, B, C, state, cu_seqlens = ctx.saved_tensors
    *found, dstate = _backward_op(dy, dfinal, x, decay, B, C, state, cu_seqlens, ctx.reverse)
    return *found, None if state is None else dstate, None, None


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)
