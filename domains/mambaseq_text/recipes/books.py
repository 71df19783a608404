"""Novels, byte by byte and in word pieces: Mamba, Mamba-2, Mamba-2 with some attention, and a Transformer, of one size,
over the same text in the same order; bits a byte against what was read and against time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mambaseq.atomic import atomic_file
from mambaseq.benchmarking.timing import release
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.reporting.charts import DARK, LIGHT, STYLE, WIDTH, Curve, frame, lines, text
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import of_text
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_text.recipes import shelf
from mambaseq_text.recipes.shakespeare import PRECISION, precision
from mambaseq_text.recipes.shelf import Split, Texts, Tokens, floors
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer, TextTokenizer

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
"""Learning rates that each contender is tried with."""
TRIED = 9  # one part in so many of a training
DROPOUT = 0.1  # of the variants
LEADING = 2  # contenders that are trained with all seeds, and in word pieces
FLOORS, SPEED, PIECES = "floors", "speed", "GPT-NeoX"


class Contender(NamedTuple):
    """A model at full scale: layers, mixer, and what else `causal_lm` takes."""

    n_layers: int
    mixer: str
    more: dict[str, Any] = {}  # noqa: RUF012 - never changed


_PATTERN = ["mamba2", "mamba2", "attention", "mamba2", "mamba2"]
CONTENDERS = {
    "Mamba": Contender(18, "mamba"),
    "Mamba-2": Contender(18, "mamba2"),
    "hybrid": Contender(20, "mamba2", {"pattern": _PATTERN, "mlp": False}),
    "Transformer++": Contender(9, "attention", {"mixers": {"mlp": {"expand": 3}}}),
}
_DELTA = ["gated_delta", "gated_delta", "gated_delta", "attention"]
TODAY = {
    "Mamba-3": Contender(18, "mamba3"),
    "Mamba-3, rank 4": Contender(14, "mamba3", {"rank": 4}),
    "gated delta": Contender(20, "gated_delta"),
    "KDA": Contender(23, "kda"),
    "gated delta hybrid": Contender(16, "gated_delta", {"pattern": _DELTA}),
}
"""Mixers of today, which the recipe `books_mixers` trains beside the others."""
D_MODEL = 512


class Entry(NamedTuple):
    """What is trained: a contender, in bytes or in word pieces."""

    contender: str
    pieces: bool = False
    dropout: float = 0.0


_USUAL = {name: Entry(name) for name in CONTENDERS}
_PIECES = {f"{name}, {PIECES}": Entry(name, True) for name in CONTENDERS}
VARIANTS = {
    f"{name}, dropout {DROPOUT:g}": entry._replace(dropout=DROPOUT) for name, entry in {**_USUAL, **_PIECES}.items()
}
"""Trained only when they are named: they say whether the others overfit."""
_TODAY = {name: Entry(name) for name in TODAY}
ENTRIES = {**_USUAL, **_PIECES, **VARIANTS, **_TODAY}


class Sizes(NamedTuple):
    """length, pieces: of windows in bytes, and in word pieces, which are about as long a text. looks: at the validation
    book during a training. positions: bytes that are tested at once; word pieces, a quarter of it."""

    length: int
    pieces: int
    batch_size: int
    steps: int
    looks: int
    positions: int

    @property
    def every(self) -> int:
        """Steps from one look to the next."""
        return max(self.steps // self.looks, 1)


class Shelf:
    """The books on the device, in the tokens that are asked for, and what is trained on them."""

    def __init__(self, context: Context, texts: Texts, tokenizer: Callable[[], TextTokenizer]) -> None:
        self.context, self.texts, self.tokenizer = context, texts, tokenizer
        usual = context.at(
            full=Sizes(2048, 512, 16, 1800, 24, 2**16),
            small=Sizes(256, 64, 8, 300, 6, 2**13),
            tiny=Sizes(32, 16, 2, 4, 2, 2**10),
        )
        self.sizes = usual if context.steps is None else usual._replace(steps=context.steps)

    @functools.cached_property
    def bytes(self) -> Tokens:
        return Tokens.of(self.texts, ByteTokenizer(), self.context.device)

    @functools.cached_property
    def pieces(self) -> Tokens:
        return Tokens.of(self.texts, self.tokenizer(), self.context.device)

    def of(self, entry: Entry) -> tuple[Tokens, int]:
        """The tokens of an entry, and how many are in a window."""
        return (self.pieces, self.sizes.pieces) if entry.pieces else (self.bytes, self.sizes.length)

    def bits(self, entry: Entry, split: Split, model: SequenceModel) -> float:
        positions = self.sizes.positions // (4 if entry.pieces else 1)  # the logits of a large vocabulary are, too
        return split.bits(model, self.of(entry)[1], positions)

    def make(self, entry: Entry, seed: int) -> SequenceModel:
        of = (CONTENDERS | TODAY)[entry.contender]
        at_least = len(of.more.get("pattern", [0]))
        n_layers = self.context.at(
            full=of.n_layers, small=max(of.n_layers // 4, at_least), tiny=max(of.n_layers // 9, at_least)
        )
        d_model = self.context.at(full=D_MODEL, small=64, tiny=16)
        torch.manual_seed(seed)
        vocab_size = self.of(entry)[0].vocab_size
        model = causal_lm(vocab_size, d_model, n_layers, of.mixer, dropout=entry.dropout, **of.more)
        return model.to(self.context.device)

    def optimizer(self, rate: float, steps: int) -> OptimizerConfig:
        """One for all but its rate."""
        return OptimizerConfig(lr=rate, weight_decay=0.1, warmup_steps=min(100, steps // 4))

    def tried(self, name: str, rate: float) -> float:
        """Bits a byte of the validation book after a short training at this rate."""
        entry, steps = ENTRIES[name], max(self.sizes.steps // TRIED, 1)
        tokens, length = self.of(entry)

        def trial(checkpoint: Path) -> dict[str, float]:
            model = self.make(entry, seed=0)
            batches = of_text(tokens.train, length, self.sizes.batch_size, seed=0)
            config, dtype = self.optimizer(rate, steps), precision(self.context.device)
            label = f"{name}, rate {rate:g}"
            train(model, batches, steps, config, autocast=dtype, checkpoint=checkpoint, label=label)
            return {"validation": self.bits(entry, tokens.validation, model)}

        found = self.context.trial(f"{name} steps={steps} rate={rate:g}", trial)["validation"]
        release()
        return found

    def rate(self, name: str) -> float:
        """The rate with which the short training is best; that of a variant is the one of what it varies.

        Raises UserError if all diverged.
        """
        usual = name.removesuffix(f", dropout {DROPOUT:g}")
        found = {rate: self.tried(usual, rate) for rate in self.context.at(full=RATES, small=RATES, tiny=RATES[:1])}
        finite = {rate: bits for rate, bits in found.items() if math.isfinite(bits)}
        if not finite:
            raise UserError(f"{usual} diverged at every rate ({', '.join(f'{rate:g}' for rate in found)}).")
        return min(finite, key=finite.__getitem__)

    def learned(self, name: str, rate: float, seed: int) -> dict[str, float]:
        """Train, keep the weights that are best on the validation book, and test these once."""

        def trial(checkpoint: Path) -> dict[str, float]:
            return self._learn(name, rate, seed, checkpoint)

        found = self.context.trial(f"{name} steps={self.sizes.steps} rate={rate:g} seed={seed}", trial)
        release()
        return found

    def _learn(self, name: str, rate: float, seed: int, checkpoint: Path) -> dict[str, float]:
        entry, of = ENTRIES[name], self.sizes
        tokens, length = self.of(entry)
        model = self.make(entry, seed)
        curve_file, best_file = (checkpoint.with_suffix(f".{part}.pt") for part in ("curve", "best"))
        curve: dict[int, float] = torch.load(curve_file, weights_only=True) if curve_file.exists() else {}

        def look(step: int) -> None:
            now = self.bits(entry, tokens.validation, model)
            if now < min((bits for at, bits in curve.items() if at != step), default=math.inf):
                with atomic_file(best_file) as file:
                    torch.save(model.state_dict(), file)
            curve[step] = now
            with atomic_file(curve_file) as file:
                torch.save(curve, file)

        run = train(
            model,
            of_text(tokens.train, length, of.batch_size, seed),
            of.steps,
            self.optimizer(rate, of.steps),
            autocast=precision(self.context.device),
            checkpoint=checkpoint,
            watch=look,
            check_every=of.every,
            label=f"{name}, seed {seed}",
        )
        if of.steps not in curve:
            look(of.steps)
        known = {step: bits for step, bits in curve.items() if math.isfinite(bits)}
        best = min(known, key=known.__getitem__) if known else of.steps
        if known:
            model.load_state_dict(torch.load(best_file, map_location=self.context.device, weights_only=True))
        read = of.steps * of.batch_size * length
        return {
            "bits": self.bits(entry, tokens.test, model),
            "carried": tokens.test.carried(model),
            "validation": known.get(best, math.nan),
            "train_bits": run.loss / math.log(2) / tokens.bytes_per_token,
            "best_at": best / of.steps,
            "passes": read / len(tokens.train),
            "rate": rate,
            "captured": float(run.captured),
            "as_run": run.seconds / 60,
            "parameters": model.n_parameters(),
            "inner": model.n_parameters() - tokens.vocab_size * model.backbone.d_model,
            **{f"at {step}": bits for step, bits in sorted(curve.items())},
        }

    def speed(self, name: str) -> float:
        """Bytes a second of training steps."""
        entry = ENTRIES[name]
        tokens, length = self.of(entry)
        steps = self.context.at(full=100, small=10, tiny=2)

        def trial(_: Path) -> dict[str, float]:
            batches = of_text(tokens.train, length, self.sizes.batch_size, seed=0)
            config, dtype = self.optimizer(1e-3, steps), precision(self.context.device)
            run = train(self.make(entry, seed=0), batches, steps, config, autocast=dtype, label=f"speed of {name}")
            read = self.sizes.batch_size * length * tokens.bytes_per_token
            return {"bytes_per_s": run.steps_per_second * read}

        found = self.context.trial(f"{name} speed", trial)["bytes_per_s"]
        release()
        return found

    def bytes_read(self, name: str, steps: int) -> float:
        tokens, length = self.of(ENTRIES[name])
        return steps * self.sizes.batch_size * length * tokens.bytes_per_token


def run(context: Context) -> list[Table]:
    texts = Texts.read(shelf.unpacked(context))
    brought = functools.partial(context.brought, shelf.TOKENIZER, shelf.TOKENIZER_SHA256, shelf.TOKENIZER_SOURCE)
    if not context.only or any(ENTRIES[name].pieces for name in context.only if name in ENTRIES):
        brought()  # before anything is trained
    return tables(context, texts, lambda: HFTokenizer(str(brought())))


def tables(context: Context, texts: Texts, tokenizer: Callable[[], TextTokenizer]) -> list[Table]:
    """The recipe on any books. tokenizer: makes that of the word pieces, when it is needed."""
    context.wanted([*ENTRIES, FLOORS, SPEED])
    of = Shelf(context, texts, tokenizer)
    found: dict[str, dict[str, list[float]]] = {}

    def trained(names: Sequence[str], seeds: Sequence[int]) -> None:
        for name in names:
            rate = of.rate(name)
            for seed in seeds:
                for key, value in of.learned(name, rate, seed).items():
                    found.setdefault(name, {}).setdefault(key, []).append(value)

    if context.only:
        trained([name for name in ENTRIES if name in context.only], context.seeds)
    else:
        trained(list(_USUAL), context.seeds[:1])
        leading = sorted(_USUAL, key=lambda name: found[name]["validation"][0])[:LEADING]
        trained(leading, context.seeds[1:])
        trained([f"{name}, {PIECES}" for name in leading], context.seeds)
    timed = list(found) or list(_USUAL)
    speeds = {name: of.speed(name) for name in timed} if not context.only or SPEED in context.only else {}
    made = [line_of(name, found.get(name, {}), of, speeds.get(name)) for name in dict.fromkeys([*found, *speeds])]
    if not context.only or FLOORS in context.only:
        counted = context.trial(FLOORS, lambda _: floors(texts))
        bound = Bound("bits", "<=", counted["Markov bits"])
        for line in made:
            line.wanted = (bound,)
        made += _floor_lines(counted)
    if not context.only:
        made.append(_lead(leading[0], leading[1], found))
    draw(context, "books.svg", of, found, speeds)
    return [Table("Novels: bits a byte of books that training does not see", _about(of, made), COLUMNS, made)]


COLUMNS = [
    Column("bits", "bits a byte, test books", 3),
    Column("carried", "the same, by the state passed on", 3),
    Column("validation", "validation book", 3),
    Column("train_bits", "last training steps", 3),
    Column("best_at", "best on validation after", 0, percent=True),
    Column("rate", "learning rate", 4),
    Column("minutes", "minutes, alone on the GPU", 2),
    Column("mb_per_s", "MB of text a second", 2),
    Column("parameters", "parameters", 0),
    Column("inner", "without the embedding", 0),
]


def line_of(name: str, values: dict[str, list[float]], of: Shelf, speed: float | None) -> Line:
    if "carried" in values:
        values["carried"] = [value for value in values["carried"] if math.isfinite(value)]
    if speed is not None:
        values = {**values, "mb_per_s": [speed / 1e6]}
        values["minutes"] = [of.bytes_read(name, of.sizes.steps) / speed / 60]
    eager = of.context.device.type == "cuda" and 0.0 in values.get("captured", ())
    return Line(name, values, note="steps were not captured" if eager else "")


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


def _lead(first: str, second: str, found: dict[str, dict[str, list[float]]]) -> Line:
    """By how much the first of the two is ahead, seed by seed."""
    ahead = {
        key: [b - a for a, b in zip(found[first][key], found[second][key], strict=True)]
        for key in ("bits", "validation")
    }
    signs = {gain > 0 for gain in ahead["bits"]}
    said = "in some of the seeds" if len(signs) > 1 else "in every seed" if True in signs else "in no seed"
    return Line(f"{first} is ahead of {second} by", ahead, note=f"on the test books: {said}")


def draw(
    context: Context, file_name: str, of: Shelf, found: dict[str, dict[str, list[float]]], speeds: dict[str, float]
) -> None:
    """Write a picture into the recipe's folder: the validation book's bits, the mean of the seeds, against what was
    read and, where speeds are known, against time. A training's first look is left out: it would set the scale."""
    read, time, named = [], [], []
    for number, name in enumerate(name for name in found if name not in VARIANTS):
        values = found[name]
        steps = sorted(int(key.removeprefix("at ")) for key in values if key.startswith("at "))[1:]
        ys = [float(np.mean(values[f"at {step}"])) for step in steps]
        megabytes = [of.bytes_read(name, step) / 1e6 for step in steps]
        kind, colour = "dots" if number % 2 else "curve", number // 2 % 3
        read.append(Curve("", megabytes, ys, kind, colour))
        named.append(Curve(name, [], [], kind, colour))
        if name in speeds:
            minutes = [1e6 * x / speeds[name] / 60 for x in megabytes]
            time.append(Curve("", minutes, ys, kind, colour))
    panels = [lines(read, "MB of text read", "bits a byte, validation", 260)]
    if time:
        panels.append(lines(time, "minutes of training, alone on the GPU", "bits a byte, validation", 260))
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
    return (
        f"{len(texts.train)} novels to train on ({n['train']} bytes), {len(texts.validation)} for validation "
        f"({n['validation']}), {len(texts.test)} to test ({n['test']}), of other authors: whole books, no edition in "
        f"two sets. {sizes.steps:,} steps of {sizes.batch_size} windows of {sizes.length:,} bytes "
        f"({of.bytes_read('Mamba', sizes.steps) / len(of.bytes.train):.1f} passes), the same windows in the same order "
        f"for all with one seed. Attention is rotary, with a SwiGLU MLP behind it in the Transformer. AdamW, warm-up "
        f"and cosine, {PRECISION}. The peak rate of each is the best of {', '.join(f'{rate:g}' for rate in RATES)} on "
        f"the validation book after one {TRIED}th of the steps. The validation book is read "
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
        said += "Minutes are those of all steps at the speed of a hundred steps with the GPU for themselves. "
    if not of.context.only:
        said += (
            f"One seed for all, {seeds} for the {LEADING} that lead on validation, in bytes and in word pieces; the "
            "verdict is whether a model is better than the best count model. A picture is in books.svg."
        )
    return said.rstrip()


recipe = Recipe(run, seeds=3, brings=True, by_steps=True)
