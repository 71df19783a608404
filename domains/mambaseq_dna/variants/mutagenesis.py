"""In-silico mutagenesis: the effect of every substitution in a region, as a table and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mambaseq import limits
from mambaseq.errors import ConfigError, DataError, did_you_mean, shown
from mambaseq.outputs import is_stream, output_file
from mambaseq.runs.devices import memory_told
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.regions import parse_region
from mambaseq_dna.tokenizer import BASES, N, fold_case
from mambaseq_dna.variants.scorers import Distance, Pool, scorer_of
from mambaseq_dna.variants.scoring import prepared
from mambaseq_dna.variants.sites import Places
from mambaseq_dna.variants.tables import check_ending, write_table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_LINE = 120  # bases in a line of the picture
_DRAWN = 3000  # bases in a picture: each is a letter
_TOGETHER = 256  # positions
PICTURES = (".png", ".svg")


class Region(NamedTuple):
    """Bases [start, stop) of a sequence, counted from 0."""

    name: str
    start: int
    stop: int

    @classmethod
    def parse(cls, text: str, assembly: Assembly) -> Region:
        """`chr17:43,044,295-43,125,483`: both ends are in it, counted from 1, as in samtools and genome browsers.

        Raises ConfigError for another text, DataError for a region that is not in the assembly.
        """
        found = parse_region(text.strip())
        if found is None:
            raise ConfigError(
                f"--region {shown(text)} is not written like chr17:43044295-43044394 (both ends counted)."
            )
        name, start, stop = assembly.resolve(found[0], "--region"), found[1], found[2]
        length = assembly.lengths[name]
        if not 0 <= start < stop <= length:
            raise DataError(f"--region {shown(text)} is not within {name}, which has bases 1 to {length:,}.")
        return cls(name, start, stop)


def mutagenesis(
    checkpoint: str | Path,
    reference: str | Path | Sequence[str | Path],
    region: str,
    out: str | Path | None = None,
    *,
    picture: str | Path | None = None,
    answer: str | None = None,
    what: str = "answers",
    window: int | None = None,
    both_strands: bool | None = None,
    pool: Pool = "mean",
    layer: int | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    progress: bool = True,
    cache: str | Path | None = None,
) -> pandas.DataFrame:
    """The effect of each of the three substitutions at every position of a region.

    region: see `Region.parse`. answer: the column that is the effect, for models that have several (`delta_CLASS`, with
    or without `delta_`); the default is the last one, of two classes the second. Other arguments: see
    `mambaseq_dna.variants.scoring.score_variants`.
    out: CSV, TSV or parquet. picture: PNG or SVG.

    Returns columns chrom, position (from 1), ref, alt, effect and note; positions where the reference has N have no
    effect, and a note.
    Raises UserError for a model, file, region or setting that cannot be used.
    """
    out, picture = (None if path is None else Path(path) for path in (out, picture))
    if out is not None:
        check_ending(out, (".csv", ".tsv", ".parquet"))
    if picture is not None:
        check_ending(picture, PICTURES)
        if is_stream(picture):
            raise ConfigError(f"--picture {picture} is a pipe or device. Give a file's name.")
    if what not in ("answers", "embeddings"):
        raise ConfigError(f"What is asked for is answers or embeddings, not {shown(what)}.")
    assembly = Assembly(reference, cache)
    name, start, stop = Region.parse(region, assembly)
    limits.WINDOW.check(3 * (stop - start), "--region")
    if picture is not None and stop - start > _DRAWN:
        raise ConfigError(f"--picture is for up to {_DRAWN:,} bases, and --region has {stop - start:,}. Name less.")
    loaded, window, tokens = prepared(checkpoint, window, batch_tokens, device)
    scorer = Distance(loaded, tokens, pool, layer) if what == "embeddings" else scorer_of(loaded, tokens)
    column = _column(scorer.columns, answer)
    places = Places(assembly, scorer.tokenizer, window)
    bases = fold_case(assembly.read(name, start, stop))
    effects = np.full((stop - start, 4), np.nan)
    known = np.flatnonzero(bases != N)
    if not len(known):
        raise DataError(f"--region {shown(region)}: the reference has only N there.")
    with (
        memory_told("--window, or --batch-tokens"),
        tqdm(total=len(known), desc="mutagenesis", unit="base", disable=None if progress else True) as bar,
    ):
        for first in range(0, len(known), _TOGETHER):
            some = known[first : first + _TOGETHER]
            others = [[base for base in range(4) if base != bases[place]] for place in some]
            sites = [
                places.cut(name, start + int(place), start + int(place) + 1, [np.array([b], np.uint8) for b in alts])
                for place, alts in zip(some, others, strict=True)
            ]
            for place, alts, found in zip(some, others, scorer.effects(sites, both_strands), strict=True):
                effects[place, alts] = found[:, column]
            bar.update(len(some))
    table = _table(name, start, bases, effects)
    if out is not None:
        write_table(table, out)
    if picture is not None:
        told = {"llr": "log-likelihood ratio (nats)"}.get(scorer.columns[column], scorer.columns[column])
        save_picture(drawn(bases, effects, start, name, told), picture)
    return table


def _column(columns: list[str], answer: str | None) -> int:
    if answer is None:
        return 0 if columns[0] == "distance_l2" else len(columns) - 1
    for name in (answer, f"delta_{answer}"):
        if name in columns:
            return columns.index(name)
    raise ConfigError(
        f"--answer {shown(answer)} is not one of this model's.{did_you_mean(answer, columns)} It has: "
        f"{', '.join(columns[:20])}."
    )


def _table(name: str, start: int, bases: np.ndarray, effects: np.ndarray) -> pandas.DataFrame:
    import pandas

    rows = [
        (name, start + place + 1, BASES[base], BASES[alt], effects[place, alt], "" if base != N else "N")
        for place, base in enumerate(bases.tolist())
        for alt in range(4)
        if alt != base
    ]
    frame = pandas.DataFrame(rows, columns=["chrom", "position", "ref", "alt", "effect", "note"])
    frame["note"] = frame["note"].replace("N", "the reference has N here")
    return frame


def drawn(bases: np.ndarray, effects: np.ndarray, start: int, name: str, told: str) -> Figure:
    """Lines of 120 bases: above, the reference's bases as letters, as tall as the mean effect of changing them is low;
    below, the effects as colours, with a point at the reference's base.

    bases: `(length,)` ids 0 to 4. effects: `(length, 4)`, nan where there is none. start: of the first base, from 0.
    """
    from matplotlib.figure import Figure

    length = len(bases)
    lines = -(-length // _LINE)
    across = min(length, _LINE)
    with np.errstate(all="ignore"):
        heights = np.where(np.isfinite(effects).any(1), -np.nan_to_num(effects).sum(1) / 3, 0.0)
    extent = float(np.nanmax(np.abs(effects))) or 1.0
    figure = Figure(figsize=(max(0.13 * across, 3) + 1.8, 2.3 * lines + 0.4), layout="constrained")
    grid = figure.subplots(2 * lines, 1, squeeze=False, gridspec_kw={"height_ratios": [1.2, 1] * lines})[:, 0]
    low, high = min(float(heights.min()), 0.0), max(float(heights.max()), 0.0)
    room = 0.05 * (high - low) or 1.0
    image: Any = None
    for line in range(lines):
        first, stop = line * _LINE, min((line + 1) * _LINE, length)
        logo, heat = grid[2 * line], grid[2 * line + 1]
        for place in range(first, stop):
            if bases[place] < N and heights[place]:
                logo.add_patch(_letter(BASES[bases[place]], place - first, float(heights[place])))
        logo.axhline(0, color="0.6", lw=0.6)
        logo.set(xlim=(-0.5, across - 0.5), ylim=(low - room, high + room), xticks=[])
        logo.set_ylabel("mean loss")
        logo.spines[["top", "right", "bottom"]].set_visible(False)
        image = heat.imshow(effects[first:stop].T, cmap="RdBu", vmin=-extent, vmax=extent, aspect="auto")
        own = np.flatnonzero(bases[first:stop] < N)
        heat.plot(own, bases[first:stop][own], ".", color="0.35", ms=2.5)
        heat.set(xlim=(-0.5, across - 0.5), yticks=range(4), yticklabels=list("ACGT"))
        ticks = [place for place in range(first, stop) if (start + place + 1) % 10 == 0]
        heat.set_xticks([place - first for place in ticks], [f"{start + place + 1:,}" for place in ticks])
        heat.tick_params(axis="x", labelrotation=45 if across < 200 else 90, labelsize=7)
    grid[-1].set_xlabel(f"position on {name}, from 1")
    figure.colorbar(image, ax=list(grid[1::2]), label=told, fraction=0.05)
    return figure


_COLOURS = {"A": "#2ca02c", "C": "#1f77b4", "G": "#e6a400", "T": "#d62728"}


def _letter(base: str, place: int, height: float) -> object:
    """A letter as a patch from 0 to `height`; upside down below 0."""
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    path = TextPath((0, 0), base, size=1)
    box = path.get_extents()
    transform = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, height / box.height)
    return PathPatch(transform.translate(place - 0.45, 0).transform_path(path), color=_COLOURS[base], lw=0)


def save_picture(figure: Figure, path: Path) -> None:
    """PNG or SVG, by the name's ending, whole or not at all."""
    kind = path.suffix.lower().removeprefix(".")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    with output_file(path) as file:
        file.write(buffer.getvalue())
