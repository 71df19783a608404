"""Many positions of some sequences by one kernel on a GPU (stretch.cu). What a model computes at a position, and the
drawing of the next token, is a list of phases with a barrier between them over the blocks that have a sequence: the
whole GPU for one, a part of it each for several. For a small model, launching a kernel for each phase, even from a
graph, takes longer than the phases themselves.
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
from mambaseq.ops.selective_scan.launches import processors

FILE = Path(__file__).parent / "stretch.cu"
LINEAR, OUT, MAMBA, LTI, GATED, CONV, SCAN = range(7)  # kinds of phases
EMBEDS, GLU, COMPLEX, SWIGLU = 1, 2, 4, 8  # flags
WIDEST = 1024  # numbers of a vector, a multiple of 4
MOST_STATES = 128  # of a channel
MOST_TOKENS = 1024  # of a vocabulary
MOST_PHASES = 200  # that fit into a block's memory
MOST_POOLS = 4
MOST_READ = 2**27  # weights that a position of several sequences reads on average, from a GPU's second cache
CACHED = 2**21  # weights that a position reads on average: on a CPU, more are faster read once for all sequences
_THREADS, _MANY_THREADS = 256, 1024
"""Of a block whose warps have a row of a phase each, which they hold, and of one whose warps have more."""
OWN = ("source", "out", "state", "conv_state", "residual", "window", "copy", "held")
"""Tensors of a phase of which each sequence has its own: the first dimension."""
_LINE = 32  # numbers between the counters of barriers, so that no two share a cache line


class Phase(NamedTuple):
    """`rows` of a linear map, each by a warp, and what is done with them. Tensors are float32 and contiguous.

    LINEAR  out = weight in + bias.
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


class Stretch:
    """Steps of a model as phases.

    Args:
        phases: in their order; the last makes the logits. Tensors of `OWN` have the sequence first.
        embedding: `(vocabulary, d_model)` float32. condition: `(batch, d_model)` float32, added to it, or None.
        logits: `(batch, room)` float32, where the last phase leaves them; room for a multiple of 4 of them.
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
        self.counts, self._pools = counts, pools
        self._groups = min(len(logits), processors(device.index))
        self._blocks = processors(device.index) // self._groups  # that have a sequence
        settings = macros(phases, len(embedding), self._blocks)
        self._kernel = _kernel(tuple(settings.items()), device.index, len(phases))

    def run(self, token: Tensor, n_steps: int, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take a token `(batch,)` int64 of each sequence and `n_steps` steps, each step's token drawn of what it makes:
        by a number of `uniforms` `(batch, n_steps)` float64 in [0, 1), or, if None, the likeliest.

        Returns the tokens `(batch, n_steps)` int64, and whether some logits were no finite numbers `(1,)` int32.
        """
        device, batch = token.device, len(self._logits)
        tokens = torch.empty(batch, n_steps, dtype=torch.int64, device=device)
        # what has failed; from the second line on, what has come to each barrier
        shared = torch.zeros((self._groups + 1) * _LINE, dtype=torch.int32, device=device)
        uniforms = None if uniforms is None else uniforms.contiguous()
        with torch.cuda.device(device):
            self._kernel(
                self._groups * self._blocks,
                self._program,
                self._strides,
                len(self._program),
                n_steps,
                batch,
                self._groups,
                self._embedding,
                self._condition,
                self._embedding.shape[1],
                self._logits,
                self._logits.stride(0),
                len(self._embedding),
                torch.tensor([temperature], dtype=torch.float64, device=device),
                uniforms,
                token.contiguous(),
                tokens,
                torch.tensor([*self.counts, 0], dtype=torch.int64, device=device),
                torch.tensor([*self._pools, 1], dtype=torch.int64, device=device),
                len(self._pools),
                shared[_LINE:],
                shared,
            )
        self.counts = moved(self.counts, self._pools, n_steps)
        return tokens, shared[:1]


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


def macros(phases: list[Phase], vocabulary: int, blocks: int) -> dict[str, int]:
    """What stretch.cu is compiled with: no more than these phases need, since a phase is as fast as one warp is."""
    longest = max(max(phase.cols, phase.held_cols) for phase in phases)
    states = max(phase.n_states for phase in phases)
    single = max(phase.rows for phase in phases) <= blocks * _THREADS // 32
    alike = {bool(phase.flags & COMPLEX) for phase in phases if phase.n_states}
    return {
        "THREADS": _THREADS if single else _MANY_THREADS,
        "PIECES": -(-longest // 128),
        "HELD": -(-max(1, states) // 32),
        "CHOICES": -(-vocabulary // 32),
        "KINDS": functools.reduce(operator.or_, (1 << phase.kind for phase in phases)),
        "FLAGS": functools.reduce(operator.or_, (phase.flags for phase in phases)),
        "COMPLEX_STATES": 2 if len(alike) > 1 else int(True in alike),
        "BIASED": int(any(phase.bias is not None for phase in phases)),
        "POOLED": int(any(phase.pool >= 0 for phase in phases)),
        "SINGLE": int(single),
    }


@functools.cache
def _kernel(settings: tuple[tuple[str, int], ...], device: int, phases: int) -> nvrtc.Kernel:
    shared = phases * len(Phase._fields) * 8
    macros = dict(settings)
    return nvrtc.kernel((FILE,), "stretch", macros, macros["THREADS"], shared, device, cooperative=True)
