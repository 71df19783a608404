"""Windows with a stride, and answers of overlapping windows as one a position, by hand-worked cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mambaseq_dna.tokenizer import BaseTokenizer
from runs.test_prediction import DNA, TEXT, classifier, fasta, language_model, saved

import mambaseq as ms
from mambaseq.errors import ConfigError, UserError
from mambaseq.runs import answers
from mambaseq.runs.answers import Found, Sequences, Span
from mambaseq.runs.overlaps import Merger


def window(start: int, value: float, known: list[bool] | None = None) -> Found:
    return Found(start, start + 4, 1, np.full((4, 1), value), None if known is None else np.array(known))


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("mean", [1, 1, 1.5, 7 / 3, 3, 3, 4]),
        # weights 1 2 2 1 in each window
        ("centre", [1, 1, (2 * 1 + 1 * 2) / 3, (1 * 1 + 2 * 2 + 1 * 4) / 4, (2 * 2 + 2 * 4) / 4, (2 + 2 * 4) / 3, 4]),
    ],
)
def test_three_windows_of_seven_positions(how, wanted: list[float]) -> None:
    merger, found = Merger(how), []
    for start, value in ((0, 1.0), (2, 2.0), (3, 4.0)):
        found += list(merger.before(start))
        merger.add(window(start, value), Span(start, start + 4))
    found += list(merger.before())
    assert [(one.start, one.stop) for one in found] == [(0, 2), (2, 3), (3, 7)]
    np.testing.assert_allclose(np.concatenate([one.values[:, 0] for one in found]), wanted, rtol=1e-6)


def test_what_no_window_knows_has_no_value_and_bins_stay_bins() -> None:
    merger = Merger()
    merger.add(window(0, 1.0, [True, True, False, False]))
    merger.add(window(2, 2.0, [False, True, True, True]))
    (found,) = merger.before()
    assert found.known is not None
    assert found.known.tolist() == [True, True, False, True, True, True]
    assert found.values[found.known, 0].tolist() == [1, 1, 2, 2, 2]
    merger.add(Found(0, 8, 4, np.array([[1.0], [2.0]])))
    merger.add(Found(4, 10, 4, np.array([[4.0], [8.0]])))  # the last bin has two positions
    (found,) = merger.before()
    assert (found.start, found.stop, found.step, found.values[:, 0].tolist()) == (0, 10, 4, [1, 3, 8])


def test_a_batch_is_as_large_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, source, read = ms.load(classifier(tmp_path / "m")), fasta(tmp_path, 50, 9), []
    table = run.predict(source, window=8, device="cpu")
    answered = Sequences.answers
    monkeypatch.setattr(Sequences, "answers", lambda self, pieces: read.append(len(pieces)) or answered(self, pieces))
    monkeypatch.setattr(answers, "WHOLE", {"cpu": 20})
    again = run.predict(source, window=8, device="cpu")
    assert read == [2, 2, 2, 2, 1]  # seven windows of eight bases, one of two, one of one
    np.testing.assert_allclose(again[list("abc")], table[list("abc")], rtol=1e-5)


def test_windows_of_a_stride(tmp_path: Path) -> None:
    run, source = ms.load(classifier(tmp_path / "m")), fasta(tmp_path, 10, 3, 4)
    table = run.predict(source, window=4, stride=3, device="cpu")
    places = [(row.record, row.start, row.stop) for row in table.itertuples()]
    # records shorter than a window are one; the last window is complete, without one more where it fits
    assert places == [("r0", 0, 4), ("r0", 3, 7), ("r0", 6, 10), ("r1", 0, 3), ("r2", 0, 4)]
    places = run.predict(source, window=4, stride=4, device="cpu")["start"].tolist()
    assert places == [0, 4, 6, 0, 0]
    for options, message in (
        ({"window": 4, "stride": 5}, "would leave gaps"),
        ({"stride": 0}, "--stride must be at least 1"),
        ({"window": 4, "stride": 2, "merge": "sum"}, "--merge is mean or centre"),
        ({"columns": ["d"]}, "there is no such column"),
        ({"both_strands": True, "regions": ["r0:0-4"]}, "bases 0 to 4 are not all in 'r0'"),
    ):
        with pytest.raises(UserError, match=message):
            run.predict(source, device="cpu", **options)
    head = {"name": "token_regression", "stride": 4}
    bins = ms.load(saved(tmp_path / "b", head, BaseTokenizer(), task="values", length=8, **DNA))
    with pytest.raises(ConfigError, match="a multiple of the 4 tokens of a bin, not 6"):
        bins.predict(source, stride=6, device="cpu")
    text = ms.load(language_model(tmp_path / "t", **{**TEXT, "length": 0}))
    (tmp_path / "x.txt").write_text("To be or not to be")
    for options, message in (
        ({"stride": 2}, r"say how long they are \(--window\)"),
        ({"both_strands": True}, "'text/bytes' of the model at .* does not say which tokens are paired"),
        ({"regions": ["x"]}, "'text/text' reads whole records only"),
    ):
        with pytest.raises(ConfigError, match=message):
            text.predict(tmp_path / "x.txt", device="cpu", **options)
