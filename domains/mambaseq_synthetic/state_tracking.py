"""Tasks whose answer is the state of a small machine that the tokens drive: parity, modular arithmetic, permutations.

Which of them a recurrence can learn follows from its eigenvalues: parity needs negative or complex ones, S5 products of
matrices that do not commute (Merrill et al., arXiv:2404.08819; Grazzi et al., arXiv:2411.12537).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.data.drawing import below, words
from mambaseq.errors import ConfigError, shown
from mambaseq_synthetic.drawing import DrawnAtLengths, check_sets

Task = Literal["parity", "modular", "permutations"]
_MOST = {"modular": 512, "permutations": 5}  # of 6, tables would have half a million entries
SIZES = {"parity": 2, "modular": 5, "permutations": 5}
"""What is published: bits, numbers modulo 5, permutations of 5."""


@functools.cache
def machine(task: Task, size: int, device: torch.device | None = None) -> Tensor:
    """`(tokens, states)` int64, not to be changed: the state after each token in each state; all begin in state 0.

    parity: a token is a bit, the state the sum of all modulo 2. modular: a token adds, subtracts or multiplies by a
    number modulo `size`, of size tokens each, in this order. permutations: a token permutes `size` things, and the
    state is how they lie, both numbered in lexicographic order: S5 for 5.

    >>> machine("parity", 2).tolist(), machine("modular", 3)[3 + 1].tolist()
    ([[0, 1], [1, 0]], [2, 0, 1])
    >>> machine("permutations", 3)[4].tolist()
    [4, 2, 5, 0, 3, 1]
    """
    if device is not None:  # kept there, so that a CUDA graph can draw
        return machine(task, size).to(device)
    with torch.device("cpu"):  # whatever the default device of who asks first
        if task == "parity":
            return torch.tensor([[0, 1], [1, 0]])
        if task == "modular":
            number, by = torch.arange(size), torch.arange(size)[:, None]
            return torch.cat([number + by, number - by, number * by]).remainder(size)
        all_ = list(itertools.permutations(range(size)))
        number_of = {permutation: number for number, permutation in enumerate(all_)}
        return torch.tensor([[number_of[tuple(state[i] for i in token)] for state in all_] for token in all_])


def draw(seed: int, items: Tensor, *, task: Task = "parity", size: int = 2, length: int = 256) -> tuple[Tensor, Tensor]:
    """Random tokens, and at each position the state behind it.

    items: `(items,)` int64 on any device, the numbers of the sequences; sequence i depends only on (seed, i). Returns
        inputs and labels, `(items, length)` int64 each.

    >>> inputs, labels = draw(0, torch.tensor([0]), length=8)
    >>> inputs.tolist(), labels.tolist()
    ([[1, 0, 0, 1, 0, 0, 0, 1]], [[1, 1, 1, 0, 0, 0, 0, 1]])
    """
    table = machine(task, size, items.device)
    inputs = below(words(seed, items, length), len(table))
    # on a GPU it is the number of kernels that takes time: three roots of the length in place of all of it
    return inputs, states(table, inputs, length if items.device.type == "cpu" else math.isqrt(length))


def states(table: Tensor, inputs: Tensor, stretch: int) -> Tensor:
    """The state after each token of inputs `(items, length)`, of the same shape and dtype, by the table of `machine`.

    stretch: positions that are run one after the other, all such stretches at once: first from every state, which tells
        what each stretch makes of a state, then from the one that it begins in.
    """
    n, length = inputs.shape
    padded = F.pad(inputs, (0, -length % stretch)).unflatten(1, (-1, stretch))  # (items, stretches, stretch)
    first = [inputs.new_zeros(n)]
    if padded.shape[1] > 1:
        after = torch.arange(table.shape[1], device=inputs.device).expand(*padded.shape[:2], -1)
        for token in padded.unbind(2):
            after = table[token[..., None], after]
        for one in after[:, :-1].unbind(1):
            first.append(one.gather(1, first[-1][:, None])[:, 0])
    state, found = torch.stack(first, 1), []
    for token in padded.unbind(2):
        state = table[token, state]
        found.append(state)
    return torch.stack(found, 2).flatten(1)[:, :length]


class StateTrackingData(DrawnAtLengths):
    """Which state is a machine in, after each token? Trained at one length and tested at many; the metric
    `synthetic/accuracy_by_length` reports each.

    Args:
        task: parity of bits; modular: numbers added, subtracted or multiplied, modulo `size`; permutations of `size`
            things.
        size: numbers, or things that are permuted; None for what is published: 5.
        length: tokens of a training and validation sequence.
        test_lengths: lengths of the test sequences; `length` alone if not given.
        samples_per_epoch: training sequences that make an epoch.
        n_validation: validation sequences.
        n_test: test sequences of each length. A multiple of the batch size keeps lengths apart, so nothing is padded.
        seed: of the training sequences; validation and test sequences are the same for any seed.
    """

    def __init__(
        self,
        task: Task = "parity",
        size: int | None = None,
        length: int = 256,
        test_lengths: list[int] | None = None,
        samples_per_epoch: int = 65536,
        n_validation: int = 512,
        n_test: int = 512,
        seed: int = 0,
    ) -> None:
        if task not in SIZES:
            raise ConfigError(f"data.task must be parity, modular or permutations, not {shown(task)}.")
        size = SIZES[task] if size is None else size
        most = _MOST.get(task, 2)
        if not 2 <= size <= most:
            raise ConfigError(
                f"data.size must be {'2' if most == 2 else f'from 2 to {most}'} for data.task {task}, not {size}; "
                f"leave it out for {SIZES[task]}."
            )
        self.test_lengths = [length] if test_lengths is None else test_lengths
        if not self.test_lengths or min(length, *self.test_lengths) < 1:
            raise ConfigError(
                f"data.length and data.test_lengths must be at least 1, not {length} and {self.test_lengths}."
            )
        self.vocab_size = max(machine(task, size).shape)
        check_sets(seed, samples_per_epoch, n_validation, n_test, max(length, *self.test_lengths), self.vocab_size)
        self.length, self.seed = length, seed
        self.samples_per_epoch, self.n_validation, self.n_test = samples_per_epoch, n_validation, n_test
        self._draw = functools.partial(draw, task=task, size=size)
