"""Recall of many keys (MQAR: Arora et al., arXiv:2312.04927, figure 2) by the size of the model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from mambaseq.models import SequenceModel, causal_lm
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import drawn
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_synthetic.drawing import TEST, VALIDATION
from mambaseq_synthetic.recall import draw

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {"d_state": 16}),
    "mamba3": ("mamba3", {"d_state": 16}),
    "gated_delta": ("gated_delta", {}),
    "kda": ("kda", {}),
    "gla": ("gla", {}),
    "attention": ("attention", {}),
}
LR = 1e-3


def run(context: Context) -> list[Table]:
    widths = context.at(full=(32, 64, 128), small=(16, 32), tiny=(8,))
    length, n_pairs, vocabulary = context.at(full=(512, 64, 8192), small=(64, 8, 64), tiny=(16, 4, 16))
    steps = context.at(full=20_000, small=500, tiny=2)
    batch_size = context.at(full=64, small=32, tiny=2)
    these = functools.partial(draw, length=length, n_pairs=n_pairs, vocab_size=vocabulary)

    def trial(name: str, width: int, seed: int, checkpoint: Path) -> dict[str, float]:
        torch.manual_seed(seed)
        mixer, options = MODELS[name]
        model = causal_lm(vocabulary, width, 2, mixer, **options).to(context.device)
        config = OptimizerConfig(lr=LR, weight_decay=0.1, warmup_steps=min(500, steps // 2))
        train(
            model,
            drawn(these, batch_size, seed),
            steps,
            config,
            checkpoint=checkpoint,
            finished=lambda: accuracy(model, these, VALIDATION, 256, batch_size) > 0.999,
            check_every=500,
            label=f"{name}, d_model {width}",
        )
        n_test = context.at(full=1024, small=128, tiny=4)
        states = sum(M.numel() for state in model.init_state(1, max_length=length) for M in state.tensors().values())
        return {
            _key(width): accuracy(model, these, TEST, n_test, batch_size),
            f"state at {width}": float(states),
        }

    lines = []
    for name in context.wanted(MODELS):
        values: dict[str, list[float]] = {}
        for width in widths:
            values |= context.over_seeds(
                f"{name} width={width} steps={steps}",
                lambda seed, checkpoint, name=name, width=width: trial(name, width, seed, checkpoint),  # type: ignore[misc]
            )
        wanted = (Bound(_key(widths[-1]), ">=", 0.99),) if name in ("gated_delta", "kda", "attention") else ()
        lines.append(Line(name, values, "", wanted))
    columns = [Column(_key(width), f"d_model {width}", 1, percent=True) for width in widths]
    columns += [Column(f"state at {width}", f"numbers in the state at {width}", 0) for width in widths]
    about = (
        f"Share of {n_pairs} values that are told rightly for their keys, in {length} tokens of a vocabulary of "
        f"{vocabulary:,}. Two layers; mixers with their default options and states of 16 in Mamba's, an MLP behind "
        f"those whose published block has one. Batches of {batch_size}, AdamW, learning rate {LR:g} with warm-up and "
        f"cosine, none tuned, until validation sequences are right or {steps:,} steps are done."
    )
    return [Table("Recall of many keys", about, columns, lines)]


def _key(width: int) -> str:
    return f"accuracy at {width}"


@torch.no_grad()
def accuracy(model: SequenceModel, draw: functools.partial, seed: int, n: int, batch_size: int) -> float:
    """Of the values that are asked for in the first n sequences of a set."""
    device, right, asked = next(model.parameters()).device, 0, 0
    for items in torch.arange(n, device=device).split(batch_size):
        inputs, labels = draw(seed, items)
        logits = model(inputs).logits
        assert logits is not None
        right += int((logits.argmax(-1) == labels).sum())  # no token is -100
        asked += int((labels != -100).sum())
    return right / asked


recipe = Recipe(run, seeds=3)
