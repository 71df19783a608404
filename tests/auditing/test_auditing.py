"""Copies, shared words and shortcuts are found as a search through everything finds them, and clean data stay clean."""

from __future__ import annotations

import numpy as np
import pytest

from mambaseq.auditing import words as words_module
from mambaseq.auditing.findings import audit
from mambaseq.auditing.layout import Layout
from mambaseq.auditing.sharing import sharing
from mambaseq.auditing.shortcuts import shortcuts
from mambaseq.auditing.text import lines
from mambaseq.auditing.words import Words
from mambaseq.data.audited import WORD, Audited, AuditedSequence, Property
from mambaseq.errors import DataError

PAIRS = np.array([3, 2, 1, 0])


def turned(ids: np.ndarray) -> np.ndarray:
    return PAIRS[ids][::-1]


def words(ids: np.ndarray) -> list[bytes]:
    """Each word or its other strand, whichever is smaller."""
    found = [ids[start : start + WORD] for start in range(len(ids) - WORD + 1)]
    return [min(one.tobytes(), np.ascontiguousarray(turned(one)).tobytes()) for one in found]


def test_words_are_told_apart_and_alike_on_either_strand() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, 700)
    ids[300:400] = ids[100:200]
    ids[500:560] = turned(ids[10:70])
    hashes, starts = Words(PAIRS).of(ids)
    assert np.array_equal(starts, np.arange(700 - WORD + 1))
    _, theirs = np.unique(np.array(words(ids)), return_inverse=True)
    _, ours = np.unique(hashes, return_inverse=True)
    assert len(np.unique(theirs)) < len(theirs) - 90
    assert len({*zip(ours.tolist(), theirs.tolist(), strict=True)}) == len(np.unique(theirs)) == len(np.unique(ours))
    some, places = Words(PAIRS, share=0.2).of(ids)
    assert 80 < len(places) < 190
    assert set(some.tolist()) == set(hashes[hashes < np.uint64(0.2 * 2**64)].tolist())
    ids[250] = -1
    _, known = Words(PAIRS).of(ids)
    assert known.tolist() == [start for start in range(700 - WORD + 1) if not start <= 250 < start + WORD]
    assert len(Words(PAIRS).of(ids[: WORD - 1])[0]) == 0


def test_words_across_blocks_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    parts = [rng.integers(0, 4, size) for size in (3, 500, 31, 0, 32, 1000)]
    data = Audited({"train": [AuditedSequence(part) for part in parts]}, np.arange(4), PAIRS)
    for size in (64, 100, 1 << 15):
        monkeypatch.setattr("mambaseq.auditing.layout.BLOCK", size)
        layout = Layout(data)
        found = layout.words()
        told = [(layout.of(found.positions) == number).sum() for number in range(len(parts))]
        assert told == [0, 469, 0, 0, 1, 969]
        expected = np.concatenate([Words(PAIRS).of(part)[0] for part in parts])
        assert np.array_equal(found.hashes, expected)
    assert words_module.WORD == WORD


def test_labelled_sequences_as_a_search_through_all_of_them_finds() -> None:
    rng = np.random.default_rng(2)
    train = [rng.integers(0, 4, 70) for _ in range(200)]
    labels = [str(label) for label in rng.integers(0, 2, 200)]
    train[1], labels[1] = train[0], labels[0]
    test = [rng.integers(0, 4, 70) for _ in range(60)]
    truth = [str(label) for label in rng.integers(0, 2, 60)]
    for place in range(10):  # copies, with and without the label; half of them on the other strand; 40 common bases
        which = 20 + place
        test[place] = train[which] if place % 2 else turned(train[which])
        truth[place] = labels[which] if place % 3 else str(1 - int(labels[which]))
        half = train[60 + place][:40]
        test[20 + place] = np.concatenate((test[20 + place][:20], half if place % 2 else turned(half), [0] * 10))
    pairs = list(zip(test, truth, strict=True))
    data = Audited(
        {
            "train": [
                AuditedSequence(one, label, "t", f"row {n}")
                for n, (one, label) in enumerate(zip(train, labels, strict=True))
            ],
            "test": [AuditedSequence(one, label, "s", f"row {n}") for n, (one, label) in enumerate(pairs)],
        },
        np.arange(4),
        PAIRS,
    )
    found = sharing(Layout(data))
    (one,) = found.splits
    of_class: dict[str, set[bytes]] = {"0": set(), "1": set()}
    for row, label in zip(train, labels, strict=True):
        of_class[label].update(words(row))
    everything = of_class["0"] | of_class["1"]
    shares = [np.mean([word in everything for word in words(row)]) for row in test]
    assert one.touched == np.count_nonzero(shares) == 20
    assert one.half == np.count_nonzero(np.array(shares) > 0.5)
    assert np.allclose(one.shares, shares)
    another = [any(word in of_class[str(1 - int(label))] for word in words(row)) for row, label in pairs]
    assert one.touched_another == sum(another)
    same = [word in of_class[label] for row, label in pairs for word in words(row)]
    assert (one.words, one.same_label) == (60 * 39, sum(same))
    assert one.another_only == one.in_other - one.same_label > 0
    copies = one.copies
    assert (copies.sequences, copies.exact, copies.reverse, copies.another_label) == (60, 5, 5, 4)
    assert (copies.examples[0][0].record, copies.examples[0][1].record) == ("row 0", "row 20")
    assert found.repeated == {"train": 1, "test": 0}
    assert {each.length for each in one.stretches} == {70}
    assert sum(pair.sequences for pair in found.classes) == 4


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_a_sample_of_the_words_tells_shares_and_finds_long_stretches(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    train, test = rng.integers(0, 4, (2, 100_000))
    test[20_000:60_000] = turned(train[:40_000])
    test[19_999] = train[40_000]  # not its pair: the common stretch ends there
    monkeypatch.setenv("MAMBASEQ_MAX_AUDITED_WORDS", str(int(share * 200_000)))
    data = Audited({"train": [AuditedSequence(train)], "test": [AuditedSequence(test)]}, None, PAIRS, length=1000)
    found = sharing(Layout(data))
    (one,) = found.splits
    assert found.word_share == pytest.approx(share)
    assert one.share == pytest.approx(0.4, abs=0.03)
    assert one.half == 40
    (stretch,) = one.stretches
    assert (stretch.length, stretch.one.start, stretch.other.start, stretch.reverse) == (40_000, 20_000, 0, True)


def labelled(split: str, classes: dict[str, list[np.ndarray]]) -> list[AuditedSequence]:
    return [
        AuditedSequence(ids, label, split, f"{label} {row}")
        for label, rows in classes.items()
        for row, ids in enumerate(rows)
    ]


def with_share(rng: np.random.Generator, share: float, ids: tuple[int, int], others: tuple[int, int]) -> np.ndarray:
    """100 tokens of which a share is of `ids`."""
    count = round(100 * share)
    return rng.permutation(np.concatenate((rng.choice(ids, count), rng.choice(others, 100 - count))))


def test_what_a_property_alone_reaches_is_told() -> None:
    """N in 80% of one class: 0.9. GC of 0.7, and of 0.3 in 15%, in one class, and the other way round: 0.85."""

    def split(seed: int) -> list[AuditedSequence]:
        rng = np.random.default_rng(seed)
        rows: dict[str, list[np.ndarray]] = {"x": [], "y": []}
        for label in rows:
            for row in range(200):
                high = (label == "x") == (row >= 30)
                ids = with_share(rng, 0.7 if high else 0.3, (1, 2), (0, 3))
                if label == "x" and row % 5:
                    ids[rng.integers(100)] = 4
                rows[label].append(np.append(ids, [5] * 50 if label == "y" else [6] * 50))
        return labelled(f"{seed}", rows)

    properties = (
        Property("N", lambda ids: float(np.mean(ids == 4))),
        Property("GC", lambda ids: float(np.mean((ids == 1) | (ids == 2))) > 0.33, artefact=False),
        Property("case", lambda ids: float(np.mean(ids == 6)), seen=False),
    )
    letters = np.array([0, 1, 2, 3, -1, -1, -1])
    data = Audited({"train": split(0), "test": split(1)}, letters, PAIRS, properties)
    told = shortcuts(data)
    assert told is not None
    assert told.chance == 0.5
    assert told.tested == 400
    assert {row.name: row.accuracy for row in told.rows} == {"N": 0.9, "GC": 0.85, "case": 1.0, "length": 0.5}
    assert told.together is not None
    assert told.together.accuracy > 0.9
    assert told.rows[0].low < 0.9 < told.rows[0].high
    found = audit(data)
    assert not found.clean
    bad = [finding.told for finding in found.findings if finding.level == "bad"]
    assert len(bad) == 3
    assert any(
        text.startswith("shortcut: N alone reaches 0.900 (0.867 to 0.926) on test, where chance") for text in bad
    )
    assert any("case alone reaches 1.000" in f.told and f.told.endswith("no model sees it.") for f in found.findings)
    assert any("length alone are not better than chance (0.500)" in finding.told for finding in found.findings)
    assert any(line.split()[:2] == ["N", "0.900"] and line.endswith("shortcut") for line in lines(found))


def test_clean_data_are_clean() -> None:
    rng = np.random.default_rng(4)
    splits = {
        name: labelled(name, {label: list(rng.integers(0, 4, (100, 100))) for label in "xy"})
        for name in ("train", "test")
    }
    gc = Property("GC", lambda ids: float(np.mean((ids == 1) | (ids == 2))), artefact=False)
    found = audit(Audited(splits, np.arange(4), PAIRS, (gc,)))
    assert [finding.level for finding in found.findings] == ["good"] * 3
    text = "\n".join(lines(found))
    assert "no word of 32 tokens is shared" in text
    assert found.record()["clean"] is True
    one = audit(Audited({"train": splits["train"]}))
    assert "nothing can leak" in one.findings[0].told
    many = [AuditedSequence(ids, f"class {number}") for number, ids in enumerate(rng.integers(0, 4, (501, 40)))]
    told = audit(Audited({"train": many, "test": many[:2]}))
    assert (told.sharing.owners, told.sharing.classes) == ([("train", None), ("test", None)], [])
    assert told.sharing.matrix.tolist() == [[1, 2 / 501], [1, 1]]
    assert told.sharing.splits[0].same_label == 18
    with pytest.raises(DataError, match="no split has a token"):
        audit(Audited({"train": []}))
