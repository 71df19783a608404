"""Windows: nothing crosses a border, random items are functions of (seed, index), fixed ones never
overlap."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mambaseq.data.store import TokenStore
from mambaseq.data.windows import (
    GridWindows,
    Group,
    Interval,
    RandomWindows,
    check_disjoint,
    group_label,
    next_token,
)
from mambaseq.errors import DataError


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Two records whose tokens are their positions, so that a window shows where it was read."""
    records = [("long", np.arange(1000)), ("short", np.arange(100))]
    return TokenStore.build(tmp_path / "s", records, "uint16", {"sources": [{"name": "a.fa", "sha256": "00"}]})


def test_random_windows_stay_inside_and_reach_both_ends(store: TokenStore) -> None:
    groups = [Group("g", [Interval(store, 0, 10, 22), Interval(store, 0, 500, 512), Interval(store, 0, 900, 905)])]
    windows = RandomWindows(groups, 10, group_label, size=300)
    starts = Counter(int(windows[i].inputs[0, 0]) for i in range(300))
    assert set(starts) == {10, 11, 12, 500, 501, 502}
    for i in range(50):
        ids = windows[i].inputs[0].numpy()
        assert (np.diff(ids) == 1).all()


def test_items_depend_on_seed_and_index_alone(store: TokenStore) -> None:
    groups = [Group("g", [Interval(store, 0, 0, 1000)])]
    one, two = (RandomWindows(groups, 10, group_label, size=10) for _ in range(2))
    order = [5, 3, 10**9, 0]
    firsts = [int(one[i].inputs[0, 0]) for i in order]
    assert [int(two[i].inputs[0, 0]) for i in reversed(order)] == firsts[::-1]
    other = RandomWindows(groups, 10, group_label, size=10, seed=1)
    assert [int(other[i].inputs[0, 0]) for i in order] != firsts
    assert [int(pickle.loads(pickle.dumps(one))[i].inputs[0, 0]) for i in order] == firsts


def test_groups_then_records_are_drawn_alike_whatever_their_size(store: TokenStore) -> None:
    small, large = Interval(store, 1, 0, 100), Interval(store, 0, 0, 1000)
    groups = [Group("both", [large, small]), Group("large", [large])]
    windows = RandomWindows(groups, 50, group_label, size=1)
    drawn = Counter((group, interval.record) for interval, _, group, _ in map(windows.draw, range(2000)))
    assert drawn[1, 0] / 2000 == pytest.approx(0.5, abs=0.05)
    assert drawn[0, 0] / 2000 == pytest.approx(0.25, abs=0.05)
    by_position = RandomWindows(groups[:1], 50, group_label, size=1, by_position=True)
    share = np.mean([by_position.draw(i)[0].record == 1 for i in range(4000)])
    assert share == pytest.approx(51 / (51 + 951), abs=0.015)


def test_targets(store: TokenStore) -> None:
    groups = [Group("a", [Interval(store, 1, 0, 9)]), Group("b", [Interval(store, 1, 20, 29)])]
    batch = GridWindows(groups, 9, next_token)[0]
    assert batch.inputs.tolist() == [list(range(8))]
    assert batch.targets is not None
    assert batch.targets.tolist() == [list(range(1, 9))]
    labelled = GridWindows(groups, 9, group_label)[1]
    assert labelled.targets is not None
    assert (labelled.inputs[0, 0], labelled.targets.tolist()) == (20, [1])


def test_tiles_cover_without_overlap(store: TokenStore) -> None:
    groups = [Group("g", [Interval(store, 0, 5, 37), Interval(store, 0, 100, 109), Interval(store, 1, 0, 10)])]
    windows = GridWindows(groups, 10, group_label)
    assert [windows.place(i)[1] for i in range(len(windows))] == [5, 15, 25, 0]
    chained = GridWindows([Group("g", [Interval(store, 0, 0, 41)])], 11, next_token, stride=10)
    targets = np.concatenate([chained[i].targets[0] for i in range(len(chained))])  # type: ignore[index]
    assert targets.tolist() == list(range(1, 41))


def test_chosen_tiles_are_seeded_distinct_and_equally_many(store: TokenStore) -> None:
    groups = [Group("long", [Interval(store, 0, 0, 1000)]), Group("short", [Interval(store, 1, 0, 100)])]
    windows = GridWindows(groups, 10, group_label, balanced=True, seed=3)
    places = [windows.place(i)[1:] for i in range(len(windows))]
    assert Counter(group for _, group in places) == {0: 10, 1: 10}
    assert len(set(places)) == 20
    again = GridWindows(groups, 10, group_label, balanced=True, seed=3)
    assert [again.place(i)[1:] for i in range(20)] == places
    other = GridWindows(groups, 10, group_label, balanced=True, seed=4)
    assert [other.place(i)[1:] for i in range(20)] != places
    few = GridWindows(groups, 10, group_label, at_most=20)
    assert Counter(few.place(i)[2] for i in range(len(few))) == {0: 20, 1: 10}


@pytest.mark.parametrize("kind", [RandomWindows, GridWindows])
def test_data_shorter_than_the_window(store: TokenStore, kind: type) -> None:
    options = {"size": 4} if kind is RandomWindows else {}
    groups = [Group("dog", [Interval(store, 1, 0, 50), Interval(store, 1, 60, 100)])]
    with pytest.raises(DataError, match=r"'dog'.*reads 64 tokens.*has 50 \(record 'short' of a\.fa.*Lower data"):
        kind(groups, 64, group_label, **options)
    with pytest.raises(DataError, match="'cow' has no sequence"):
        kind([Group("cow", [])], 64, group_label, **options)


def test_reading_out_of_an_interval_is_an_error(store: TokenStore) -> None:
    with pytest.raises(IndexError, match="leaves the interval"):
        Interval(store, 0, 10, 20).read(15, 6)


def test_overlapping_splits_are_refused(store: TokenStore, tmp_path: Path) -> None:
    train, test = Interval(store, 0, 0, 600), Interval(store, 0, 600, 1000)
    check_disjoint(train=[Group("g", [train])], test=[Group("g", [test])])
    with pytest.raises(DataError, match=r"Positions 599 to 600 of record 'long' of a\.fa.* train .* test "):
        check_disjoint(train=[Group("g", [train])], test=[Group("g", [Interval(store, 0, 599, 700)])])
    copy = TokenStore.build(tmp_path / "copy", [("renamed", np.arange(1000))], "uint16", store.meta)
    with pytest.raises(DataError, match=r"train \(b\) and in train \(a\)"):
        check_disjoint(train=[Group("a", [train]), Group("b", [Interval(copy, 0, 0, 10)])])
