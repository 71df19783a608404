"""Selective copying (Gu and Dao, arXiv:2312.00752, section 4.1.1, Table 1): selection is what it takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mambaseq.models import SequenceModel, causal_lm
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import drawn
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_synthetic.drawing import TEST, VALIDATION
from mambaseq_synthetic.selective_copying import draw

VOCABULARY = 16
LR = 2e-3
# Mixer, options, accuracy in the paper and what is wanted of ours.
MODELS: dict[str, tuple[str, dict, str, tuple[Bound, ...]]] = {
    "mamba": ("mamba", {}, "99.8 %", (Bound("accuracy", ">=", 0.99),)),
    "mamba, lti": ("mamba", {"lti": True}, "56.4 % (Mamba with S4)", (Bound("accuracy", "<=", 0.6),)),
    "h3": ("h3", {}, "57.0 % (H3 with S4)", ()),
    "s4d": ("s4d", {}, "18.3 % (S4, no gate)", ()),
}


def run(context: Context) -> list[Table]:
    lengths = context.at(full=(64, 256, 1024, 4096), small=(32, 64, 128), tiny=(16, 32))
    n_data = context.at(full=16, small=8, tiny=4)
    steps = context.at(full=4_000, small=1_000, tiny=2)
    batch_size = context.at(full=64, small=16, tiny=2)

    def trial(name: str, seed: int, checkpoint: Path) -> dict[str, float]:
        torch.manual_seed(seed)
        mixer, options, _, _ = MODELS[name]
        model = causal_lm(VOCABULARY, 64, 2, mixer, **options).to(context.device)
        return taught(context, name, model, seed, checkpoint, lengths, n_data, steps, batch_size)

    lines = []
    for name in context.wanted(MODELS):
        _, _, paper, wanted = MODELS[name]
        seeds = context.seeds if wanted else context.seeds[:1]
        values = dataclasses.replace(context, seeds=seeds).over_seeds(
            f"{name} steps={steps} a length",
            lambda seed, checkpoint, name=name: trial(name, seed, checkpoint),  # type: ignore[misc]
        )
        lines.append(Line(name, values, paper, wanted))
    columns = [
        Column("accuracy", "accuracy", 1, percent=True),
        Column("whole", "whole sequences", 1, percent=True),
        Column("parameters", "parameters", 0),
        Column("steps", "steps", 0),
        Column("minutes", "minutes", 1),
    ]
    alone = context.at(
        full="at 4,096 alone Mamba had learned nothing after 12,000 steps (the paper takes 400,000 there); ",
        small="",
        tiny="",
    )
    about = (
        f"Share of the {n_data} data tokens that are given back rightly after {lengths[-1]:,} tokens, and of sequences "
        f"without an error. Two layers, d_model 64, batches of {batch_size}, trained at the lengths "
        f"{', '.join(f'{n:,}' for n in lengths)} one after the other; {alone}"
        f"AdamW, learning rate {LR:g} with warm-up and cosine at each, until the whole validation set is right or "
        f"{steps:,} steps are done. Of H3 and S4D one seed."
    )
    return [Table("Selective copying", about, columns, lines)]


def taught(
    context: Context,
    name: str,
    model: SequenceModel,
    seed: int,
    checkpoint: Path,
    lengths: tuple[int, ...],
    n_data: int,
    steps: int,
    batch_size: int,
) -> dict[str, float]:
    """Train a model at one length after the other. Returns what it is right on at the last, its size and its costs."""
    config = OptimizerConfig(lr=LR, weight_decay=0.0, beta2=0.999, warmup_steps=min(200, steps // 2))
    taken, seconds = 0, 0.0
    for phase, length in enumerate(lengths):
        draw_these = functools.partial(draw, length=length, n_data=n_data, vocab_size=VOCABULARY)
        trained = train(
            model,
            drawn(draw_these, batch_size, seed * len(lengths) + phase),  # answers of its own at each length
            steps,
            config,
            checkpoint=checkpoint.with_suffix(f".{length}.pt"),
            finished=lambda these=draw_these: accuracy(model, these, VALIDATION, 256, batch_size)["accuracy"] == 1,  # type: ignore[misc]
            check_every=250,
            label=f"{name} at {length}",
        )
        taken, seconds = taken + trained.steps, seconds + trained.seconds
    n_test = context.at(full=1024, small=256, tiny=8)
    found = accuracy(model, draw_these, TEST, n_test, batch_size)
    return {**found, "parameters": model.n_parameters(), "steps": taken, "minutes": seconds / 60}


@torch.no_grad()
def accuracy(
    model: SequenceModel, draw: Callable[[int, Tensor], tuple[Tensor, Tensor]], seed: int, n: int, batch_size: int
) -> dict[str, float]:
    """Of the data tokens, and of whole sequences, of the first n sequences of a set."""
    device = next(model.parameters()).device
    tokens: list[Tensor] = []
    for items in torch.arange(n, device=device).split(batch_size):
        inputs, labels = draw(seed, items)
        logits = model(inputs).logits
        assert logits is not None
        asked = labels != -100
        tokens.append((logits.argmax(-1) == labels)[asked].view(len(items), -1))
    right = torch.cat(tokens)
    return {"accuracy": float(right.float().mean()), "whole": float(right.all(1).float().mean())}


recipe = Recipe(run, seeds=3)
