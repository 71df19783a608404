"""Scores of the variants in a file: `score_variants`, which `mambaseq dna/variants` runs."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from mambaseq import limits
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.errors import ConfigError, DataError, UserError, shown
from mambaseq.outputs import is_stream
from mambaseq.runs.devices import choose_device, memory_told
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.vcf import Variant, is_vcf, read_variants
from mambaseq_dna.tokenizer import N, fold_case
from mambaseq_dna.variants.reasons import OTHER_REF, reasons_told
from mambaseq_dna.variants.scorers import Distance, Pool, Scorer, check_bases, scorer_of
from mambaseq_dna.variants.sites import Places, Site
from mambaseq_dna.variants.tables import check_ending, rows_to

if TYPE_CHECKING:
    import pandas

What = Literal["answers", "embeddings", "both"]

_WINDOW = 4096  # of a model that does not say the length of its training
_TOKENS = {"cpu": 2**15, "cuda": 2**19}
_GATHERED, _GATHERED_BASES = 4096, 2**25  # variants, and bases, that are in memory together

_BLOCK = 2**15  # variants whose scores wait to be written
_ENOUGH = 10  # variants, to tell that the reference is another assembly


class Scores(NamedTuple):
    """table: a `pandas.DataFrame`, a row for each alternative, in the order of the file: chrom, pos, id, ref, alt,
    line, the numbers of the model, n (bases of the reference's window that are N) and a note that says why there is no
    score; None if it was not asked for. columns: of the numbers. rows: number of rows. without: how many have no score,
    by reason."""

    table: Any
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
    table: bool = True,
) -> Scores:
    """Score every alternative of a VCF file, or of a table with CHROM, POS, REF and ALT.

    checkpoint: a run's folder or an exported model. reference: FASTA files of the assembly that the variants are on.
    out: CSV, TSV, parquet, or, for a VCF, VCF, by the name's ending. None writes nothing.
    what: "answers" of the head, the distance of "embeddings" (by pool and layer), or "both". See
        `mambaseq_dna.variants.scorers`.
    window: bases around the variant; None takes the length of training.
    both_strands: the mean over both; None: for likelihoods and distances, not for answers of classifiers.
    batch_tokens: bases that are read at once; more is faster, and needs more memory.
    table: return the scores as a table too; without it memory does not grow with the file.

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
    places = Places(Assembly(reference, cache), scorers[0].tokenizer, window)
    survey = _Survey(source, places)
    check_assembly(source, survey.reasons())
    columns = [column for scorer in scorers for column in scorer.columns]
    without: collections.Counter[str] = collections.Counter()
    repeats, frames = _Repeats(survey.in_order), []
    with contextlib.ExitStack() as stack:
        rows, scored = stack.enter_context(rows_to(out, source, columns)) if out is not None else (None, [])
        stack.enter_context(memory_told("--window, or --batch-tokens"))
        hidden = None if progress else True
        bar = stack.enter_context(tqdm(total=survey.count, desc="variants", unit="variant", disable=hidden))
        for block in _blocks(source, places, len(columns)):
            done = 0
            try:
                for numbers, sites in _sites(block.variants, block.reasons, places, scorers[0].least, bar):
                    scores = [np.concatenate(scorer.effects(sites, both_strands)) for scorer in scorers]
                    unknown = np.concatenate([np.full((len(site.alts), 1), count_unknown(site)) for site in sites])
                    block.values[numbers] = np.concatenate([*scores, unknown], axis=1)
                done = len(block.variants)
            except (UserError, KeyboardInterrupt, MemoryError):
                done = block.finished
                raise
            finally:
                frame = block.table(columns, repeats, done)
                if rows is not None and done:
                    scored.append(block.scored)
                    rows.add(frame)
            without.update(reason for reason in block.reasons if reason)
            if table:
                frames.append(frame)
        if without.total() == survey.count:
            raise DataError(
                f"None of the {survey.count:,} variants in {source} can be scored "
                f"({'; '.join(reasons_told(without, 4))}); nothing was written. Is the reference the assembly that "
                "they were called on?"
            )
    whole = None
    if table:
        import pandas

        whole = pandas.concat(frames, ignore_index=True)
    return Scores(whole, columns, survey.count, dict(without))


def check_assembly(source: Path, reasons: Iterable[str]) -> None:
    """Raise DataError if the REF of most variants is not in the reference: a quarter of bases agree by chance.

    reasons: why each variant cannot be scored, "" for those that can.
    """
    other, alike, first = 0, 0, ""
    for reason in reasons:
        alike += not reason
        if reason.startswith(OTHER_REF):
            other, first = other + 1, first or reason
    compared = other + alike
    if compared >= _ENOUGH and other > compared / 2:
        raise DataError(
            f"The REF of {other:,} of the {compared:,} variants in {source} that can be compared is not in the "
            f"reference (the first: {first}); nothing was written. The others agree by chance: give the assembly that "
            "they were called on."
        )


class _Survey:
    """What is known of a file's variants before any is scored. count: how many there are. in_order: each sequence's are
    together, with ascending positions. Both are known when `reasons` ends."""

    def __init__(self, source: Path, places: Places) -> None:
        self._source, self._places = source, places
        self.count, self.in_order = 0, True

    def reasons(self) -> Iterator[str]:
        """Why each variant cannot be scored."""
        ended: set[str] = set()
        last: Variant | None = None
        for variant in read_variants(self._source):
            self.count += 1
            if last is not None and last.chrom != variant.chrom:
                ended.add(last.chrom)
                self.in_order &= variant.chrom not in ended
            elif last is not None:
                self.in_order &= variant.pos >= last.pos
            last = variant
            yield self._places.why_not(variant)


class _Repeats:
    """Notes for variants that an earlier line has. in_order: equal variants are at one place, so that those of other
    places need not be remembered."""

    def __init__(self, in_order: bool) -> None:
        self._in_order, self._seen = in_order, dict[int, int]()
        self._place: tuple[str, int] = ("", 0)

    def note(self, variant: Variant) -> str:
        """ "" for a variant that no line before has. Variants are told in the order of the file."""
        place = (variant.chrom, variant.pos)
        if self._in_order and place != self._place:
            self._seen.clear()
            self._place = place
        key = hash((*place, variant.ref.upper(), variant.alt.upper()))
        line = self._seen.setdefault(key, variant.line)
        return "" if line == variant.line else f"the same as in line {line:,}"


class _Block:
    """Variants that are in memory together, and what is found of them. values: `(variants, numbers + 1)`, NaN where
    there is no score. reasons: why that is so."""

    def __init__(self, variants: list[Variant], reasons: list[str], numbers: int) -> None:
        self.variants, self.reasons = variants, reasons
        self.values = np.full((len(variants), numbers + 1), np.nan)

    @property
    def scored(self) -> int:
        return int((~np.isnan(self.values[:, -1])).sum())

    @property
    def finished(self) -> int:
        """How many variants there are up to the last that has a score."""
        known = np.flatnonzero(~np.isnan(self.values[:, -1]))
        return int(known[-1]) + 1 if len(known) else 0

    def table(self, columns: Sequence[str], repeats: _Repeats, count: int) -> pandas.DataFrame:
        """The first rows."""
        some = self.variants[:count]
        notes = [reason or repeats.note(one) for reason, one in zip(self.reasons, some, strict=False)]
        return _table(some, columns, self.values[:count], notes)


def _blocks(source: Path, places: Places, numbers: int) -> Iterator[_Block]:
    """The variants of a file, in parts that do not divide a line."""
    variants: list[Variant] = []
    for _, line in itertools.groupby(read_variants(source), lambda variant: variant.line):
        variants += line
        if len(variants) >= _BLOCK:
            yield _Block(variants, [places.why_not(variant) for variant in variants], numbers)
            variants = []
    if variants:
        yield _Block(variants, [places.why_not(variant) for variant in variants], numbers)


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


def _sites(
    variants: Sequence[Variant], reasons: list[str], places: Places, least: int, bar: tqdm
) -> Iterator[tuple[list[int], list[Site]]]:
    """Sites to be read together, and the numbers of their variants. Neighbours with the same POS and REF are one site.
    A reason is added for what is too short for the model."""
    numbers: list[int] = []
    sites: list[Site] = []
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
    variants: Sequence[Variant], columns: Sequence[str], values: np.ndarray, notes: list[str]
) -> pandas.DataFrame:
    import pandas

    frame: dict[str, Any] = {
        name: [getattr(variant, name) for variant in variants] for name in ("chrom", "pos", "id", "ref", "alt", "line")
    }
    frame |= {column: values[:, number] for number, column in enumerate(columns)}
    frame["n"] = pandas.array([None if np.isnan(n) else int(n) for n in values[:, -1]], dtype="Int64")
    frame["note"] = notes
    return pandas.DataFrame(frame)
