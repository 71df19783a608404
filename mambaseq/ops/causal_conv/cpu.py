"""The causal convolution on CPU: calls the Numba kernels with PyTorch's tensors, on several threads.

Only lengths decide how the work is cut, so results do not depend on the number of threads.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.causal_conv.library import conv_operator
from mambaseq.ops.cpu import blocking, threads
from mambaseq.ops.cpu.flat import flat, rows_of, scratch

_SEGMENT = 128
_TASKS = 64
# Elements of x below which starting threads costs more than it saves.
_LITTLE_WORK = 2**16


def why_not(arguments: ConvArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    if arguments.x.device.type != "cpu":
        return f"the kernels run on the CPU, x is on {arguments.x.device}"
    for name, value in arguments._asdict().items():
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return f"{name} is float64, the kernels compute in float32"
    return None


def _kernels() -> ModuleType:
    """Imported when first needed: Numba takes a second to import."""
    return importlib.import_module("mambaseq.ops.causal_conv.kernels")


def _prepare(arguments: ConvArguments, kernels: ModuleType) -> Any:
    """The kernels' `Inputs`."""
    x, weight, bias, activation, state, cu_seqlens, reverse, _ = arguments
    batch, length, channels = x.shape
    width = weight.shape[1]
    bounds = blocking.bounds_of(cu_seqlens, batch, length)
    lengths = np.diff(bounds)
    # An empty sequence has one empty segment, which hands its state on.
    count = np.maximum(1, -(-lengths // _SEGMENT))
    sequence = np.repeat(np.arange(len(lengths)), count)
    begin = (np.arange(len(sequence)) - np.repeat(np.cumsum(count) - count, count)) * _SEGMENT
    end = np.minimum(begin + _SEGMENT, lengths[sequence])
    n_tasks = min(_TASKS, len(sequence))
    cuts = np.arange(n_tasks + 1) * len(sequence) // max(1, n_tasks)
    if state is None:
        history = np.zeros(len(lengths) * (width - 1) * channels, dtype=np.float32)
    else:
        history = flat(state.transpose(1, 2))  # laid out (sequences, width - 1, channels)
    return kernels.Inputs(
        cuts,
        np.stack([sequence, begin, end], axis=1),  # (segments, 3)
        bounds,
        reverse,
        *rows_of(x),
        history,
        flat(weight.t()),  # (width, channels)
        flat(x.new_zeros(channels) if bias is None else bias),
        activation == "silu",
        channels,
        width,
    )


def _forward(arguments: ConvArguments) -> tuple[Tensor, Tensor | None]:
    kernels = _kernels()
    x, inputs = arguments.x, _prepare(arguments, kernels)
    y = torch.empty(x.shape, dtype=torch.float32)
    final = torch.empty(arguments.n_sequences, inputs.width - 1, inputs.channels, dtype=torch.float32)
    outputs = y.view(-1).numpy(), final.view(-1).numpy()

    def make_worker() -> Any:
        out = scratch(inputs.channels)
        return lambda first, end: kernels.forward(first, end, inputs, *outputs, out)

    threads.share(len(inputs.cuts) - 1, make_worker, serial=x.numel() < _LITTLE_WORK)
    # the state: (sequences, channels, width - 1)
    return y.to(x.dtype), final.transpose(1, 2).contiguous() if arguments.wants_final_state else None


def _backward(arguments: ConvArguments, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    kernels = _kernels()
    x, weight, bias, state = arguments.x, arguments.weight, arguments.bias, arguments.initial_state
    inputs = _prepare(arguments, kernels)
    channels, width, n_tasks = inputs.channels, inputs.width, len(inputs.cuts) - 1
    dx = torch.empty(x.shape, dtype=torch.float32)
    dhistory = torch.empty(arguments.n_sequences, width - 1, channels, dtype=torch.float32)
    dweight, dbias = (
        torch.empty(n_tasks, width, channels, dtype=torch.float32),
        torch.empty(n_tasks, channels, dtype=torch.float32),
    )
    if dfinal is None:
        dfinal = x.new_zeros(arguments.n_sequences, channels, width - 1, dtype=torch.float32)
    given = *rows_of(dy), flat(dfinal.transpose(1, 2))  # laid out (sequences, width - 1, channels)
    outputs = [value.view(-1).numpy() for value in (dx, dhistory, dweight, dbias)]

    def make_worker() -> Any:
        recent, out = scratch(width * channels), scratch(channels)
        return lambda first, end: kernels.backward(first, end, inputs, *given, *outputs, recent, out)

    threads.share(n_tasks, make_worker, serial=x.numel() < _LITTLE_WORK)
    return (
        dx.to(x.dtype),
        dweight.sum(0).t().to(weight.dtype).contiguous(),  # (channels, width)
        None if bias is None else dbias.sum(0).to(bias.dtype),
        # (sequences, channels, width - 1)
        None if state is None else dhistory.transpose(1, 2).to(state.dtype).contiguous(),
    )


run = conv_operator("causal_conv_cpu", _forward, _backward, "cpu")
