"""An audit on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mambaseq.auditing.findings import Audit, percent, record, stretch, verdict_of
from mambaseq.data.audited import WORD
from mambaseq.errors import cut

MOST_ROWS = 30


def lines(audit: Audit) -> Iterator[str]:
    """The audit as text, a line at a time."""
    found, unit = audit.sharing, audit.audited.unit
    compared = "all of them" if found.word_share >= 1 else f"{percent(found.word_share)} of all"
    strands = ", on either strand" if audit.audited.complement is not None else ""
    yield f"{audit.name}: {audit.tokens:,} {unit}, in {audit.piece}."
    yield (
        f"Compared by words of {WORD} {unit}{strands}: {compared}, {found.words:,}. Every shared stretch of "
        f"{found.found_surely} is found."
    )
    yield from audit.audited.notes
    yield ""
    rows: list[Sequence[object]] = [("split", "class", "sequences", unit, "repeated")]
    for (split, label), sequences, tokens in zip(found.owners, found.sequences, found.tokens, strict=True):
        again = found.repeated[split] if split not in {row[0] for row in rows} else ""
        rows.append((split, "-" if label is None else cut(label, 24), sequences, tokens, again))
    yield from columns(rows)
    yield ""
    table: list[Sequence[object]] = [
        (
            "held out",
            "against",
            "shared words",
            f"~{unit}",
            "other class only",
            "touched",
            "over half",
            "copies",
            "longest",
        )
    ]
    for one in found.splits:
        other = percent(one.another_only / one.in_other) if one.in_other and found.classes else "-"
        of = max(one.pieces, 1)
        table.append(
            (
                *(one.split, one.other, percent(one.share), one.tokens, other),
                *(
                    percent(one.touched / of),
                    percent(one.half / of),
                    f"{one.copies.copied:,} of {one.copies.sequences:,}",
                ),
                one.stretches[0].length if one.stretches else 0,
            )
        )
    yield from columns(table)
    for one in found.splits:
        if one.stretches:
            yield f"\nlongest equal stretches, {one.split} = {one.other}"
            yield from (f"  {stretch(each, unit)}" for each in one.stretches[:3])
        if one.records:
            yield f"records of {one.split} with the most of {one.other}"
            for part in one.records[:3]:
                yield f"  {percent(part.share)}, about {part.tokens:,} {unit}: {record(part.place)}"
    if found.classes:
        yield ""
        table = [("class", "in class", "shared words", "whole sequences", "longest")]
        for pair in found.classes:
            longest = pair.stretches[0].length if pair.stretches else 0
            table.append((cut(pair.label, 24), cut(pair.other, 24), percent(pair.share), pair.sequences, longest))
        yield from columns(table)
    if (told := audit.shortcuts) is not None:
        yield f"\nWhat one property tells on {told.split} (chance {told.chance:.3f}; {told.tested:,} {audit.piece})"
        table = [("property", "accuracy", "95% interval", "verdict")]
        for row in (*told.rows, *([told.together] if told.together else [])):
            verdict = "all alike" if row.alike else verdict_of(row, told.chance)
            seen = "" if row.seen else " (folded)"
            table.append((row.name + seen, f"{row.accuracy:.3f}", f"{row.low:.3f} to {row.high:.3f}", verdict))
        yield from columns(table)
    yield "\nVerdict"
    for finding in audit.findings:
        yield f"  {finding.level:<5} {finding.told}"


def columns(rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Rows below their heading, numbers on the right; of many rows the first `MOST_ROWS`."""
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows[: MOST_ROWS + 1]]
    right = [any(isinstance(row[column], int) for row in rows[1:]) for column in range(len(rows[0]))]
    widths = [max(len(row[column]) for row in texts) for column in range(len(rows[0]))]
    for row in texts:
        cells = (
            text.rjust(width) if on_right else text.ljust(width)
            for text, width, on_right in zip(row, widths, right, strict=True)
        )
        yield "  ".join(cells).rstrip()
    if len(rows) > MOST_ROWS + 1:
        yield f"and {len(rows) - MOST_ROWS - 1:,} more (all are in the JSON)"
