"""What a language model finds again in a long text: one number hidden in it (a needle), or all of several.

Texts are read in parts with the state passed on, so that memory does not grow with them where the state does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from mambaseq.errors import ConfigError
from mambaseq.generation.scoring import Asked
from mambaseq.limits import WINDOW
from mambaseq.mixers.base import State
from mambaseq_text.evaluating import Reader
from mambaseq_text.reading import text_files
from mambaseq_text.rows import documents

PLACES = (
    *("Aachen", "Bergen", "Cairo", "Delhi", "Essen", "Faro", "Geneva", "Havana", "Izmir", "Jena", "Kyoto", "Lima"),
    *("Madrid", "Nairobi", "Oslo", "Porto", "Quito", "Riga", "Seoul", "Turin", "Utrecht", "Vienna", "Warsaw", "Zurich"),
)
CHOICES = 10
"""Numbers of which a needle's is one; the others stand nowhere in the text."""


class Scale(NamedTuple):
    """How much is asked. lengths: of texts, in tokens. depths: places of a needle, 0 the beginning, 1 the end. texts:
    how many there are for each. pairs: numbers that are hidden at once where all are asked for."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    texts: int
    pairs: int


SCALES = {
    "tiny": Scale((256, 512), (0.0, 1.0), 1, 2),
    "small": Scale((2**10, 2**12, 2**14), (0.0, 0.25, 0.5, 0.75, 1.0), 4, 8),
    "full": Scale(tuple(2**k for k in range(10, 21, 2)), (0.0, 0.25, 0.5, 0.75, 1.0), 8, 16),
}


class Found(NamedTuple):
    """What was found again in texts of one length.

    needle: by depth, the shares of needles that are (the likeliest of `CHOICES` numbers, the model's first choice token
        by token). recall: the same for texts with several numbers, of which the others are the choices.
    tokens_per_second: how fast texts were read. state_bytes: what one text is remembered by at its end.
    """

    length: int
    needle: dict[float, tuple[float, float]]
    recall: tuple[float, float]
    tokens_per_second: float
    state_bytes: int

    @property
    def needles(self) -> tuple[float, float]:
        """The means over depths."""
        first, second = np.mean(list(self.needle.values()), axis=0).tolist()
        return first, second

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        kinds = ("choice", "exact")
        needle = {f"{depth:g}": dict(zip(kinds, shares, strict=True)) for depth, shares in self.needle.items()}
        recall = dict(zip(kinds, self.recall, strict=True))
        return {**self._asdict(), "needle": needle, "recall": recall}


class Texts:
    """Makes texts in which numbers are hidden.

    filler: what they stand in: files of text, the first `most` tokens or a little more; taken from a random place on,
        and again from the beginning at its end.
    Raises ConfigError for a filler of less than two tokens.
    """

    def __init__(self, reader: Reader, filler: str | Sequence[str], seed: int = 0, most: int = 2**21) -> None:
        self.reader, self.random = reader, np.random.default_rng(seed)
        held = [np.zeros(0, dtype=np.int64)]
        for text in _pieces(filler):
            held.append(self.ids(text))
            if sum(map(len, held)) >= most:
                break
        self.filler = np.concatenate(held)
        if len(self.filler) < 2:
            raise ConfigError("The filler (--filler) has no text. Give files with some.")

    def ids(self, text: str) -> np.ndarray:
        return self.reader.tokenizer.encode_counted(text)[0].astype(np.int64)

    def drawn(self, pairs: int, numbers: int) -> tuple[list[str], list[int]]:
        """Different places, and different numbers."""
        places = self.random.permutation(len(PLACES))[:pairs]
        found = 10_000 + self.random.choice(90_000, numbers, replace=False)
        return [PLACES[place] for place in places], found.tolist()

    def text(self, length: int, hidden: Sequence[tuple[str, int]], depths: Sequence[float]) -> np.ndarray:
        """A text `(length,)` that says the number of each place at its depth. Raises ConfigError where it is too
        short."""
        pieces = [self.ids(f"\nThe secret number of {place} is {number}.\n") for place, number in hidden]
        mark = np.asarray(self.reader.mark, dtype=np.int64)
        room = length - len(mark) - sum(map(len, pieces))
        if room < 0:
            raise ConfigError(
                f"A text of {length:,} tokens has no room for {len(pieces)} numbers, which take {length - room:,}. "
                "Give larger --lengths."
            )
        start = int(self.random.integers(len(self.filler)))
        around = np.take(self.filler, np.arange(start, start + room), mode="wrap")
        parts, last = [mark], 0
        for depth, piece in sorted(zip(depths, pieces, strict=True), key=lambda one: one[0]):
            at = round(depth * room)
            parts += [around[last:at], piece]
            last = at
        return np.concatenate([*parts, around[last:]])

    def asked(self, text: np.ndarray, place: str, number: int) -> Asked:
        """The question for the number of a place, behind a text, and an answer."""
        question = f"\nThe secret number of {place} is"
        return Asked(text, self.ids(f"{question} {number}"), given=len(self.ids(question)))


def _pieces(files: str | Sequence[str]) -> Iterator[str]:
    for name in text_files(files):
        for _, text in documents(name):
            yield from (text[start : start + 2**16] for start in range(0, len(text), 2**16))


def recall(
    reader: Reader, texts: Texts, scale: Scale, lengths: Sequence[int] | None = None, progress: bool = False
) -> Iterator[Found]:
    """What a model finds again, by length; see `Found`. lengths: in place of the scale's. progress: show a bar of the
    texts of a length on standard error.

    Raises ConfigError for a length that has no room for what is hidden.
    """
    for length in lengths or scale.lengths:
        WINDOW.check(length, "--lengths")
        start, read = time.perf_counter(), 0
        needle: dict[float, tuple[float, float]] = {}
        asked = (len(scale.depths) + 1) * scale.texts
        with tqdm(total=asked, desc=f"{length:,} tokens", unit="text", disable=not progress, leave=False) as bar:
            for depth in scale.depths:
                shares = []
                for _ in range(scale.texts):
                    (place,), numbers = texts.drawn(1, CHOICES)
                    text = texts.text(length, [(place, numbers[0])], [depth])
                    shares.append(_told(reader, texts, text, place, numbers[0], numbers))
                    read += length
                    bar.update()
                needle[depth] = _mean(shares)
            shares = []
            for _ in range(scale.texts):
                places, numbers = texts.drawn(scale.pairs, scale.pairs)
                depths = texts.random.random(scale.pairs).tolist()
                text = texts.text(length, list(zip(places, numbers, strict=True)), depths)
                shares += _all_told(reader, texts, text, places, numbers)
                read += length
                bar.update()
        seconds = time.perf_counter() - start
        yield Found(length, needle, _mean(shares), read / seconds, _state_bytes(reader, length))


def _told(
    reader: Reader, texts: Texts, text: np.ndarray, place: str, number: int, numbers: Sequence[int]
) -> tuple[bool, bool]:
    scored = reader.scorer.continuations([texts.asked(text, place, one) for one in numbers])
    best = max(range(len(numbers)), key=lambda one: scored[one].nats)
    return numbers[best] == number, scored[list(numbers).index(number)].greedy


def _all_told(
    reader: Reader, texts: Texts, text: np.ndarray, places: Sequence[str], numbers: Sequence[int]
) -> list[tuple[bool, bool]]:
    """For each place. The text is read once for all questions."""
    asked = [texts.asked(text, place, one) for place in places for one in numbers]
    scored = reader.scorer.continuations(asked)
    rows = [scored[start : start + len(numbers)] for start in range(0, len(scored), len(numbers))]
    return [
        (max(range(len(row)), key=lambda one, row=row: row[one].nats) == which, row[which].greedy)  # type: ignore[misc]
        for which, row in enumerate(rows)
    ]


def _mean(shares: Sequence[tuple[bool, bool]]) -> tuple[float, float]:
    first, second = np.mean(np.asarray(shares, dtype=np.float64), axis=0).tolist()
    return first, second


def _state_bytes(reader: Reader, length: int) -> int:
    """Of one text: growing states take room for all of it."""
    state = reader.loaded.model.init_state(1, length)
    tensors = [tensor for layer in state if isinstance(layer, State) for tensor in layer.tensors().values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table(found: Sequence[Found], scale: Scale) -> str:
    """Lines of text: a row for each length."""
    lines = [
        f"{'tokens':>9}  {'needle':^15}  {f'all of {scale.pairs}':^15}  {'tokens/s':>9}  {'state, KiB':>10}",
        f"{'':>9}  {'choice   exact':>15}  {'choice   exact':>15}",
    ]
    for one in found:
        needle, several = (f"{first:>6.0%}  {second:>6.0%} " for first, second in (one.needles, one.recall))
        lines.append(
            f"{one.length:>9,}  {needle:>15}  {several:>15}  {one.tokens_per_second:>9,.0f}  "
            f"{one.state_bytes / 1024:>10,.1f}"
        )
    return (
        "\n".join(
            [
                *lines,
                f"choice: the likeliest of {CHOICES} numbers, or of all {scale.pairs} (chance: {1 / CHOICES:.0%}, ",
            ]
        )
        + f"{1 / scale.pairs:.0%}); exact: each token of it the model's first choice."
    )


def picture(found: Sequence[Found], scale: Scale) -> Figure:
    """Needles by length and depth, and what is found again by length."""
    figure = Figure(figsize=(9, 3.2))
    left, right = figure.subplots(1, 2)
    depths = list(found[0].needle)
    shares = np.array([[one.needle[depth][0] for one in found] for depth in depths])
    names = [_short(one.length) for one in found]
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*shares.shape):
        colour = "white" if shares[row, column] > 0.5 else "black"
        left.text(column, row, f"{shares[row, column]:.0%}", ha="center", va="center", color=colour)
    left.set_xticks(range(len(found)), names)
    left.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    left.set_xlabel("tokens")
    left.set_ylabel("depth of the needle")
    lengths = [one.length for one in found]
    for name, values, colour in (
        ("needle", [one.needles for one in found], "C0"),
        (f"all of {scale.pairs}", [one.recall for one in found], "C1"),
    ):
        right.plot(lengths, [first for first, _ in values], color=colour, marker="o", ms=3, label=f"{name}, choice")
        right.plot(lengths, [second for _, second in values], color=colour, ls="--", label=f"{name}, exact")
    right.axhline(1 / CHOICES, color="C0", lw=0.8, ls=":")
    right.axhline(1 / scale.pairs, color="C1", lw=0.8, ls=":")
    right.set_xscale("log", base=2)
    right.set_xticks(lengths, names)
    right.set_ylim(-0.03, 1.03)
    right.set_xlabel("tokens (dotted: chance)")
    right.set_ylabel("share found again")
    right.grid(alpha=0.3)
    right.legend(fontsize=7)
    figure.tight_layout()
    return figure


def _short(length: int) -> str:
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return f"{length:,}"


def write(folder: Path, found: Sequence[Found], scale: Scale) -> None:
    """`recall.json`, `recall.txt` and `recall.png` in a folder.

    Raises UserError when the disk is full or not writable.
    """
    from mambaseq.atomic import atomic_file, json_text
    from mambaseq.reporting.pictures import save_png

    for name, text in {
        "recall.json": json_text([one.plain() for one in found], indent=2),
        "recall.txt": table(found, scale),
    }.items():
        with atomic_file(folder / name, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    save_png(folder / "recall.png", picture(found, scale))
