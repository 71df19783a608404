"""Tables of a paper's results next to our measurements."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any, Literal

from mambaseq.atomic import atomic_file, json_text, plain_values

_MOST_DIGITS = 4
_TINY = (
    "Tiny models and a few steps, to see that everything runs: nothing is learned, and the figures say nothing of the "
    "paper's. `--scale small` is sized for a CPU, `--scale full` gives the reported results, on a GPU."
)
HOLDS, FAILS, NONE = "holds", "does not hold", ""


@dataclasses.dataclass(frozen=True)
class Column:
    """A measured value: its key in the lines, its heading, its digits, and whether it is shown in percent."""

    key: str
    heading: str
    digits: int = 2
    percent: bool = False

    def show(self, values: list[float]) -> str:
        """The mean of the seeds' values and, where they differ, the standard deviation."""
        scale, unit = (100, " %") if self.percent else (1, "")
        finite = [scale * value for value in values if math.isfinite(value)]
        if not finite:
            return "diverged" if values else "-"
        mean, digits = statistics.mean(finite), self.digits
        while self.percent and digits < _MOST_DIGITS and float(f"{mean:.{digits}f}") == scale > mean:
            digits += 1  # less than 100 % is not rounded to 100 %
        text = f"{mean:,.{digits}f}"
        if len(set(finite)) > 1:
            text += f" ± {statistics.stdev(finite):,.{digits}f}"
        return text + unit + (f" ({len(values) - len(finite)} diverged)" if len(finite) < len(values) else "")


@dataclasses.dataclass(frozen=True)
class Bound:
    """A bound on the mean of a column's values, for the paper's result to hold here."""

    column: str
    relation: Literal[">=", "<="]
    value: float

    def holds(self, values: list[float]) -> bool:
        mean = statistics.mean(values)
        return mean >= self.value if self.relation == ">=" else mean <= self.value


@dataclasses.dataclass
class Line:
    """One thing that was trained or measured.

    paper: what the paper reports, in its words or figures; "" if nothing. values: one for each seed and measured
        column. wanted: bounds for the result to hold. note: for instance why something is missing.
    """

    name: str
    values: dict[str, list[float]]
    paper: str = ""
    wanted: tuple[Bound, ...] = ()
    note: str = ""

    @property
    def verdict(self) -> str:
        """HOLDS, FAILS, or NONE if there is no bound or no measurement."""
        measured = [bound for bound in self.wanted if self.values.get(bound.column)]
        if not measured:
            return NONE
        return HOLDS if all(bound.holds(self.values[bound.column]) for bound in measured) else FAILS


@dataclasses.dataclass
class Table:
    """A table of a recipe; `about` says what was trained, on what and for how long."""

    title: str
    about: str
    columns: list[Column]
    lines: list[Line]

    def markdown(self) -> str:
        """A heading, what was done, and a table."""
        has_paper = any(line.paper for line in self.lines)
        has_verdict = any(line.verdict != NONE for line in self.lines)
        has_note = any(line.note for line in self.lines)
        heads = ["", *(["paper"] if has_paper else []), *(column.heading for column in self.columns)]
        heads += [*(["verdict"] if has_verdict else []), *(["note"] if has_note else [])]
        rows = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
        for line in self.lines:
            cells = [line.name, *([line.paper] if has_paper else [])]
            cells += [column.show(line.values.get(column.key, [])) for column in self.columns]
            cells += [*([line.verdict] if has_verdict else []), *([line.note] if has_note else [])]
            rows.append("| " + " | ".join(cells) + " |")
        return f"### {self.title}\n\n{self.about}\n\n" + "\n".join(rows) + "\n"

    def as_json(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        for line, made in zip(plain["lines"], self.lines, strict=True):
            line["verdict"] = made.verdict
            line["values"] = plain_values(made.values)
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Table:
        lines = [
            Line(
                line["name"],
                {key: [math.nan if value is None else value for value in of] for key, of in line["values"].items()},
                line["paper"],
                tuple(Bound(**bound) for bound in line["wanted"]),
                line["note"],
            )
            for line in plain["lines"]
        ]
        return cls(plain["title"], plain["about"], [Column(**column) for column in plain["columns"]], lines)


@dataclasses.dataclass
class Report:
    """The tables of one run of a recipe, and what they were made with. seconds: of all its trials together, None if
    unknown."""

    recipe: str
    scale: str
    seeds: list[int]
    command: str
    hardware: str
    versions: str
    date: str
    seconds: float | None
    tables: list[Table]

    def markdown(self) -> str:
        seeds = f"seed {self.seeds[0]}" if len(self.seeds) == 1 else f"{len(self.seeds)} seeds"
        took = "" if self.seconds is None else f"{self.seconds / 60:.1f} min, "
        made = f"`{self.command}`: {self.hardware}, {self.versions}, {seeds}, {took}{self.date}."
        made += f"\n\n{_TINY}" if self.scale == "tiny" else ""
        return made + "\n\n" + "\n".join(table.markdown() for table in self.tables)

    def write(self, folder: Path, stem: str = "report") -> Path:
        """Write `report.json` and `report.md`, or with another stem. Returns the path of the first."""
        plain = {**vars(self), "tables": [table.as_json() for table in self.tables]}
        for suffix, text in ((".md", self.markdown()), (".json", json_text(plain, indent=1) + "\n")):
            with atomic_file(folder / (stem + suffix)) as file:
                file.write(text.encode())
        return folder / f"{stem}.json"

    @classmethod
    def read(cls, path: Path) -> Report:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**plain, "tables": [Table.from_json(table) for table in plain["tables"]]})
