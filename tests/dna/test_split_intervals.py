"""Splits by a BED file: windows of one split read no base of another, and what the published rule leaks is counted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mambaseq_dna.genome import GenomeData
from mambaseq_dna.ranges import covered, difference, intersection, union
from mambaseq_dna.split_intervals import SplitIntervals
from mambaseq_dna.tokenizer import BaseTokenizer

from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
LENGTH = 1000


def letters(n: int, seed: int) -> str:
    return BaseTokenizer().decode(np.random.default_rng(seed).integers(0, 4, n))


def write(folder: Path, *intervals: tuple[str, int, int, str], **records: str) -> dict[str, Any]:
    (folder / "a.bed").write_text("".join("{}\t{}\t{}\t{}\n".format(*interval) for interval in intervals))
    (folder / "a.fa").write_text("".join(f">{name}\n{text}\n" for name, text in records.items()))
    return {"fasta": [str(folder / "a.fa")], "intervals": str(folder / "a.bed"), "cache": str(folder / "cache")}


def places(data: GenomeData, split: str) -> np.ndarray:
    """Which bases of each sequence windows of the split may read, `(sequences, LENGTH)` bool."""
    found = np.zeros((2, LENGTH), dtype=bool)
    for group in getattr(data.splits, split):
        for interval in group.intervals:
            found[interval.record, interval.start : interval.stop] = True
    return found


def test_sets_of_ranges_by_hand_and_against_sets_of_places() -> None:
    assert union(np.array([[5, 7], [0, 2], [2, 4], [6, 9]])).tolist() == [[0, 4], [5, 9]]
    rng = np.random.default_rng(0)
    for _ in range(200):
        starts = rng.integers(0, 60, (2, int(rng.integers(1, 9))))
        one, other = (union(np.stack((part, part + rng.integers(1, 9, len(part))), axis=1)) for part in starts)
        ours, theirs = ({place for a, b in part.tolist() for place in range(a, b)} for part in (one, other))

        def held(ranges: np.ndarray) -> set[int]:
            assert (ranges[:, 0] < ranges[:, 1]).all()
            return {place for a, b in ranges.tolist() for place in range(a, b)}

        both, of = intersection(one, other)
        assert held(both) == ours & theirs
        assert ((one[of, 0] <= both[:, 0]) & (both[:, 1] <= one[of, 1])).all()
        assert held(difference(one, other)) == ours - theirs
        assert held(difference(one, other[:0])) == ours
        assert covered(one, other).tolist() == [len(set(range(a, b)) & theirs) for a, b in one.tolist()]


@pytest.mark.parametrize("extend", ["none", "within"])
def test_no_base_is_in_two_splits(tmp_path: Path, extend: str) -> None:
    """Random intervals against a painting of every base: overlapping ones, `chr1` for `1`, gaps between splits."""
    rng = np.random.default_rng(1)
    intervals, owner = [], np.zeros((2, LENGTH), dtype=int)
    for _ in range(60):
        record, start = int(rng.integers(2)), int(rng.integers(0, LENGTH - 40))
        stop, split = start + int(rng.integers(1, 40)), int(rng.integers(3))
        if set(np.unique(owner[record, start:stop])) <= {0, split + 1}:
            owner[record, start:stop] = split + 1
            intervals.append((("chr1", "two")[record], start, stop, SPLITS[split]))
    options = write(tmp_path, *intervals, **{"1": letters(LENGTH, 0), "two": letters(LENGTH, 1)})
    data = GenomeData(length=5, extend=extend, **options)  # type: ignore[arg-type]
    expected = owner.copy()
    if extend == "within":
        for row in expected:
            (known,) = np.nonzero(row)
            for place in np.flatnonzero(row == 0):
                near = {*row[known[known < place][-1:]].tolist(), *row[known[known > place][:1]].tolist()}
                row[place] = near.pop() if len(near) == 1 else 0
    for split, name in enumerate(("train", "validation", "test")):
        np.testing.assert_array_equal(places(data, name), expected == split + 1)
    windows = data.train()
    for index in range(100):
        interval, start, _, _ = windows.draw(index)
        assert (expected[interval.record, start : start + 6] == 1).all()
    assert data.sources()["a.bed"] == hashlib.sha256((tmp_path / "a.bed").read_bytes()).hexdigest()


LAYOUT = [("a", 100, 200, "train"), ("a", 200, 300, "test"), ("a", 320, 380, "train"), ("b", 0, 64, "valid")]


def test_windows_of_the_published_rule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """HyenaDNA: one an interval, its first bases or more to both sides. Mamba: tiles, or one that begins and one that
    ends with it. Moved into the sequence; N stays."""
    options = write(tmp_path, *LAYOUT, a="N" * 10 + letters(390, 0), b=letters(400, 1))

    def starts(length: int, split: str, rule: Any = "hyenadna") -> list[tuple[int, int]]:
        data = GenomeData(length=length, objective="masked", extend=rule, **options)
        (group,) = getattr(data.splits, split)
        assert len(data.train()[0].inputs[0]) == length
        return [(interval.start, len(interval)) for interval in group.intervals]

    assert starts(32, "train") == [(100, 32), (320, 32)]
    assert starts(60, "test") == [(200, 60)]
    assert not caplog.records
    assert starts(100, "train") == [(100, 100), (300, 100)]
    assert starts(200, "train") == [(50, 200), (200, 200)]
    assert "100 of 100 bases of the test intervals (100.0%) are in training windows of 200" in caplog.text
    assert starts(400, "train") == [(0, 400), (0, 400)]
    assert starts(400, "validation") == [(0, 400)]
    assert [place for place, _ in starts(32, "train", "mamba")] == [100, 132, 164, 320]
    assert [place for place, _ in starts(140, "train", "mamba")] == [100, 60, 260, 240]


def test_the_leak_of_the_published_rule_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, *LAYOUT)
    found = SplitIntervals.read(tmp_path / "a.bed")
    # 300-380 is what windows of 100 read around 320-380, and 280 to 420 what windows of 140 do
    for length, leaked, touched in ((60, 0, 0), (100, 0, 0), (140, 20 + 20, 1), (200, 100, 1)):
        valid, test = found.leaks(length, "hyenadna")
        assert (valid.leaked, valid.touched, valid.bases, test.bases, test.windows) == (0, 0, 64, 100, 1)
        assert (test.leaked, test.touched) == (leaked, touched)
    # 100-240 and 240-380
    assert [leak.leaked for leak in found.leaks(140, "mamba")] == [0, 40 + 60]
    assert [leak.leaked for leak in found.leaks(60, "mamba")] == [0, 0]
    assert main(["dna/split-leak", str(tmp_path / "a.bed"), "--lengths", "100", "2^8"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["256", "hyenadna", "test", "100", "100", "100.00%", "1", "1", "100.0%"] in rows
    assert ["100", "mamba", "validation", "64", "0", "0.00%", "2", "0", "0.0%"] in rows
    for wrong, told in (("none", "is not a length"), ("2^40", "not between 1 and 2")):
        assert main(["dna/split-leak", str(tmp_path / "a.bed"), "--lengths", wrong]) == 2
        assert told in capsys.readouterr().err
    assert main(["dna/split-leak", "dna/genome"]) == 2
    assert "dna/genome sets no data.intervals" in capsys.readouterr().err


BAD = {
    "another split": ([("a", 0, 9, "train"), ("a", 9, 12, "hold")], {}, r"a\.bed, line 2: the split .* is 'hold'"),
    "no training data": ([("a", 0, 9, "test")], {}, "has no interval of training data"),
    "an unknown sequence": (
        [("a", 0, 9, "train"), ("c", 0, 9, "test")],
        {},
        r"a\.bed, line 2: the assembly \(a\.fa\) has no sequence 'c'",
    ),
    "beyond the end": (
        [("a", 0, 9, "train"), ("a", 90, 101, "test")],
        {},
        r"line 2: the interval 90 to 101 ends behind 'a', which has 100 bases",
    ),
    "two splits": (
        [("a", 0, 50, "train"), ("a", 40, 60, "test")],
        {},
        r"10 bases are in train and in test intervals.*data\.duplicates to drop",
    ),
    "a split of N": ([("a", 0, 50, "train"), ("b", 0, 5, "test")], {}, r"The test set has no base .*Check its inter"),
    "names too": ([("a", 0, 9, "train")], {"test_records": "a"}, r"data\.intervals and data\.test_records both say"),
    "a mistyped rule": (
        [("a", 0, 9, "train")],
        {"extend": "all"},
        r"data\.extend must be one of none, within, hyen",
    ),
    "no file": ([("a", 0, 9, "train")], {"intervals": None, "extend": "within"}, "beside data.intervals, which is not"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be(tmp_path: Path, what: str) -> None:
    intervals, more, told = BAD[what]
    options = write(tmp_path, *intervals, a=letters(100, 0), b="N" * 50 + letters(50, 1)) | {"length": 5} | more
    with pytest.raises((DataError, ConfigError), match=told):
        GenomeData(**options).setup()


def test_bases_of_two_splits_may_be_dropped(tmp_path: Path) -> None:
    options = write(tmp_path, ("a", 0, 50, "train"), ("a", 40, 60, "test"), a=letters(100, 0))
    data = GenomeData(length=5, duplicates="drop", **options)
    for split, place in (("train", (0, 40)), ("test", (40, 60))):
        (group,) = getattr(data.splits, split)
        assert [(interval.start, interval.stop) for interval in group.intervals] == [place]
