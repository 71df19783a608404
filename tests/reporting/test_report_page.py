"""The page that reports are written to: on a phone, in the dark, without a network; numbers alike are written alike."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from mambaseq.reporting import Section, audio_player, drawing, picture, side_by_side, table
from mambaseq.reporting.charts import Bar, Curve, axis_numbers, bars, confusion, lines, square, ticks
from mambaseq.reporting.curves import loss_charts, other_charts, smoothed
from mambaseq.reporting.page import write_page
from mambaseq.reporting.runs import RunFolder
from mambaseq.reporting.tracks import Band, tracks

VOID = {"meta", "img", "input", "br"}


class Reader(HTMLParser):
    """What elements stand in which, and everything that they fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.around: dict[str, list[list[tuple[str, str]]]] = {}
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {key: value or "" for key, value in attrs}
        self.around.setdefault(tag, []).append([*self.open])
        self.fetched += [named[key] for key in ("src", "href") if key in named]
        if tag not in VOID:
            self.open.append((tag, named.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_nothing_is_wider_than_a_phone_and_nothing_is_fetched(tmp_path: Path) -> None:
    figure = Figure()
    figure.subplots()
    numbers = table(("what", "a", "b"), [("x" * 200, 1.5, 20_000)])
    body = numbers + side_by_side(picture(figure, "a <b>"), audio_player(np.zeros(10), 8000, "silence"))
    first = Section("One & two", "sum", body, highlight=drawing(bars([Bar("ours", 1.0, 0)])))
    write_page(tmp_path / "p.html", "a <run>", "lead", [Section("Last", "", "<p>end</p>"), first], notes=["it broke"])
    text, page = (tmp_path / "p.html").read_text(), read(tmp_path / "p.html")
    assert all(("div", "scroll") in around for around in page.around["table"])
    assert all("main" in dict(around) for around in page.around["img"] + page.around["svg"] + page.around["audio"])
    style = re.sub(r"\s+", " ", text)
    for rule in (
        ".scroll { overflow-x: auto; max-width: 100%",
        "img { max-width: 100%",
        ".chart { display: block; width: 100%",
    ):
        assert rule in style
    assert "prefers-color-scheme: dark" in style
    assert "width=device-width" in text
    assert all(address.startswith(("data:", "#")) for address in page.fetched)
    assert "it broke" in text
    assert text.index('id="part-1">One &amp; two') < text.index('id="part-2">Last')  # what has a highlight comes first


def test_numbers_of_one_quantity_have_one_number_of_decimals() -> None:
    cells = re.findall(r'<td class="number">([^<]*)', table(("m", "bits", "n"), [("a", 4.8195, 7), ("b", 5.1, 12_000)]))
    assert cells == ["4.819", "7", "5.100", "12,000"]
    cells = re.findall(
        r'<td class="number">([^<]*)', table(("m", "v", "t"), [("a", 0.5, 0.25), ("b", 130.0, 6.0)], "rows")
    )
    assert cells == ["0.500", "0.250", "130.0", "6.0"]


def test_a_curve_is_smoothed_without_lag_and_without_what_is_not_finite() -> None:
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    line = np.arange(100.0)
    assert smoothed(line)[10:90] == pytest.approx(line[10:90])
    noisy = line + np.tile([1.0, -1.0], 50)
    noisy[50] = np.nan
    assert np.isfinite(smoothed(noisy)).all()
    assert np.abs(smoothed(noisy) - line)[10:90].max() < 0.5
    assert [len(smoothed(values)) for values in ([], [3.0], [3.0, 1.0])] == [0, 1, 2]


def test_charts_of_odd_numbers(tmp_path: Path) -> None:
    """Constant, single, missing, infinite and very many points, and no room for anything that is not finite."""
    for ys in ([1.0, 1.0], [0.0], [float("nan"), 2.0], [1e-9, 2e-9], list(range(5000)), [-3.0, float("inf")]):
        chart = lines([Curve("a", list(range(len(ys))), ys), Curve("", [0], [1e6], "faint")], "step", "loss")
        assert "nan" not in chart
        assert "inf" not in chart
        assert len(chart) < 20_000
    assert "<circle" in lines([Curve("a", [1], [2.0])], "step", "loss")  # one point is no line
    assert lines([Curve("a", [1], [float("nan")])], "step", "loss") == ""
    assert "nan" in bars([Bar("a", float("nan")), Bar("b", 0.0)], mark=(0.2, "chance"))  # it is said, and has no bar
    told = confusion([[3, 1], [0, 4]], ["cat <x>", "dog"])
    assert "cat &lt;x&gt; 75% right" in told
    assert [told.count(f'fill-opacity="{share}"') for share in ("0.06", "1.00")] == [1, 1]
    assert loss_charts(RunFolder(tmp_path)) == ""
    for ys in ([-1.7e308, 1.7e308], [1e-322, 3e-322], [1e16, 1e16 + 2]):
        lines([Curve("a", [0, 1], ys)], "step", "loss")
    assert confusion([], []) == ""


@pytest.mark.parametrize(
    ("low", "high"),
    [
        *((1000.1, 1000.2), (123456.1, 123456.2), (1.05e-3, 1.0502e-3), (0.0, 1e-15), (5e-15, 6e-15), (2e5, 2.01e5)),
        *((0.5, 0.5 + 1e-9), (-1.0, 1.0), (0.0, 12_000.0), (1e16, 2e16), (3e6, 3.000004e6), (2e-5, 2.001e-5)),
    ],
)
def test_the_numbers_of_an_axis_are_those_of_its_ticks(low: float, high: float) -> None:
    levels = ticks(low, high, 4)
    words = axis_numbers(levels)
    assert 3 <= len(words) == len(set(words))
    units = {"k": 1e3, "M": 1e6, "": 1.0}
    for level, word in zip(levels, words, strict=True):
        value, _, unit = word.replace(",", "").partition(" ")
        assert float(value) * units[unit] == pytest.approx(level, abs=0.01 * (levels[1] - levels[0]))
        assert len(word) <= 12
    chart = lines([Curve("", [low, high], [low, high])], "", "")
    for place in ("end", "middle"):  # of the vertical axis, and of the other
        axis = re.findall(rf'text-anchor="{place}">([^<]+)<', chart)
        assert 2 <= len(axis) == len(set(axis)), axis


def test_what_is_not_drawn_is_counted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.logs / "version_0").mkdir(parents=True)
    names = [f"train/{letter}" for letter in "abcdefghijklmn"]
    rows = "".join(f"{step}{',0.5' * len(names)}\n" for step in (0, 1))
    (folder.logs / "version_0" / "metrics.csv").write_text(f"step,{','.join(names)}\n{rows}")
    told = other_charts(folder)
    assert (told.count("<svg"), "2 more are not drawn" in told) == (12, True)
    assert "not drawn" not in other_charts(folder, 14)


def test_tracks_stand_one_above_the_other() -> None:
    """A lane for each class that occurs, its bands as wide as its runs; the share that agrees is said."""
    truth, said = [(0, 50), (1, 30), (-1, 20)], [(0, 60), (1, 40)]
    chart = tracks(
        [Band("truth", truth, 2), Band("predicted", said)], ["other", "gene <x>", "never"], start=100, step=2
    )
    assert "gene &lt;x&gt;" in chart
    assert "never" not in chart
    assert "truth and predicted along 200 positions, 88% alike" in chart
    widths = [int(width) for width in re.findall(r"h(\d+)v", chart)]
    whole = sum(widths) / 1.8  # 50 + 30 + 60 + 40 of 100
    assert [round(width / whole, 1) for width in widths if width > 2] == [0.5, 0.6, 0.3, 0.4]
    assert tracks([Band("truth", [(-1, 5)])], ["a"]) == ""
    many = tracks([Band("truth", [(label, 1 + label) for label in range(15)])], [f"class {i}" for i in range(15)])
    assert "3 more classes are not drawn" in many
    assert square([Curve("a", [0, 0.5], [float("nan"), 2.0])], "x", "y").count("<path") > 3
    assert square([], "x", "y") == ""
