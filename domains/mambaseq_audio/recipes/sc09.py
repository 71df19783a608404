"""Unconditional speech on SC09: Tables 4 and 5 of Mamba's paper (arXiv:2312.00752), likelihoods."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mambaseq.checkpoints import ModelCard, save_model
from mambaseq.errors import DataError, cut_list
from mambaseq.models import SequenceModel
from mambaseq.reproduction import Context, Line, Recipe, Table
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.recipes.published import COLUMNS, SAMPLE_RATE, Sounds, Variant, make_model, sizes_of, trained

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
COUNTS = {"train": 31_158, "validation": 3_643, "test": 4_107}
"""Clips of each split, of Speech Commands v0.02: 16 times 200,000 clips are then the paper's 100 epochs."""

SOURCE = (
    "the folders zero to nine of Speech Commands v0.02 (arXiv:1804.03209, CC BY 4.0), each with its wav files, and the "
    "archive's validation_list.txt and testing_list.txt beside them"
)

TABLE_4 = (
    Variant("Mamba, 6.1 M", "audio/sc09", "NLL 1.852, FID 0.94, IS 6.26, mIS 88.54, AM 0.52", 6.1),
    Variant("Mamba, 24.3 M", "audio/sc09_large", "NLL 1.860, FID 0.67, IS 7.33, mIS 144.9, AM 0.36", 24.3),
    Variant("SaShiMi, 5.8 M", "audio/sc09_sashimi", "NLL 1.873, FID 1.99, IS 5.13, mIS 42.57, AM 0.74", 5.8),
)


def _center(outer: str, center: str, config: str, paper: str) -> Variant:
    return Variant(f"{outer}, {center} in the center", f"audio/{config}", paper)


TABLE_5 = (
    _center("S4+MLP", "MHA+MLP", "table5_s4_attention", "NLL 1.859, FID 1.45, IS 5.06, mIS 47.03, AM 0.70"),
    _center("S4+MLP", "S4+MLP", "sc09_sashimi", "NLL 1.867, FID 1.43, IS 5.42, mIS 53.54, AM 0.65"),
    _center("S4+MLP", "Mamba", "table5_s4_mamba", "NLL 1.859, FID 1.42, IS 5.71, mIS 56.51, AM 0.64"),
    _center("Mamba", "MHA+MLP", "table5_mamba_attention", "NLL 1.850, FID 1.37, IS 5.63, mIS 58.23, AM 0.62"),
    _center("Mamba", "S4+MLP", "table5_mamba_s4", "NLL 1.853, FID 1.07, IS 6.05, mIS 73.34, AM 0.55"),
    _center("Mamba", "Mamba", "sc09", "NLL 1.852, FID 0.94, IS 6.26, mIS 88.54, AM 0.52"),
)


class Clips(NamedTuple):
    """Files of each split."""

    train: list[Path]
    validation: list[Path]
    test: list[Path]


def clips(folder: Path, whole: bool) -> Clips:
    """The files of each split by the official lists; their other words are left out.

    whole: whether there must be as many as are published. Raises DataError for a word without a file, a list that is
        missing or names a clip that is not there, and for other numbers of clips.
    """
    found = {f"{word}/{path.name}": path for word in WORDS for path in sorted((folder / word).glob("*.wav"))}
    if empty := [word for word in WORDS if not any(name.startswith(f"{word}/") for name in found)]:
        raise DataError(f"{folder} has no wav files in {cut_list(empty)}. It needs {SOURCE}.")
    listed: dict[str, list[Path]] = {}
    for split, name in LISTS.items():
        if not (folder / name).is_file():
            raise DataError(f"There is no {folder / name}. The folder needs {SOURCE}.")
        lines = [line.strip() for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        wanted = [line for line in lines if line.partition("/")[0] in WORDS]
        if missing := [line for line in wanted if line not in found]:
            raise DataError(
                f"{folder / name} names {len(missing):,} of the clips, but they are not there: {cut_list(missing, 3)}. "
                "Copy the whole folders of the same version."
            )
        listed[split] = [found.pop(line) for line in wanted if line in found]
    splits = Clips(list(found.values()), listed["validation"], listed["test"])
    counts = {name: len(getattr(splits, name)) for name in COUNTS}
    if whole and counts != COUNTS:
        told = ", ".join(f"{counts[name]:,} {name} clips instead of {wanted:,}" for name, wanted in COUNTS.items())
        raise DataError(f"{folder} is not the published SC09: {told}. It needs {SOURCE}.")
    if not splits.train or not splits.test:
        raise DataError(f"{folder} has no clip for training or none for the test. It needs {SOURCE}.")
    return splits


def _keep(folder: Path, model: SequenceModel) -> None:
    """Write the model's folder, from which `mambaseq generate` makes the clips that `mambaseq audio/score` scores."""
    assert model.spec is not None
    card = ModelCard(
        model.spec,
        {"name": "audio/mulaw", "options": {}},
        length=SAMPLE_RATE,
        start_ids=[MuLaw.start_id],
        reader="audio/audio",
        writer="audio/wav",
        reader_options={"sample_rate": SAMPLE_RATE},
        writer_options={"sample_rate": SAMPLE_RATE},
        generation={"max_new_tokens": SAMPLE_RATE, "temperature": 1.0},
        task="next_token",
    )
    save_model(folder, model, card, MuLaw())


def run(context: Context) -> list[Table]:
    variants = {one.name: one for one in (*TABLE_4, *TABLE_5)}
    trainings = {one.config: one for one in reversed(variants.values())}  # two lines of Table 5 are some of Table 4
    wanted = context.wanted(variants)
    folder = context.brought("sc09", None, SOURCE)
    full = sizes_of("audio/sc09")  # of all
    sizes = context.at(
        full=full,
        small=full.shorter(100)._replace(length=2_000, batch_size=4, tested=50),
        tiny=full.shorter(2)._replace(length=64, batch_size=2, tested=4),
    )
    splits = clips(folder, context.scale == "full")
    train_on, test_on = (
        Sounds.read(files, context.device, label)
        for label, files in (("training clips", splits.train), ("test clips", splits.test))
    )
    places = train_on.windows(sizes.length, drop_last=False), test_on.windows(sizes.length, drop_last=False)

    def line(name: str) -> Line:
        variant = trainings[variants[name].config]

        def trial(seed: int, checkpoint: Path) -> dict[str, float]:
            model = make_model(context, variant.config, seed)
            found = trained(
                context, model, (train_on, places[0]), (test_on, places[1]), sizes, seed, checkpoint, variant.name
            )
            _keep(context.folder / "models" / checkpoint.stem, model)
            return found

        return Line(name, context.over_seeds(f"{variant.name} steps={sizes.steps}", trial), variants[name].paper)

    about = (
        f"SC09, clips of a second at 16 kHz, unconditional, 8-bit mu-law after each clip's own scaling, as in "
        f"SaShiMi's published code. {sizes.steps:,} steps of {sizes.batch_size} clips, AdamW (0.9, 0.95), learning "
        f"rate {sizes.optimizer.lr} with a tenth of the steps as warm-up and a cosine to a tenth of it, weight decay "
        f"{sizes.optimizer.weight_decay}, gradients clipped at {sizes.clip}, bf16 autocast on a GPU; "
        f"{len(splits.train):,} training clips, drawn with replacement; test: all samples of "
        f"{min(sizes.tested, len(splits.test)):,} clips. The paper does not say what unit its NLL has, how short clips "
        "are filled (here they are masked), or which of its settings the baselines had. The models are in the folder "
        "models: `mambaseq generate` makes clips from them, which `mambaseq audio/score` scores by FID, IS, mIS and AM."
    )
    tables: list[Table] = []
    for title, group in (
        ("SC09: Table 4", TABLE_4),
        ("SC09: Table 5, what is in the outer stages, and in the center", TABLE_5),
    ):
        if lines := [line(one.name) for one in group if one.name in wanted]:
            tables.append(Table(title, about if not tables else "As above; 8 layers a stage.", COLUMNS, lines))
    return tables


recipe = Recipe(run, seeds=1, brings=True, configs=tuple({one.config: None for one in (*TABLE_4, *TABLE_5)}))
