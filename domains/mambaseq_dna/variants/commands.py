"""`mambaseq dna/variants` and `mambaseq dna/mutagenesis`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambaseq.arguments import Arguments
from mambaseq.data.cache import check_there
from mambaseq.importing import uncollected
from mambaseq.outputs import is_stream
from mambaseq.resources import model_folder
from mambaseq_dna.variants.reasons import OTHER_REF, reasons_told


def _shared(parser: argparse.ArgumentParser, whats: tuple[str, ...]) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument(
        "--reference",
        required=True,
        action="append",
        metavar="FASTA",
        help="the assembly: a FASTA file or a pattern, plain or packed; may be given several times",
    )
    parser.add_argument(
        "--what",
        choices=whats,
        default="answers",
        help="answers: the log-likelihood ratio of a language model (nats; below 0: the alternative is less likely), "
        "or the change of a classifier's probabilities or of values; embeddings: how far the embedding moves",
    )
    parser.add_argument("--window", type=int, help="bases around the variant; the default is the length of training")
    parser.add_argument(
        "--both-strands",
        action=argparse.BooleanOptionalAction,
        help="the mean over both strands; the default for likelihoods and embeddings, but not for other answers",
    )
    parser.add_argument(
        "--pool",
        choices=("mean", "last", "variant"),
        default="mean",
        help="embeddings: the mean over the window (the default), its last position, or the mean over the allele",
    )
    parser.add_argument("--layer", type=int, help="embeddings: after this layer, 1 being the first")
    parser.add_argument("--batch-tokens", type=int, help="bases that are read at once; lower it if memory is short")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")


def _check_there(given: argparse.Namespace, *inputs: str) -> None:
    """Raise UserError where the model, the reference or another file is not there, before anything slow is imported."""
    model_folder(given.checkpoint)
    for name in (*given.reference, *inputs):
        check_there(name)


def _shared_options(given: argparse.Namespace) -> dict[str, Any]:
    """What was given for the options of `_shared` that are not files."""
    names = ("what", "window", "both_strands", "pool", "layer", "batch_tokens", "device")
    return {name: getattr(given, name) for name in names}


def variants(argv: list[str]) -> int:
    """`mambaseq dna/variants`."""
    parser = Arguments(
        prog="mambaseq dna/variants",
        description="Score variants with a model: each alternative of a VCF file (or of a table with CHROM, POS, REF "
        "and ALT) against the reference.",
        epilog="REF is compared with the reference, and chr1 is found where 1 is named. What cannot be scored keeps "
        "its row, with a note that says why.",
    )
    _shared(parser, ("answers", "embeddings", "both"))
    parser.add_argument("variants", metavar="VARIANTS", help="a VCF file or a table, plain or packed (gzip, bgzip)")
    parser.add_argument(
        "--out",
        default="/dev/stdout",
        metavar="FILE",
        help="FILE.tsv, .csv, .parquet or .vcf; the default is standard output",
    )
    given = parser.parse_args(argv)
    _check_there(given)
    with uncollected(for_good=True):
        from mambaseq_dna.variants.scoring import score_variants

    found = score_variants(
        given.checkpoint,
        given.reference,
        given.variants,
        given.out,
        table=False,
        **_shared_options(given),
    )
    if found.without:
        print(f"mambaseq dna/variants: {_told(found.without, found.rows)}", file=sys.stderr)
    out = Path(given.out)
    print(f"{_rows(found.rows)} in {out}", file=sys.stderr if is_stream(out) else sys.stdout)
    return 0


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _told(without: Mapping[str, int], rows: int) -> str:
    """How many variants have no score, and why."""
    count = sum(without.values())
    question = ""
    if sum(number for reason, number in without.items() if reason.startswith(OTHER_REF)) > rows / 20:
        question = " Is the reference the assembly that they were called on?"
    return f"{count:,} of {rows:,} have no score: {'; '.join(reasons_told(without))}.{question}"


def mutagenesis(argv: list[str]) -> int:
    """`mambaseq dna/mutagenesis`."""
    parser = Arguments(
        prog="mambaseq dna/mutagenesis",
        description="In-silico mutagenesis: the effect of every substitution in a region, as a table and a picture.",
    )
    _shared(parser, ("answers", "embeddings"))
    parser.add_argument(
        "--region", required=True, metavar="NAME:START-STOP", help="such as chr17:43044295-43044394, both ends counted"
    )
    parser.add_argument("--answer", metavar="NAME", help="the class or value whose change is the effect, if several")
    parser.add_argument("--out", required=True, metavar="FILE", help="FILE.tsv, .csv or .parquet")
    parser.add_argument("--picture", metavar="FILE", help="FILE.png or .svg: effects as colours below a logo")
    given = parser.parse_args(argv)
    _check_there(given)
    with uncollected(for_good=True):
        from mambaseq_dna.variants.mutagenesis import mutagenesis as run

    table = run(
        given.checkpoint,
        given.reference,
        given.region,
        given.out,
        picture=given.picture,
        answer=given.answer,
        **_shared_options(given),
    )
    drawn = "" if given.picture is None else f", and a picture in {given.picture}"
    print(f"{_rows(len(table))} in {given.out}{drawn}", file=sys.stderr if is_stream(Path(given.out)) else sys.stdout)
    return 0
