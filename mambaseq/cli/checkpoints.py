"""`mambaseq import` and `mambaseq export`: published checkpoints to runs, and back."""

from __future__ import annotations

from mambaseq.arguments import DTYPES, Arguments, dtype_name
from mambaseq.cli.imports import add_allow_import
from mambaseq.importing import uncollected
from mambaseq.resources import model_folder


def run(argv: list[str], command: str) -> int:
    return _import(argv) if command == "import" else _export(argv)


def _import(argv: list[str]) -> int:
    parser = Arguments(
        prog="mambaseq import",
        description="Make a published language model a run with the same outputs: generate, predict, test and fit "
        "--init-from take it. Mamba and Mamba-2 of state-spaces, their -hf forms, Mamba-Codestral, "
        "Falcon Mamba and Bamba; nothing that is downloaded is run.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="a repository on the Hugging Face Hub (state-spaces/mamba-130m-hf), or a folder: config.json, and "
        "model.safetensors or pytorch_model.bin, whole or in parts",
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder, which must not be there yet")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a tokenizer.json, or a folder with one, where the checkpoint has none or another is wanted",
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=("keep", *DTYPES),
        default="keep",
        help="of the weights in the run; they are kept as they are by default",
    )
    parser.add_argument("--length", type=int, help="tokens that predict reads at once by default (2048)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the repository")
    given = parser.parse_args(argv)
    with uncollected(for_good=True):
        from mambaseq.runs.published import import_checkpoint

    found = import_checkpoint(
        given.checkpoint,
        given.out,
        tokenizer=given.tokenizer,
        dtype=given.dtype,
        length=given.length,
        revision=given.revision,
    )
    told = [f"{found.path}: {found.model.model.n_parameters():,} parameters", *found.notes]
    print("; ".join(told))
    return 0


def _export(argv: list[str]) -> int:
    parser = Arguments(
        prog="mambaseq export",
        description="Write a run's model as a folder of another house: config.json, generation_config.json, weights "
        "and tokenizer, which transformers loads by AutoModelForCausalLM.from_pretrained(FOLDER).",
        epilog="Language models of one kind of layer, mamba or mamba2 as published, and hybrids as Bamba's have such a "
        "form; others are refused, and the reason is named.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write, not there yet")
    parser.add_argument("--format", choices=("transformers",), default="transformers", help="whose form")
    parser.add_argument("--dtype", type=dtype_name, choices=DTYPES, help="of the weights; otherwise that of the run's")
    add_allow_import(parser)
    given = parser.parse_args(argv)
    model_folder(given.checkpoint)  # before anything slow is imported
    with uncollected(for_good=True):
        from mambaseq.runs.published import export_checkpoint

    found = export_checkpoint(given.checkpoint, given.out, format=given.format, dtype=given.dtype)
    told = [f"{found.path}: {found.model.model.n_parameters():,} parameters, for {given.format}", *found.notes]
    print("; ".join(told))
    return 0
