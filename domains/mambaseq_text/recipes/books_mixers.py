"""The mixers of today on the novels of `books`: Mamba-1 to -3, delta rules, hybrids, a Transformer; one size, the same
bytes in the same order, rates of their own, several seeds; and whether they come in the published order."""

from __future__ import annotations

import itertools
import statistics

from mambaseq.reproduction import Column, Context, Line, Recipe, Table
from mambaseq_text.recipes import shelf
from mambaseq_text.recipes.books import COLUMNS, CONTENDERS, SPEED, TODAY, Shelf, about_training, draw, line_of
from mambaseq_text.recipes.shelf import Texts
from mambaseq_text.tokenization import TextTokenizer

NAMES = (*CONTENDERS, *TODAY)
# Average accuracy of downstream tasks, models of 1.3 B parameters
PUBLISHED = {"Mamba-3, rank 4": 52.39, "KDA": 52.28, "gated delta": 52.07, "Mamba-2": 51.82}
# as many curves as can be told apart
PICTURES = {
    "books_mixers.svg": ("Mamba", "Mamba-2", "Mamba-3", "gated delta", "KDA", "Transformer++"),
    "books_hybrids.svg": ("Mamba-2", "hybrid", "Mamba-3", "Mamba-3, rank 4", "gated delta", "gated delta hybrid"),
}


def run(context: Context) -> list[Table]:
    return tables(context, Texts.read(shelf.unpacked(context)))


def tables(context: Context, texts: Texts) -> list[Table]:
    """The recipe on any books."""
    names = context.wanted(NAMES, [SPEED])
    of = Shelf(context, texts, _no_pieces)
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        rate = of.rate(name)
        for seed in context.seeds:
            for key, value in of.learned(name, rate, seed).items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
    speeds = {name: of.speed(name) for name in names} if not context.only or SPEED in context.only else {}
    made = [line_of(name, found[name], of, speeds.get(name)) for name in names]
    for line in made:
        line.paper = f"{PUBLISHED[line.name]}" if line.name in PUBLISHED else ""
    made += _orders(names, found)
    for file_name, some in PICTURES.items():
        shown = {name: found[name] for name in some if name in found}
        draw(context, file_name, of, shown, {name: speeds[name] for name in shown if name in speeds})
    about = about_training(of) + (
        "Layers are as many as come to about the same number of parameters at one width. The hybrid of Mamba-2 has "
        "attention without MLP in every fifth layer, that of the gated delta rule with one in every fourth. The "
        "paper's figures are the average accuracy of downstream tasks at 1.3 B parameters, more being better. Pictures "
        f"are in {' and '.join(PICTURES)}."
    )
    return [Table("Novels: the mixers of today at one size", about, [*COLUMNS, _AHEAD], made)]


_AHEAD = Column("ahead", "seeds in which it is so", 0)


def _orders(names: list[str], found: dict[str, dict[str, list[float]]]) -> list[Line]:
    """Of neighbours in the published order: by how much the first is ahead, and in how many seeds."""
    ranked = [name for name in sorted(PUBLISHED, key=lambda name: -PUBLISHED[name]) if name in names]
    lines = []
    for first, second in itertools.pairwise(ranked):
        gains = [b - a for a, b in zip(found[first]["bits"], found[second]["bits"], strict=True)]
        told = "as published" if statistics.mean(gains) > 0 else "the other way round than published"
        values = {"bits": gains, "ahead": [float(sum(gain > 0 for gain in gains))]}
        lines.append(Line(f"{first} is ahead of {second} by", values, note=told))
    return lines


def _no_pieces() -> TextTokenizer:
    raise NotImplementedError  # this recipe is about bytes alone


recipe = Recipe(run, seeds=3, brings=True, by_steps=True)
