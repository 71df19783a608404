"""The causal convolution on GPUs: launching the Triton kernels.

`forward_into` and `backward_into` are the two passes without autograd, for operators that hold more than a convolution.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.causal_conv.library import conv_operator
from mambaseq.ops.gpu import portable
from mambaseq.ops.selective_scan.launches import processors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8  # filter
LONGEST = 2**29  # row: steps are counted in 32 bits
_BLOCK = 128  # channels of a program: 4 a thread
_LANES = 4  # runs of a program, each walked by one warp
_UNROLL = 8  # steps that are read at a time, so that there is enough of memory's work under way
_LEAST_STEPS = 8
_START = 8  # a program's beginning counts as so many steps: it reads filters and what lies before its runs
_LOCATED = 256
_ROWS, _GATHERED = 256, 16  # programs' sums that are read at a time, of so many channels


def why_not(arguments: ConvArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    x = arguments.x
    if (reason := portable.why_not(x.device.type)) is not None:
        return reason
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, the kernels compute in float32"
    for name in ("weight", "bias", "initial_state"):
        value = getattr(arguments, name)
        if value is not None and value.dtype == torch.float64:
            return f"{name} is float64, the kernels compute in float32"
    if arguments.weight.shape[1] > WIDEST:
        return f"the filter is wider than {WIDEST}"
    if x.shape[1] >= LONGEST:
        return "a row is longer than 2^29"
    return None


def forward_into(arguments: ConvArguments, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """y and the final state, without autograd; arguments are those for which `why_not` is None.

    x is read where it lies if its channels lie beside each other, whatever its other strides are.

    Args:
        y: where to write `(batch, length, channels)` of the dtype of x, its channels beside each other; None makes a
            contiguous one.

    Returns:
        y; the final state `(sequences, channels, width - 1)`, float32, or None if `wants_final_state` is False.
    """
    x, weight, bias, activation, state, cu_seqlens, reverse, wants_final_state = arguments
    batch, length, channels = x.shape
    width = weight.shape[1]
    x = _rows(x)
    kernels = _kernels()
    if y is None:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = None
    blocks = -(-channels // _BLOCK)
    with portable.on(x):
        history = _history(state, width, cu_seqlens is not None)
        if x.numel():
            steps, runs = _division(batch, length, blocks, _at_once(arguments, backward=False), 0)
            kernels.forward[(batch * runs * blocks,)](
                x,
                x.stride(0),
                x.stride(1),
                weight.contiguous(),
                None if bias is None else bias.contiguous(),
                *history,
                _places(cu_seqlens, length),
                y,
                y.stride(0),
                y.stride(1),
                length,
                channels,
                blocks,
                runs,
                steps,
                activation == "silu",
                reverse,
                width,
                _LANES,
                _BLOCK,
                _UNROLL,
            )
        if wants_final_state:
            n_sequences = arguments.n_sequences
            final = torch.empty(n_sequences, channels, width - 1, dtype=torch.float32, device=x.device)
            if final.numel():
                kernels.final_state[(-(-n_sequences // _LANES) * blocks,)](
                    x,
                    x.stride(0) if cu_seqlens is None else 0,
                    x.stride(1),
                    *history,
                    _bounds(cu_seqlens),
                    n_sequences,
                    final,
                    length,
                    channels,
                    blocks,
                    reverse,
                    width,
                    _LANES,
                    _BLOCK,
                )
    return y, final


def backward_into(
    arguments: ConvArguments, dy: Tensor, dfinal: Tensor | None = None, dx: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and initial_state, without autograd; nothing of the forward is needed.

    x and dy are read where they lie if their channels lie beside each other, whatever their other strides are. The
    same inputs give the same bits on GPUs of as many processors.

    Args:
        dy: `(batch, length, channels)`, any real dtype that the kernels read.
        dfinal: `(sequences, channels, width - 1)`, or None for zeros.
        dx: where to write the gradient of x, of its shape, its channels beside each other; None makes a contiguous
            one of the dtype of x.

    Returns:
        dx; dweight and dbias in the dtypes of weight and bias; dinitial in the dtype of initial_state; None for what is
        None in the arguments.
    """
    x, weight, bias, activation, state, cu_seqlens, reverse, _ = arguments
    batch, length, channels = x.shape
    width = weight.shape[1]
    x, dy = _rows(x), _rows(dy)
    kernels = _kernels()
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = -(-channels // _BLOCK)
    with portable.on(x):
        history = _history(state, width, cu_seqlens is not None)
        filters = weight.contiguous(), None if bias is None else bias.contiguous()
        # The kernels read the gradient of the state as they read x: channels beside each other.
        # (sequences, width - 1, channels)
        later = None if dfinal is None or not dfinal.numel() else dfinal.transpose(1, 2).contiguous()
        new = torch.empty_like if x.numel() else torch.zeros_like
        dweight, dbias = new(filters[0]), None if filters[1] is None else new(filters[1])
        if x.numel():
            # A run walks over `width - 1` steps more than its own.
            steps, runs = _division(batch, length, blocks, _at_once(arguments, backward=True), width - 1)
            sums = torch.empty(batch * runs, width + 1, channels, dtype=torch.float32, device=x.device)
            kernels.backward[(batch * runs * blocks,)](
                x,
                x.stride(0),
                x.stride(1),
                *filters,
                *history,
                _places(cu_seqlens, length),
                dy,
                dy.stride(0),
                dy.stride(1),
                later,
                dx,
                dx.stride(0),
                dx.stride(1),
                sums,
                length,
                channels,
                blocks,
                runs,
                steps,
                activation == "silu",
                reverse,
                width,
                _LANES,
                _BLOCK,
                _UNROLL,
            )
            kernels.gathered[(-(-channels // _GATHERED), width if bias is None else width + 1)](
                sums, dweight, dbias, batch * runs, channels, width, _ROWS, _GATHERED
            )
        dinitial = None
        if state is not None:
            n_sequences = arguments.n_sequences
            dinitial = torch.empty(state.shape, dtype=state.dtype, device=x.device)
            if dinitial.numel():
                kernels.initial_gradient[(-(-n_sequences // _LANES) * blocks,)](
                    x,
                    x.stride(0) if cu_seqlens is None else 0,
                    x.stride(1),
                    *filters,
                    *history,
                    _bounds(cu_seqlens),
                    n_sequences,
                    dy,
                    dy.stride(0) if cu_seqlens is None else 0,
                    dy.stride(1),
                    later,
                    dinitial,
                    length,
                    channels,
                    blocks,
                    activation == "silu",
                    reverse,
                    width,
                    _LANES,
                    _BLOCK,
                )
    return dx, dweight, dbias, dinitial


def _kernels() -> Any:
    """Imported when first needed: there is no Triton everywhere."""
    return importlib.import_module("mambaseq.ops.causal_conv.triton_kernels")


def _rows(value: Tensor) -> Tensor:
    """With channels beside each other; the same where they are."""
    return value if value.stride(2) == 1 or value.shape[2] == 1 else value.contiguous()


def _history(state: Tensor | None, width: int, packed: bool) -> tuple[Tensor | None, int, int, int]:
    """The initial state and its strides by sequence, channel and step."""
    if state is None or width == 1:
        return None, 0, 0, 0
    if packed:  # read at every start of a sequence, as x is: channels beside each other
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    return state, state.stride(0), state.stride(1), state.stride(2)


def _bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.contiguous()


def _places(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """Of each row the sequence that it belongs to, and where that begins and ends: (3, length) int32."""
    if cu_seqlens is None:
        return None
    n_sequences = cu_seqlens.shape[0] - 1
    places = torch.empty(3, length, dtype=torch.int32, device=cu_seqlens.device)
    grid = (-(-length // _LOCATED),)
    _kernels().locate[grid](cu_seqlens.contiguous(), n_sequences, length, n_sequences.bit_length(), places, _LOCATED)
    return places


def _at_once(arguments: ConvArguments, *, backward: bool) -> int:
    """How many programs run at the same time; on a CPU, in Triton's interpreter, as on an H100.

    By registers, which Triton 3.6 was asked for at compute capabilities 8.0 and 9.0, with bias, SiLU and filters of the
    dtype of x. Some other cases have room for one program more, which are not worth more rules.
    """
    x, more = arguments.x, arguments.cu_seqlens is not None or arguments.weight.shape[1] > 4
    if backward:
        of_a_processor = 2 if more else 3
    elif more or x.shape[2] % 16:  # numbers are read one by one
        of_a_processor = 4
    else:
        of_a_processor = 6 if x.element_size() == 2 else 5
    return of_a_processor * (processors(x.device.index) if x.is_cuda else 132)


@functools.lru_cache(4096)
def _division(batch: int, length: int, blocks: int, at_once: int, beyond: int) -> tuple[int, int]:
    """Steps of a run, and programs that share a row: those that are done first, if `at_once` programs run at a time.

    beyond: steps that a run walks over after its own. What it walks over is a multiple of `_UNROLL`.
    """

    def divided(programs: int) -> tuple[int, int]:
        steps = -(-length // (programs * _LANES))
        steps += -(steps + beyond) % _UNROLL
        return steps, -(-length // (steps * _LANES))

    def time(division: tuple[int, int]) -> int:
        steps, programs = division
        return -(-batch * blocks * programs // at_once) * (steps + beyond + _START)

    most = min(-(-length // (_LANES * _LEAST_STEPS)), -(-8 * at_once // (batch * blocks)))
    return min(map(divided, range(1, most + 1)), key=time)


run = conv_operator("causal_conv_triton", forward_into, backward_into)
