"""The ablations of the Mamba paper (Gu and Dao, arXiv:2312.00752, section 4.6, Tables 6 to 10) at a small scale.

The paper trains models of about 350 million parameters on the Pile, for as many tokens as suit them, and reports
perplexity a token; here a model of half a million reads tinyshakespeare byte by byte.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table
from mambaseq_text.recipes.shakespeare import PRECISION, Sizes, Text, make_model, trained

# dt_rank is d_model / 16 at full scale, as by default
BASELINE: dict[str, Any] = {"d_state": 16, "dt_rank": 8}


class Entry(NamedTuple):
    """A line: the paper's perplexity, and what differs from the baseline.

    worse: the paper finds it so much worse than the baseline that it should be here, too.
    """

    name: str
    paper: str
    options: Mapping[str, Any]
    mixer: str = "mamba"
    worse: bool = False

    def all_options(self) -> dict[str, Any]:
        """Of the mixer; equal ones are one model."""
        return {**BASELINE, **self.options} if self.mixer == "mamba" else dict(self.options)


class Group(NamedTuple):
    """A table of the paper."""

    title: str
    finding: str
    entries: list[Entry]


def _selective(dt: bool, B: bool, C: bool) -> dict[str, bool]:
    return {"selective_dt": dt, "selective_B": B, "selective_C": C}


# A complex A has half as many states here, each of two numbers.
GROUPS = [
    Group(
        "Table 6: architecture and SSM layer",
        "In the paper time-invariant layers differ little from each other, real or complex, and S6 is far better; with "
        "S6 Mamba's block is about as good as H3's. S4 is S4D-Lin, complex with half as many states, or S4D-Real, as "
        "in the paper (Mamba's block with it: `lti: true`); H3's block has half as many layers and as many MLPs, which "
        "comes to an eighth fewer parameters. Not here: H3 with S6 (8.95), Mamba with Hyena (10.75).",
        [
            Entry("Mamba with S6", "8.69", {}),
            Entry(
                "Mamba with S4 (complex)",
                "10.54",
                {"lti": True, "lti_complex": True, "lti_init": "lin", "d_state": 8},
                worse=True,
            ),
            Entry("Mamba with S4 (real)", "10.56", {"lti": True, "lti_complex": False, "lti_init": "real"}, worse=True),
            Entry("H3 with S4 (complex)", "10.30", {"d_state": 8}, "h3"),
            Entry("H3 with S4 (real)", "10.34", {"d_state": 16, "real": True}, "h3"),
            Entry("H3 with Hyena", "10.24", {}, "hyena"),
        ],
    ),
    Group(
        "Table 7: selective dt, B and C",
        "In the paper dt is the most important of the three, and all together are better than any one. What is not "
        "selective is a learned constant.",
        [
            Entry("none", "10.93", _selective(False, False, False), worse=True),
            Entry("B", "10.15", _selective(False, True, False)),
            Entry("C", "9.98", _selective(False, False, True)),
            Entry("dt", "9.81", _selective(True, False, False), worse=True),
            Entry("dt and B", "", _selective(True, True, False)),
            Entry("dt and C", "", _selective(True, False, True)),
            Entry("B and C", "", _selective(False, True, True)),
            Entry("dt, B and C", "8.71", {}),
        ],
    ),
    Group(
        "Table 8: initial A",
        "In the paper real values are better than complex ones, and random ones as good as -(n + 1). The complex A has "
        "half as many states here, so that the state has as many numbers.",
        [
            Entry("A = -1/2 + n i (complex)", "9.16", {"complex": True, "A_init": "s4d-lin", "d_state": 8}),
            Entry("A = -1/2", "8.85", {"A_init": "constant"}),
            Entry("A = -(n + 1)", "8.71", {}),
            Entry("A = -exp(N(0, 1))", "8.71", {"A_init": "random"}),
        ],
    ),
    Group(
        "Table 9: rank of the projection to dt",
        "In the paper a projection of rank 1 brings much of what selective dt does, and higher ranks a little more "
        "(the default, d_model / 16, is 64 there and 8 here).",
        [
            Entry("static", "9.12", _selective(False, True, True)),
            *(
                Entry(f"rank {rank}", paper, {"dt_rank": rank})
                for rank, paper in (
                    (1, "8.97"),
                    (2, "8.97"),
                    (4, "8.91"),
                    (8, "8.83"),
                    (16, "8.84"),
                    (32, "8.80"),
                    (64, "8.71"),
                )
            ),
        ],
    ),
    Group(
        "Table 10: states a channel",
        "In the paper more states help much where B and C are selective, and hardly where they are constant.",
        [
            Entry(f"N = {n}, B and C {kind}", paper, {"d_state": n, **options}, worse=kind == "constant" and n == 16)
            for kind, options, papers in (
                ("constant", _selective(True, False, False), ("9.88", "9.86", "9.82", "9.82", "9.81")),
                ("selective", {}, ("9.73", "9.40", "9.09", "8.84", "8.71")),
            )
            for n, paper in zip((1, 2, 4, 8, 16), papers, strict=True)
        ],
    ),
]
_COLUMNS = [
    Column("bits", "bits a byte, held out", 3),
    Column("difference", "more than the baseline's", 3),
    Column("surely", "less two standard errors", 3),
    Column("train_bits", "bits a byte, last training steps", 3),
    Column("parameters", "parameters", 0),
]


def _surely(differences: list[float]) -> float:
    """Their mean less two standard errors: above 0, a difference that other seeds would show as well."""
    return statistics.mean(differences) - 2 * statistics.stdev(differences) / len(differences) ** 0.5


def run(context: Context) -> list[Table]:
    wanted = context.wanted(dict.fromkeys(entry.name for group in GROUPS for entry in group.entries))
    text = Text.load(context.device)
    sizes = Sizes(
        length=context.at(full=1024, small=128, tiny=16),
        batch_size=context.at(full=8, small=4, tiny=2),
        steps=context.at(full=500, small=100, tiny=2),
        tested=context.at(full=len(text.test), small=16_384, tiny=256),
    )
    d_model = context.at(full=128, small=48, tiny=16)
    n_layers = context.at(full=4, small=2, tiny=2)
    about = (
        f"In all tables, the baseline: {n_layers} Mamba layers, d_model {d_model}, 16 states a channel, dt of rank 8. "
        f"Tinyshakespeare byte by byte, the last tenth held out; {sizes.steps:,} steps of {sizes.batch_size} windows "
        f"of {sizes.length:,} bytes ({sizes.epochs(text):.1f} times the training text), AdamW, learning rate 2e-3 with "
        f"warm-up and cosine, {PRECISION}. The paper's column: perplexity a token of models of about 350 M parameters "
        "on the Pile."
    )

    def measured(entry: Entry) -> dict[str, list[float]]:
        options = entry.all_options()
        layers = n_layers if entry.mixer == "mamba" else n_layers // 2

        def trial(seed: int, checkpoint: Path) -> dict[str, float]:
            torch.manual_seed(seed)
            model = make_model(entry.mixer, d_model, layers, sizes.length, options).to(context.device)
            return trained(model, text, sizes, seed, checkpoint, entry.name)

        described = " ".join([entry.mixer, *(f"{key}={value}" for key, value in sorted(options.items()))])
        return context.over_seeds(f"{described} steps={sizes.steps}", trial)

    tables: list[Table] = []
    for group in GROUPS:
        lines = []
        for entry in (entry for entry in group.entries if entry.name in wanted):
            values, baseline = measured(entry), measured(Entry("baseline", "", {}))
            values["difference"] = [a - b for a, b in zip(values["bits"], baseline["bits"], strict=True)]
            values["surely"] = [_surely(values["difference"])] if len(context.seeds) > 1 else []
            bounds = (Bound("surely", ">=", 0.0),) if entry.worse else ()
            lines.append(Line(entry.name, values, entry.paper, bounds))
        if lines:
            tables.append(Table(group.title, group.finding + ("" if tables else f"\n\n{about}"), _COLUMNS, lines))
    return tables


recipe = Recipe(run, seeds=3)
