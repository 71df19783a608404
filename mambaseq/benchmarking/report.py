"""The rows of a benchmark: printed when they are ready, compared at the end, written as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mambaseq import __version__
from mambaseq.atomic import json_text
from mambaseq.benchmarking.timing import attempt
from mambaseq.outputs import is_stream, output_file

OURS = "mambaseq"


@dataclasses.dataclass(frozen=True)
class Column:
    """A measured value: its key in the rows, its heading, its digits, and whether more is better."""

    key: str
    heading: str
    digits: int = 3
    more_is_better: bool = False
    compared: bool = True


@dataclasses.dataclass
class Row:
    """One contender at one shape; see `mambaseq.benchmarking` for the meaning of the fields."""

    op: str
    shape: dict[str, int]
    contender: str
    backend: str = ""
    status: str = "ok"
    note: str = ""
    error: float | None = None
    values: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        values = fields.pop("values")
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        return {**fields, "error": error, **values}


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How far mambaseq is ahead of a peer in one value (1: as fast); a geometric mean where shape is None."""

    op: str
    shape: dict[str, int] | None
    peer: str
    value: str
    ratio: float
    over: str = ""


_WHERE = 70  # characters for a row's shape


def _width(column: Column) -> int:
    """Characters for a column, with what separates it from the one before."""
    return max(13, len(column.heading) + 2)


class Report:
    """Collects a benchmark's rows and prints each when it is ready. path: a file where all of them are then
    written."""

    def __init__(
        self, bench: str, device: torch.device, scale: str, columns: Sequence[Column], path: Path | None = None
    ) -> None:
        self.path = path
        self.bench, self.device, self.scale, self.columns = bench, device, scale, columns
        self.rows: list[Row] = []
        on_gpu = device.type == "cuda"
        self.hardware = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()
        print(f"mambaseq {__version__}, torch {torch.__version__}, {self.hardware}: bench {bench}, {scale} shapes")

    def head(self, title: str) -> None:
        """Begin a table."""
        headings = "".join(f"{column.heading:>{_width(column)}}" for column in self.columns)
        print(f"\n{title}\n{'':<{_WHERE}} {'':<22}{headings}", flush=True)

    def add(self, row: Row) -> None:
        """Keep a row and print it."""
        self.rows.append(row)
        who = row.contender + (f" ({row.backend})" if row.backend else "")
        if row.status == "ok":
            cells = ((column, self._cell(column, row.values.get(column.key))) for column in self.columns)
            text = "".join(f"{cell:>{_width(column)}}" for column, cell in cells)
            text += f"  {row.note}" if row.note else ""
        elif row.status == "wrong":
            text = f"  WRONG: {row.note}"
        else:
            text = f"  {'-' if row.status == 'skipped' else row.status}: {row.note}"
        print(f"{label(row.shape):<{_WHERE}} {who:<22}{text}", flush=True)
        if self.path is not None and not is_stream(self.path):
            self.write(self.path)

    def _cell(self, column: Column, value: float | None) -> str:
        return "-" if value is None else f"{value:,.{column.digits}f}"

    def attempted(self, op: str, shape: dict[str, int], contender: str, run: Callable[[], Row]) -> Row:
        """Add the row from `run`, or one that says why it failed."""
        status, note, row = attempt(run)
        row = row if row is not None else Row(op, shape, contender, status=status, note=note)
        self.add(row)
        return row

    @property
    def failed(self) -> bool:
        """Whether a result was wrong, or one of ours did not run."""
        return any(row.status == "wrong" or (_is_ours(row.contender) and row.status == "failed") for row in self.rows)

    def ratios(self) -> list[Ratio]:
        """Of every peer that ran where we did, and their geometric means over the shapes of an op; ours that are run in
        another way ("mambaseq, no graphs") are an op of their own."""
        found = []
        for variant in dict.fromkeys(row.contender for row in self.rows if _is_ours(row.contender)):
            rows = [row for row in self.rows if row.contender == variant and row.status == "ok"]
            ours = {(row.op, label(row.shape)): row for row in rows}
            for row in self.rows:
                mine = ours.get((row.op, label(row.shape)))
                if _is_ours(row.contender) or row.status != "ok" or mine is None:
                    continue
                op = row.op + variant.removeprefix(OURS)
                for column in self.columns:
                    a, b = mine.values.get(column.key), row.values.get(column.key)
                    if column.compared and a and b:
                        ratio = a / b if column.more_is_better else b / a
                        found.append(Ratio(op, row.shape, row.contender, column.key, ratio))
        return found + _means(found)

    def summary(self) -> None:
        """Print the ratios."""
        headings = {column.key: column.heading for column in self.columns}
        ratios = self.ratios()
        if ratios:
            print("\ntimes ahead of the peer (below 1: behind)")
        lines: dict[tuple[str, str, str], list[str]] = {}
        for ratio in ratios:
            where = label(ratio.shape) if ratio.shape is not None else f"geometric mean, {ratio.over}"
            line = lines.setdefault((ratio.op, where, ratio.peer), [])
            line.append(f"{headings[ratio.value]} {ratio.ratio:.2f}x")
        for (op, where, peer), parts in lines.items():
            print(f"{op:<30} {where:<{_WHERE}} {peer:<22} {'   '.join(parts)}")

    def write(self, path: Path) -> None:
        """Write everything as JSON, completely or not at all."""
        content = {
            "bench": self.bench,
            "scale": self.scale,
            "device": self.device.type,
            "gpu": self.hardware,
            "torch": torch.__version__,
            "mambaseq": __version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rows": [row.as_json() for row in self.rows],
            "ratios": [
                {key: value for key, value in dataclasses.asdict(ratio).items() if key != "over" or value}
                for ratio in self.ratios()
            ],
        }
        with output_file(path, "w", encoding="utf-8") as file:
            file.write(json_text(content, indent=2) + "\n")


def label(shape: dict[str, int]) -> str:
    """A shape as it is printed: `batch 8, channels 2048`."""
    return ", ".join(f"{name} {size}" for name, size in shape.items())


def _means(ratios: list[Ratio]) -> list[Ratio]:
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for ratio in ratios:
        assert ratio.shape is not None
        batch = ratio.shape.get("batch")
        kinds = ["all"] if batch is None else ["all", "batch 1" if batch == 1 else "batch > 1"]
        for kind in kinds:
            groups.setdefault((ratio.op, ratio.peer, ratio.value, kind), []).append(ratio.ratio)
    sizes = {key[:3]: len(values) for key, values in groups.items() if key[3] == "all"}
    return [
        Ratio(op, None, peer, value, math.exp(sum(map(math.log, values)) / len(values)), kind)
        for (op, peer, value, kind), values in groups.items()
        if len(values) > 1 and (kind == "all" or len(values) < sizes[op, peer, value])
    ]


def _is_ours(contender: str) -> bool:
    return contender.startswith(OURS)
