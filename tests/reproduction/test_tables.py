"""Tables of a recipe: what is shown of several seeds, and what holds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from mambaseq.reproduction import Bound, Column, Line, Table
from mambaseq.reproduction.tables import FAILS, HOLDS, NONE, Report

NAN = math.nan


@pytest.mark.parametrize(
    ("column", "values", "shown"),
    [
        (Column("a", "A"), [1.0, 2.0, 3.0], "2.00 ± 1.00"),
        (Column("a", "A", 1, percent=True), [0.5, 0.6], "55.0 ± 7.1 %"),  # 10 / sqrt(2)
        (Column("a", "A", 0), [12345.6], "12,346"),
        (Column("a", "A", 0, percent=True), [511 / 512], "99.8 %"),  # not 100
        (Column("a", "A", 0, percent=True), [1.0, 1.0], "100 %"),
        (Column("a", "A", 1), [3.0, 3.0], "3.0"),
        (Column("a", "A"), [], "-"),
        (Column("a", "A"), [NAN, math.inf], "diverged"),
        (Column("a", "A"), [1.0, NAN, 3.0], "2.00 ± 1.41 (1 diverged)"),
        (Column("a", "A"), [1.0, NAN], "1.00 (1 diverged)"),
    ],
)
def test_a_cell_is_mean_and_deviation_of_the_seeds(column: Column, values: list[float], shown: str) -> None:
    assert column.show(values) == shown


@pytest.mark.parametrize(
    ("wanted", "values", "verdict"),
    [
        ((Bound("a", ">=", 0.5),), {"a": [0.4, 0.6]}, HOLDS),
        ((Bound("a", ">=", 0.5),), {"a": [0.4, 0.5]}, FAILS),
        ((Bound("a", "<=", 0.5),), {"a": [0.4, 0.6]}, HOLDS),
        ((Bound("a", "<=", 0.5), Bound("b", ">=", 1)), {"a": [0.4], "b": [0.9]}, FAILS),
        ((Bound("a", ">=", 0.5), Bound("b", ">=", 1)), {"a": [0.6]}, HOLDS),  # b was not measured
        ((Bound("a", ">=", 0.5),), {"a": [0.9, NAN]}, FAILS),
        ((Bound("a", "<=", 0.5),), {"a": [0.1, NAN]}, FAILS),
        ((Bound("a", ">=", 0.5),), {"a": []}, NONE),
        ((), {"a": [1.0]}, NONE),
    ],
)
def test_a_verdict_is_of_the_means(wanted: tuple[Bound, ...], values: dict, verdict: str) -> None:
    assert Line("x", values, wanted=wanted).verdict == verdict


def table() -> Table:
    lines = [
        Line("mamba", {"a": [0.99, 1.0]}, "100 %", (Bound("a", ">=", 0.9),), "as published"),
        Line("s4d", {"a": [0.25, NAN], "n": [7.0]}),
    ]
    return Table("Copying", "What was done.", [Column("a", "accuracy", 1, percent=True), Column("n", "n", 0)], lines)


def test_markdown_has_the_columns_that_have_something_in_them() -> None:
    assert table().markdown() == (
        "### Copying\n\nWhat was done.\n\n"
        "|  | paper | accuracy | n | verdict | note |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| mamba | 100 % | 99.5 ± 0.7 % | - | holds | as published |\n"
        "| s4d |  | 25.0 % (1 diverged) | 7 |  |  |\n"
    )
    bare = Table("T", "x", [Column("n", "n", 0)], [Line("one", {"n": [3.0]})])
    assert bare.markdown().endswith("|  | n |\n| --- | --- |\n| one | 3 |\n")


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = Report(
        "d/x", "full", [0, 1], "mambaseq reproduce x", "a GPU", "torch 1", "2026-01-02", 90.0, [table(), table()]
    )
    path = report.write(tmp_path / "out")
    again = Report.read(path)
    assert again.markdown() == report.markdown() == (tmp_path / "out" / "report.md").read_text()
    assert "1.5 min" in again.markdown()
    assert "nothing is learned" not in again.markdown()
    assert "nothing is learned" in dataclasses.replace(again, scale="tiny").markdown()
    assert again.tables[0].lines[0] == report.tables[0].lines[0]
    assert again.tables[0].lines[1].values["a"][0] == 0.25
    assert math.isnan(again.tables[0].lines[1].values["a"][1])
    assert "NaN" not in path.read_text()  # which other readers of JSON refuse
    assert again.tables[0].columns == report.tables[0].columns
