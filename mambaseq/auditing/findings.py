"""The verdicts of an audit, from what was counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from mambaseq.auditing.layout import Layout, Place
from mambaseq.auditing.sharing import Shared, Sharing, Stretch, sharing
from mambaseq.auditing.shortcuts import Shortcut, Shortcuts, shortcuts
from mambaseq.data.audited import WORD, Audited
from mambaseq.errors import cut, cut_path

Level = Literal["bad", "note", "good"]

TOLERANCE = 0.02
"""The share of held-out windows that may be near copies: more than half of their words are in another split. Repeats
make that 1% in mammals, of windows of 1,000 bases on another chromosome."""

MARGIN = 0.05
"""By so much must an artefact alone be better than chance to be called a shortcut."""

BINS = ((0.0, "none"), (0.1, "up to 10%"), (0.5, "up to half"), (0.9, "up to 90%"), (1.0, "above 90%"))


@dataclasses.dataclass(frozen=True)
class Finding:
    """level: "bad" (a leak or a shortcut), "note" (what a reader must know), or "good"."""

    level: Level
    told: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found. name: of the dataset. findings: worst first."""

    name: str
    audited: Audited
    tokens: int
    sharing: Sharing
    shortcuts: Shortcuts | None
    findings: list[Finding]

    @property
    def clean(self) -> bool:
        """Whether no finding is bad."""
        return all(finding.level != "bad" for finding in self.findings)

    @property
    def piece(self) -> str:
        """What a model gets one of, in the plural."""
        return "sequences" if self.audited.length is None else f"windows of {self.audited.length:,}"

    def record(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        found = self.sharing
        return {
            "data": self.name,
            "clean": self.clean,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "notes": list(self.audited.notes),
            "tokens": self.tokens,
            "unit": self.audited.unit,
            "window": self.audited.length,
            "word": WORD,
            "words": found.words,
            "share_of_words": found.word_share,
            "found_surely": found.found_surely,
            "groups": [
                {"split": split, "class": label, "sequences": sequences, "tokens": tokens}
                for (split, label), sequences, tokens in zip(found.owners, found.sequences, found.tokens, strict=True)
            ],
            "shared_words_of_groups": found.matrix.round(6).tolist(),
            "repeated": found.repeated,
            "splits": [_shared_record(one) for one in found.splits],
            "classes": [
                {
                    "class": one.label,
                    "other": one.other,
                    "share": one.share,
                    "sequences": one.sequences,
                    "stretches": [dataclasses.asdict(stretch) for stretch in one.stretches],
                }
                for one in found.classes
            ],
            "shortcuts": None if self.shortcuts is None else dataclasses.asdict(self.shortcuts),
        }


def _shared_record(one: Shared) -> dict[str, Any]:
    plain = {field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.name != "shares"}
    plain |= {
        "share": one.share,
        "shares": dict(zip((name for _, name in BINS), histogram(one.shares), strict=True)),
        "records": [dataclasses.asdict(part) for part in one.records],
        "copies": dataclasses.asdict(one.copies),
        "stretches": [dataclasses.asdict(stretch) for stretch in one.stretches],
    }
    return plain


def histogram(shares: np.ndarray) -> list[int]:
    """How many shares, `(n,)`, are in each of `BINS`."""
    places = np.searchsorted([edge for edge, _ in BINS], shares, side="left")
    return np.bincount(places, minlength=len(BINS)).tolist()


def audit(audited: Audited, name: str = "", tolerance: float = TOLERANCE) -> Audit:
    """Look for copies, shared words and shortcuts. name: of the dataset, for the report.

    Raises DataError for data without a token."""
    layout = Layout(audited)
    shared, told = sharing(layout), shortcuts(audited)
    windows = "sequences" if audited.length is None else f"windows of {audited.length:,} {audited.unit}"
    found = [*_of_splits(shared, audited, windows, tolerance), *_of_classes(shared, tolerance), *_of_shortcuts(told)]
    order = ("bad", "note", "good")
    found.sort(key=lambda finding: order.index(finding.level))
    return Audit(name, audited, layout.tokens, shared, told, found)


def record(where: Place) -> str:
    """A record for a table, cut."""
    label = f" ({cut(where.label, 24)})" if where.label is not None else ""
    source = f"{cut_path(where.source, 40)}, " if where.source else ""
    return f"{where.split}{label}: {source}{cut(where.record, 40)}"


def place(where: Place) -> str:
    """A place for a table, cut."""
    return f"{record(where)} from {where.start:,}"


def stretch(one: Stretch, unit: str) -> str:
    """A stretch, where it is, and where it is too."""
    strand = ", on the other strand" if one.reverse else ""
    return f"{one.length:,} {unit}: {place(one.one)} = {place(one.other)}{strand}"


def percent(share: float) -> str:
    """A share for a sentence; not 0% unless it is 0.

    >>> percent(0.0319), percent(0), percent(0.00001), percent(0.99999)
    ('3.2%', '0%', '0.001%', '99.999%')
    """
    if share in (0, 1):
        return f"{share:.0%}"
    for places in range(1, 6):
        text = f"{100 * share:.{places}f}"
        if 0 < float(text) < 100:
            return f"{text}%"
    return "less than 0.00001%" if share < 0.5 else "more than 99.99999%"


def _of_splits(shared: Sharing, audited: Audited, windows: str, tolerance: float) -> Iterator[Finding]:
    whole = "sequences" if audited.length is None else "records"
    for one in shared.splits:
        copies, between = one.copies, f"{one.split} against {one.other}"
        if copies.copied:
            strand = f" ({copies.reverse:,} of them on the other strand alone)" if copies.reverse else ""
            label = f"; {copies.another_label:,} have a copy of another class" if copies.another_label else ""
            first = f" The first: {place(copies.examples[0][0])} = {place(copies.examples[0][1])}."
            yield Finding(
                "bad",
                f"{between}: {copies.copied:,} of {copies.sequences:,} {whole} are there as a whole{strand}{label}."
                f"{first}",
            )
        near = one.half / max(one.pieces, 1)
        what = (
            f"{percent(one.share)} of the words of {one.split} are in {one.other}; {percent(near)} of its {windows} "
            "have more than half of theirs there"
        )
        if one.another_only > (one.in_other - one.another_only):
            what += f"; {percent(one.another_only / one.in_other)} of what is shared has another class there"
        longest = f" Longest: {stretch(one.stretches[0], audited.unit)}." if one.stretches else ""
        if near > tolerance:
            yield Finding("bad", f"{between}: {what}.{longest}")
        elif one.in_other:
            yield Finding("note", f"{between}: {what}.{longest}")
        elif one.words:
            yield Finding("good", f"{between}: no word of {WORD} {audited.unit} is shared.")
        else:
            short = f"no sequence has a word of {WORD} {audited.unit}"
            yield Finding("note", f"{between}: {short}; only copies were looked for.")
    if not shared.splits:
        yield Finding("note", "There is no held-out split: nothing can leak into it.")
    for split, number in shared.repeated.items():
        if number:
            yield Finding("note", f"{split}: {number:,} {whole} are repetitions of others in it.")


def _of_classes(shared: Sharing, tolerance: float) -> Iterator[Finding]:
    for one in shared.classes:
        if one.sequences:
            yield Finding(
                "bad",
                f"classes: {one.sequences:,} of {one.label} are in {one.other} as a whole: no model can tell them.",
            )
    alike = [one for one in shared.classes if one.share > tolerance]
    if alike:
        told = "; ".join(f"{cut(one.label, 24)} in {cut(one.other, 24)} {percent(one.share)}" for one in alike[:4])
        yield Finding("note", f"classes: words that two classes share do not tell them apart: {told}.")
    elif shared.classes:
        yield Finding("good", f"classes: no two share more than {percent(tolerance)} of their words.")


def _of_shortcuts(found: Shortcuts | None) -> Iterator[Finding]:
    if found is None:
        return
    quiet = []
    for row in (*found.rows, *([found.together] if found.together else [])):
        verdict = verdict_of(row, found.chance)
        told = f"{row.name} alone reaches {row.accuracy:.3f} ({row.low:.3f} to {row.high:.3f}) on {found.split}"
        if verdict == "nothing":
            quiet.append(row.name)
        elif verdict == "shortcut":
            yield Finding("bad", f"shortcut: {told}, where chance is {found.chance:.3f}.")
        elif verdict == "hidden":
            yield Finding("note", f"{told}, where chance is {found.chance:.3f}; no model sees it.")
        else:
            yield Finding("note", f"{told}, where chance is {found.chance:.3f}: a model must be better.")
    if quiet:
        yield Finding("good", f"no shortcut: {', '.join(quiet)} alone are not better than chance ({found.chance:.3f}).")


def verdict_of(row: Shortcut, chance: float) -> Literal["nothing", "tells", "shortcut", "hidden"]:
    """What a property is by its accuracy: an artefact is a shortcut when it is surely better than chance, by `MARGIN`;
    another property when it goes more than half of the way from chance to 1."""
    if row.alike or row.low <= chance:
        return "nothing"
    if not row.seen:
        return "hidden"
    return "shortcut" if row.low > chance + (MARGIN if row.artefact else (1 - chance) / 2) else "tells"
