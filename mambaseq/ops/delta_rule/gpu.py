"""The delta rule on GPUs: launching the Triton kernels.

Three kernels forward: pairs of a chunk's positions, the states before each chunk and what is written, outputs. Nothing
is kept for the backward pass but the arguments: it makes pairs and states again.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseq.ops import sequences
from mambaseq.ops.delta_rule.arguments import DeltaArguments
from mambaseq.ops.eager import constant_to_compilers
from mambaseq.ops.gpu import portable
from mambaseq.ops.operators import Operator, register
from mambaseq.ops.selective_scan.launches import processors, room
from mambaseq.ops.ssd import gpu as dual

_HALF = (torch.bfloat16, torch.float16)
_MOST = 256  # channels of a key
_SIZE = 64  # positions of a chunk
# Rows and columns of a tile that is read as an operand from shared memory: 128 bytes in 16 bits. Of narrower ones
# ptxas 12.8, which comes with Triton 3.6, takes the address from a register that nothing was written to.
_NARROWEST = 64
_LONGEST = 2**30  # row: positions are counted in 32 bits
_FEWEST = 16  # chunks of a part
_WARPS = 8  # of walks, whose registers a processor has
# Bytes of shared memory of a program: what large tiles are planned for, a Hopper GPU's, and what small ones take at
# most, of keys of up to 128 channels or of more; `benchmarks/delta_compiled.py` tells what the kernels take.
_PLENTY, _ENOUGH, _ENOUGH_OF_WIDE = 232_448, 101_376, 110_592


class Given(NamedTuple):
    """`DeltaArguments`, those first whose gradients and shapes the outputs have."""

    v: Tensor
    q: Tensor
    k: Tensor
    g: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool
    wants_final_state: bool


class Shape(NamedTuple):
    """How a kernel cuts its work. rows: of d_value. columns: of d_key."""

    warps: int
    stages: int
    rows: int
    columns: int = _MOST


class Plan(NamedTuple):
    """How each kernel cuts its work."""

    pairs: Shape
    walk: Shape
    output: Shape
    walk_back: Shape
    gradients: Shape
    of_pairs: Shape
    of_channels: Shape


def plan(d_key: int, d_value: int, dtype: torch.dtype, channels: bool, room: int = _PLENTY) -> Plan:
    """What suits these sizes, of tiles that `room` bytes of shared memory hold; in full precision and float16 twice as
    much is kept."""
    tight = room < _PLENTY
    wide = 2 if tight or dtype != torch.bfloat16 else 1
    whole = d_key <= 128 and d_value > 64 and wide == 1  # all rows of a state, one program a processor
    stages = 1 if tight else 3 if d_key <= 128 and wide == 1 else 2
    walk = Shape(4 if d_key <= 128 else 8, stages, 64 // wide)
    rows = 128 // dtype.itemsize
    few = wide == 2 or (channels and d_key > 128)  # of the tiles find room
    walk_back = Shape(8, 2 if channels else 3, 128) if whole else walk._replace(stages=1 if few else 2)
    if channels:
        walk = Shape(8, 3, 128) if whole else walk._replace(stages=min(stages, 2))
    return Plan(
        pairs=Shape(8 if channels and dtype == torch.float32 else 4, 1, 0, 128 // wide),
        walk=walk,
        output=Shape(4, 1, 128 // wide, 128),
        walk_back=walk_back,
        gradients=Shape(8, 1, rows, 128 // wide),
        of_pairs=Shape(8, 1, rows),
        of_channels=Shape(8, 1, rows, _NARROWEST),
    )


def _room(device: torch.device) -> int:
    """Bytes of shared memory that a program can have."""
    return room(device.index) if device.type == "cuda" else _PLENTY


@constant_to_compilers
def _too_little_on(device: torch.device, d_key: int) -> str | None:
    needed, given = _ENOUGH if d_key <= 128 else _ENOUGH_OF_WIDE, _room(device)
    return None if needed <= given else f"programs take {needed} bytes of shared memory, the GPU gives them {given}"


def _parts(device: torch.device, programs: int, warps: int, chunks: int) -> int:
    """How many parts a sequence of so many chunks is walked in, where a walk of one part for its map takes so many
    programs. All parts but one are walked twice."""
    several = processors(device.index) if device.type == "cuda" else 1
    parts = min(several * _WARPS // warps // programs + 1, chunks // _FEWEST)
    return parts if parts > 2 else 1


def _block(size: int) -> int:
    return max(dual._block(size), _NARROWEST)


def why_not(arguments: DeltaArguments) -> str | None:
    """The reason why the kernels cannot run these arguments, or None."""
    v = arguments.v
    if (reason := portable.why_not(v.device.type)) is not None:
        return reason
    if v.dtype not in _HALF and not (v.dtype == torch.float32 and v.is_cuda):
        return f"v is {v.dtype}, the kernels take bfloat16, float16 and, on a GPU, float32"
    return why_not_these(arguments) or _too_little_on(v.device, arguments.k.shape[3])


def why_not_these(arguments: DeltaArguments) -> str | None:
    """The same of shapes and of what is not v."""
    v, k = arguments.v, arguments.k
    for name in ("q", "k", "g", "beta", "initial_state"):
        value = getattr(arguments, name)
        if value is not None and value.dtype == torch.float64:
            return f"{name} is float64, the kernels compute in float32"
    if v.numel() == 0 or k.numel() == 0:
        return "k or v is empty"
    most = _MOST // 2 if v.dtype == torch.float32 else _MOST  # registers hold no more
    if k.shape[3] > most:
        return f"keys have {k.shape[3]} channels, the kernels take {most} in {v.dtype}"
    if v.shape[1] >= _LONGEST:
        return "a row is longer than 2^30"
    return None


class _Call:
    """Arguments as the kernels take them, pairs, and room for what is kept between kernels; `backward` keeps more of
    the pairs."""

    def __init__(self, a: Given, backward: bool = False) -> None:
        self.kernels: Any = importlib.import_module("mambaseq.ops.delta_rule.triton_kernels")
        self.channels = a.g is not None and a.g.ndim == 4
        self.given = a
        self.plan = plan(a.k.shape[3], a.v.shape[3], a.v.dtype, self.channels, _room(a.v.device))
        self.batch, self.length, self.heads, self.d_value = a.v.shape
        self.d_key = a.k.shape[3]
        self.heads_of_key = self.heads // a.k.shape[2]
        # tiles have room for one dtype of operands
        self.q, self.k, self.v = (dual.side_by_side(value.to(a.v.dtype)) for value in (a.q, a.k, a.v))
        self.kept_dtype = torch.bfloat16 if a.v.dtype == torch.bfloat16 else torch.float32
        self.n_sequences = sequences.count(a.v, a.cu_seqlens)
        self.table = self.bounds = None
        self.chunks_of_row = -(-self.length // _SIZE)
        if a.cu_seqlens is not None:
            self.table = sequences.shared(dual._table, a.cu_seqlens, self.length, _SIZE, a.reverse)
            self.bounds = sequences.shared(_bounds, a.cu_seqlens, self.length)
            self.chunks_of_row = self.table.shape[1]
        self.chunks = self.batch * self.chunks_of_row
        self.place = (self.chunks, self.chunks_of_row, self.length)
        self.sizes = {"P": self.d_value, "N": self.d_key, "SIZE": _SIZE, "REVERSE": a.reverse}
        self.scores = self.empty(_SIZE, _SIZE, dtype=self.kept_dtype)
        self.inverse = None if a.beta is None else self.empty(_SIZE, _SIZE, dtype=self.kept_dtype)
        self.of_pairs = (self.q, *self.q.stride()[:3], self.k, *self.k.stride()[:3])
        g = None if a.g is None else dual.side_by_side(a.g) if self.channels else a.g
        self.rates = (*_strided(g), *_strided(a.beta))
        shape, dtype = self.plan.pairs, a.v.dtype
        common = {"N": self.d_key, "BLOCK_N": min(_block(self.d_key), shape.columns), "SIZE": _SIZE,
                  "REVERSE": a.reverse, "PRECISION": "tf32" if dtype == torch.bfloat16 else "tf32x3",
                  "num_warps": shape.warps, "num_stages": shape.stages}  # fmt: skip
        # what the walks read: as it was given, or as it is at the ends of a chunk
        self.up = None
        self.down_q, self.down_k = self.of_pairs[:4], self.of_pairs[4:]
        grid = (self.chunks, self.heads)
        if not self.channels:
            self.total = self.empty(_SIZE, dtype=torch.float64)
            self.kernels.pairs[grid](
                *self.of_pairs, *self.rates, self.table, *self.place, self.total, self.scores, self.inverse,
                self.heads, self.heads_of_key, **common,
            )  # fmt: skip
            return
        self.total = self.empty(self.d_key, dtype=torch.float32)
        q_down, k_down, self.up = (self.empty(_SIZE, self.d_key, dtype=dtype) for _ in range(3))
        self.down_q, self.down_k = (q_down, 0, 0, 0), (k_down, 0, 0, 0)
        kernels: Any = importlib.import_module("mambaseq.ops.delta_rule.triton_channels")
        self.exact = dtype != torch.bfloat16
        self.sums = self.empty(2 if self.exact else 1, _SIZE, self.d_key, dtype=torch.float32)
        self.overlaps = torch.empty_like(self.scores) if backward and a.beta is not None else None
        kernels.pairs_of_channels[grid](
            *self.of_pairs, *self.rates, self.table, *self.place, self.total, self.sums, self.scores, self.inverse,
            self.overlaps, q_down, k_down, self.up, self.heads, self.heads_of_key, EXACT=self.exact, **common,
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Of each head of each chunk."""
        return torch.empty(self.chunks, self.heads, *shape, dtype=dtype, device=self.v.device)

    def blocks(self, shape: Shape) -> dict[str, int]:
        rows, columns = min(_block(self.d_value), shape.rows), min(_block(self.d_key), shape.columns)
        return {**self.sizes, "BLOCK_P": rows, "BLOCK_N": columns,
                "num_warps": shape.warps, "num_stages": shape.stages}  # fmt: skip

    def walk(self, wants_end: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The states before each chunk, what is written, and the final state."""
        states = self.empty(self.d_value, self.d_key, dtype=self.kept_dtype)
        written = self.empty(self.d_value, _SIZE, dtype=self.kept_dtype)
        tensors = (
            *self.down_k, self.up, self.v, *self.v.stride()[:3], *self.rates[4:], self.total, self.inverse
        )  # fmt: skip
        kept = (states, written)
        end = self.through(self.kernels.walk, self.plan.walk, tensors, self.given.initial_state, wants_end, kept)
        return states, written, end

    def through(
        self,
        kernel: Any,
        shape: Shape,
        tensors: tuple[Any, ...],
        start: Tensor | None,
        wants_end: bool,
        kept: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """Take states through all chunks by a walk; returns those at the ends. Long sequences that are few are walked
        in parts at once, after a walk that finds what each makes of a state; these are joined as PyTorch is told to
        multiply float32."""
        blocks = self.blocks(shape)
        programs = self.n_sequences * self.heads
        rows, both = (-(-n // blocks["BLOCK_P"]) for n in (self.d_value, self.d_value + self.d_key))
        parts = _parts(self.v.device, programs * both, shape.warps, self.chunks // self.n_sequences)

        def launch(n: int, start: Tensor | None, end: Tensor | None, kept: tuple[Any, Any], **sizes: Any) -> None:
            kernel[(n,)](
                *tensors, self.table, self.bounds, self.n_sequences, *self.place, start, end, *kept, self.heads,
                self.heads_of_key, PARTS=parts, **sizes, **blocks,
            )  # fmt: skip

        def room(*size: int) -> Tensor:
            return torch.empty(*size, self.d_key, dtype=torch.float32, device=self.v.device)

        shape_of_ends = (self.n_sequences, self.heads, self.d_value)
        starts = None if start is None else start.contiguous()
        if parts > 1:
            maps = room(parts - 1, programs, self.d_value + self.d_key)
            launch((parts - 1) * programs * both, None, maps, (None, None), MAPS=True)
            starts = room(parts, programs, self.d_value)
            starts[0] = 0 if start is None else start.flatten(0, 1)
            for before, after, of in zip(starts, starts[1:], maps, strict=False):
                torch.baddbmm(of[:, : self.d_value], before, of[:, self.d_value :], out=after)
        end = room(parts, *shape_of_ends) if wants_end else None
        launch(parts * programs * rows, starts, end, kept, MAPS=False)
        # a state that is kept is not to keep those of all parts
        return None if end is None else end.squeeze(0) if parts == 1 else end[-1].clone()


def _strided(value: Tensor | None) -> tuple[Any, ...]:
    """g or beta, and its strides."""
    return (None, 0, 0, 0) if value is None else (value, *value.stride()[:3])


def _bounds(cu_seqlens: Tensor, length: int) -> Tensor:
    """(2, sequences) int32: the first chunk of each packed sequence, and how many it has."""
    cut = sequences.in_chunks(cu_seqlens, length, _SIZE)
    return torch.stack([cut.begin, cut.counts]).int()


def forward_into(a: Given) -> tuple[Tensor, Tensor | None]:
    """y and the final state (None if it is not wanted), without autograd; of what `why_not` is None for."""
    with portable.on(a.v):
        call = _Call(a)
        states, written, final = call.walk(a.wants_final_state)
        y = torch.empty(a.v.shape, dtype=a.v.dtype, device=a.v.device)
        blocks = call.blocks(call.plan.output)
        call.kernels.output[(call.chunks, call.heads, -(-call.d_value // blocks["BLOCK_P"]))](
            *call.down_q, call.total, call.scores, states, written, call.table, *call.place, y,
            call.heads, call.heads_of_key, CHANNELS=call.channels, **blocks,
        )  # fmt: skip
        return y, final


def backward_into(a: Given, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of v, q, k, g, beta and initial_state, without autograd; None for what is None.

    Nothing of the forward is needed. The same inputs give the same bits.
    """
    kernels: Any = importlib.import_module("mambaseq.ops.delta_rule.triton_backward")
    with portable.on(a.v):
        call = _Call(a, backward=True)
        states, written, _ = call.walk(False)
        dy = dual.side_by_side(dy.to(a.v.dtype))
        left, errors = torch.empty_like(states), torch.empty_like(written)
        walked = (*call.down_q, *call.down_k, call.up, dy, *dy.stride()[:3], *call.rates[4:],
                   call.total, call.scores, call.inverse)  # fmt: skip
        wants = a.initial_state is not None
        dinitial = call.through(kernels.walk_back, call.plan.walk_back, walked, dfinal, wants, (left, errors))

        blocks = call.blocks(call.plan.of_channels if call.channels else call.plan.gradients)
        n = -(-call.d_key // blocks["BLOCK_N"])
        dv = torch.empty(a.v.shape, dtype=a.v.dtype, device=a.v.device)
        # of each head of values (batch, length, heads, d_key)
        shape = (*a.v.shape[:3], call.d_key)
        dq, dk = (
            torch.empty(shape, dtype=torch.float32 if call.heads_of_key > 1 else value.dtype, device=dv.device)
            for value in (a.q, a.k)
        )

        def of_blocks(value: Tensor | None) -> Tensor | None:
            """Room for the gradients of g or beta, of each block of d_key (blocks, batch, length, heads)."""
            if value is None:
                return None
            dtype = value.dtype if n == 1 else torch.float32
            return torch.empty(n, *value.shape, dtype=dtype, device=dv.device)

        dbeta = of_blocks(a.beta)
        values, cotangents = (call.v, *call.v.stride()[:3]), (dy, *dy.stride()[:3])
        after = (dbeta, call.batch * call.length * call.heads, call.heads, call.heads_of_key)
        grid = (call.chunks, call.heads, n)
        if call.channels:
            assert a.g is not None
            kernels = importlib.import_module("mambaseq.ops.delta_rule.triton_channels")
            dg: Tensor | None = torch.empty(a.g.shape, dtype=a.g.dtype, device=dv.device)
            of = call.plan.of_pairs
            of_pairs = torch.empty_like(call.scores)
            of_keys = of_rates = None
            if a.beta is not None:
                of_keys, of_rates = torch.empty_like(call.scores), call.empty(_SIZE, dtype=torch.float32)
            kernels.gradients_of_pairs[grid[:2]](
                *values, *cotangents, *call.rates[4:], written, errors, call.overlaps, call.table, *call.place, dv,
                of_pairs, of_keys, of_rates, call.heads, P=call.d_value, BLOCK_P=min(_block(call.d_value), of.rows),
                SIZE=_SIZE, REVERSE=a.reverse, num_warps=of.warps, num_stages=of.stages,
            )  # fmt: skip
            kernels.gradients_of_channels[grid](
                *call.of_pairs, *cotangents, *call.rates[4:], call.total, call.sums, states, left, written, errors,
                of_pairs, of_keys, of_rates, call.table, *call.place, dq, dk, dg, *after, EXACT=call.exact, **blocks,
            )  # fmt: skip
        else:
            dg = of_blocks(a.g)
            kernels.gradients[grid](
                *call.of_pairs, *values, *cotangents, *call.rates[4:], call.total, states, left, written, errors,
                call.table, *call.place, dq, dk, dv, dg, *after, **blocks,
            )  # fmt: skip
            dg = _over_blocks(dg, a.g)
    if call.heads_of_key > 1:  # those that a head of keys serves are side by side
        dq, dk = (
            found.unflatten(2, (-1, call.heads_of_key)).sum(3).to(value.dtype)
            for found, value in ((dq, a.q), (dk, a.k))
        )
    if dinitial is not None and a.initial_state is not None:
        dinitial = dinitial.to(a.initial_state.dtype)
    return dv, dq, dk, dg, _over_blocks(dbeta, a.beta), dinitial


def _over_blocks(found: Tensor | None, value: Tensor | None) -> Tensor | None:
    """The sum of a gradient's parts (blocks, batch, length, heads), in the dtype of the value."""
    if found is None or value is None:
        return None
    return found.squeeze(0) if found.shape[0] == 1 else found.sum(0).to(value.dtype)


def _fake(a: Given) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(a.v, memory_format=torch.contiguous_format)
    n = a.v.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    shape = (n, *a.v.shape[2:], a.k.shape[3])
    return y, a.v.new_empty(shape, dtype=torch.float32) if a.wants_final_state else None


_run = register(
    Operator(
        "delta_rule_triton",
        Given,
        "Tensor v, Tensor q, Tensor k, Tensor? g, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, "
        "bool reverse, bool wants_final_state",
        ("v", "q", "k", "g", "beta", "initial_state"),
        forward_into,
        backward_into,
        _fake,
    )
)


def run(arguments: DeltaArguments) -> tuple[Tensor, Tensor]:
    """y in the dtype of v, and the final state, an empty tensor where it is not wanted."""
    a = arguments
    y, final = _run(Given(a.v, a.q, a.k, a.g, a.beta, a.initial_state, a.cu_seqlens, a.reverse, a.wants_final_state))
    return y, final
