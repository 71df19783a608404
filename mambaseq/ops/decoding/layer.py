"""One decode step of one sequence through a whole residual layer on a GPU: its norm, its Mamba or Mamba-2 block and the
residual sum by four or three kernels (`layer_kernels.py`), where single operations would take eight to ten. The time
between kernels counts as much as the reading of the weights then. Several sequences have the kernels of `layer_rows.py`
and `rows.py`, or go by single operations.

Under Triton's interpreter, CPU tensors work here too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.ops.decoding.block import BlockWeights
from mambaseq.ops.decoding.gpu import power_of_two, ssd_update_
from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import portable

WIDEST = 8192  # columns of a weight that a program holds whole, for one row
_WIDEST_CONV = 8
_MOST_STATES = 256
_MOST_RANKS = 1024
STATES = (torch.float32, torch.bfloat16)


@dataclasses.dataclass
class Tuning:
    """What was measured to be fast (`benchmarks/decode_parts.py`).

    on: whether layers are stepped whole. held: numbers of a weight that a program multiplies, by as many warps.
        programs: the fewest. scan_elements: numbers of the states that a program has. pdl: start a kernel before the
        one in front of it has ended, where a GPU can (compute capability 9.0 on).
    """

    on: bool = True
    held: int = 8192
    held_warps: int = 4
    programs: int = 264
    scan_elements: int = 256
    pdl: bool = True


tuning = Tuning()


class LayerNorm(NamedTuple):
    """The layer's RMSNorm."""

    weight: Tensor
    eps: float


class Mamba2Weights(NamedTuple):
    """Parameters of a Mamba-2 block with one group, of the names and shapes of the published checkpoints."""

    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor
    out_proj: Tensor
    out_bias: Tensor | None


def can_step(residual: Tensor, norm: LayerNorm, conv_state: Tensor, ssm_state: Tensor, weights: Any) -> bool:
    """Whether the kernels can run: a contiguous fp32 stream `(1, d_model)`, contiguous states and weights of one
    floating dtype on one GPU, which nobody differentiates."""
    device = residual.device
    tensors = [value for value in (*weights, norm.weight) if value is not None]
    states = (conv_state, ssm_state)
    if device.type != "cuda" or not is_eager(residual, *states, *tensors) or portable.why_not("cuda") is not None:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or len(residual) != 1 or not tuning.on:
        return False
    if residual.dtype != torch.float32 or conv_state.dtype != torch.float32 or ssm_state.dtype not in STATES:
        return False
    dtype = weights.in_proj.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if max(weights.in_proj.shape[1], weights.out_proj.shape[1]) > WIDEST or weights.conv.shape[-1] > _WIDEST_CONV:
        return False
    if ssm_state.shape[-1] > _MOST_STATES or (hasattr(weights, "dt_proj") and weights.dt_proj.shape[1] > _MOST_RANKS):
        return False
    plain = all(t.device == device and t.is_contiguous() for t in (residual, *states, *tensors))
    return plain and all(t.dtype == dtype for t in tensors)


def mamba_step_(
    residual: Tensor, norm: LayerNorm, conv_state: Tensor, ssm_state: Tensor, weights: BlockWeights
) -> Tensor:
    """residual + block(norm(residual)), `(1, d_model)` fp32; changes the states in place.

    conv_state `(1, d_inner, d_conv - 1)` fp32; ssm_state `(1, d_inner, d_state)` fp32 or bf16.
    """
    w, (_, channels, d_state) = weights, ssm_state.shape
    rank, dtype = w.dt_proj.shape[1], w.in_proj.dtype
    conv = Convolution(conv_state, w.conv, w.conv_bias, 0)
    inner = linear_step(residual, w.in_proj, w.in_bias, norm=norm, conv=conv, out_dtype=dtype)
    products = linear_step(inner[:, :channels], w.x_proj, out_dtype=torch.float32)
    y = inner.new_empty(1, channels)
    states, ranks = power_of_two(d_state), power_of_two(rank)
    per_program = max(tuning.scan_elements // states, 1)
    with portable.on(residual):
        _kernels().scan_step[(-(-channels // per_program),)](
            ssm_state,
            inner,
            products,
            w.dt_proj,
            w.dt_bias,
            w.A_log,
            w.D,
            y,
            channels,
            RANK=rank,
            RANKS=ranks,
            D_STATE=d_state,
            STATES=states,
            CHANNELS=per_program,
            enable_fp_fusion=False,  # as in `gpu.py`
            **_launch(4, residual.device),
        )
    return linear_step(y, w.out_proj, w.out_bias, residual=residual, out_dtype=torch.float32)


def mamba2_step_(
    residual: Tensor, norm: LayerNorm, conv_state: Tensor, ssm_state: Tensor, weights: Mamba2Weights, eps: float
) -> Tensor:
    """The same of Mamba-2. eps: of the gated norm. conv_state `(1, d_inner + 2 d_state, d_conv - 1)`, ssm_state `(1,
    heads, head_dim, d_state)`."""
    w, (_, heads, head_dim, d_state) = weights, ssm_state.shape
    channels, dtype = heads * head_dim, w.in_proj.dtype
    conv = Convolution(conv_state, w.conv, w.conv_bias, channels)
    inner = linear_step(residual, w.in_proj, w.in_bias, norm=norm, conv=conv, out_dtype=dtype)
    gate, x, B, C, dt = inner.split([channels, channels, d_state, d_state, heads], dim=1)
    x = x.unflatten(1, (heads, head_dim))
    y = ssd_update_(ssm_state, x, dt, w.A_log, B[:, None], C[:, None], w.D, w.dt_bias, True, A_is_log=True)
    gated = LayerNorm(w.norm, eps)
    y = y.flatten(1)
    return linear_step(y, w.out_proj, w.out_bias, norm=gated, gate=gate, residual=residual, out_dtype=torch.float32)


class Convolution(NamedTuple):
    """The causal convolution of the outputs from `begin` on; state and weights as in `causal_conv_update_`."""

    state: Tensor
    weight: Tensor
    bias: Tensor | None
    begin: int


def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: LayerNorm | None = None,
    gate: Tensor | None = None,
    conv: Convolution | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x `(1, in)` by the weight `(out, in)` to `(1, out)`; see the kernel."""
    n_out, columns = weight.shape
    out = torch.empty(1, n_out, dtype=out_dtype, device=x.device)
    block = power_of_two(columns)
    outputs = max(tuning.held // block, 1)
    while outputs > 1 and -(-n_out // outputs) < tuning.programs:
        outputs //= 2
    warps = max(1, min(tuning.held_warps, outputs * block * tuning.held_warps // tuning.held))
    warps = max(warps, min(4, tuning.held_warps))
    with portable.on(x):
        _kernels().linear_step[(-(-n_out // outputs),)](
            x,
            gate,
            None if norm is None else norm.weight,
            0.0 if norm is None else norm.eps,
            weight,
            bias,
            out,
            residual,
            None if conv is None else conv.state,
            None if conv is None else conv.weight,
            None if conv is None else conv.bias,
            0 if conv is None else conv.begin,
            0 if conv is None else conv.state.shape[1],
            n_out,
            COLUMNS=columns,
            BLOCK=block,
            OUTPUTS=outputs,
            NORM=norm is not None,
            GATED=gate is not None,
            HAS_BIAS=bias is not None,
            CONV=0 if conv is None else conv.state.shape[2] + 1,
            TAPS=1 if conv is None else power_of_two(conv.state.shape[2] + 1),
            HAS_CONV_BIAS=conv is not None and conv.bias is not None,
            ADD=residual is not None,
            enable_fp_fusion=False,  # as in `gpu.py`
            **_launch(warps, x.device),
        )
    return out


def _launch(warps: int, device: torch.device) -> dict[str, Any]:
    early = tuning.pdl and _starts_early(device)
    return {"num_warps": warps, "PDL": early, **({"launch_pdl": True} if early else {})}


@functools.cache
def _starts_early(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("mambaseq.ops.decoding.layer_kernels")
