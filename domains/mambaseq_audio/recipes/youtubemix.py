"""Bits a sample of piano by the length of training windows: Figures 7 and 10 of Mamba's paper (arXiv:2312.00752)."""

from __future__ import annotations

import re
from pathlib import Path

from mambaseq.errors import DataError
from mambaseq.reproduction import Context, Recipe, Table
from mambaseq_audio.recipes.by_length import LENGTHS, Ladder, Rung, columns, line
from mambaseq_audio.recipes.published import S4_MLP, SAMPLE_RATE, Sounds, Variant

SOURCE = (
    "YouTubeMix (DeepSound 2017), four hours of solo piano as wav files of a minute at 16,000 samples a second, as "
    "SaShiMi's authors share them; 88, 6 and 6 % of the files, in the order of their names, are for training, "
    "validation and test"
)
HOURS = 3.9, 4.1

FIGURE_7 = (
    Variant("Mamba, 3.5 M", (), "about 1.30 at 958,464", 3.5),
    Variant("S4+MLP", ("model.backbone.pattern=[s4+mlp]", *S4_MLP), "about 1.35 at 958,464"),
)
"""Bits read from the figure."""

SIZE = ("model.backbone.n_layers=8", "model.backbone.pool=[4, 4]")
REAL = ("model.mixer.complex=false", "model.mixer.d_state=16")
CONSTANT = ("model.mixer.selective_B=false", "model.mixer.selective_C=false")
LTI = ("model.mixer.complex=false", "model.mixer.lti=true")  # whose A is complex unless lti_complex is false
OUTER = (
    "model.backbone.tiers=[[outer], [outer], [mamba]]",
    "model.mixers.outer.name=mamba",
    "model.mixers.outer.lti=true",
    "model.mixers.outer.d_state=8",
)

LEFT = (
    Variant("everywhere: S4+MLP", (*SIZE, "model.backbone.pattern=[s4+mlp]", *S4_MLP)),
    Variant("everywhere: Mamba (S6), real", (*SIZE, *REAL)),
    Variant("everywhere: complex", SIZE),
    Variant("everywhere: complex, B and C constant", (*SIZE, *CONSTANT)),
    Variant("everywhere: Mamba-S4 (complex, LTI)", (*SIZE, *LTI)),
)
RIGHT = (
    Variant("center: Mamba (S6), real", (*SIZE, *OUTER, *REAL)),
    Variant("center: complex", (*SIZE, *OUTER)),
    Variant("center: complex, B and C constant", (*SIZE, *OUTER, *CONSTANT)),
)
"""With all LTI, the fourth line is the last one on the left."""

TABLE_14 = tuple(
    Rung(2048 * pieces, batch)
    for pieces, batch in ((4, 128), (8, 64), (15, 32), (30, 16), (59, 8), (117, 4), (234, 2), (468, 1))
)
LENGTHS_10 = tuple(Rung(2**k, 2 ** (20 - k)) for k in range(11, 19))
TINY = (Rung(64, 2), Rung(128, 1))


def splits(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The wav files for training, validation and test, numbers in their names in numerical order. Raises DataError for
    too few to be split."""
    files = sorted(folder.glob("*.wav"), key=lambda path: [part.zfill(12) for part in re.split(r"(\d+)", path.name)])
    first, second = int(0.88 * len(files)), int(0.94 * len(files))
    if not 0 < first < second < len(files):
        raise DataError(f"{folder} has {len(files)} wav files, too few for three splits. It needs {SOURCE}.")
    return files[:first], files[first:second], files[second:]


def _check_hours(folder: Path, *parts: Sounds) -> None:
    """Raise DataError unless training and test are 94 % of four hours."""
    hours = sum(int(part.bounds[-1]) for part in parts) / SAMPLE_RATE / 3600 / 0.94
    if not HOURS[0] <= hours <= HOURS[1]:
        raise DataError(f"{folder} has {hours:.2f} hours of sound, not the published four. It needs {SOURCE}.")


def run(context: Context) -> list[Table]:
    sevenths = context.at(full=TABLE_14, small=TABLE_14[:2], tiny=TINY)
    tenths = context.at(full=LENGTHS_10, small=LENGTHS_10[:2], tiny=TINY)
    groups = (
        ("YouTubeMix: Figure 7", FIGURE_7, sevenths, 200_000, 2e-3),
        ("YouTubeMix: Figure 10, left: blocks everywhere", LEFT, tenths, 100_000, 1e-3),
        ("YouTubeMix: Figure 10, right: blocks in the center, Mamba-S4 outside", RIGHT, tenths, 100_000, 1e-3),
    )
    names = [variant.name for _, group, *_ in groups for variant in group]
    lengths = list(dict.fromkeys(str(rung.length) for rung in (*sevenths, *tenths)))
    wanted, asked = context.wanted(names, lengths), context.wanted(lengths, names)
    folder = context.brought("youtubemix", None, SOURCE)
    train_files, _, test_files = splits(folder)
    train_on, test_on = (
        Sounds.read(files, context.device, label) for label, files in (("training", train_files), ("test", test_files))
    )
    if context.scale == "full":
        _check_hours(folder, train_on, test_on)
    tables: list[Table] = []
    for title, group, rungs, steps, lr in groups:
        steps = context.at(full=steps, small=50, tiny=2)
        some = [rung for rung in rungs if str(rung.length) in asked]
        ladder = Ladder(train_on, test_on, some, steps, lr, drop_last=True)
        lines = [line(context, variant, ladder) for variant in group if variant.name in wanted and some]
        if lines:
            tables.append(Table(title, _about(context, ladder), columns(some), lines))
    return tables


def _about(context: Context, ladder: Ladder) -> str:
    return (
        f"Piano at 16 kHz, 8-bit mu-law after each minute's own scaling. {ladder.steps:,} steps, AdamW (0.9, 0.95), "
        f"learning rate {ladder.lr} with a tenth of the steps as warm-up and a cosine to a tenth of it, weight decay "
        f"0.1, bf16 autocast on a GPU. {LENGTHS} The paper does not say what Figure 10's pooling and batches are (here "
        "4, SaShiMi's, and 2^20 samples), nor how recordings are scaled or gradients clipped (here at norm 1)."
    )


recipe = Recipe(run, seeds=1, brings=True)
