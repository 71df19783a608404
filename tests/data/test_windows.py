"""Windows: nothing crosses a border, random items are functions of (seed, index), fixed ones never
overlap."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mambaseq.data.intervals import Group, Interval, Intervals
from mambaseq.data.store import TokenStore
from mambaseq.data.windows import GridWindows, RandomWindows, group_label, next_token, warn_once
from mambaseq.errors import ConfigError, DataError


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


def test_the_length_that_is_named(store: TokenStore) -> None:
    groups = [Group("g", [Interval(store, 1, 0, 50)])]
    for options, fits in (({}, 49), ({"length": 100}, 49), ({"length": 101}, 50), ({"length": 40}, None)):
        told = f"at most {fits}, give" if fits else r"\)\. Give more"
        with pytest.raises(DataError, match=told):
            GridWindows(groups, 101, group_label, **options)


@pytest.mark.parametrize("size", [0, -1, 2**63])
def test_an_epoch_has_a_size(store: TokenStore, size: int) -> None:
    with pytest.raises(ConfigError, match=r"data\.epoch_size must be at least 1 and below 2\^63"):
        RandomWindows([Group("g", [Interval(store, 0, 0, 1000)])], 10, next_token, size=size)


def test_nothing_to_draw_from(store: TokenStore) -> None:
    with pytest.raises(DataError, match="The training set is empty"):
        RandomWindows([], 10, next_token, size=4)
    for kind, options in ((RandomWindows, {"size": 4}), (GridWindows, {})):
        with pytest.raises(ConfigError, match=r"data\.seed must be at least 0"):
            kind([Group("g", [Interval(store, 0, 0, 1000)])], 10, next_token, seed=-1, **options)  # type: ignore[operator]


@pytest.mark.parametrize("kind", [RandomWindows, GridWindows])
def test_what_is_left_out_is_said_once(store: TokenStore, kind: type, caplog: pytest.LogCaptureFixture) -> None:
    options = {"size": 4} if kind is RandomWindows else {}
    groups = [
        Group("a", [Interval(store, 0, 0, 900), Interval(store, 0, 901, 905), Interval(store, 1, 0, 46)]),
        Group("b", [Interval(store, 0, 905, 955)]),
    ]
    warn_once.cache_clear()
    for _ in range(2):
        kind(groups, 47, group_label, what="data", **options)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("data: 1 of 3 records are left out, with 5.0% of the tokens: they are shorter than a window")
    caplog.clear()
    kind(groups[:1], 46, group_label, what="data", **options)
    assert not caplog.records  # one stretch of a record, with less than a hundredth of the tokens
    kind([Group("a", [Interval(store, 0, 0, 900), Interval(store, 0, 901, 940)])], 46, group_label, what="d", **options)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("d: some stretches of records are left out, with 4.2% of the tokens")


def test_intervals_in_an_array_are_a_sequence(store: TokenStore) -> None:
    listed = [Interval(store, 1, 0, 50), Interval(store, 0, 5, 9), Interval(store, 1, 60, 70)]
    found = Intervals.of(listed)
    assert list(found) == listed
    assert (len(found), found[-1], list(found[1:])) == (3, listed[2], listed[1:])
    assert found.lengths.tolist() == [50, 4, 10]
    assert found.records().tolist() == [0, 1, 0]
    assert list(found.where(found.lengths > 4)) == [listed[0], listed[2]]
    assert list(Intervals.of([])) == []
    assert Intervals.of(found) is found
