"""`mambaseq dna/import`: a published model as one of ours, for predict, embeddings and fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mambaseq.arguments import Arguments
from mambaseq.checkpoints import LoadedModel, ModelCard
from mambaseq.checkpoints.hub import save_pretrained
from mambaseq.errors import ConfigError
from mambaseq.limits import WINDOW
from mambaseq.outputs import output_file
from mambaseq_dna.published.folders import read_published
from mambaseq_dna.published.settings import Imported
from mambaseq_dna.tokenizer import BaseTokenizer

_FROM_DATA = ("vocab_size", "complement")  # of encoder and head: a run's data say them


def run(argv: list[str]) -> None:
    parser = Arguments(
        prog="mambaseq dna/import",
        description="Make a published language model of DNA one of ours, with the same outputs: Caduceus-Ph, "
        "Caduceus-PS or HyenaDNA, from a downloaded folder. The result is a model for predict (bits a base, "
        "embeddings), ms.load and fit --init-from.",
    )
    parser.add_argument(
        "folder", type=Path, help="config.json, and model.safetensors or pytorch_model.bin, whole or in parts"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="the folder to write")
    parser.add_argument(
        "--length",
        type=int,
        help="bases that predict reads at once by default; otherwise what the folder says of the model's longest input",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="also write a configuration that goes on training it: FILE.yaml"
    )
    given = parser.parse_args(argv)
    if given.length is not None:
        if given.length < 2:
            raise ConfigError(f"--length must be at least 2, not {given.length}.")
        WINDOW.check(given.length, "--length")
    found = import_published(given.folder, given.out, given.length)
    if given.config is not None:
        with output_file(given.config) as file:
            file.write(configuration(found, given.out).encode())
    print(
        f"{given.out}: {found.kind}, {found.model.n_parameters():,} parameters, {_trained_for(found)}"
        + "".join(f"; {note}" for note in found.notes)
    )


def import_published(folder: str | Path, out: str | Path, length: int | None = None) -> Imported:
    """Write a published model's folder (see `read_published`) as an exported model with the tokenizer `dna/base`.

    out: replaced if it holds a model and nothing else. length: bases that `predict` reads at once by default.

    Raises UserError for a folder that cannot be read, or written.
    """
    found = read_published(folder)
    assert found.model.spec is not None
    if length is not None:
        found.length = length
    tokenizer = BaseTokenizer()
    card = ModelCard(
        spec=found.model.spec,
        tokenizer={"name": "dna/base", "options": tokenizer.options},
        length=found.length,
        reader="dna/fasta",
        writer="dna/fasta",
        reader_options={"lowercase": "fold"},
        task=found.task,
    )
    save_pretrained(LoadedModel(found.model, card, tokenizer, Path(folder)), out)
    return found


def configuration(found: Imported, model: Path) -> str:
    """A YAML configuration that trains the model further on bases of FASTA files."""
    import yaml

    spec: dict[str, Any] = dict(found.model.spec or {})
    for part in ("encoder", "head"):
        spec[part] = {key: value for key, value in spec[part].items() if key not in _FROM_DATA}
    masked = found.task == "masked"
    data: dict[str, Any] = {"name": "dna/genome", "length": min(found.length, 8192)}
    if masked:
        data |= {"objective": "masked"}
    strands = spec["encoder"]["name"] == "rc_tokens"
    if strands:
        data |= {"reverse_complement": False}
    settings = {
        "seed": 0,
        "metrics": ["bits_per_token", "token_accuracy"],
        "data": data,
        "loader": {"batch_size": 8},
        "model": spec,
        "finetune": {"init_from": str(model)},
        "optimizer": {"lr": 1.0e-4, "warmup_steps": 100},
        "checkpoint": {"monitor": "val/bits_per_token"},
        "trainer": {"max_steps": 1000, "val_check_interval": 500, "check_val_every_n_epoch": None},
    }
    head = (
        f"# Goes on training {found.kind}, imported to {model}, on data.fasta (the default ships with the project).\n"
        f"# For labels: other data, model.head.name {'rc_' if strands else ''}classification, "
        "model.tie_embeddings false; all else of model stays.\n"
    )
    return head + yaml.safe_dump(settings, sort_keys=False)


def _trained_for(found: Imported) -> str:
    return "masked bases" if found.task == "masked" else "the next base"
