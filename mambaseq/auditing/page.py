"""An audit as a page: verdicts, what is shared as a picture, and what properties tell."""

from __future__ import annotations

import html
from pathlib import Path

from mambaseq.auditing.findings import BINS, Audit, histogram, percent, place, record, stretch, verdict_of
from mambaseq.data.audited import WORD
from mambaseq.errors import cut
from mambaseq.reporting import Section, drawing, side_by_side, table
from mambaseq.reporting.charts import Bar, bars, frame, text
from mambaseq.reporting.page import write_page

_MOST = 24  # rows of the picture
_WORDS = {"bad": "bad", "note": "soft", "good": "good"}


def write_audit(path: Path, audit: Audit) -> None:
    """Write the page. Raises UserError when it cannot be written."""
    counts = {level: sum(finding.level == level for finding in audit.findings) for level in _WORDS}
    badges = [(_WORDS[level], f"{number} {level}") for level, number in counts.items() if number]
    write_page(
        path,
        f"Audit of {audit.name}",
        f"{audit.tokens:,} {audit.audited.unit}, in {audit.piece}; compared by words of {WORD}, "
        f"{percent(audit.sharing.word_share)} of them. Every shared stretch of {audit.sharing.found_surely} is found.",
        [_verdict(audit), _shared(audit), *_classes(audit), *_told(audit)],
        badges=badges,
        notes=[finding.told for finding in audit.findings if finding.level == "bad"],
    )


def _verdict(audit: Audit) -> Section:
    rows = [(finding.level, finding.told) for finding in audit.findings]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in audit.audited.notes)
    return Section("Verdict", "", table(("level", "finding"), rows) + notes)


def heatmap(names: list[str], matrix: list[list[float]]) -> str:
    """Squares: how much of the row is in the column, as a number and as a shade. The first 24 rows and columns."""
    names = [cut(name, 22) for name in names[:_MOST]]
    size, margin = len(names), 14 + 6.2 * max(map(len, names[:_MOST]), default=0)
    wide = min(52.0, max(16.0, (460 - margin) / max(size, 1)))
    head = 16 + 4.6 * max(map(len, names), default=0)
    parts = []
    for row, name in enumerate(names):
        y = head + row * wide
        parts.append(text(margin - 6, y + wide / 2 + 4, name, "end"))
        x = margin + (row + 0.5) * wide
        column = text(x, head - 6, name)
        parts.append(column.replace("<text", f'<text transform="rotate(-45 {x:.1f} {head - 6:.1f})"', 1))
        for other in range(size):
            share = matrix[row][other]
            parts.append(
                f'<rect class="c{int(row != other) if share < 1 else 0} area" x="{margin + other * wide + 1:.1f}" '
                f'y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{wide - 2:.1f}" rx="2" '
                f'fill-opacity="{0.05 + 0.95 * share:.3f}"/>'
            )
            if size <= 12:
                kind = "on" if share > 0.5 else ""
                shown = f"{100 * share:.0f}" if share >= 0.095 or not share else f"{100 * share:.1f}"
                parts.append(text(margin + (other + 0.5) * wide, y + wide / 2 + 4, shown, "middle", kind))
    told = f"share of the words of each of {size} groups that is in each other"
    return frame(margin + size * wide + 30, head + size * wide + 8, told, "".join(parts))


def _shared(audit: Audit) -> Section:
    found, unit = audit.sharing, audit.audited.unit
    names = [split if label is None else f"{split} {label}" for split, label in found.owners]
    picture = drawing(
        heatmap(names, found.matrix.tolist()), "Words of the row that are also in the column: the darker, the more"
    )
    parts: list[Bar | str] = []
    rows: list[tuple[object, ...]] = []
    stretches: list[tuple[object, ...]] = []
    for one in found.splits:
        of = max(one.pieces, 1)
        parts += [
            f"{one.split} against {one.other}",
            *(
                Bar(f"{name} of the words", 100 * count / of, int(number > 2))
                for number, ((_, name), count) in enumerate(zip(BINS, histogram(one.shares), strict=True))
            ),
        ]
        rows.append(
            (
                *(one.split, one.other, percent(one.share), one.tokens),
                percent(one.another_only / one.in_other) if one.in_other and found.classes else "-",
                *(f"{one.touched:,} of {one.pieces:,}", f"{one.half:,} ({percent(one.half / of)})"),
                *(f"{one.copies.copied:,} of {one.copies.sequences:,}", one.copies.reverse, one.copies.another_label),
            )
        )
        stretches += [
            (each.length, place(each.one), place(each.other), "other" if each.reverse else "same")
            for each in one.stretches
        ]
    chart = drawing(bars(parts, "%", places=1), f"Held-out {audit.piece} by how much of them another split has")
    header = ("held out", "against", "shared words", f"about {unit}", "in other classes only", "touched", "over half")
    body = (
        f'<div class="wide">{side_by_side(picture, chart)}</div>'
        + table((*header, "copies", "on the other strand", "of another class"), rows)
        + "<h3>Longest equal stretches</h3>"
        + table((unit, "where", "where else", "strand"), stretches)
    )
    parts_of = [
        (percent(part.share), part.tokens, record(part.place), one.other)
        for one in found.splits
        for part in one.records
    ]
    if parts_of:
        body += "<h3>Records with the most in another split</h3>"
        body += table(("shared words", f"about {unit}", "record", "against"), parts_of)
    groups = [
        (split, "-" if label is None else label, sequences, tokens)
        for (split, label), sequences, tokens in zip(found.owners, found.sequences, found.tokens, strict=True)
    ]
    body += f"<details><summary>Groups</summary>{table(('split', 'class', 'sequences', unit), groups)}</details>"
    worst = max(found.splits, key=lambda one: one.share, default=None)
    summary = (
        f"{percent(worst.share)} of the words of {worst.split} are in {worst.other}" if worst else "no held-out split"
    )
    return Section("What splits share", summary, body, picture)


def _classes(audit: Audit) -> list[Section]:
    if not audit.sharing.classes:
        return []
    rows = [
        (
            pair.label,
            pair.other,
            percent(pair.share),
            pair.sequences,
            pair.stretches[0].length if pair.stretches else 0,
            stretch(pair.stretches[0], audit.audited.unit) if pair.stretches else "",
        )
        for pair in audit.sharing.classes
    ]
    header = ("class", "in class", "shared words", "whole sequences", "longest", "where")
    return [Section("What classes share", "All splits together, those with most in common first.", table(header, rows))]


def _told(audit: Audit) -> list[Section]:
    if (found := audit.shortcuts) is None:
        return []
    all_rows = [*found.rows, *([found.together] if found.together else [])]
    colours = {"shortcut": 1, "tells": 0}
    drawn = [
        Bar(
            row.name + ("" if row.seen else " (folded)"),
            row.accuracy,
            colours.get(verdict_of(row, found.chance), 2),
            (row.low, row.high),
        )
        for row in all_rows
        if not row.alike
    ]
    alike = ", ".join(row.name for row in all_rows if row.alike)
    chart = drawing(
        bars(drawn, mark=(found.chance, f"chance {found.chance:.3f}"), places=3), "Accuracy, with 95% intervals"
    )
    rows = [
        (
            row.name,
            "yes" if row.seen else "no",
            row.accuracy,
            f"{row.low:.3f} to {row.high:.3f}",
            "all alike" if row.alike else verdict_of(row, found.chance),
        )
        for row in all_rows
    ]
    classes = list(found.rows[0].means)
    means = [(name, *(row.means[name] for row in found.rows)) for name in classes]
    body = (
        f"<p>A tree of at most 8 leaves sees one property of {found.trained:,} training {html.escape(audit.piece)} and "
        f"is measured on {found.tested:,} of {html.escape(found.split)}."
        + (f" The same for all: {html.escape(alike)}." if alike else "")
        + "</p>"
        + (chart if drawn else "")
        + table(("property", "a model sees it", "accuracy", "95% interval", "verdict"), rows)
        + "<h3>Means of the training data</h3>"
        + table(("class", *(row.name for row in found.rows)), means)
    )
    best = max(found.rows, key=lambda row: (row.seen, row.accuracy))
    summary = f"{best.name} alone reaches {best.accuracy:.3f}, chance is {found.chance:.3f}"
    return [Section("What one property tells", summary, body, chart if drawn else "")]
