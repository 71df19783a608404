"""Recall of many keys (MQAR: Arora et al., arXiv:2312.04927, figure 2) by the size of the model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from mambaseq.heads.lm import LMHead
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.reproduction import FINISHED, Bound, Column, Context, Line, Recipe, Table, train
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
WIDTHS = {"full": (32, 64, 128), "small": (16, 32), "tiny": (8,)}
_RATE = 0.16  # over the width: at 5e-3 attention tells which of two values at width 32, at 128 it guesses
_AT_ONCE = 64  # sequences


def run(context: Context) -> list[Table]:
    widths = context.at(**WIDTHS)
    vocabulary = context.at(full=8192, small=64, tiny=16)
    pairs = context.at(full=(2, 4, 8, 16, 32, 64), small=(2, 4, 8), tiny=(4,))
    spread = context.at(full=8, small=8, tiny=4)  # tokens of a sequence to a pair
    steps = context.at(full=(3_000, 800, 500, 500, 500, 1_500), small=(1_500, 400, 400), tiny=(2,))
    tokens = context.at(full=2**14, small=2**11, tiny=32)  # of a batch
    n_pairs, length = pairs[-1], spread * pairs[-1]

    def trial(name: str, width: int, seed: int, checkpoint: Path) -> dict[str, float]:
        torch.manual_seed(seed)
        mixer, options = MODELS[name]
        model = causal_lm(vocabulary, width, 2, mixer, **options).to(context.device)
        taken = 0
        for phase, (n, most) in enumerate(zip(pairs, steps, strict=True)):
            assert isinstance(model.head, LMHead)
            model.head.most_labels = n
            these = functools.partial(draw, length=spread * n, n_pairs=n, vocab_size=vocabulary)
            size = tokens // (spread * n)
            enough = 0.999 if n == n_pairs else 0.99
            taken += train(
                model,
                drawn(these, size, seed * len(pairs) + phase),
                most,
                OptimizerConfig(lr=_RATE / width, weight_decay=0.0, warmup_steps=min(200, most // 2)),
                checkpoint=checkpoint.with_suffix(f".{n}.pt"),
                finished=lambda these=these, n=2048 // n, enough=enough: (  # type: ignore[misc]
                    accuracy(model, these, VALIDATION, n) > enough
                ),
                check_every=context.at(full=100, small=50, tiny=1),
                label=f"{name}, d_model {width}, {n} pairs",
            ).steps
        states = sum(M.numel() for state in model.init_state(1, max_length=length) for M in state.tensors().values())
        return {
            _key(width): accuracy(model, these, TEST, context.at(full=1024, small=128, tiny=4)),
            f"state at {width}": float(states),
            f"steps at {width}": float(taken),
        }

    of_width = {f"d_model {width}": width for width in widths}
    chosen = [of_width[name] for name in context.wanted(of_width, [*MODELS, FINISHED])]
    lines = []
    for name in context.wanted(MODELS, [*of_width, FINISHED]):
        values: dict[str, list[float]] = {}
        for width in chosen:
            values |= context.over_seeds(
                f"{name} width={width}",
                lambda seed, checkpoint, name=name, width=width: trial(name, width, seed, checkpoint),  # type: ignore[misc]
            )
        told = widths[-1] in chosen and name in ("gated_delta", "kda", "attention")
        wanted = (Bound(_key(widths[-1]), ">=", 0.99),) if told else ()
        lines.append(Line(name, values, "", wanted, context.note(values)))
    columns = [Column(_key(width), f"d_model {width}", 1, percent=True) for width in chosen]
    columns += [Column(f"state at {width}", f"numbers in the state at {width}", 0) for width in chosen]
    columns += [Column(f"steps at {width}", f"steps at {width}", 0) for width in chosen]
    about = (
        f"Share of {n_pairs} values that are told rightly for their keys, in {length} tokens of a vocabulary of "
        f"{vocabulary:,}. Two layers; mixers with their default options and states of 16 in Mamba's, an MLP behind "
        f"those whose published block has one. Trained with {', '.join(map(str, pairs))} pairs one after the other, in "
        f"{spread} times as many tokens, batches of {tokens:,} tokens, AdamW, learning rate {_RATE:g} / d_model with "
        "warm-up and cosine at each, the same for all mixers, until 99 % of the values of validation sequences are "
        f"right, of the last 99.9 %, or {', '.join(f'{n:,}' for n in steps)} steps are done, whatever was learned."
    )
    return [Table("Recall of many keys", about, columns, lines)]


def _key(width: int) -> str:
    return f"accuracy at {width}"


@torch.no_grad()
def accuracy(model: SequenceModel, draw: functools.partial, seed: int, n: int) -> float:
    """Of the values that are asked for in the first n sequences of a set. Logits are computed of these alone."""
    device, right, asked = next(model.parameters()).device, 0, 0
    for items in torch.arange(n, device=device).split(_AT_ONCE):
        inputs, labels = draw(seed, items)
        where = labels != -100
        hidden = model.backbone(model.encoder(inputs))[where]
        right += int((model.told(hidden[:, None])[:, 0].argmax(-1) == labels[where]).sum())
        asked += len(hidden)
    return right / asked


recipe = Recipe(run, seeds=3)
