"""Compile the delta rule's Triton kernels for a GPU, which need not be there, and look at what came out.

A line of JSON for each kernel that a call launches, forward and backward: `widths`, bytes of a row of the operands that
products read from shared memory, and `shared`, bytes that a program takes of it; with --code also `unwritten`,
instructions that read a register which no instruction has written, or that take the stack's address for a number. Exits
with 1 if there is one, an operand narrower than 128 bytes, or more shared memory than there is: ptxas 12.8, which comes
with Triton 3.6, makes such instructions of narrower operands. nvdisasm 13.1, of Triton 3.8, does not read the code of
that Triton.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mambaseq.atomic import json_text
from mambaseq.ops.delta_rule import gpu

# by compute capability, bytes of shared memory that a program can have: A100, RTX 3090 and 4090, H100, RTX 5090
ROOM = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
PARTLY = re.compile(r"(?:@!?U?P\d+ )?(?:PRMT|LOP3\.LUT) (R\d+), .*\b\1\b")  # some bits of a register are written
MOVED = re.compile(r"(?:@!?U?P\d+ )?(?:STL|U?MOV|IMAD\.MOV)\b")
LEFT_IN_REGISTERS = re.compile(r"HGMMA\S+ R\d+, R\d+, gdesc\[UR(\d+)\]")
UNIFORM = 3, 4  # which of the groups of columns that nvdisasm prints, and where UR0 is in it
STACK = re.compile(r"\bR1\b")
OF_STACK = re.compile(r"\[R1\b|\bLDC R1,|\b(?:VIADD|IADD3) R1, R1,")


class Driver(NamedTuple):
    """As much of a driver as compiling asks for."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _EnoughError(Exception):
    pass


def launched(
    call: Callable[[], object], *, code: bool = False, capability: int = 90
) -> list[tuple[str, str, int, Any]]:
    """The kernels that `call` launches, none of which is run: name, TTGIR, bytes of shared memory and, with code, what
    Triton compiled."""
    driver: Any = Driver(capability)
    triton.runtime.driver.set_active(driver)
    found: list[tuple[str, str, int, Any]] = []
    seen: dict[str, Any] = {}
    launches: set[tuple[str, bool | None]] = set()
    backend = triton.compiler.make_backend(driver.get_current_target())
    run, stages_of = JITFunction.run, type(backend).add_stages

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if not code and (self.__name__, options.get("MAPS")) in launches:
            return  # launched again, with the same operands
        launches.add((self.__name__, options.get("MAPS")))
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
            seen.update(ttgir=kernel.asm["ttgir"], shared=kernel.metadata.shared)
        except _EnoughError:
            kernel = None
        found.append((self.__name__, seen["ttgir"], seen["shared"], kernel))

    def stages(self: Any, stages: dict[str, Any], *args: Any) -> None:
        stages_of(self, stages, *args)
        of_gpu = stages["ttgir"]

        def told(module: Any, metadata: Any) -> Any:
            module = of_gpu(module, metadata)
            seen.update(ttgir=str(module))
            return module

        def enough(module: Any, metadata: Any) -> None:
            seen.update(shared=metadata["shared"])
            raise _EnoughError

        if not code:
            stages.update(ttgir=told, ptx=enough)

    JITFunction.run, type(backend).add_stages = compiled, stages
    try:
        call()
    finally:
        JITFunction.run, type(backend).add_stages = run, stages_of
    return found


def widths(ttgir: str) -> list[int]:
    """Bytes of a row of the operands that products read from shared memory."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.nvmma_shared<\{swizzlingByteWidth = (\d+)", ttgir, re.MULTILINE))
    operands = [
        layout
        for line in ttgir.splitlines()
        if "ttng.warp_group_dot " in line
        for layout in re.findall(r"memdesc<[^>]*?, (#\w+), #smem", line)
    ]
    return sorted({int(layouts[layout]) for layout in operands})


def unwritten(cubin: bytes, tool: str) -> list[str]:
    """Instructions that read registers that nothing has written, but those that do nothing with what they read."""
    image = bytearray(cubin)
    at = -1
    while (at := image.find(b"\x04\x2f\x08\x00", at + 1)) >= 0:  # nvdisasm refuses the most registers there are
        if struct.unpack_from("<I", image, at + 8)[0] == 255:
            struct.pack_into("<I", image, at + 8, 253)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        made = subprocess.run([tool, "-plr", "-lrm", "narrow", file.name], capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"{tool}: {made.stderr}\nGive an nvdisasm of the same CUDA as Triton's ptxas by --nvdisasm.")
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+([^;\n]*;)\s*// (.*)$", made.stdout, re.MULTILINE)
    found = [line for line, _ in lines if STACK.search(line) and not OF_STACK.search(line)]
    groups = [ranges.split("|") for _, ranges in lines]
    for kind, group in enumerate(groups[0]):
        for column in range(len(group)):
            if group[column] not in ":vx":
                continue
            first = next(
                (n for n, g in enumerate(groups) if kind < len(g) and g[kind][column : column + 1] in ("^", "v", "x")),
                None,
            )
            if first is None or groups[first][kind][column] == "^":  # written under a condition
                continue
            line = lines[first][0]
            # the address of a left side, which is in registers, is not read
            left = LEFT_IN_REGISTERS.match(line) if kind == UNIFORM[0] else None
            unread = left is not None and column - UNIFORM[1] - int(left[1]) in (0, 1)
            if not unread and not PARTLY.match(line) and not MOVED.match(line):
                found.append(line)
    return found


def call(
    d_key: int,
    d_value: int,
    dtype: torch.dtype,
    *,
    channels: bool,
    shared: bool = False,
    keys: torch.dtype | None = None,
) -> None:
    """Forward and backward, of memory that is not looked at; keys: the dtype of q and k, that of v if None."""
    q, k = (torch.empty(1, 65, 1 if shared else 2, d_key, dtype=keys or dtype) for _ in range(2))
    v = torch.empty(1, 65, 2, d_value, dtype=dtype)
    g = torch.empty(1, 65, 2, *([d_key] if channels else []))
    given = gpu.Given(v, q, k, g, torch.empty(1, 65, 2), None, None, reverse=False, wants_final_state=True)
    gpu.forward_into(given)
    gpu.backward_into(given, torch.empty_like(v), None)


def main() -> int:
    own = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["128x128", "64x64", "16x32"], help="d_key x d_value")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--decays", nargs="+", default=["channels", "heads"], choices=["channels", "heads"])
    parser.add_argument("--keys", help="the dtype of queries and keys, if another than that of values")
    parser.add_argument("--capability", type=int, choices=ROOM, default=90, help="of the GPU")
    parser.add_argument("--shared", action="store_true", help="two heads to a key")
    parser.add_argument("--parts", action="store_true", help="walks in parts, as of sequences that are few and long")
    parser.add_argument("--code", action="store_true", help="compile to the end: seconds a kernel")
    parser.add_argument("--nvdisasm", default=str(own), help="Triton's own, if it is not given")
    options = parser.parse_args()
    if options.parts:
        gpu._parts = lambda *_: 3
    wrong, most = False, ROOM[options.capability]
    gpu._room = lambda device: most
    for dtype, decays, size in itertools.product(options.dtypes, options.decays, options.sizes):
        d_key, d_value = map(int, size.split("x"))
        one = functools.partial(
            call,
            d_key,
            d_value,
            getattr(torch, dtype),
            channels=decays == "channels",
            shared=options.shared,
            keys=None if options.keys is None else getattr(torch, options.keys),
        )
        for name, ttgir, shared, kernel in launched(one, code=options.code, capability=options.capability):
            found: dict[str, Any] = {"widths": widths(ttgir), "shared": shared}
            wrong |= min(found["widths"], default=128) < 128 or shared > most
            if kernel is not None:
                found["unwritten"] = unwritten(kernel.asm["cubin"], options.nvdisasm)
                wrong |= bool(found["unwritten"])
            print(json_text({"kernel": name, "size": size, "dtype": dtype, "decays": decays, **found}), flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
