"""`mambaseq text/lambada`, `mambaseq text/perplexity` and `mambaseq text/recall`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from mambaseq.arguments import Arguments
from mambaseq.errors import ConfigError, shown
from mambaseq.importing import uncollected
from mambaseq.outputs import check_json, output_file, output_target
from mambaseq.resources import model_folder


def _parser(name: str, description: str, what: str) -> argparse.ArgumentParser:
    parser = Arguments(prog=f"mambaseq text/{name}", description=description)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument("files", nargs="+", metavar="FILE", help=what)
    parser.add_argument("--field", default="text", help="the field of jsonl and parquet rows that holds the text")
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers to this file as well")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    return parser


def lambada(argv: list[str]) -> int:
    """`mambaseq text/lambada`."""
    parser = _parser(
        "lambada",
        "Accuracy and perplexity of the last word of passages, given the rest, as lm-eval's lambada_openai has them.",
        "passages: jsonl or parquet with one a row (LAMBADA's 5,153), or plain text with one a line",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N passages")
    given = parser.parse_args(argv)
    check_json(given.out)
    model_folder(given.checkpoint)  # before anything slow is imported
    if given.limit is not None and given.limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {given.limit}.")
    with uncollected(for_good=True):
        from mambaseq_text.evaluating import Reader, last_words

    reader = Reader(given.checkpoint, given.device)
    found = last_words(reader, given.files, field=given.field, limit=given.limit, progress=sys.stderr.isatty())
    print(f"passages    {found.passages:,} (last words of {found.tokens / found.passages:.2f} tokens on average)")
    print(f"accuracy    {found.accuracy:.4f} (standard error {found.accuracy_error:.4f})")
    print(f"perplexity  {found.perplexity:,.4f} (of the last word)")
    _save(given.out, dataclasses.asdict(found))
    return 0


def perplexity(argv: list[str]) -> int:
    """`mambaseq text/perplexity`."""
    parser = _parser(
        "perplexity",
        "Perplexity of documents of any length: every token is predicted from all before it in its document, by the "
        "state that is passed on.",
        "jsonl or parquet with a document a row, or plain text",
    )
    parser.add_argument("--encoding", default="utf-8", help="of the files")
    parser.add_argument(
        "--unit",
        choices=("file", "paragraph", "line"),
        default="file",
        help="what a document is in plain text",
    )
    parser.add_argument("--each", action="store_true", help="print a line for each document, too")
    given = parser.parse_args(argv)
    check_json(given.out)
    model_folder(given.checkpoint)  # before anything slow is imported
    with uncollected(for_good=True):
        from mambaseq_text.evaluating import Reader, Surprise, surprise, total

    reader = Reader(given.checkpoint, given.device)
    found: list[Surprise] = []
    for where, one in surprise(reader, given.files, field=given.field, encoding=given.encoding, unit=given.unit):
        found.append(one)
        if given.each:
            print(f"{where}: {one.tokens:,} tokens, perplexity {one.token_perplexity:,.4f}", flush=True)
    whole = total(found)
    print(f"documents         {whole.documents:,} ({whole.tokens:,} tokens, {whole.bytes:,} bytes predicted)")
    print(f"bits a byte       {whole.bits_per_byte:.4f}")
    print(f"token perplexity  {whole.token_perplexity:,.4f}")
    print(f"word perplexity   {whole.word_perplexity:,.4f}")
    _save(given.out, whole.plain())
    return 0


def recall(argv: list[str]) -> int:
    """`mambaseq text/recall`."""
    parser = Arguments(
        prog="mambaseq text/recall",
        description="What a model finds again in long texts: a number hidden at some depth, and all of several. Texts "
        "are read in parts with the state passed on.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument(
        "--scale",
        choices=("tiny", "small", "full"),
        default="small",
        help="tiny: a trial; small: 1 k to 16 k tokens; full: 1 k to 1 M, which takes a GPU",
    )
    parser.add_argument("--lengths", metavar="N[,N...]", help="tokens of the texts, in place of the scale's")
    parser.add_argument(
        "--filler", action="append", metavar="FILE", help="text around what is hidden; the default is tinyshakespeare"
    )
    parser.add_argument("--seed", type=int, default=0, help="of places, numbers and filler")
    parser.add_argument("--out", metavar="FOLDER", help="write recall.json, recall.txt and recall.png to it")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    given = parser.parse_args(argv)
    model_folder(given.checkpoint)  # before anything slow is imported
    lengths = None if given.lengths is None else _lengths(given.lengths)
    if given.seed < 0:
        raise ConfigError(f"--seed must be at least 0, not {given.seed}.")
    with uncollected(for_good=True):
        from mambaseq.runs.devices import memory_told
        from mambaseq_text.corpus import SHAKESPEARE
        from mambaseq_text.evaluating import Reader
        from mambaseq_text.recall import SCALES, Found, Texts, table, write
        from mambaseq_text.recall import recall as recalled

    folder = None if given.out is None else output_target(Path(given.out), folder=True)
    scale, reader = SCALES[given.scale], Reader(given.checkpoint, given.device)
    texts = Texts(reader, given.filler or SHAKESPEARE, given.seed)
    found: list[Found] = []
    with memory_told("--lengths"):
        for one in recalled(reader, texts, scale, lengths, progress=sys.stderr.isatty()):
            found.append(one)
            print(f"{one.length:,} tokens: needle {one.needles[0]:.0%}", file=sys.stderr, flush=True)
    print(table(found, scale))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, found, scale)
    return 0


def _lengths(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"--lengths must be whole numbers of at least 1 with commas between, not {shown(text)}.")
    return found


def _save(out: str | None, numbers: dict[str, Any]) -> None:
    if out is None:
        return
    from mambaseq.atomic import json_text

    with output_file(Path(out)) as file:
        file.write((json_text(numbers, indent=2) + "\n").encode())
