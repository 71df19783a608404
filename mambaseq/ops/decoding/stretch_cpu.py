"""Many positions of some sequences by one kernel on a CPU: the phases of `stretch.py`. For a small model, calling
PyTorch's operators takes many times longer than what they do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaseq.ops.cpu.threads import share
from mambaseq.ops.decoding.stretch import COMPLEX, SCAN, Phase, moved

_LITTLE = 2**18  # weights that are much smaller than a core's cache


class StretchOnCPU:
    """Steps of a model as phases.

    Each sequence is computed by itself, in the same way however many there are; threads share the sequences.

    Args:
        phases: see `Stretch`; their own tensors (`stretch.OWN`) have the sequence first.
        embedding, counts, pools: see there. condition: `(batch, d_model)` float32 or None.
        logits: `(batch, room)` float32.
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
        self._kernels: Any = importlib.import_module("mambaseq.ops.decoding.stretch_kernels")
        self.counts, self._pools = counts, pools
        self._embedding = embedding.numpy()
        self._batch = len(logits)
        self._has_condition = condition is not None
        self._condition = np.zeros((1, 1), dtype=np.float32) if condition is None else condition.numpy()
        self._logits = logits
        self._states: list[tuple[Tensor, Tensor, bool]] = []  # of a phase, and the planes that the kernel changes
        self._phases = [self._in_planes(phase) for phase in phases]  # what the program points to must stay
        self._program = np.array([self._words(phase) for phase in self._phases], dtype=np.int64)
        self._eps = np.array([phase.eps for phase in phases], dtype=np.float32)
        # Small weights stay in a core's cache while one sequence takes all its steps, and its states, too. Larger ones
        # are read once for all sequences.
        read = sum(phase.weight.numel() for phase in phases if phase.weight is not None)
        self._at_once = 1 if read < _LITTLE else self._batch
        self._widest = max(phase.rows for phase in phases)

    def run(
        self,
        token: Tensor,
        n_steps: int,
        temperature: float,
        uniforms: Tensor | None,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Take a token `(batch,)` int64 of each sequence and `n_steps` steps, each step's token drawn of what it makes:
        by a number of `uniforms` `(batch, n_steps)` float64 in [0, 1), or, if None, the likeliest.

        Returns the tokens `(batch, n_steps)` int64, and whether some logits were no finite numbers `(1,)` int32.
        """
        tokens = np.empty((self._batch, n_steps), dtype=np.int64)
        failed = np.zeros(self._batch, dtype=np.int32)
        numbers = np.zeros((self._batch, n_steps)) if uniforms is None else uniforms.contiguous().numpy()
        for state, planes, is_complex in self._states:
            planes.copy_(_planes(state, is_complex))
        arguments = (
            self._program,
            self._eps,
            self._widest,
            self._embedding,
            self._condition,
            self._has_condition,
            self._logits.data_ptr(),
            self._logits.shape[1],
            np.array(self.counts, dtype=np.int64),
            np.array(self._pools, dtype=np.int64),
        )
        rest = (
            0.0 if uniforms is None else temperature,
            top_k,
            top_p,
            numbers,
            token.contiguous().numpy(),
            tokens,
            failed,
        )

        def make_worker() -> Callable[[int, int], None]:
            def work(first: int, last: int) -> None:
                for one in range(first, last, self._at_once):
                    self._kernels.stretch(*arguments, one, min(one + self._at_once, last), *rest)

            return work

        share(self._batch, make_worker, portions=1)
        for state, planes, is_complex in self._states:
            state.copy_(_from_planes(planes, is_complex))
        self.counts = moved(self.counts, self._pools, n_steps)
        return torch.from_numpy(tokens), torch.from_numpy(failed.max(keepdims=True))

    def _in_planes(self, phase: Phase) -> Phase:
        if not phase.n_states:
            return phase
        assert phase.state is not None
        is_complex = bool(phase.flags & COMPLEX)
        planes = _planes(phase.state, is_complex)
        self._states.append((phase.state, planes, is_complex))
        names = ("a",) if phase.kind == SCAN else ("a", "b", "c")
        more: dict[str, Any] = {name: _planes(getattr(phase, name), is_complex, of_sequences=False) for name in names}
        return phase._replace(state=planes, **more)

    def _words(self, phase: Phase) -> list[int]:
        """A row of the program: numbers, addresses, and how far the sequences' own tensors are apart, in bytes."""
        kernels = self._kernels
        words = [getattr(phase, name) for name in kernels.NUMBERS]
        own = [getattr(phase, name) for name in kernels.OWN]
        for value in (*(getattr(phase, name) for name in kernels.SHARED), *own):
            words.append(0 if value is None else value.data_ptr())
        return words + [0 if value is None else value.stride(0) * value.element_size() for value in own]


def _planes(value: Tensor, is_complex: bool, of_sequences: bool = True) -> Tensor:
    """`(batch, channels, d_state[, 2])` to `(batch, parts, d_state, channels)`, a contiguous copy; without batch if the
    value has none."""
    value = value if of_sequences else value[None]
    planes = value.permute(0, 3, 2, 1) if is_complex else value.transpose(1, 2)[:, None]
    planes = planes.clone(memory_format=torch.contiguous_format)
    return planes if of_sequences else planes[0]


def _from_planes(planes: Tensor, is_complex: bool) -> Tensor:
    return planes.permute(0, 3, 2, 1) if is_complex else planes[:, 0].transpose(1, 2)
