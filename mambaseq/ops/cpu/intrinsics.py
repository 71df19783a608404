# mypy: allow-untyped-defs
"""What Numba lacks: atomic counters, and fetching memory before it is used. Arrays are flat."""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_LINE = 16  # float32 numbers in a cache line


def _place(context, builder, signature, args):
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


@intrinsic
def _fetch_add(typingctx, array, index):
    def codegen(context, builder, signature, args):
        place = _place(context, builder, signature, args)
        return builder.atomic_rmw("add", place, context.get_constant(types.int64, 1), "seq_cst")

    return types.int64(array, types.intp), codegen


@intrinsic
def _load(typingctx, array, index):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(_place(context, builder, signature, args), "seq_cst", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def _prefetch_line(typingctx, array, index):
    def codegen(context, builder, signature, args):
        number = ir.IntType(32)
        place = builder.bitcast(_place(context, builder, signature, args), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(prefetch, [place, number(0), number(2), number(1)])  # to read, into the second level, data
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def _load_pair(typingctx, array, index):
    def codegen(context, builder, signature, args):
        place = builder.bitcast(_place(context, builder, signature, args), ir.IntType(32).as_pointer())
        pair = builder.load(place)
        pair.align = 2
        return pair

    return types.uint32(array, types.intp), codegen


@intrinsic
def _pointer(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), codegen


# Numba calls an intrinsic with the arguments after the first.
fetch_add: Any = _fetch_add  # (int64 array, index): adds 1 atomically; returns what was there
load: Any = _load  # (int64 array, index): reads anew each time, and before whatever is read next
prefetch_line: Any = _prefetch_line  # (array, index): starts fetching; what does not exist does no harm
load_pair: Any = _load_pair  # (uint16 array, index): two numbers as one uint32, the first as its lower half
pointer: Any = _pointer  # (int64 address): for `numba.carray`
# (): lets another thread have this core, if one waits for it
yield_core: Any = None if sys.platform == "win32" else types.ExternalFunction("sched_yield", types.int32())


@njit
def prefetch(array, stride, first, width, row, go, steps):
    """Start fetching columns `first` to `first + width` of rows `row, row + go, …` of a float32 array with this stride
    between its rows. Rows that do not exist do no harm."""
    for t in range(steps):
        at = (row + t * go) * stride + first
        for c in range(0, width, _LINE):
            prefetch_line(array, at + c)
