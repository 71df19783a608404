"""Many positions of some sequences by one kernel on a GPU (stretch.cu). What a model computes at a position, and the
drawing of the next token, is a list of phases, whose rows are shared by the blocks that have some sequences: the whole
GPU for one, a part of it each for several. For a small model, launching a kernel for each phase, even from a graph,
takes longer than the phases themselves; and so does a barrier, so that each number is passed on with the number of its
step, for which others wait.
"""

from __future__ import annotations

import functools
import operator
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq.ops.gpu import nvrtc
from mambaseq.ops.selective_scan.launches import processors, room

FILES = tuple(Path(__file__).parent / f"{name}.cu" for name in ("stretch_common", "stretch_rows", "stretch"))
LINEAR, OUT, MAMBA, LTI, GATED, CONV, SCAN = range(7)  # kinds of phases
EMBEDS, GLU, COMPLEX, SWIGLU = 1, 2, 4, 8  # flags
WIDEST = 1024  # numbers of a vector, a multiple of 4
MOST_STATES = 128  # of a channel
MOST_TOKENS = 1024  # of a vocabulary
MOST_TAPS = 32  # past inputs of a convolution
MOST_POOLS = 4
MOST_READ = 2**27  # weights that a position of several sequences reads on average, from a GPU's second cache
CACHED = 2**21  # weights that a position reads on average: on a CPU, more are faster read once for all sequences
_THREADS, _MANY_THREADS = 256, 384
"""Of a block whose warps have a row of a phase each, and of one whose warps have more. Samples a second of U-Nets of
6 M weights (H200), 64 sequences, with 256, 384 and 512 threads: time-invariant 671,000, 618,000 and 411,000; selective
403,000, 456,000 and 311,000. Registers decide: a thread has 255, 168 or 128, and a row of 8 sequences takes more than
168 where states are complex."""
_MOST_AT_ONCE = 8  # sequences of which a warp has a row
_FEWEST_BLOCKS = 12  # that have some sequences: more sequences at once rather than fewer blocks
_FEW_BLOCKS = 48
"""Each block of a group has a row of the logits, so that a vocabulary bounds how many there are. Where it leaves one
fewer than this, and the GPU and the other phases have more, nobody has measured whether the kernel pays."""
_MOST_HELD = 128  # states of a row that a warp holds for all of its sequences
OWN = ("source", "out", "state", "conv_state", "residual", "window", "copy", "held")
"""Tensors of a phase of which each sequence has its own: the first dimension."""


class Phase(NamedTuple):
    """`rows` of a linear map, each by a warp, and what is done with them. Tensors are float32 and contiguous. On a GPU
    vectors (see `vector`) are in pairs of a number and the step that it is of, and written once a step.

    LINEAR  out = weight in + bias. With a pool, `in` is its window.
    OUT     the same, gated by its other half (GLU) and added to `residual`. The sum goes to `out`, with
            what row `count * rows + row` of `up` makes of `held`, and to `copy`; without that to `window`, at the
            place of the pool's count.
    MAMBA   a channel of the time-invariant Mamba block: two rows, convolution, states, gate.
    LTI     a channel of `in` through its states, GELU.
    GATED   silu(row) times its other half (SWIGLU), or GELU of the row.
    CONV    a channel of the selective Mamba block: two rows and convolution; the gate goes to `copy`.
    SCAN    the same channel, whose step size is the softplus of a row, through its states: `in` has `held_cols`
            numbers, those of the row, B and C; `residual` has the inputs, `copy` the gates.

    normed: `in` is divided by the root of its mean square and eps, and a norm's weight is a factor of `weight`, or of b
    and D. level: pools that must be whole with a position for it to be run. flags: EMBEDS takes the token's embedding
    instead of `in`, and puts it into `residual`. a, b, c: `(channels, n_states)`, real or (COMPLEX) as pairs of
    numbers, with the state's new value a h + b x and the output the sum of all numbers' products with c; for SCAN a is
    A.
    """

    kind: int
    level: int
    rows: int
    cols: int
    source: Tensor | None = None
    normed: int = 0
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None
    out: Tensor | None = None
    flags: int = 0
    a: Tensor | None = None
    b: Tensor | None = None
    c: Tensor | None = None
    D: Tensor | None = None
    state: Tensor | None = None
    n_states: int = 0
    conv: Tensor | None = None
    conv_bias: Tensor | None = None
    conv_state: Tensor | None = None
    width: int = 0
    residual: Tensor | None = None
    window: Tensor | None = None
    copy: Tensor | None = None
    up: Tensor | None = None
    held: Tensor | None = None
    held_cols: int = 0
    pool: int = -1

    def words(self) -> list[int]:
        """As `struct Phase` has them: addresses, numbers, and the bits of a float."""
        return [
            0
            if value is None
            else value.data_ptr()
            if isinstance(value, Tensor)
            else struct.unpack("<i", struct.pack("<f", value))[0]
            if isinstance(value, float)
            else value
            for value in self
        ]

    def strides(self) -> list[int]:
        """How far the sequences' values are apart, in bytes, for each field; 0 for what all share."""
        values = ((name, getattr(self, name)) for name in self._fields)
        return [v.stride(0) * v.element_size() if name in OWN and v is not None else 0 for name, v in values]


def vector(batch: int, size: int, device: torch.device) -> Tensor:
    """What a phase writes, or, of pools, is read first: `(batch, size)` float32, and on a GPU `(batch, size, 2)`, where
    the first of two is the number (see `values`)."""
    return torch.zeros((batch, size, 2) if device.type == "cuda" else (batch, size), device=device)


def values(vector: Tensor) -> Tensor:
    """The numbers of a vector, `(batch, size)`, as a view."""
    return vector[..., 0] if vector.ndim == 3 else vector


class Stretch:
    """Steps of a model as phases.

    Args:
        phases: in their order; the last makes the logits. Tensors of `OWN` have the sequence first.
        embedding: `(vocabulary, d_model)` float32. condition: `(batch, d_model)` float32, added to it, or None.
        logits: where the last phase leaves them, a vector of twice a multiple of 4 of them: odd steps take its second
            half.
        counts: how far each pool's window is, in all sequences. pools: positions that each makes one of.
    """

    def __init__(
        self,
        phases: list[Phase],
        embedding: Tensor,
        condition: Tensor | None,
        logits: Tensor,
        counts: list[int],
        pools: list[int],
    ) -> None:
        device = embedding.device
        self._phases = phases  # what they point to must stay
        self._program = torch.tensor([phase.words() for phase in phases], dtype=torch.int64, device=device)
        self._strides = torch.tensor([phase.strides() for phase in phases], dtype=torch.int64, device=device)
        self._embedding, self._condition, self._logits = embedding, condition, logits
        self.counts, self._pools, self._steps = counts, pools, 0  # steps: taken before
        self._shares = Shares.of(phases, len(logits), processors(device.index), room(device.index))
        settings = macros(phases, len(embedding), self._shares)
        self._kernel = _kernel(tuple(settings.items()), device.index, len(phases))

    def run(self, token: Tensor, n_steps: int, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take a token `(batch,)` int64 of each sequence and `n_steps` steps, each step's token drawn of what it makes:
        by a number of `uniforms` `(batch, n_steps)` float64 in [0, 1), or, if None, the likeliest.

        Returns the tokens `(batch, n_steps)` int64, and whether some logits were no finite numbers `(1,)` int32.
        """
        device, batch, logits = token.device, len(self._logits), self._logits
        tokens = torch.empty(batch, n_steps, dtype=torch.int64, device=device)
        failed = torch.zeros(1, dtype=torch.int32, device=device)
        uniforms = None if uniforms is None else uniforms.contiguous()
        with torch.cuda.device(device):
            self._kernel(
                self._shares.groups * self._shares.blocks,
                self._program,
                self._strides,
                len(self._program),
                n_steps,
                batch,
                self._shares.groups,
                self._steps % 2**32,
                self._embedding,
                self._condition,
                self._embedding.shape[1],
                logits,
                logits.stride(0) * logits.element_size(),
                logits.shape[1] // 2,
                len(self._embedding),
                torch.tensor([temperature], dtype=torch.float64, device=device),
                uniforms,
                token.contiguous(),
                tokens,
                torch.tensor([*self.counts, 0], dtype=torch.int64, device=device),
                torch.tensor([*self._pools, 1], dtype=torch.int64, device=device),
                len(self._pools),
                failed,
            )
        self.counts = moved(self.counts, self._pools, n_steps)
        self._steps += n_steps
        return tokens, failed


class Shares(NamedTuple):
    """How a GPU is shared: groups of blocks, each of so many sequences at once."""

    groups: int
    blocks: int  # of a group
    sequences: int
    threads: int  # of a block

    @classmethod
    def of(cls, phases: list[Phase], batch: int, processors: int, memory: int) -> Shares:
        """For a batch on a GPU of so many multiprocessors, whose blocks have so many bytes of shared memory: as few
        sequences at once as leave a group enough blocks, and no more than fit.

        >>> Shares.of([Phase(LINEAR, 0, 256, 88)], 64, 132, 101_376)
        Shares(groups=8, blocks=16, sequences=8, threads=384)
        """
        n_states = max(phase.n_states for phase in phases)
        held = -(-n_states // 32) * min(32, _power_of_two(n_states))
        sequences = 1
        while (
            processors // -(-batch // sequences) < _FEWEST_BLOCKS
            and sequences < min(_MOST_AT_ONCE, batch)
            and 2 * sequences * held <= _MOST_HELD
            and shared_bytes(2 * sequences, _room(phases, phases[-1].rows), len(phases)) <= memory
        ):
            sequences *= 2
        groups = min(-(-batch // sequences), processors)
        blocks = min(processors // groups, phases[-1].rows)  # each with rows of the last phase
        alone = sequences == 1 and max(phase.rows for phase in phases) <= blocks * _THREADS // 32
        large = sequences == _MOST_AT_ONCE and any(phase.flags & COMPLEX for phase in phases)
        return cls(groups, blocks, sequences, _THREADS if alone or large else _MANY_THREADS)


def why_not(phases: list[Phase], batch: int, processors: int, memory: int) -> str | None:
    """Why a GPU of so many multiprocessors, whose blocks have so many bytes of shared memory, should not run these
    phases; None if it should. Only their sizes are read.

    >>> why_not([Phase(LINEAR, 0, 512, 256), Phase(LINEAR, 0, 16, 256)], 1, 132, 101_376)
    'a vocabulary of 16 leaves most of the GPU idle'
    """
    needed = shared_bytes(1, _room(phases, phases[-1].rows), len(phases))
    if needed > memory:
        return f"a block needs {needed:,} bytes of shared memory, and this GPU's have {memory:,}"
    shares = Shares.of(phases, batch, processors, memory)
    usable = min(processors // shares.groups, max(phase.rows for phase in phases))
    if shares.blocks < min(usable, _FEW_BLOCKS):
        return f"a vocabulary of {phases[-1].rows} leaves most of the GPU idle"
    return None


def moved(counts: list[int], pools: list[int], n_steps: int) -> list[int]:
    """The places in the pools' windows after some more positions.

    >>> moved([1, 3], [4, 4], 3)
    [0, 0]
    """
    found = []
    for count, pool in zip(counts, pools, strict=True):
        found.append((count + n_steps) % pool)
        n_steps = (count + n_steps) // pool
    return found


def macros(phases: list[Phase], vocabulary: int, shares: Shares) -> dict[str, int]:
    """What stretch.cu is compiled with: no more than these phases need, since a phase is as fast as one warp is."""
    lengths = {phase.cols for phase in phases} | {phase.held_cols for phase in phases if phase.up is not None}
    states = max(phase.n_states for phase in phases)
    alike = {bool(phase.flags & COMPLEX) for phase in phases if phase.n_states}
    return {
        "THREADS": shares.threads,
        "SEQUENCES": shares.sequences,
        "ROOM": _room(phases, vocabulary),
        "PIECES": -(-max(lengths) // 128),
        "USED": functools.reduce(operator.or_, (1 << -(-length // 128) for length in lengths)),
        "HELD": -(-max(1, states) // 32),
        "STATES": min(32, _power_of_two(states)),
        "TAPS": min(MOST_TAPS, _power_of_two(max(phase.width for phase in phases) - 1)),
        "CHOICES": -(-vocabulary // 32),
        "KINDS": functools.reduce(operator.or_, (1 << phase.kind for phase in phases)),
        "FLAGS": functools.reduce(operator.or_, (phase.flags for phase in phases)),
        "COMPLEX_STATES": 2 if len(alike) > 1 else int(True in alike),
        "BIASED": int(any(phase.bias is not None for phase in phases)),
        "POOLED": int(any(phase.pool >= 0 for phase in phases)),
    }


def _power_of_two(n: int) -> int:
    """The smallest that is at least n, at least 1."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _kernel(settings: tuple[tuple[str, int], ...], device: int, phases: int) -> nvrtc.Kernel:
    macros = dict(settings)
    shared = shared_bytes(macros["SEQUENCES"], macros["ROOM"], phases)
    return nvrtc.kernel(FILES, "stretch", macros, macros["THREADS"], shared, device, cooperative=True)


def _room(phases: list[Phase], vocabulary: int) -> int:
    """Numbers of a sequence that a phase reads, or the drawing of a token, at most: a multiple of 4."""
    rooms = [phase.held_cols if phase.kind == SCAN else phase.cols + phase.held_cols for phase in phases]
    return -(-max(*rooms, vocabulary) // 4) * 4


def shared_bytes(sequences: int, room: int, phases: int) -> int:
    """Of a block: two vectors of each sequence, 8 tokens, and the phases with their strides."""
    return 8 * sequences * room + 32 + 2 * phases * len(Phase._fields) * 8
