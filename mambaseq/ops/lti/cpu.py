"""The time-invariant scan on CPU: calls the Numba kernels with PyTorch's tensors, on several threads."""

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
from mambaseq.ops.lti.arguments import SCHEMA, LtiArguments, System, system_of
from mambaseq.ops.operators import Operator, register

# Updates of a state below which starting threads costs more than it saves.
_LITTLE_WORK = 2**16


def why_not(arguments: LtiArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    if arguments.x.device.type != "cpu":
        return f"the kernels run on the CPU, x is on {arguments.x.device}"
    if arguments.x.dtype == torch.float64:
        return "x is float64, the kernels compute in float32"
    return scan.why_not(arguments)


def run(arguments: LtiArguments) -> tuple[Tensor, Tensor]:
    """y and the final state in float32 or complex64."""
    system = system_of(arguments)
    y, final = _run(system._replace(x=system.x.float()))
    return y, final


def _kernels() -> ModuleType:
    """Imported when first needed: Numba takes a second to import."""
    return importlib.import_module("mambaseq.ops.lti.kernels")


def _parts(value: Tensor) -> Tensor:
    """`(…)` → `(…, 2)`: real and imaginary part."""
    if value.is_complex():
        return torch.view_as_real(value.detach().resolve_conj())
    return torch.stack([value, torch.zeros_like(value)], dim=-1)  # (…, 2)


def _joined(parts: Tensor, complex_: bool) -> Tensor:
    """The reverse of `_parts`, in memory of its own."""
    return (
        torch.view_as_complex(parts.clone(memory_format=torch.contiguous_format)) if complex_ else parts[..., 0].clone()
    )


def _signs(decay: Tensor) -> Tensor:
    """What the kernels' C' is to the parts of C."""
    return torch.tensor([2.0, -2.0] if decay.is_complex() else [1.0, 0.0], dtype=torch.float32)


def _prepare(kernels: ModuleType, system: System) -> tuple[blocking.Blocks, Any]:
    """The blocks of channels and the kernels' `Inputs`."""
    x, decay, B, C, state, cu_seqlens, reverse, *_ = system
    batch, length, channels = x.shape
    blocks = blocking.of_channels(channels, 1, kernels.WIDTH)
    bounds = blocking.bounds_of(cu_seqlens, batch, length)
    matrices = torch.cat([_parts(decay), _parts(B), _parts(C) * _signs(decay)], dim=-1)  # (channels, d_state, 6)
    inputs = kernels.Inputs(
        blocking.tasks_of(blocks, bounds),
        bounds,
        reverse,
        *rows_of(x),
        flat(blocks.spread(matrices).permute(0, 2, 3, 1)),  # (blocks, d_state, 6, width)
        flat(None if state is None else _parts(state)),
        state is not None,
        channels,
        decay.shape[1],
    )
    return blocks, inputs


def _forward(system: System) -> tuple[Tensor, Tensor]:
    kernels, x, decay = _kernels(), system.x, system.decay
    _, inputs = _prepare(kernels, system)
    y = torch.empty(x.shape, dtype=torch.float32)
    final = torch.empty(len(inputs.bounds) - 1, *decay.shape, 2, dtype=torch.float32)
    outputs = y.view(-1).numpy(), final.view(-1).numpy()

    def make_worker() -> Any:
        h = scratch(inputs.d_state * 2 * kernels.WIDTH)
        local = scratch(3 * kernels.CHUNK * kernels.WIDTH)
        return lambda first, end: kernels.forward(first, end, inputs, *outputs, h, local)

    threads.share(len(inputs.tasks), make_worker, serial=x.numel() * inputs.d_state < _LITTLE_WORK)
    return y, _joined(final, decay.is_complex())


def _backward(given: System, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    kernels, x, decay = _kernels(), given.x, given.decay
    width, chunk = kernels.WIDTH, kernels.CHUNK
    blocks, inputs = _prepare(kernels, given)
    d_state, n_tasks, complex_ = inputs.d_state, len(inputs.tasks), decay.is_complex()
    gradients = kernels.Gradients(
        x=torch.empty(x.shape, dtype=torch.float32),
        system=torch.empty(n_tasks, d_state, 6, width, dtype=torch.float32),
        initial=torch.empty(len(inputs.bounds) - 1, *decay.shape, 2, dtype=torch.float32),
    )
    outputs = kernels.Gradients(*(value.view(-1).numpy() for value in gradients))
    cotangents = *rows_of(dy), flat(_parts(dfinal))
    longest = int(np.diff(inputs.bounds).max(initial=0))

    def make_worker() -> Any:
        working = kernels.Scratch(
            h=scratch(d_state * 2 * width),
            local=scratch(3 * chunk * width),
            entering=scratch(-(-longest // chunk) * d_state * 2 * width),
            history=scratch((chunk + 1) * 2 * width),
            dstate=scratch(d_state * 8 * width),
        )
        return lambda first, end: kernels.backward(first, end, inputs, *cotangents, outputs, working)

    threads.share(n_tasks, make_worker, serial=x.numel() * d_state < _LITTLE_WORK)

    # A sum over the tasks of a block, in a fixed order.
    system = gradients.system.view(-1, len(blocks.first), d_state, 6, width).sum(0)  # (blocks, d_state, 6, width)
    ddecay, dB, dC = blocks.gather(system.permute(0, 3, 1, 2)).split(2, dim=-1)  # each (channels, d_state, 2)
    return (
        gradients.x,
        _joined(ddecay, complex_),
        _joined(dB, complex_),
        _joined(dC * _signs(decay), complex_),
        _joined(gradients.initial, complex_),
    )


def _fake(s: System) -> tuple[Tensor, Tensor]:
    return s.x.new_empty(s.x.shape), s.decay.new_empty((s.n_sequences, *s.decay.shape))


_run = register(
    Operator(
        "lti_scan_cpu",
        System,
        SCHEMA,
        ("x", "decay", "B", "C", "initial_state"),
        _forward,
        _backward,
        _fake,
        zeros=True,
        device_types="cpu",
    )
)
