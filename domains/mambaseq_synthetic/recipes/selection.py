"""Which of dt, B and C has to be selective for selective copying: Table 7 of the Mamba paper (Gu and Dao,
arXiv:2312.00752, section 4.6.1) on the task of its Table 1.

The paper's Table 7 is of language models, where small ones differ little (the recipe `ablations`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mambaseq.models import causal_lm
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table
from mambaseq_synthetic.recipes.selective_copying import LR, VOCABULARY, taught

# The paper's perplexity on the Pile, and what is wanted of the accuracy.
LINES: dict[str, tuple[str, tuple[Bound, ...]]] = {
    "none": ("10.93", (Bound("accuracy", "<=", 0.6),)),
    "B": ("10.15", ()),
    "C": ("9.98", ()),
    "dt": ("9.81", ()),
    "dt and B": ("", ()),
    "dt and C": ("", ()),
    "B and C": ("", ()),
    "dt, B and C": ("8.71", (Bound("accuracy", ">=", 0.99),)),
}


def run(context: Context) -> list[Table]:
    lengths = context.at(full=(64, 256), small=(32, 64), tiny=(16, 32))
    n_data = context.at(full=16, small=8, tiny=4)
    steps = context.at(full=4_000, small=1_000, tiny=2)
    batch_size = context.at(full=64, small=16, tiny=2)

    def trial(name: str, seed: int, checkpoint: Path) -> dict[str, float]:
        torch.manual_seed(seed)
        selective = name.replace(",", "").split()
        options: dict[str, Any] = {f"selective_{parameter}": parameter in selective for parameter in ("dt", "B", "C")}
        model = causal_lm(VOCABULARY, 64, 2, "mamba", **options).to(context.device)
        found = taught(context, name, model, seed, checkpoint, lengths, n_data, steps, batch_size)
        return {key: found[key] for key in ("accuracy", "whole", "parameters", "steps")}

    lines = []
    for name in context.wanted(LINES):
        values = context.over_seeds(
            f"{name} steps={steps} a length",
            lambda seed, checkpoint, name=name: trial(name, seed, checkpoint),  # type: ignore[misc]
        )
        lines.append(Line(name, values, *LINES[name]))
    columns = [
        Column("accuracy", "accuracy", 1, percent=True),
        Column("whole", "whole sequences", 1, percent=True),
        Column("parameters", "parameters", 0),
        Column("steps", "steps", 0),
    ]
    about = (
        "Mamba, of whose dt, B and C these are selective, the others learned constants. Share of the "
        f"{n_data} data tokens that are given back rightly after {lengths[-1]:,} tokens, and of sequences without an "
        f"error. Two layers, d_model 64, batches of {batch_size}, trained at the lengths "
        f"{' and '.join(f'{n:,}' for n in lengths)} one after the other, AdamW, learning rate {LR:g} with warm-up and "
        f"cosine at each, until the whole validation set is right or {steps:,} steps are done. The paper's column: "
        "perplexity a token on the Pile, of models of about 350 M parameters."
    )
    return [Table("Selective copying by what is selective", about, columns, lines)]


recipe = Recipe(run, seeds=3)
