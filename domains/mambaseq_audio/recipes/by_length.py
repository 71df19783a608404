"""Models of raw waveforms by the length of their training windows, with as many samples a step at each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mambaseq.reproduction import Column, Context, Line
from mambaseq_audio.recipes.published import Sizes, Sounds, Variant, make_model, sizes_of, trained

LENGTHS = (
    "Bits a sample of the test recordings, cut into windows as long as those in training, each predicted from its own "
    "beginning on."
)


class Rung(NamedTuple):
    """A length of windows, and how many are in a batch."""

    length: int
    batch_size: int


class Ladder(NamedTuple):
    """What is trained and tested at each length. steps: of a training, None for as many as the configuration says.
    drop_last: leave out what is shorter than a window at a recording's end."""

    train_on: Sounds
    test_on: Sounds
    rungs: Sequence[Rung]
    steps: int | None
    drop_last: bool


def columns(rungs: Sequence[Rung]) -> list[Column]:
    return [
        *(Column(f"bits at {rung.length}", f"{rung.length:,}", 3) for rung in rungs),
        Column("parameters", "parameters", 0),
    ]


def line(context: Context, variant: Variant, ladder: Ladder) -> Line:
    """A variant's bits a sample at each length."""
    values: dict[str, list[float]] = {}
    of = sizes_of(variant.config)
    of = of.shorter(ladder.steps or of.steps)._replace(tested=context.at(full=of.tested, small=64, tiny=4))
    for rung in ladder.rungs:
        sizes = of._replace(length=rung.length, batch_size=rung.batch_size)
        places = [part.windows(rung.length, ladder.drop_last) for part in (ladder.train_on, ladder.test_on)]
        for seed in context.seeds:
            label = f"{variant.name} length={rung.length} steps={sizes.steps}"

            def trial(
                checkpoint: Path,
                seed: int = seed,
                sizes: Sizes = sizes,
                label: str = label,
                places: list[Tensor] = places,
            ) -> dict[str, float]:
                model = make_model(context, variant.config, seed)
                data = (ladder.train_on, places[0]), (ladder.test_on, places[1])
                return trained(context, model, *data, sizes, seed, checkpoint, label)

            found = context.trial(f"{label} seed={seed}", trial)
            values.setdefault(f"bits at {rung.length}", []).append(found["bits"])
            values.setdefault("parameters", []).append(found["parameters"])
    return Line(variant.name, values, variant.paper)
