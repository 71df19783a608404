"""The JSON of `context_parallel.py`: rows of several counts of GPUs in one file, its tables and its picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mambaseq.atomic import atomic_file, json_text

FORMS = ("relayed", "gathered")
Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def keep(path: Path, row: Row, **machine: str | None) -> None:
    """Add a row to a file. machine: what is known of it; the file keeps what is not."""
    told: dict[str, Any] = {"bench": "context_parallel", "gpu": None, "torch": None}
    told |= json.loads(path.read_text()) if path.is_file() else {}
    told |= {key: value for key, value in machine.items() if value is not None}
    told["rows"] = merged(rows_of(path), [row])
    with atomic_file(path, "w") as file:
        file.write(json_text(told, indent=2) + "\n")


def merged(former: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of an earlier measurement with those of another one, which replace theirs, by count of GPUs and name. One
    that failed replaces none that did not."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in [*former, *new]:
        if not row.get("failed") or found.get(_key(row), row).get("failed"):
            found[_key(row)] = row
    return sorted(found.values(), key=lambda row: row["ranks"])


def _key(row: Row) -> tuple[Any, ...]:
    return row["name"], row.get("length"), row["ranks"]


def split_rows(rows: Sequence[Row]) -> list[Row]:
    """Of sequences that are split over GPUs, against one GPU with the whole."""
    return [row for row in rows if any(f"{form}_efficiency" in row for form in FORMS)]


def rate_rows(rows: Sequence[Row]) -> list[Row]:
    """Of training with sequences for each GPU or group of GPUs, each with its `efficiency`: tokens a second over as
    many times those of one GPU (of the same way or, where that needs several, of `fit, ddp`); None without those."""
    found = [row for row in rows if row.get("tokens_per_s")]
    alone = {row["name"]: row["tokens_per_s"] for row in found if row["ranks"] == 1}

    def efficiency(row: Row) -> float | None:
        one = alone.get(row["name"]) or (alone.get("fit, ddp") if row["name"].startswith("fit, ") else None)
        return row["tokens_per_s"] / (row["ranks"] * one) if one else None

    return [{**row, "efficiency": efficiency(row)} for row in found]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _milliseconds(value: float | Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else " and ".join(f"{one:.1f}" for one in value)


def _replayed(row: Row) -> str:
    """How many stages of chunks were replayed from CUDA graphs, or that none was, and why."""
    found = ", ".join(f"{key} {value}" for key, value in row.items() if key.endswith("_replays"))
    why = f", not captured: {row['why_not_replayed']}" if "why_not_replayed" in row else ""
    return f"; {found}{why}" if found else ""


def tables(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| | positions | GPUs | one GPU, s | relayed, s | efficiency | gathered, s | efficiency | memory a rank |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in split_rows(rows):
        cells = [row["name"], f"{row['length']:,}", str(row["ranks"]), f"{row['one_s']:.4f}"]
        for form in FORMS:
            seconds = row.get(f"{form}_s")
            cells += [f"{seconds:.4f}", _percent(row.get(f"{form}_efficiency"))] if seconds else ["", ""]
        memory = [row[f"{form}_memory"] for form in FORMS if row.get(f"{form}_memory")]
        lines.append(f"| {' | '.join([*cells, _percent(max(memory, default=None))])} |")
    lines += ["", "| | parameters | GPUs | tokens/s | efficiency | MFU | GiB a GPU |", "|---|---|---|---|---|---|---|"]
    for row in rate_rows(rows):
        cells = [row["name"], f"{row['parameters']:,}", str(row["ranks"]), f"{row['tokens_per_s']:,.0f}"]
        cells += [_percent(row["efficiency"]), f"{100 * row['mfu']:.1f} %" if row.get("mfu") else ""]
        cells.append(f"{row['gib']:.1f}" if row.get("gib") else "")
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if row.get("chunk_ms"):
            apart = ", ".join(f"{key} {_milliseconds(value)}" for key, value in row.items() if key.endswith("_ms"))
            lines += ["", f"{row['name']}, {row['length']:,} positions on {row['ranks']}: {apart}{_replayed(row)}"]
        elif "relayed_replays" in row:
            eager = f"eager {row['eager_s']:.4f} s, " if row.get("eager_s") else ""
            told = {key: value for key, value in row.items() if key.endswith(("_gc_ms", "_mallocs")) and value}
            found = "".join(f", {key} {value:.0f}" for key, value in told.items())
            where = f"{row['name']}, {row['length']:,} positions on {row['ranks']}"
            lines += ["", f"{where}: {eager}relayed {row['relayed_s']:.4f} s{_replayed(row)}{found}"]
    failed = [f"{row['name']} on {row['ranks']}: {row['failed']}" for row in rows if row.get("failed")]
    return "\n".join([*lines, *failed])


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw efficiency over the number of GPUs: a line a way to train, and a line a length and form of a split
    sequence's whole step."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    lines: dict[str, dict[int, float]] = {}
    for row in rate_rows(rows):
        if row["efficiency"] is not None:
            lines.setdefault(row["name"], {})[row["ranks"]] = row["efficiency"]
    for row in split_rows(rows):
        for form in FORMS:
            if row["name"].startswith("step") and row["name"] != "step, alone" and f"{form}_efficiency" in row:
                name = f"{row['name'].partition(', chunk')[0]}, {row['length']:,} positions, {form}"
                lines.setdefault(name, {1: 1.0})[row["ranks"]] = row[f"{form}_efficiency"]
    with mpl.rc_context({"svg.hashsalt": "several devices", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(lines.items()):
            counts, dashes = sorted(points), ("-", "--", ":", "-.")[number // 10 % 4]  # there are ten colours
            axes.plot(counts, [100 * points[count] for count in counts], dashes, marker="o", label=name)
        axes.set_xscale("log", base=2)
        counts = sorted({count for points in lines.values() for count in points} or {1})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_ylim(0, 105)
        axes.set_xlabel("GPUs of one host")
        axes.set_ylabel("efficiency, % of as many times one GPU")
        if lines:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
