"""The selective scan on CPU: hands PyTorch's tensors to the Numba kernels, on several threads.

The work is cut by channels and sequences alone, never by the number of threads: results do not depend on it.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.cpu import blocking, threads
from mambaseq.ops.cpu.flat import flat, rows_of, scratch
from mambaseq.ops.selective_scan.arguments import ScanArguments
from mambaseq.ops.selective_scan.library import scan_operator, wanted

# Updates of a state below which starting threads costs more than it saves.
_LITTLE_WORK = 2**16


def why_not(arguments: ScanArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    x = arguments.x
    if x.device.type != "cpu":
        return f"the kernels run on the CPU, x is on {x.device}"
    if arguments.A.is_complex():
        return "A is complex"
    if arguments.B.ndim == 2 or arguments.C.ndim == 2:
        return "B or C is constant in time"
    for name, value in arguments._asdict().items():
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return f"{name} is float64, the kernels compute in float32"
    return None


def _kernels() -> ModuleType:
    """Imported when first needed: Numba takes a second to import."""
    return importlib.import_module("mambaseq.ops.selective_scan.kernels")


def _forward(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    kernels = _kernels()
    x = arguments.x
    _, inputs = _prepare(arguments, kernels)
    y = torch.empty(x.shape, dtype=torch.float32)
    final = torch.empty(arguments.n_sequences, *arguments.A.shape, dtype=torch.float32)
    outputs = y.view(-1).numpy(), final.view(-1).numpy()

    def make_worker() -> Any:
        h = scratch(inputs.n_states * kernels.WIDTH)
        local = scratch(kernels.CHUNK * kernels.SLOTS_FORWARD * kernels.WIDTH)
        return lambda first, end: kernels.forward(first, end, inputs, *outputs, h, local)

    threads.share(len(inputs.tasks), make_worker, serial=_is_little(x, inputs))
    return y.to(x.dtype), final


def _backward(arguments: ScanArguments, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    kernels = _kernels()
    width, chunk = kernels.WIDTH, kernels.CHUNK
    x, A, B, C = arguments.x, arguments.A, arguments.B, arguments.C
    channels, d_state = A.shape
    blocks, inputs = _prepare(arguments, kernels)
    n_states, n_tasks, n_blocks = inputs.n_states, len(inputs.tasks), len(blocks.first)
    rows = x.shape[0] * x.shape[1]
    gradients = kernels.Gradients(
        x=torch.empty(x.shape, dtype=torch.float32),
        dt=torch.empty(x.shape, dtype=torch.float32),
        z=torch.empty(0 if arguments.z is None else x.shape, dtype=torch.float32),
        B=torch.empty(n_blocks, rows, n_states, dtype=torch.float32),
        C=torch.empty(n_blocks, rows, n_states, dtype=torch.float32),
        A=torch.empty(n_tasks, n_states, width, dtype=torch.float32),
        D=torch.empty(n_tasks, width, dtype=torch.float32),
        bias=torch.empty(n_tasks, width, dtype=torch.float32),
        initial=torch.empty(arguments.n_sequences, channels, d_state, dtype=torch.float32),
    )
    outputs = kernels.Gradients(*(value.view(-1).numpy() for value in gradients))
    given = *rows_of(dy), flat(dfinal)
    longest = int(np.diff(inputs.bounds).max(initial=0))

    def make_worker() -> Any:
        working = kernels.Scratch(
            h=scratch(n_states * width),
            local=scratch(chunk * kernels.SLOTS_BACKWARD * width),
            entering=scratch(-(-longest // chunk) * n_states * width),
            history=scratch(chunk * n_states * 2 * width),
            dstate=scratch(n_states * 2 * width),
        )
        return lambda first, end: kernels.backward(first, end, inputs, *given, outputs, working)

    threads.share(n_tasks, make_worker, serial=_is_little(x, inputs))

    # Sums in a fixed order: over the tasks of a block, and over the blocks of a group.
    dA = gradients.A.view(-1, n_blocks, n_states, width).sum(0).transpose(1, 2)  # (blocks, width, n_states)
    dA = blocks.gather(dA)[:, :d_state]
    # (channels,)
    dD, dbias = (blocks.gather(value.view(-1, n_blocks, width).sum(0)) for value in (gradients.D, gradients.bias))
    dB, dC = (_sum_of_blocks(value, M) for value, M in ((gradients.B, B), (gradients.C, C)))
    found = (gradients.x, gradients.dt, dA, dB, dC, dD, gradients.z, dbias, gradients.initial)
    return tuple(
        None if value is None else gradient.to(value.dtype).contiguous()
        for gradient, value in zip(found, wanted(arguments), strict=True)
    )


def _prepare(arguments: ScanArguments, kernels: ModuleType) -> tuple[blocking.Blocks, Any]:
    """The blocks of channels and the kernels' `Inputs`."""
    x, A, B, C = arguments.x, arguments.A, arguments.B, arguments.C
    batch, length, channels = x.shape
    d_state = A.shape[1]
    n_states = -(-d_state // 4) * 4
    groups = math.lcm(*(M.shape[2] if M.ndim == 4 else 1 for M in (B, C)))
    blocks = blocking.of_channels(channels, groups, kernels.WIDTH)
    bounds = blocking.bounds_of(arguments.cu_seqlens, batch, length)

    def by_block(value: Tensor | None) -> np.ndarray:
        return flat(blocks.spread(A.new_zeros(channels) if value is None else value.float()))

    def in_groups(M: Tensor) -> np.ndarray:
        """B or C as `(rows, groups, n_states)`, flat."""
        own_groups = M.shape[2] if M.ndim == 4 else 1
        M = M.reshape(batch * length, own_groups, d_state).float()  # (rows, groups of its own, d_state)
        M = M.repeat_interleave(groups // own_groups, dim=1) if own_groups != groups else M  # (rows, groups, d_state)
        M = F.pad(M, (0, n_states - d_state)) if n_states != d_state else M
        return flat(M)

    A2 = F.pad((A.double() / math.log(2)).float(), (0, n_states - d_state))
    initial = arguments.initial_state
    inputs = kernels.Inputs(
        blocking.tasks_of(blocks, bounds),
        bounds,
        arguments.reverse,
        *rows_of(x),
        *rows_of(arguments.dt),
        *rows_of(arguments.z),
        in_groups(B),
        in_groups(C),
        groups,
        n_states,
        flat(blocks.spread(A2).transpose(1, 2)),  # (blocks, n_states, width)
        by_block(arguments.D),
        by_block(arguments.dt_bias),
        arguments.dt_softplus,
        flat(initial),
        initial is not None,
        channels,
        d_state,
    )
    return blocks, inputs


def _sum_of_blocks(partial: Tensor, M: Tensor) -> Tensor:
    """The gradient of `M`, B or C, from those of the blocks `(blocks, rows, n_states)`."""
    own_groups = M.shape[2] if M.ndim == 4 else 1
    total = partial.unflatten(0, (own_groups, -1)).sum(1)  # (groups of its own, rows, n_states)
    return total[..., : M.shape[-1]].transpose(0, 1).reshape(M.shape)


def _is_little(x: Tensor, inputs: Any) -> bool:
    return x.numel() * inputs.n_states < _LITTLE_WORK


run = scan_operator("selective_scan_cpu", _forward, _backward, "cpu")
