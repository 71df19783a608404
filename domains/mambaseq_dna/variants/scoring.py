"""Scores of the variants in a file: `score_variants`, which `mambaseq dna/variants` runs."""

from __future__ import annotations

import collections
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from mambaseq import limits
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.errors import ConfigError, DataError, UserError, shown
from mambaseq.outputs import is_stream, output_target
from mambaseq.runs.devices import choose_device, memory_told
from mambaseq.runs.tables import partial_path
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.vcf import Variant, is_vcf, read_variants
from mambaseq_dna.tokenizer import N, fold_case
from mambaseq_dna.variants.reasons import OTHER_REF, reasons_told
from mambaseq_dna.variants.scorers import Distance, Pool, Scorer, check_bases, scorer_of
from mambaseq_dna.variants.sites import Places, Site
from mambaseq_dna.variants.tables import check_ending, write_table, write_vcf

if TYPE_CHECKING:
    import pandas

What = Literal["answers", "embeddings", "both"]

_WINDOW = 4096  # of a model that does not say the length of its training
_TOKENS = {"cpu": 2**15, "cuda": 2**19}
_GATHERED, _GATHERED_BASES = 4096, 2**25  # variants, and bases, that are in memory together

_ENOUGH = 10  # variants, to tell that the reference is another assembly


class Scores(NamedTuple):
    """table: a `pandas.DataFrame`, a row for each alternative, in the order of the file: chrom, pos, id, ref, alt,
    line, the numbers of the model, n (bases of the reference's window that are N) and a note that says why there is no
    score. columns: of the numbers. rows: number of rows. without: how many have no score, by reason."""

    table: pandas.DataFrame
    columns: list[str]
    rows: int
    without: dict[str, int]


def score_variants(
    checkpoint: str | Path,
    reference: str | Path | Sequence[str | Path],
    variants: str | Path,
    out: str | Path | None = None,
    *,
    what: What = "answers",
    window: int | None = None,
    both_strands: bool | None = None,
    pool: Pool = "mean",
    layer: int | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    progress: bool = True,
    cache: str | Path | None = None,
) -> Scores:
    """Score every alternative of a VCF file, or of a table with CHROM, POS, REF and ALT.

    checkpoint: a run's folder or an exported model. reference: FASTA files of the assembly that the variants are on.
    out: CSV, TSV, parquet, or, for a VCF, VCF, by the name's ending. None writes nothing.
    what: "answers" of the head, the distance of "embeddings" (by pool and layer), or "both". See
        `mambaseq_dna.variants.scorers`.
    window: bases around the variant; None takes the length of training.
    both_strands: the mean over both; None: for likelihoods and distances, not for answers of classifiers.
    batch_tokens: bases that are read at once; more is faster, and needs more memory.

    Raises UserError for a model, file or setting that cannot be used, and where no variant can be scored. Scores that
    were finished before are kept at `mambaseq.runs.tables.partial_path(out)`.
    """
    source = Path(variants)
    if out is not None:
        out = Path(out)
        check_ending(out)
        if out.suffix.lower() == ".vcf" and not is_stream(out) and not is_vcf(source):
            raise ConfigError(f"--out {out}: {source} is a table, which has no VCF lines. Write a .tsv or .csv.")
        if out.exists() and out.samefile(source):
            raise ConfigError(f"--out {out} is the input and would be overwritten. Give another name.")
    if what not in ("answers", "embeddings", "both"):
        raise ConfigError(f"What is asked for is answers, embeddings or both, not {shown(what)}.")
    if what == "answers" and (pool != "mean" or layer is not None):
        raise ConfigError("--pool and --layer are for --what embeddings or both.")
    loaded, window, tokens = prepared(checkpoint, window, batch_tokens, device)
    scorers: list[Scorer] = [] if what == "embeddings" else [scorer_of(loaded, tokens)]
    if what != "answers":
        scorers.append(Distance(loaded, tokens, pool, layer))
    found = list(read_variants(source))
    places = Places(Assembly(reference, cache), scorers[0].tokenizer, window)
    reasons = [places.why_not(variant) for variant in found]
    check_assembly(source, reasons)
    columns = [column for scorer in scorers for column in scorer.columns]
    values = np.full((len(found), len(columns) + 1), np.nan)
    with _kept(found, columns, values, reasons, out), memory_told("--window, or --batch-tokens"):
        for numbers, sites in _sites(found, reasons, places, scorers[0].least, progress):
            scores = [np.concatenate(scorer.effects(sites, both_strands)) for scorer in scorers]
            unknown = np.concatenate([np.full((len(site.alts), 1), count_unknown(site)) for site in sites])
            values[numbers] = np.concatenate([*scores, unknown], axis=1)
    without = dict(collections.Counter(reason for reason in reasons if reason))
    if sum(without.values()) == len(found):
        told = "; ".join(reasons_told(without, 4))
        raise DataError(
            f"None of the {len(found):,} variants in {source} can be scored ({told}); nothing was written. Is the "
            "reference the assembly that they were called on?"
        )
    table = _table(found, columns, values, reasons)
    if out is not None and out.suffix.lower() == ".vcf" and not is_stream(out):
        write_vcf(source, table, columns, out)
    elif out is not None:
        write_table(table, out)
    return Scores(table, columns, len(found), without)


def check_assembly(source: Path, reasons: Sequence[str]) -> None:
    """Raise DataError if the REF of most variants is not in the reference: a quarter of bases agree by chance.

    reasons: why each variant cannot be scored, "" for those that can.
    """
    other = [reason for reason in reasons if reason.startswith(OTHER_REF)]
    compared = len(other) + reasons.count("")
    if compared >= _ENOUGH and len(other) > compared / 2:
        raise DataError(
            f"The REF of {len(other):,} of the {compared:,} variants in {source} that can be compared is not in the "
            f"reference (the first: {other[0]}); nothing was written. The others agree by chance: give the assembly "
            "that they were called on."
        )


@contextlib.contextmanager
def _kept(
    variants: Sequence[Variant], columns: Sequence[str], values: np.ndarray, reasons: Sequence[str], out: Path | None
) -> Iterator[None]:
    """Keep the scores that were finished before an error, before Ctrl-C or for lack of memory, beside `out`."""
    try:
        yield
    except (UserError, KeyboardInterrupt, MemoryError) as error:
        finished = np.flatnonzero(~np.isnan(values[:, -1]))
        if out is None or not len(finished) or is_stream(out):
            raise
        stop = int(finished[-1]) + 1
        kept = partial_path(output_target(out))
        kept = kept.with_suffix(".tsv") if kept.suffix.lower() == ".vcf" else kept
        write_table(_table(variants[:stop], columns, values[:stop], reasons[:stop]), kept)
        told = f"The {stop:,} rows finished before it are in {kept}."
        if isinstance(error, UserError):
            raise type(error)(f"{error} {told}") from error
        print(f"\n{told}", file=sys.stderr)
        raise


def prepared(
    checkpoint: str | Path, window: int | None, tokens: int | None, device: str | None
) -> tuple[LoadedModel, int, int]:
    """The model, the window and the bases that are read at once. Raises UserError."""
    place = choose_device(device)
    loaded = load_model(checkpoint, place)
    check_bases(loaded)
    if window is None:
        window = loaded.card.length or _WINDOW
    if window < 8:
        raise ConfigError(f"--window must be at least 8 bases, not {window}.")
    limits.WINDOW.check(window, "--window")
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--batch-tokens must be at least 1, not {tokens}.")
    return loaded, window, tokens or _TOKENS.get(place.type, _TOKENS["cpu"])


def count_unknown(site: Site) -> int:
    """How many bases of the reference's window are N."""
    return int(sum((fold_case(part) == N).sum() for part in (site.before, site.ref, site.after)))


def _repeats(variants: Sequence[Variant]) -> list[str]:
    """For each variant a note if an earlier line has the same one."""
    seen: dict[tuple[str, int, str, str], int] = {}
    lines = [seen.setdefault((v.chrom, v.pos, v.ref.upper(), v.alt.upper()), v.line) for v in variants]
    return [
        "" if line == variant.line else f"the same as in line {line:,}"
        for line, variant in zip(lines, variants, strict=True)
    ]


def _sites(
    variants: Sequence[Variant], reasons: list[str], places: Places, least: int, progress: bool
) -> Iterator[tuple[list[int], list[Site]]]:
    """Sites to be read together, and the numbers of their variants. Neighbours with the same POS and REF are one site.
    A reason is added for what is too short for the model."""
    numbers: list[int] = []
    sites: list[Site] = []
    with tqdm(total=len(variants), desc="variants", unit="variant", disable=None if progress else True) as bar:
        for _, neighbours in itertools.groupby(
            range(len(variants)), lambda number: (variants[number].chrom, variants[number].pos, variants[number].ref)
        ):
            some = list(neighbours)
            kept = [number for number in some if not reasons[number]]
            if kept:
                site = places.site([variants[number] for number in kept])
                if (shortest := min(len(site.whole(allele)) for allele in site.alleles)) < least:
                    for number in kept:
                        reasons[number] = f"only {shortest} bases around it, and the model reads {least} at once"
                else:
                    sites.append(site)
                    numbers += kept
            if len(numbers) >= _GATHERED or len(numbers) * places.window >= _GATHERED_BASES:
                yield numbers, sites
                numbers, sites = [], []
            bar.update(len(some))
        if numbers:
            yield numbers, sites


def _table(
    variants: Sequence[Variant], columns: Sequence[str], values: np.ndarray, reasons: Sequence[str]
) -> pandas.DataFrame:
    import pandas

    frame: dict[str, Any] = {
        name: [getattr(variant, name) for variant in variants] for name in ("chrom", "pos", "id", "ref", "alt", "line")
    }
    frame |= {column: values[:, number] for number, column in enumerate(columns)}
    frame["n"] = pandas.array([None if np.isnan(n) else int(n) for n in values[:, -1]], dtype="Int64")
    frame["note"] = [reason or repeat for reason, repeat in zip(reasons, _repeats(variants), strict=True)]
    return pandas.DataFrame(frame)
