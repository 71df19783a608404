"""`mambaseq predict`: apply a run to files of its own kind."""

from __future__ import annotations

import os
from pathlib import Path

from mambaseq.arguments import Arguments, add_condition, add_condition_columns, add_dtype, parse_inputs
from mambaseq.cli.arguments import read_card
from mambaseq.cli.imports import add_allow_import
from mambaseq.data.cache import check_there
from mambaseq.importing import uncollected
from mambaseq.runs.tables import check_ending


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq predict",
        description="Classify windows of records, give their values (regression), label each position, or measure "
        "bits a token (language models): the model's head decides, unless --what asks for something else. Writes a "
        "table in the order of the records: CSV, TSV, parquet, npz or one of `mambaseq list tables`, by the name's "
        "ending.",
        epilog="A row without a prediction (of an empty record, for instance) has empty cells and a note that says "
        "why. Text that begins with =, +, -, @, a tab or a carriage return is written with an apostrophe before it, "
        "so that no spreadsheet runs it as a formula; numbers stay numbers. When a file or record cannot be used, "
        "the rows that were finished before are kept in FILE.partial.csv (or .tsv, ...), until FILE.csv is finished, "
        "and the exit code is 2.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files that the run's reader understands")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="FILE.csv, .tsv, .parquet, .npz, .bed, .bw, ..., a pipe or /dev/stdout",
    )
    parser.add_argument(
        "--what",
        choices=("answers", "tokens", "embeddings"),
        default="answers",
        help="answers of the head (the default), bits of each token of a language model, or embeddings",
    )
    parser.add_argument(
        "--pool",
        choices=("mean", "last", "none", "positions"),
        default="mean",
        help="embeddings: the mean over a record (the default), its last position, or none: all positions",
    )
    parser.add_argument(
        "--layer",
        type=int,
        help="embeddings: after this layer, 1 being the first; the default is the backbone's output",
    )
    parser.add_argument("--reader", help="another reader (`mambaseq list readers`)")
    add_condition(parser, "for conditional models, the condition of all records")
    add_condition_columns(parser)
    parser.add_argument(
        "--window",
        type=int,
        help="tokens of each window; the default is the length of training, and whole records for language models",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="from the start of a window to that of the next; answers for positions are merged where windows overlap, "
        "and the last window of a record is complete. Windows are end to end when left out",
    )
    parser.add_argument(
        "--merge",
        choices=("mean", "centre"),
        default="mean",
        help="of overlapping windows: their mean (the default), or weighed by how near the centre of each one is",
    )
    parser.add_argument("--both-strands", action="store_true", help="DNA: the mean of both strands")
    parser.add_argument(
        "--region",
        action="append",
        default=[],
        metavar="REGION",
        help="parts of the records, as the reader names them (dna/fasta: chr1:1,001-2,000, counted from 1, or a BED "
        "file); may be repeated",
    )
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME", help="write this column only; may be repeated"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="windows of about one length that are read together; more if they are short, fewer if long on a CPU "
        "(default 16)",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    add_dtype(parser)
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out files and records that cannot be used, and say which"
    )
    add_allow_import(parser)
    arguments = parse_inputs(parser, argv)
    _check_files(arguments.checkpoint, arguments.reader, arguments.inputs, Path(arguments.out))
    with uncollected(for_good=True):
        from mambaseq.runs.prediction import predict, report

    out = Path(arguments.out)
    found = predict(
        arguments.checkpoint,
        [Path(p) for p in arguments.inputs],
        out,
        what=arguments.what,
        pool=arguments.pool,
        layer=arguments.layer,
        reader=arguments.reader,
        condition=arguments.condition,
        condition_column=arguments.condition_column,
        condition_table=arguments.condition_table,
        window=arguments.window,
        stride=arguments.stride,
        merge=arguments.merge,
        both_strands=arguments.both_strands,
        regions=arguments.region,
        columns=arguments.column,
        batch_size=arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
        skip_bad=arguments.skip_bad,
    )
    report(found, out)
    return 0


def _check_files(checkpoint: str, reader: str | None, inputs: list[str], out: Path) -> None:
    """Raise UserError, before anything slow is imported, where there is no model or no input, and for an ending of the
    table that there is not."""
    own = read_card(checkpoint).get("reader")
    for name in inputs:
        check_there(name)
    if not os.path.lexists(out):  # it may be an input, which is told as that
        check_ending(out, str(reader or own or "").partition("/")[0])
