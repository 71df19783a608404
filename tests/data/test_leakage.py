"""Nothing is in two splits: records are compared by what they hold, and positions within them."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from mambaseq.data.intervals import Group, Interval, Intervals
from mambaseq.data.leakage import check_disjoint, without_copies
from mambaseq.data.store import TokenStore
from mambaseq.errors import DataError

LONG = np.arange(1000)


def make(tmp_path: Path, name: str, *records: np.ndarray) -> TokenStore:
    """A store of records a, b, c, ... whose other strand is the tokens in reverse."""

    def both(tokens: np.ndarray) -> tuple[int, int]:
        return hash(tokens.tobytes()) % 2**64, hash(tokens[::-1].tobytes()) % 2**64

    named = zip("abcdef", records, strict=False)
    return TokenStore.build(tmp_path / name, named, "uint16", {"sources": [{"name": f"{name}.fa"}]}, checksums=both)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return make(tmp_path, "x", LONG, np.arange(100))


def test_positions_of_a_record(store: TokenStore) -> None:
    train, test = Interval(store, 0, 0, 600), Interval(store, 0, 600, 1000)
    check_disjoint(train=[Group("g", [train])], test=[Group("g", [test])])
    told = r"Positions 599 to 600 of record 'a' of x\.fa are in test \(g\) and in train \(g\)"
    with pytest.raises(DataError, match=told):
        check_disjoint(train=[Group("g", [train])], test=[Group("g", [Interval(store, 0, 599, 700)])])
    with pytest.raises(DataError, match=r"Positions 0 to 600 of record 'a'.* in train \(two\) and in train \(one\)"):
        check_disjoint(train=[Group("one", [train]), Group("two", [train])])
    with pytest.raises(DataError, match=r"Positions 0 to 600 of record 'a'.*Name every file once"):
        check_disjoint(train=[Group("g", [train, test, train])])
    far = [Interval(store, 0, 0, 1000), Interval(store, 1, 0, 100)]
    with pytest.raises(DataError, match="Positions 700 to 701 of record 'a'"):  # not beside each other when sorted
        check_disjoint(train=[Group("g", far)], test=[Group("g", [Interval(store, 0, 700, 701)])])


def test_a_copy_under_another_name(store: TokenStore, tmp_path: Path) -> None:
    copy = make(tmp_path, "y", np.arange(7), LONG)
    told = r"Record 'a' of x\.fa, in test \(g\), holds the same as record 'b' of y\.fa, in train \(g\).*; do that\."
    with pytest.raises(DataError, match=told):
        check_disjoint(
            train=[Group("g", [Interval(copy, 1, 0, 500)])],
            test=[Group("g", [Interval(store, 0, 499, 600)])],
            remedy="; do that",
        )
    check_disjoint(train=[Group("g", [Interval(copy, 1, 0, 500)])], test=[Group("g", [Interval(store, 0, 500, 600)])])
    check_disjoint(train=[Group("g", [Interval(copy, 1, 0, 500), Interval(store, 0, 0, 500)])])


def test_a_copy_of_the_other_strand(store: TokenStore, tmp_path: Path) -> None:
    turned = make(tmp_path, "y", LONG[::-1])
    for start, stop, meets in ((400, 1000, False), (399, 1000, True), (0, 1000, True), (0, 401, False)):
        train = [Group("g", [Interval(store, 0, 600, 1000)])]
        test = [Group("g", [Interval(turned, 0, start, stop)])]
        if stop - start == 401:
            train = [Group("g", [Interval(store, 0, 0, 599)])]
        if meets:
            with pytest.raises(DataError, match="holds the same as"):
                check_disjoint(train=train, test=test)
        else:
            check_disjoint(train=train, test=test)


def test_the_number_of_copies_is_said(tmp_path: Path) -> None:
    store = make(tmp_path, "x", *(np.arange(3) for _ in range(4)))
    one, *others = (Interval(store, k, 0, 3) for k in range(4))
    with pytest.raises(DataError, match=r"This is so for 3 records\."):
        check_disjoint(train=[Group("g", others)], test=[Group("g", [one])])


def test_copies_are_dropped_from_what_is_least_protected(store: TokenStore, tmp_path: Path) -> None:
    copy = make(tmp_path, "y", LONG, np.arange(50), LONG[::-1])
    splits = {
        "train": [Group("g", [Interval(copy, 2, 0, 500), Interval(copy, 1, 0, 50), Interval(copy, 2, 500, 1000)])],
        "validation": [Group("g", [Interval(copy, 0, 0, 1000)])],
        "test": [Group("g", [Interval(store, 0, 0, 300)])],
    }
    kept, intervals, tokens = without_copies(splits)
    assert [list(kept[split][0].intervals) for split in ("test", "validation")] == [[Interval(store, 0, 0, 300)], []]
    assert [(i.record, i.start) for i in kept["train"][0].intervals] == [(2, 0), (1, 0)]
    assert (intervals, tokens) == (2, 1500)
    check_disjoint(**kept)


def test_copies_in_two_groups_are_dropped_from_both(store: TokenStore, tmp_path: Path) -> None:
    copy = make(tmp_path, "y", LONG, np.arange(50))
    one = [Interval(store, 0, 0, 10), Interval(store, 1, 0, 9)]
    two = [Interval(copy, 0, 5, 20), Interval(copy, 0, 20, 30)]
    empty = [Group("one", []), Group("two", [])]
    kept, _, _ = without_copies({"train": [Group("one", one), Group("two", two)], "test": empty})
    assert [[(i.record, i.start) for i in group.intervals] for group in kept["train"]] == [[(1, 0)], [(0, 20)]]


def test_equals_a_search_through_all_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for case in range(60):
        contents = [rng.integers(0, 3, int(rng.integers(2, 4))) for _ in range(6)]
        store = make(tmp_path, f"s{case}", *contents)
        taken: dict[str, list[Group]] = {split: [Group("p", []), Group("q", [])] for split in ("train", "test")}
        claims: list[tuple[str, set[tuple[tuple[int, ...], int]]]] = []
        for record, content in enumerate(contents):
            split, group = ["train", "test"][rng.integers(2)], int(rng.integers(2))
            start, stop = sorted(rng.choice(len(content) + 1, 2, replace=False).tolist())
            taken[split][group].intervals.append(Interval(store, record, start, stop))  # type: ignore[attr-defined]
            forward, turned = tuple(content.tolist()), tuple(content[::-1].tolist())
            held = {(forward, k) for k in range(start, stop)}
            if turned != forward:  # of a record that is its own other strand, one direction counts
                held |= {(turned, len(content) - 1 - k) for k in range(start, stop)}
            claims.append((f"{split}{group}", held))
        leaks = any(one[0] != two[0] and one[1] & two[1] for one, two in itertools.combinations(claims, 2))
        refused += leaks
        if leaks:
            with pytest.raises(DataError):
                check_disjoint(**taken)
            check_disjoint(**without_copies(taken)[0])
        else:
            check_disjoint(**taken)
    assert 10 < refused < 50


def test_many_records_take_no_time(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "s", ((str(k), np.array([k % 500])) for k in range(20_000)), "uint16", {})
    groups = [Group("g", [Interval(store, k, 0, 1) for k in range(start, 20_000, 2)]) for start in (0, 1)]
    check_disjoint(train=[groups[0]], test=[groups[1]])
    kept, dropped, _ = without_copies({"train": [groups[0]], "test": [Group("g", [Interval(store, 2, 0, 1)])]})
    assert (len(kept["train"][0].intervals), dropped) == (10_000 - 40, 40)


def reference(splits: dict[str, list[Group]]) -> dict[str, list[list[Interval]]]:
    """What `without_copies` keeps, by a search through all pairs."""

    def held(interval: Interval) -> set[tuple[bytes, int]]:
        content = np.asarray(interval.store[interval.record])
        turned = bool(interval.store.checksums[interval.record][0] > interval.store.checksums[interval.record][1])
        places = range(interval.start, interval.stop)
        if turned:
            content, places = content[::-1], [len(content) - 1 - place for place in places]
        return {(content.tobytes(), place) for place in places}

    kept: dict[str, list[list[Interval]]] = {}
    taken: set[tuple[bytes, int]] = set()
    for split in [name for name in ("test", "validation", "train") if name in splits]:
        groups = [[(interval, held(interval)) for interval in group.intervals] for group in splits[split]]
        everything = [set().union(*(places for _, places in group)) for group in groups]
        kept[split] = []
        for number, group in enumerate(groups):
            others = taken.union(*(places for other, places in enumerate(everything) if other != number))
            kept[split].append([interval for interval, places in group if not places & others])
        for group in kept[split]:
            taken = taken.union(*map(held, group))
    return kept


def test_keeps_what_a_search_through_all_pairs_keeps(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    left_out = 0
    for case in range(20):
        contents = [np.arange(9) + k for k in (0, 0, 1)] + [np.arange(9)[::-1], np.arange(9), np.full(4, 7)]
        store = make(tmp_path, f"s{case}", *contents)
        splits = {name: [Group(g, []) for g in "pqr"] for name in ("train", "validation", "test")}
        for record, content in enumerate(contents):
            places = np.sort(rng.choice(len(content) + 1, int(rng.integers(2, 5)), replace=False)).tolist()
            for start, stop in itertools.pairwise(places):
                group = splits[list(splits)[rng.integers(3)]][rng.integers(3)]
                group.intervals.append(Interval(store, record, start, stop))  # type: ignore[attr-defined]
        kept, number, _ = without_copies(splits)
        assert {name: [list(group.intervals) for group in kept[name]] for name in kept} == reference(splits)
        left_out += number
    assert left_out > 50


def test_many_copies_of_many_records_take_no_time(tmp_path: Path) -> None:
    count = 20_000
    store = TokenStore.build(
        tmp_path / "s",
        ((str(k), np.array([k // 2 % 250, k // 500])) for k in range(2 * count)),
        "uint16",
        {},
        checksums=lambda tokens: (hash(tokens.tobytes()) % 2**64, hash(tokens[::-1].tobytes()) % 2**64),
    )
    rows = np.zeros((count, 4), np.int64)
    rows[:, 1], rows[:, 3] = np.arange(0, 2 * count, 2), 2
    splits = {
        "train": [Group("g", Intervals([store], rows))],
        "test": [Group("g", Intervals([store], rows + np.array([0, 1, 0, 0])))],
    }
    begun = time.process_time()
    kept, dropped, tokens = without_copies(splits)
    assert time.process_time() - begun < 0.5  # 1.5 s where each record is looked at by itself
    assert (len(kept["train"][0].intervals), len(kept["test"][0].intervals), dropped, tokens) == (
        0,
        count,
        count,
        2 * count,
    )
