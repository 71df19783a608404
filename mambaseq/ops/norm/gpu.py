"""The norms on GPUs: launching the Triton kernels (kernels.py), and PyTorch operators for `torch.compile`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambaseq.ops.eager import is_eager
from mambaseq.ops.gpu import portable
from mambaseq.ops.norm.arguments import AddNormArguments, GatedNormArguments

_WIDEST = 8192  # the widest row (of a group) that a program holds
# elements of a tile: enough loads in flight from few registers; the backward holds more values an element
TILE, TILE_BACKWARD = 4096, 2048
_MOST_ROWS = 32  # of a tile
_PROGRAMS_A_PROCESSOR = 4  # that walk over the tiles in the backward
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_add(arguments: AddNormArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    x, residual, weight, _, out_dtype = arguments
    tensors = (residual, weight) if x is None else (x, residual, weight)
    return why_not(residual.shape[-1], tensors, out_dtype)


def why_not_gated(arguments: GatedNormArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    return why_not(arguments.width, (arguments.x, arguments.z, arguments.weight), None)


def why_not(width: int, tensors: tuple[Tensor, ...], out_dtype: torch.dtype | None) -> str | None:
    if (reason := portable.why_not(tensors[0].device.type)) is not None:
        return reason
    if width > _WIDEST:
        return f"rows are {width} wide, the kernels hold {_WIDEST}"
    for dtype in (*(t.dtype for t in tensors), out_dtype):
        if dtype is not None and dtype not in _DTYPES:
            return f"the kernels compute in float32, there is {dtype}"
    if tensors[0].numel() == 0:
        return "there are no rows"
    return None


def run_add(arguments: AddNormArguments) -> tuple[Tensor, Tensor]:
    """(y, new residual), see `reference.run_add`."""
    x, residual, weight, eps, out_dtype = arguments
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    call = _AddNorm.apply if is_eager(x, residual, weight) else _add_op
    y, total, _ = call(x, residual, weight, eps, out_dtype)
    return y, total if _stores_total(x, residual) else residual


def run_gated(arguments: GatedNormArguments) -> Any:
    """(y,), see `reference.run_gated`."""
    x, z, weight, eps, _, norm_before_gate, gate = arguments
    call = _GatedNorm.apply if is_eager(x, z, weight) else _gated_op
    return (call(x, z, weight, eps, arguments.width, norm_before_gate, gate == "silu")[0],)


def _stores_total(x: Tensor | None, residual: Tensor) -> bool:
    return x is not None or residual.dtype != torch.float32


@functools.cache
def _kernels() -> Any:
    """Imported when first needed: that imports Triton."""
    return importlib.import_module("mambaseq.ops.norm.kernels")


@functools.cache
def most_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return _PROGRAMS_A_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def tile_of(width: int, elements: int) -> dict[str, int]:
    """How a row of this width is cut: constants of the kernels."""
    columns = 1 << (width - 1).bit_length()
    rows = min(_MOST_ROWS, max(1, elements // columns))
    return {"WIDTH": width, "COLUMNS": columns, "ROWS": rows, "num_warps": 16 if rows * columns > 4096 else 4}


def _add_forward(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the sum or nothing where it is the residual, 1 / rms of each row)."""
    width = residual.shape[-1]
    n_rows = residual.numel() // width
    stores = _stores_total(x, residual)
    shape, device = residual.shape, residual.device
    residual = residual.contiguous()
    y = torch.empty(shape, dtype=out_dtype, device=device)
    total = torch.empty(shape if stores else (0,), dtype=torch.float32, device=device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=device)
    tile = tile_of(width, TILE)
    with portable.on(residual):
        _kernels().add_forward[(-(-n_rows // tile["ROWS"]),)](
            residual if x is None else x.contiguous(), residual, weight.contiguous(), y, total, rstd, n_rows, eps,
            HAS_X=x is not None, STORE_TOTAL=stores, **tile,
        )  # fmt: skip
    return y, total, rstd


def _add_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual_dtype: torch.dtype,
    x_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual, of x (nothing where it is that of the residual, or x is None) and of the weight."""
    width = total.shape[-1]
    n_rows = total.numel() // width
    stores_dx = x_dtype is not None and x_dtype != residual_dtype
    device = total.device
    dresidual = torch.empty(total.shape, dtype=residual_dtype, device=device)
    dx = torch.empty(total.shape if stores_dx else (0,), dtype=x_dtype or residual_dtype, device=device)
    tile = tile_of(width, TILE_BACKWARD)
    n_tiles = -(-n_rows // tile["ROWS"])
    programs = min(n_tiles, most_programs(device))
    shares = torch.empty(programs, width, dtype=torch.float32, device=device)
    with portable.on(total):
        _kernels().add_backward[(programs,)](
            dy.contiguous(), dy if dtotal is None else dtotal.contiguous(), total.contiguous(), rstd,
            weight.contiguous(), dresidual, dx, shares, n_rows, n_tiles,
            HAS_DTOTAL=dtotal is not None, STORE_DX=stores_dx, **tile,
        )  # fmt: skip
    return dresidual, dx, shares.sum(0).to(weight.dtype)


def rows_of(x: Tensor) -> Tensor:
    """`(rows, channels)` with channels side by side; a view where it can be one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def gated_forward(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, width: int, before: bool, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """(y, 1 / rms of each row and group)."""
    xs, zs = rows_of(x), rows_of(z)
    n_rows, channels = xs.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(n_rows, channels // width, dtype=torch.float32, device=x.device)
    tile = tile_of(width, TILE)
    with portable.on(x):
        _kernels().gated_forward[(-(-n_rows // tile["ROWS"]), channels // width)](
            xs, zs, weight.contiguous(), y, rstd, n_rows, xs.stride(0), zs.stride(0), channels // width, eps,
            BEFORE=before, SILU=silu, **tile,
        )  # fmt: skip
    return y, rstd


def gated_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    rstd: Tensor,
    width: int,
    before: bool,
    silu: bool = True,
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dz and dweight. dz: where to write it, `(rows, channels)`, its channels side by side."""
    xs, zs = rows_of(x), rows_of(z)
    n_rows, channels = xs.shape
    groups = channels // width
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = torch.empty(z.shape, dtype=z.dtype, device=x.device) if dz is None else dz
    tile = tile_of(width, TILE_BACKWARD)
    n_tiles = -(-n_rows // tile["ROWS"])
    programs = min(n_tiles, max(1, most_programs(x.device) // groups))
    shares = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    with portable.on(x):
        _kernels().gated_backward[(programs, groups)](
            dy.contiguous(), xs, zs, weight.contiguous(), rstd, dx, dz, shares,
            n_rows, n_tiles, xs.stride(0), zs.stride(0), dz.view(-1, channels).stride(0), groups,
            BEFORE=before, SILU=silu, **tile,
        )  # fmt: skip
    return dx, dz, shares.sum(0).to(weight.dtype)


_add_op = torch.library.custom_op(
    "mambaseq::add_rms_norm",
    _add_forward,
    mutates_args=(),
    schema="(Tensor? x, Tensor residual, Tensor weight, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
)
_add_backward_op = torch.library.custom_op(
    "mambaseq::add_rms_norm_backward",
    _add_backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor? dtotal, Tensor total, Tensor rstd, Tensor weight, ScalarType residual_dtype, "
    "ScalarType? x_dtype) -> (Tensor, Tensor, Tensor)",
)
_gated_op = torch.library.custom_op(
    "mambaseq::gated_rms_norm",
    gated_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor z, Tensor weight, float eps, int width, bool before, bool silu) -> (Tensor, Tensor)",
)
_gated_backward_op = torch.library.custom_op(
    "mambaseq::gated_rms_norm_backward",
    gated_backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor z, Tensor weight, Tensor rstd, int width, bool before, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
)


@_add_op.register_fake
def _(x: Any, residual: Any, weight: Any, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    total = residual.shape if _stores_total(x, residual) else (0,)
    return (
        residual.new_empty(residual.shape, dtype=out_dtype),
        residual.new_empty(total, dtype=torch.float32),
        residual.new_empty(residual.shape[:-1].numel(), dtype=torch.float32),
    )


@_add_backward_op.register_fake
def _(
    dy: Any, dtotal: Any, total: Any, rstd: Any, weight: Any, residual_dtype: torch.dtype, x_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx = total.shape if x_dtype is not None and x_dtype != residual_dtype else (0,)
    return (
        total.new_empty(total.shape, dtype=residual_dtype),
        total.new_empty(dx, dtype=x_dtype or residual_dtype),
        weight.new_empty(weight.shape),
    )


@_gated_op.register_fake
def _(x: Any, z: Any, weight: Any, eps: float, width: int, before: bool, silu: bool) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), x.new_empty((rows, x.shape[-1] // width), dtype=torch.float32)


@_gated_backward_op.register_fake
def _(
    dy: Any, x: Any, z: Any, weight: Any, rstd: Any, width: int, before: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _remember_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, ctx.out_dtype = inputs
    ctx.stored = _stores_total(x, residual)
    ctx.save_for_backward(output[1] if ctx.stored else residual, output[2], weight)
    ctx.dtypes = residual.dtype, None if x is None else x.dtype
    ctx.set_materialize_grads(False)


def _add_gradients(ctx: Any, backward: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None and dtotal is None:
        return None, None, None, None, None
    total, rstd, weight = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros(total.shape, dtype=ctx.out_dtype, device=total.device)
    residual_dtype, x_dtype = ctx.dtypes
    dresidual, dx, dweight = backward(dy, dtotal if ctx.stored else None, total, rstd, weight, residual_dtype, x_dtype)
    if x_dtype is None:
        return None, dresidual, dweight, None, None
    return dresidual if x_dtype == residual_dtype else dx, dresidual, dweight, None, None


def _remember_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, z, weight, _, ctx.width, ctx.before, ctx.silu = inputs
    ctx.save_for_backward(x, z, weight, output[1])
    ctx.set_materialize_grads(False)


def _gated_gradients(ctx: Any, backward: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None, None, None
    x, z, weight, rstd = ctx.saved_tensors
    return *backward(dy, x, z, weight, rstd, ctx.width, ctx.before, ctx.silu), None, None, None, None


_add_op.register_autograd(
    lambda ctx, dy, dtotal, _: _add_gradients(ctx, _add_backward_op, dy, dtotal), setup_context=_remember_add
)
_gated_op.register_autograd(
    lambda ctx, dy, _: _gated_gradients(ctx, _gated_backward_op, dy), setup_context=_remember_gated
)


class _AddNorm(torch.autograd.Function):
    """The same without the operators' wrappers, which cost more than a short kernel."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        outputs = _add_forward(*values)
        _remember_add(ctx, values, outputs)
        ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: Any) -> tuple[Any, ...]:
        return _add_gradients(ctx, _add_backward, dy, dtotal)


class _GatedNorm(torch.autograd.Function):
    """As `_AddNorm`."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        outputs = gated_forward(*values)
        _remember_gated(ctx, values, outputs)
        ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        return _gated_gradients(ctx, gated_backward, dy)
