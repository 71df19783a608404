"""One decode step of Mamba-1 blocks of several sequences on an NVIDIA GPU: dt_proj, the scan and the gate by one kernel
(`step_rows.cu`), where single operations take two. The other products are cuBLAS's, and the convolution has its kernel.

Used for what a GPU has computed right and faster by it (`_TRIED`); tests and `benchmarks/decode_parts.py` run it for
all by `tuning.untried`.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.decoding.block import BlockWeights
from mambaseq.ops.decoding.gpu import can_run, causal_conv_update_
from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import nvrtc, portable

FILES = (Path(__file__).parent / "rows_common.cu", Path(__file__).parent / "step_rows.cu")
CODES = {torch.bfloat16: 1, torch.float16: 2}
_STATES = (torch.float32, torch.bfloat16)
_CHANNELS = 64  # of a block
_MOST_SEQUENCES = 8  # of a block
_MOST_STATES, _MOST_RANKS = 64, 512
_ALIGNED = 16  # bytes that are read at once
# States a channel, ranks of dt_proj, types of parameters and states, and the most sequences, of what a GPU has computed
# right and faster than single operations (`benchmarks/decode_parts.py`): the published 130M, whose step of 2, 8, 64,
# 128 sequences took 570, 588, 697, 844 where these took 634, 646, 762, 900 us on an H200; of 256 as long. Not the 1.4B
# (16, 128): 2,374 for 2,170 us of 16, 3,840 for 2,671 of 64.
_TRIED = {(16, 48, torch.bfloat16, torch.float32): 128}


@dataclasses.dataclass
class Tuning:
    """on: whether the kernel is used. untried: for every shape that it takes. held: numbers of states that a thread has
    at most, which decide how many sequences a block has. blocks: that a multiprocessor has room for."""

    on: bool = True
    untried: bool = False
    held: int = 16
    blocks: int = 3


tuning = Tuning()


class Plan(NamedTuple):
    """threads: of a channel. rows: sequences of a block."""

    threads: int
    rows: int


def can_step_rows(inner: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> bool:
    """Whether the kernels can run: parameters of bf16 or fp16 and contiguous states on one GPU, which nobody
    differentiates."""
    device, w = inner.device, weights
    tensors = (w.conv, w.conv_bias, w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D)
    given = [inner, *(t for t in tensors if t is not None)]
    if device.type != "cuda" or not tuning.on or not is_eager(*given, conv_state, ssm_state) or not _runs_on(device):
        return False
    d_state, rank = ssm_state.shape[2], w.dt_proj.shape[1]
    most = _TRIED.get((d_state, rank, inner.dtype, ssm_state.dtype), 0)
    if not tuning.untried and len(ssm_state) > most:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or not len(inner):
        return False
    if conv_state.dtype != torch.float32 or ssm_state.dtype not in _STATES or inner.dtype not in CODES:
        return False
    if d_state > _MOST_STATES or rank > _MOST_RANKS or not can_run(conv_state, *given):
        return False
    if any(t.dtype != inner.dtype for t in given):
        return False
    if any(t.data_ptr() % _ALIGNED for t in (w.dt_proj, w.A_log, ssm_state)):
        return False
    return all(t.device == device and t.is_contiguous() for t in (*given, ssm_state))


@functools.cache
def _runs_on(device: torch.device) -> bool:
    return nvrtc.why_not() is None and torch.cuda.get_device_capability(device) >= (9, 0)


def step_rows_(inner: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights) -> Tensor:
    """What in_proj makes, `(rows, 2 d_inner)`, to what out_proj takes, `(rows, d_inner)`; changes the states in place.

    conv_state `(rows, d_inner, d_conv - 1)` fp32; ssm_state `(rows, d_inner, d_state)` fp32 or bf16.
    """
    w, channels = weights, ssm_state.shape[1]
    u = causal_conv_update_(conv_state, inner[:, :channels], w.conv.view(channels, -1), w.conv_bias, True)
    return scan_rows_(u, F.linear(u, w.x_proj), inner[:, channels:], ssm_state, w)


def scan_rows_(
    u: Tensor, products: Tensor, gate: Tensor, ssm_state: Tensor, weights: BlockWeights, early: bool = False
) -> Tensor:
    """What the convolution made, `(rows, d_inner)`, to what out_proj takes. products `(rows, rank + 2 d_state)`: of u
    with x_proj; or fp32 summands of them, `(parts, rows, rank + 2 d_state)`. A row's numbers are the same however many
    there are. early: whether it begins before the kernel in front of it has ended."""
    w, (rows, channels, d_state) = weights, ssm_state.shape
    device: int = u.device.index
    plan = planned(rows, channels, d_state, torch.cuda.get_device_properties(device).multi_processor_count)
    parts = len(products) if products.dim() == 3 else 0
    macros = macros_of(plan, u.dtype, w.dt_proj.shape[1], d_state, ssm_state.dtype == torch.bfloat16, parts)
    y = u.new_empty(rows, channels)
    with portable.on(u):
        _kernel(tuple(macros.items()), device, early)(
            -(-rows // plan.rows) * -(-channels // _CHANNELS),
            u,
            products,
            gate,
            gate.stride(0),
            ssm_state,
            w.dt_proj,
            w.dt_bias,
            w.A_log,
            w.D,
            y,
            rows,
            channels,
        )
    return y


def planned(rows: int, channels: int, d_state: int, processors: int) -> Plan:
    """How the work is spread. Only a block's sequences depend on how many there are, which changes no number."""
    threads = 4 if d_state >= 4 else 1
    at_once, states, room = 1, -(-d_state // threads), processors * tuning.blocks
    while (
        at_once < _MOST_SEQUENCES
        and 2 * at_once * states <= tuning.held
        and -(-rows // at_once) * -(-channels // _CHANNELS) > room
    ):
        at_once *= 2
    return Plan(threads, at_once)


def macros_of(plan: Plan, dtype: torch.dtype, rank: int, d_state: int, half: bool, parts: int) -> dict[str, int]:
    """What step_rows.cu is compiled with."""
    return {
        "IN": CODES[dtype],
        "HALF": int(half),
        "CHANNELS": _CHANNELS,
        "ROWS": plan.rows,
        "SUBS": plan.threads,
        "BLOCKS": tuning.blocks,
        "RANK": rank,
        "D_STATE": d_state,
        "PARTS": parts,
    }


@functools.cache
def _kernel(settings: tuple[tuple[str, int], ...], device: int, early: bool) -> nvrtc.Kernel:
    macros = dict(settings)
    return nvrtc.kernel(FILES, "step_rows", macros, macros["CHANNELS"] * macros["SUBS"], 0, device, early=early)
