"""Bits a sample of piano by the length of training windows: Figures 7 and 10 of Mamba's paper (arXiv:2312.00752)."""

from __future__ import annotations

import re
from pathlib import Path

from mambaseq.errors import DataError
from mambaseq.reproduction import Context, Recipe, Table
from mambaseq_audio.recipes.by_length import LENGTHS, Ladder, Rung, columns, line
from mambaseq_audio.recipes.published import SAMPLE_RATE, Sounds, Variant, sizes_of

SOURCE = (
    "YouTubeMix (DeepSound 2017), four hours of solo piano as wav files of a minute at 16,000 samples a second, as "
    "SaShiMi's authors share them; 88, 6 and 6 % of the files, in the order of their names, are for training, "
    "validation and test"
)
HOURS = 3.9, 4.1

FIGURE_7 = (
    Variant("Mamba, 3.5 M", "audio/youtubemix", "about 1.30 at 958,464", 3.5),
    Variant("S4+MLP", "audio/youtubemix_s4", "about 1.35 at 958,464"),
)
"""Bits read from the figure."""

LEFT = (
    Variant("everywhere: S4+MLP", "audio/figure10_s4"),
    Variant("everywhere: Mamba (S6), real", "audio/figure10_real"),
    Variant("everywhere: complex", "audio/figure10_complex"),
    Variant("everywhere: complex, B and C constant", "audio/figure10_constant"),
    Variant("everywhere: Mamba-S4 (complex, LTI)", "audio/figure10_lti"),
)
RIGHT = (
    Variant("center: Mamba (S6), real", "audio/figure10_center_real"),
    Variant("center: complex", "audio/figure10_center_complex"),
    Variant("center: complex, B and C constant", "audio/figure10_center_constant"),
)
"""With all LTI, the fourth line is the last one on the left."""

TABLE_14 = tuple(
    Rung(2048 * pieces, batch)
    for pieces, batch in ((4, 128), (8, 64), (15, 32), (30, 16), (59, 8), (117, 4), (234, 2), (468, 1))
)
LENGTHS_10 = tuple(Rung(2**k, 2 ** (20 - k)) for k in range(11, 19))
SMALL = (Rung(512, 4), Rung(1024, 2))  # a million samples a step take a CPU minutes
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
    sevenths, tenths = (context.at(full=rungs, small=SMALL, tiny=TINY) for rungs in (TABLE_14, LENGTHS_10))
    groups = (
        ("YouTubeMix: Figure 7", FIGURE_7, sevenths),
        ("YouTubeMix: Figure 10, left: blocks everywhere", LEFT, tenths),
        ("YouTubeMix: Figure 10, right: blocks in the center, Mamba-S4 outside", RIGHT, tenths),
    )
    names = [variant.name for _, group, _ in groups for variant in group]
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
    for title, group, rungs in groups:
        some = [rung for rung in rungs if str(rung.length) in asked]
        ladder = Ladder(train_on, test_on, some, context.at(full=None, small=20, tiny=2), drop_last=True)
        lines = [line(context, variant, ladder) for variant in group if variant.name in wanted and some]
        if lines:
            tables.append(Table(title, _about(group[0].config, ladder), columns(some), lines))
    return tables


def _about(config: str, ladder: Ladder) -> str:
    sizes = sizes_of(config)  # of all in the group
    return (
        f"Piano at 16 kHz, 8-bit mu-law after each minute's own scaling. {ladder.steps or sizes.steps:,} steps, AdamW "
        f"(0.9, 0.95), learning rate {sizes.optimizer.lr} with a tenth of the steps as warm-up and a cosine to a tenth "
        f"of it, weight decay {sizes.optimizer.weight_decay}, bf16 autocast on a GPU. {LENGTHS} The paper does not say "
        "what Figure 10's pooling and batches are (here 4, SaShiMi's, and 2^20 samples), nor how recordings are scaled "
        f"or gradients clipped (here at norm {sizes.clip:g})."
    )


recipe = Recipe(run, seeds=1, brings=True, configs=tuple(one.config for one in (*FIGURE_7, *LEFT, *RIGHT)))
