"""Published checkpoints as runs, and runs as folders of transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from mambaseq.atomic import atomic_folder
from mambaseq.checkpoints.export import LoadedModel, has_model, load_model, save_model
from mambaseq.checkpoints.hub import download, download_tokenizer
from mambaseq.checkpoints.published import load_published
from mambaseq.checkpoints.to_transformers import save_transformers
from mambaseq.errors import ConfigError, UserError, shown
from mambaseq.limits import WINDOW
from mambaseq.plain import dump_yaml
from mambaseq.runs.naming import PROVIDED

FORMATS = ("transformers",)

_WITHOUT = (
    "no tokenizer came with it, so generate, predict and serve cannot read text. What works: fit --init-from, whose "
    "data name a tokenizer, and ids in Python (SequenceModel.from_pretrained, ms.generate). Or import it again with "
    "--tokenizer FILE, the tokenizer.json that the model was trained with, or a folder with one (tokenizer.model and "
    "vocab.json are not read; transformers' save_pretrained writes a tokenizer.json)"
)


class Imported(NamedTuple):
    """path: the run's folder. notes: on what is missing or was added, a phrase each."""

    path: Path
    model: LoadedModel
    notes: list[str]


def import_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "keep",
    length: int | None = None,
    revision: str | None = None,
) -> Imported:
    """Make a published Mamba a run of ours, with the same outputs: predict, generate, test and `fit --init-from` take
    it.

    checkpoint: a folder (see `load_published`), or a repository's name on the Hugging Face Hub, "user/name". out: a
    folder that is not there, or empty. tokenizer, dtype, length: see `load_published`. revision: of the repository.

    The run has a configuration only where there is a tokenizer, since its data are texts. Raises UserError for what
    cannot be read, downloaded or written.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already, and would be overwritten. Give another --out, or remove it.")
    if length is not None:
        if length < 2:
            raise ConfigError(f"--length must be at least 2, not {length}.")
        WINDOW.check(length, "--length")
    notes = []
    if Path(checkpoint).is_dir():
        folder = Path(checkpoint)
    else:
        folder = download(str(checkpoint), revision=revision)
        if tokenizer is None and not (folder / "tokenizer.json").is_file():
            tokenizer = download_tokenizer(str(checkpoint))
            notes += [] if tokenizer is None else ["with the tokenizer of GPT-NeoX, which it was trained with"]
    if has_model(folder):
        raise UserError(f"{folder} holds a model of mambaseq, which needs no import. Give it as --checkpoint itself.")
    found = load_published(folder, tokenizer=tokenizer, dtype=dtype, length=length)
    rows = found.card.spec["encoder"]["vocab_size"]
    if found.tokenizer is None:
        notes.append(_WITHOUT)
    elif found.tokenizer.vocab_size < rows:
        notes.append(f"{rows - found.tokenizer.vocab_size} of the {rows:,} ids are padding")
    with atomic_folder(out) as temporary:
        save_model(temporary / "model", found.model, found.card, found.tokenizer)
        if found.tokenizer is not None:
            (temporary / "config.yaml").write_text(_configuration(found, out.resolve()), encoding="utf-8")
    return Imported(out, dataclasses.replace(found, source=out / "model" / "model.safetensors"), notes)


def _configuration(found: LoadedModel, out: Path) -> str:
    """The settings by which the run is evaluated, and trained further: on Shakespeare until other files are named."""
    assert found.card.tokenizer is not None
    spec: dict[str, Any] = dict(found.card.spec)
    for part in ("encoder", "head"):
        spec[part] = {key: value for key, value in spec[part].items() if key not in PROVIDED}
    options = {**found.card.tokenizer["options"], "path": str(out / "model" / "tokenizer.json")}
    settings = {
        "seed": 0,
        "metrics": ["bits_per_byte", "perplexity"],
        "data": {
            "name": "text/corpus",
            "length": found.card.length,
            "tokenizer": found.card.tokenizer["name"],
            "tokenizer_options": options,
        },
        "loader": {"batch_size": 4},
        "model": spec,
        "finetune": {"init_from": str(out)},
        "optimizer": {"lr": 1.0e-4, "warmup_steps": 100},
        "checkpoint": {"monitor": "val/bits_per_byte"},
        "generation": found.card.generation,
        "trainer": {"max_steps": 1000, "val_check_interval": 500, "check_val_every_n_epoch": None},
    }
    return (
        "# A published model, imported. test evaluates it on --data.files; fit --config with this file and another\n"
        "# --out trains it further.\n" + dump_yaml(settings)
    )


class Exported(NamedTuple):
    """path: the folder. notes: on what could not go along, a phrase each."""

    path: Path
    model: LoadedModel
    notes: list[str]


def export_checkpoint(
    checkpoint: str | Path, out: str | Path, *, format: str = "transformers", dtype: str | None = None
) -> Exported:
    """Write a run's model as a folder that transformers loads; see `save_transformers`.

    Raises UserError for a model that has no such form, and for what cannot be read or written.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {shown(format)}.")
    loaded = load_model(checkpoint)
    return Exported(Path(out), loaded, save_transformers(loaded, out, dtype=dtype))
