"""State tracking by mixers of positive, negative and complex eigenvalues: parity, modular arithmetic, S5.

Of which a recurrence is capable: Grazzi et al., arXiv:2411.12537 (negative eigenvalues); Mamba-3, arXiv:2603.15569,
section 4.2 (complex ones).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.models import SequenceModel, causal_lm
from mambaseq.reproduction import FINISHED, Bound, Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import drawn
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_synthetic.drawing import TEST, VALIDATION
from mambaseq_synthetic.state_tracking import SIZES, Task, draw, machine

# 16 states take a few hundred training steps where 64 take many more. Mamba-3 turns by at most pi times its step size:
# half a turn, which parity is, needs steps of 1, and from a tenth of that at most, the default, it comes there late.
_MAMBA = {"d_state": 16, "dt_min": 0.1, "dt_max": 2.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", _MAMBA),
    "mamba3": ("mamba3", _MAMBA),
    "gated_delta": ("gated_delta", {}),
    "gated_delta, negative": ("gated_delta", {"negative_eigenvalues": True}),
    "kda, negative": ("kda", {"negative_eigenvalues": True}),
}
TASKS: dict[Task, str] = {
    "parity": "Parity of bits",
    "modular": "Addition, subtraction and multiplication modulo 5, from left to right",
    "permutations": "Products of permutations of 5 things (S5)",
}
# arXiv:2603.15569, performance on formal languages, scaled so that 0 is chance; arithmetic is that "w/o brackets"
_PAPER: dict[tuple[str, Task], str] = {
    ("mamba2", "parity"): "0.9",
    ("mamba2", "modular"): "47.8",
    ("mamba3", "parity"): "100",
    ("mamba3", "modular"): "98.5",
    ("gated_delta, negative", "parity"): "100",
    ("gated_delta, negative", "modular"): "99.3",
}
# what must be: those of negative or complex eigenvalues keep the parity at the length that they have learned
_SOLVE, _FAIL = ("mamba3", "gated_delta, negative", "kda, negative"), ("mamba2", "gated_delta")
# an angle adds up, so a length needs it as many times more exactly: at a rate that stays, Mamba-3 loses at the next
# length what it had learned in one or two of three seeds; a mean of the last hundred steps is nearer than each of them
_ADD_UP = ("mamba2", "mamba3")
_TOKENS = 2**18  # that are read at once: several trainings share a GPU's memory


def run(context: Context) -> list[Table]:
    learned = context.at(full=(8, 16, 32, 64, 128, 256), small=(8, 16, 32, 64), tiny=(8,))
    lengths = [learned[-1] * 4**k for k in range(context.at(full=5, small=3, tiny=2))]
    tested = {length: context.at(full=256 if length <= 2**12 else 64, small=64, tiny=4) for length in lengths}
    # of the first length, those between and the last
    first, steps, last = context.at(full=(2_000, 800, 2_000), small=(400, 400, 400), tiny=(2, 2, 2))
    # a length is learned once so many validation sequences, so many times as long, are right; of the last length, too
    checked = context.at(full=64, small=256, tiny=4)
    beyond, last_beyond = context.at(full=(2, 16), small=(4, 4), tiny=(2, 2))
    batch_size = context.at(full=64, small=32, tiny=2)
    lr = context.at(full=1e-3, small=4e-3, tiny=4e-3)
    layers, d_model = context.at(full=(2, 128), small=(1, 64), tiny=(1, 8))

    def trial(name: str, task: Task, seed: int, checkpoint: Path) -> dict[str, float]:
        torch.manual_seed(seed)
        mixer, options = MODELS[name]
        these = functools.partial(draw, task=task, size=SIZES[task])
        model = causal_lm(max(machine(task, SIZES[task]).shape), d_model, layers, mixer, **options).to(context.device)
        taken = 0
        for phase, length in enumerate(learned):
            far = (last_beyond if length == learned[-1] else beyond) * length
            most = last if length == learned[-1] else steps if phase else first
            rate, average = (lr * (learned[0] / length) ** 0.5, 0.99) if name in _ADD_UP else (lr, 0.0)
            taken += train(
                model,
                drawn(functools.partial(these, length=length), batch_size, seed * len(learned) + phase),
                most,
                OptimizerConfig(lr=rate, weight_decay=0.0, beta2=0.999, warmup_steps=min(100, most // 2)),
                checkpoint=checkpoint.with_suffix(f".{length}.pt"),
                finished=lambda far=far: accuracy(model, these, VALIDATION, far, checked) == 1,  # type: ignore[misc]
                check_every=context.at(full=100, small=100, tiny=1),
                average=average,
                label=f"{name}, {task} at {length}",
            ).steps
        found = {_key(length): accuracy(model, these, TEST, length, n) for length, n in tested.items()}
        return {**found, "parameters": model.n_parameters(), "steps": taken}

    columns = [
        *(Column(_key(length), f"{length:,}", 1, percent=True) for length in tested),
        Column("parameters", "parameters", 0),
        Column("steps", "steps", 0),
    ]
    about = (
        "Share of states that are told rightly in the second half of test sequences of each length "
        f"({_counts(tested)}), scaled so that 0 is the share of the most frequent one and 100 all. Layers: {layers}, "
        f"of d_model {d_model}; batches of {batch_size}, trained at the lengths {', '.join(map(str, learned))} one "
        f"after the other, every position's state a target; AdamW, learning rate {lr:g} with warm-up and cosine at "
        f"each (in Mamba-2 and -3 times the root of {learned[0]} over the length, weights averaged by 0.99), until "
        f"{checked} validation sequences {beyond} times as long are right or {first:,} steps are done, {steps:,} from "
        f"the second on; at the last, until those {last_beyond} times as long are right or {last:,} steps are done. "
        f"Step sizes of Mamba-2 and -3 begin between {_MAMBA['dt_min']} and {_MAMBA['dt_max']}. Longer "
        "sequences are read in pieces, the state handed on. The paper's figures, in percent, are each the best of 16 "
        "settings, trained at up to 160 tokens and tested at 256, with multiplication before addition."
    )
    tables = []
    names = context.wanted(MODELS, [*TASKS, FINISHED])
    tasks: list[Any] = context.wanted(TASKS, [*MODELS, FINISHED])
    for task in tasks:
        lines = []
        for name in names:
            values = context.over_seeds(
                f"{name} {task}",
                lambda seed, checkpoint, name=name, task=task: trial(name, task, seed, checkpoint),  # type: ignore[misc]
            )
            wanted = _wanted(name, learned[-1]) if task == "parity" else ()
            lines.append(Line(name, values, _PAPER.get((name, task), ""), wanted, context.note(values)))
        tables.append(Table(TASKS[task], about, columns, lines))
    return tables


def _counts(tested: dict[int, int]) -> str:
    """How many sequences of which lengths: "256, from 16,384 on 64"."""
    first, *others = tested.items()
    fewer = next((f", from {length:,} on {n}" for length, n in others if n < first[1]), "")
    return f"{first[1]}{fewer}"


def _key(length: int) -> str:
    return f"accuracy at {length}"


def _wanted(name: str, length: int) -> tuple[Bound, ...]:
    if name in _SOLVE:
        return (Bound(_key(length), ">=", 0.99),)
    return (Bound(_key(length), "<=", 0.2),) if name in _FAIL else ()


@torch.no_grad()
def accuracy(model: SequenceModel, draw: Callable[..., tuple[Tensor, Tensor]], seed: int, length: int, n: int) -> float:
    """Of the states in the second half of the first n sequences of a set, 0 for chance and 1 for all."""
    device = next(model.parameters()).device
    inputs, labels = draw(seed, torch.arange(n, device=device), length=length)
    piece = max(1, _TOKENS // n)
    right, state = [], None
    for part, targets in zip(inputs.split(piece, dim=1), labels.split(piece, dim=1), strict=True):
        output = model(part, state=state, return_state=True)
        state = output.state
        right.append(output.logits.argmax(-1) == targets)
    late = labels[:, length // 2 :]
    chance = float(torch.bincount(late.flatten()).max()) / late.numel()
    found = float(torch.cat(right, dim=1)[:, length // 2 :].double().mean())
    return (found - chance) / (1 - chance)


recipe = Recipe(run, seeds=3)
