"""Novels, byte by byte and in word pieces: Mamba-1 to -3, delta rules, hybrids and a Transformer, of one size, over the
same text in the same order; bits a byte against what was read and against time, and beside the published order."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from mambaseq.atomic import atomic_file
from mambaseq.reporting.charts import DARK, LIGHT, STYLE, WIDTH, Curve, frame, lines, text
from mambaseq.reproduction import FINISHED, Bound, Column, Context, Line, Recipe, Table
from mambaseq_text.recipes import shelf
from mambaseq_text.recipes.books_training import CONTENDERS, ENTRIES, PIECES, RATES, TODAY, TRIED, VARIANTS, Shelf
from mambaseq_text.recipes.shakespeare import PRECISION
from mambaseq_text.recipes.shelf import Texts, floors
from mambaseq_text.tokenization import HFTokenizer, TextTokenizer

LEADING = 2  # of the contenders, that are trained in word pieces
FLOORS, SPEED = "floors", "speed"
USUAL, NAMES = tuple(CONTENDERS), (*CONTENDERS, *TODAY)
PUBLISHED = {"Mamba-3, rank 4": 52.39, "KDA": 52.28, "gated delta": 52.07, "Mamba-2": 51.82}
"""Average accuracy of downstream tasks, in percent, of models of 1.3 B parameters."""
# as many curves as can be told apart
PICTURES = {
    "books_mixers.svg": ("Mamba", "Mamba-2", "Mamba-3", "gated delta", "KDA", "Transformer++"),
    "books_hybrids.svg": ("Mamba-2", "hybrid", "Mamba-3", "Mamba-3, rank 4", "gated delta", "gated delta hybrid"),
}
Found = dict[str, dict[int, dict[str, float]]]
"""What was learned, by name and seed."""


def run(context: Context) -> list[Table]:
    context.wanted([*ENTRIES, FLOORS, SPEED, FINISHED])
    texts = Texts.read(shelf.unpacked(context))
    if context.scale != "full":  # whole books, held out, would take longer than what is trained
        texts = texts.beginnings(*context.at(full=(0, 0), small=(2**18, 2**16), tiny=(2**13, 2**11)))
    brought = functools.partial(context.brought, shelf.TOKENIZER, shelf.TOKENIZER_SHA256, shelf.TOKENIZER_SOURCE)
    if not context.only or any(ENTRIES[name].pieces for name in context.only if name in ENTRIES):
        brought()  # before anything is trained
    return tables(context, texts, lambda: HFTokenizer(str(brought())))


def tables(context: Context, texts: Texts, tokenizer: Callable[[], TextTokenizer]) -> list[Table]:
    """The recipe on any books: whole, or the named pieces of it, or what is finished of all pieces and what is not.

    tokenizer: makes that of the word pieces, when it is needed.
    """
    of, only = Shelf(context, texts, tokenizer), context.only
    found = _finished(of) if FINISHED in only else _trained(of)
    leading = _leading(found, context.seeds[0])
    speeds = _speeds(of, found)
    asked = [name for name in only if name in ENTRIES]
    names = list(dict.fromkeys([*found, *speeds]))
    if not only or (FINISHED in only and not asked):
        pieces = [f"{name}, {PIECES}" for name in leading]
        names = list(dict.fromkeys([*NAMES, *pieces, *names]))
    elif FINISHED in only:
        names = list(dict.fromkeys([*asked, *names]))
    rows = {name: line_of(name, found.get(name, {}), of, speeds.get(name)) for name in names}
    made = [line for name, line in rows.items() if name not in TODAY]
    if not only or FLOORS in only:
        counted = context.trial(FLOORS, lambda _: floors(texts))
    else:
        counted = (context.finished(FLOORS) if FINISHED in only else None) or {}
    if counted:
        bound = Bound("bits", "<=", counted["Markov bits"])
        for line in rows.values():
            line.wanted = (bound,)
        made += _floor_lines(counted)
    if len(leading) == LEADING and not asked:
        made.append(_lead(leading[0], leading[1], found))
    draw(context, "books.svg", of, {name: found[name] for name in found if name not in TODAY}, speeds)
    said = []
    if made:
        said.append(Table("Novels: bits a byte of books that training does not see", _about(of, made), COLUMNS, made))
    if any(name in TODAY for name in rows):
        said.append(_mixers(of, found, speeds, rows))
    return said


def _trained(of: Shelf) -> Found:
    """Train what is asked for: all rates first, then seed after seed, so that what is there can be compared early."""
    only, seeds = of.context.only, of.context.seeds
    found: Found = {}

    def train(names: Sequence[str]) -> None:
        rates = {name: of.rate(name) for name in names}
        for seed, name in itertools.product(seeds, names):
            found.setdefault(name, {})[seed] = of.learned(name, rates[name], seed)

    train([name for name in ENTRIES if name in only] if only else NAMES)
    if not only:
        train([f"{name}, {PIECES}" for name in _leading(found, seeds[0])])
    return found


def _finished(of: Shelf) -> Found:
    """What earlier calls have trained, of what is named or of all."""
    found: Found = {}
    names = [name for name in ENTRIES if name in of.context.only] or ENTRIES
    for name, seed in itertools.product(names, of.context.seeds):
        if (one := of.finished(name, seed)) is not None:
            found.setdefault(name, {})[seed] = one
    return found


def _leading(found: Found, seed: int) -> list[str]:
    """The contenders that lead on the validation book with the first seed, the best first; none until all have it."""
    firsts = {name: found[name][seed]["validation"] for name in USUAL if seed in found.get(name, {})}
    if len(firsts) < len(USUAL):
        return []
    order = sorted(firsts, key=lambda name: firsts[name] if math.isfinite(firsts[name]) else math.inf)
    return order[:LEADING]


def _speeds(of: Shelf, found: Found) -> dict[str, float]:
    """Bytes a second, measured if that is asked for; else those of an earlier call, or of the trainings."""
    only = of.context.only
    names = list(found) or list(USUAL)
    if not only or SPEED in only:
        return {name: of.speed(name) for name in names}
    known = {name: of.known_speed(name) for name in found}
    trained = {name: max(one["bytes_per_s"] for one in seeds.values()) for name, seeds in found.items()}
    return {name: trained[name] if speed is None else speed for name, speed in known.items()}


def _mixers(of: Shelf, found: Found, speeds: dict[str, float], rows: dict[str, Line]) -> Table:
    """The mixers of today beside the published order, which only these lines show."""
    made = [
        dataclasses.replace(rows[name], paper=f"{PUBLISHED[name]}" if name in PUBLISHED else "")
        for name in NAMES
        if name in rows
    ]
    made += _orders(found)
    for file_name, some in PICTURES.items():
        draw(of.context, file_name, of, {name: found[name] for name in some if name in found}, speeds)
    about = about_training(of) + (
        "Layers are as many as come to about the same number of parameters at one width. The hybrid of Mamba-2 has "
        "attention without MLP in every fifth layer, that of the gated delta rule with one in every fourth. The "
        "paper's figures are the average accuracy of downstream tasks at 1.3 B parameters, more being better. Pictures "
        f"are in {' and '.join(PICTURES)}."
    )
    return Table("Novels: the mixers of today at one size", about, [*COLUMNS, _AHEAD], made)


_AHEAD = Column("ahead", "seeds in which it is so", 0)


def _orders(found: Found) -> list[Line]:
    """Of neighbours in the published order: by how much the first is ahead, and in how many seeds."""
    ranked = [name for name in sorted(PUBLISHED, key=lambda name: -PUBLISHED[name]) if found.get(name)]
    made = []
    for first, second in itertools.pairwise(ranked):
        gains = _ahead(first, second, found, "bits")
        if gains:
            told = "as published" if statistics.mean(gains) > 0 else "the other way round than published"
            values = {"bits": gains, "ahead": [float(sum(gain > 0 for gain in gains))]}
            made.append(Line(f"{first} is ahead of {second} by", values, note=told))
    return made


def _ahead(first: str, second: str, found: Found, key: str) -> list[float]:
    """By how much the first is ahead, in each seed that both have."""
    both = [seed for seed in found[first] if seed in found[second]]
    return [found[second][seed][key] - found[first][seed][key] for seed in both]


COLUMNS = [
    Column("bits", "bits a byte, test books", 3),
    Column("carried", "the same, by the state passed on", 3),
    Column("validation", "validation book", 3),
    Column("train_bits", "last training steps", 3),
    Column("best_at", "best on validation after", 0, percent=True),
    Column("rate", "learning rate", 4),
    Column("minutes", "minutes of training steps", 2),
    Column("mb_per_s", "MB of text a second", 2),
    Column("parameters", "parameters", 0),
    Column("inner", "without the embedding", 0),
]


def line_of(name: str, seeds: dict[int, dict[str, float]], of: Shelf, speed: float | None) -> Line:
    """Its values, and which of the seeds that are asked for are missing."""
    values: dict[str, list[float]] = {}
    for one in seeds.values():
        for key, value in one.items():
            values.setdefault(key, []).append(value)
    if "carried" in values:
        values["carried"] = [value for value in values["carried"] if math.isfinite(value)]
    if speed is not None:
        values["mb_per_s"] = [speed / 1e6]
        values["minutes"] = [of.bytes_read(name, of.sizes.steps) / speed / 60]
    eager = of.context.device.type == "cuda" and 0.0 in values.get("captured", ())
    notes = ["steps were not captured"] if eager else []
    missing = [seed for seed in of.context.seeds if seed not in seeds]
    if missing and (FINISHED in of.context.only or seeds):
        notes.append(f"missing: seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}")
    return Line(name, values, note="; ".join(notes))


def _floor_lines(found: dict[str, float]) -> list[Line]:
    names = {
        "unigram": "bytes by their frequency",
        "gzip": "gzip -9, each book by itself",
        "xz": "xz -9, each book by itself",
        "xz behind": "xz -9, what the books add behind the training books",
        "Markov": f"Markov model of order {found['order']:.0f}, interpolated",
    }
    return [
        Line(said, {key: [found[f"{kind} {key}"]] for key in ("bits", "validation")}) for kind, said in names.items()
    ]


def _lead(first: str, second: str, found: Found) -> Line:
    """By how much the first of the two is ahead, seed by seed."""
    ahead = {key: _ahead(first, second, found, key) for key in ("bits", "validation")}
    signs = {gain > 0 for gain in ahead["bits"]}
    said = "in some of the seeds" if len(signs) > 1 else "in every seed" if True in signs else "in no seed"
    return Line(f"{first} is ahead of {second} by", ahead, note=f"on the test books: {said}")


def draw(context: Context, file_name: str, of: Shelf, found: Found, speeds: dict[str, float]) -> None:
    """Write a picture into the recipe's folder: the validation book's bits, the mean of the seeds, against what was
    read and, where speeds are known, against time. A training's first look is left out: it would set the scale."""
    read, time, named = [], [], []
    for number, name in enumerate(name for name in found if name not in VARIANTS):
        seeds = list(found[name].values())
        steps = sorted(int(key.removeprefix("at ")) for key in seeds[0] if key.startswith("at "))[1:]
        ys = [float(np.mean([one[f"at {step}"] for one in seeds])) for step in steps]
        megabytes = [of.bytes_read(name, step) / 1e6 for step in steps]
        kind, colour = "dots" if number % 2 else "curve", number // 2 % 3
        read.append(Curve("", megabytes, ys, kind, colour))
        named.append(Curve(name, [], [], kind, colour))
        if name in speeds:
            minutes = [1e6 * x / speeds[name] / 60 for x in megabytes]
            time.append(Curve("", minutes, ys, kind, colour))
    panels = [lines(read, "MB of text read", "bits a byte, validation", 260)]
    if time:
        panels.append(lines(time, "minutes of training steps", "bits a byte, validation", 260))
    panels = [panel.split(">", 1)[1].removesuffix("</svg>") for panel in panels if panel]
    if not panels:
        return
    wide = WIDTH * len(panels)
    body, at, top = "", 12.0, 14.0
    for curve in named:
        if at + 40 + 6.2 * len(curve.name) > wide:
            at, top = 12.0, top + 16
        shape = f'<path class="c{curve.colour} curve" d="M{at:.0f} {top - 4:.0f}h16"/>'
        dot = f'<circle class="c{curve.colour} dot" cx="{at + 8:.0f}" cy="{top - 4:.0f}" r="3"/>'
        body += shape + (dot if curve.kind == "dots" else "") + text(at + 21, top, curve.name)
        at += 40 + 6.2 * len(curve.name)
    for number, panel in enumerate(panels):
        body += f'<g transform="translate({number * WIDTH} {top + 6:.0f})">{panel}</g>'
    told = f"bits a byte by what was read and by time: {', '.join(curve.name for curve in named)}"
    head, inner = frame(wide, 260 + top + 6, told, body).split(">", 1)
    style = f".chart {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ .chart {{ {DARK} }} }} {STYLE}"
    ground = '<rect width="100%" height="100%" rx="8" fill="var(--ground)"/>'
    with atomic_file(context.folder / file_name, "w", encoding="utf-8") as file:
        file.write(f"{head}><style>{style}</style>{ground}{inner}\n")


def about_training(of: Shelf) -> str:
    """What all contenders have in common."""
    sizes, texts = of.sizes, of.texts
    n = {name: f"{sum(map(len, books)):,}" for name, books in texts._asdict().items()}
    whole = "whole books" if of.context.scale == "full" else "beginnings of books"
    return (
        f"{len(texts.train)} novels to train on ({n['train']} bytes), {len(texts.validation)} for validation "
        f"({n['validation']}), {len(texts.test)} to test ({n['test']}), of other authors: {whole}, no edition in "
        f"two sets. {sizes.steps:,} steps of {sizes.batch_size} windows of {sizes.length:,} bytes "
        f"({of.bytes_read('Mamba', sizes.steps) / len(of.bytes.train):.1f} passes), the same windows in the same order "
        f"for all with one seed. Attention is rotary, with a SwiGLU MLP behind it in the Transformer. AdamW, warm-up "
        f"and cosine, {PRECISION}. The peak rate of each is the best on the validation book after one {TRIED}th of the "
        f"steps, of {', '.join(f'{rate:g}' for rate in RATES)}: from the middle on to the better side. The "
        "validation book is read "
        f"{len(range(sizes.every, sizes.steps + 1, sizes.every))} times, at fixed steps; the weights that are best "
        "there are tested once, in pieces of a window that know only themselves, and, where the state does not grow, "
        "over whole books by the state passed on. "
    )


def _about(of: Shelf, made: Sequence[Line]) -> str:
    seeds = len(of.context.seeds)
    said = about_training(of) + (
        f"In word pieces of GPT-NeoX's tokenizer a window is {of.sizes.pieces:,}, which are about as many bytes. The "
        "hybrid has attention without MLP in every fifth layer. "
    )
    if any("minutes" in line.values for line in made):
        said += (
            "Minutes are those of all steps at the speed of a hundred steps with the GPU for themselves, or, where "
            "that was not measured, at that of the fastest training. "
        )
    if not of.context.only:
        said += (
            f"{seeds} seeds for all; the {LEADING} of {', '.join(USUAL)} that lead on validation in word pieces too; "
            "the verdict is whether a model is better than the best count model. A picture is in books.svg."
        )
    return said.rstrip()


recipe = Recipe(
    run,
    seeds=3,
    brings=True,
    by_steps=True,
    settings=("mambaseq_text.recipes.books_training", "mambaseq_text.recipes.shelf"),
)
