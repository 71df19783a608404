"""`mambaseq data audit` on text: a document that is nearly in training is found; what has no tokens is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mambaseq_text.documents import DocumentData

from mambaseq.auditing.findings import audit
from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData
from mambaseq.errors import DataError


def test_a_document_that_is_nearly_in_training(tmp_path: Path) -> None:
    lines = [
        f"{n} is a number, and line {n + 7} tells of {n**3} of them, of which few are left today." for n in range(40)
    ]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    near = lines[5].replace("today", "now")
    (tmp_path / "test.txt").write_text("Nothing of this stands in the other file, not a word of it.\n" + near)
    data = DocumentData(
        files=str(tmp_path / "train.txt"), test_files=str(tmp_path / "test.txt"), unit="line", validation_fraction=0
    )
    found = audit(data.audited())
    (one,) = found.sharing.splits
    assert (one.pieces, one.touched, one.half, one.copies.copied) == (2, 1, 1, 0)
    assert not found.clean
    assert (one.stretches[0].one.record, one.stretches[0].length) == ("item 0 of test, part 2", near.index("now"))


class _Items(SequenceData):
    """Sequences that are given."""

    def __init__(self, train: Any, test: Any = None, **known: Any) -> None:
        self._sets = train, test
        for name, value in known.items():
            setattr(self, name, value)

    def setup(self) -> None:
        pass

    def train(self) -> Any:
        return self._sets[0]

    def test(self) -> Any:
        return self._sets[1]


def test_items_are_audited_as_they_are_and_others_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(1, 61)[None]
    hidden = torch.where(ids % 7 == 0, ids, -100)
    masked = Batch(torch.where(ids % 7 == 0, 99, ids), hidden)
    padded = Batch(torch.cat((ids, ids), 1), torch.tensor([1]), mask=torch.arange(120)[None] < 60)
    (one,) = _Items([masked], task="masked").audited().splits["train"]
    assert one.ids.tolist() == ids[0].tolist()
    splits = _Items([padded], {"near": [padded], "far": []}, class_names=["a", "b"]).audited().splits
    assert {name: [(len(each), each.label) for each in rows] for name, rows in splits.items()} == {
        "train": [(60, "b")],
        "test near": [(60, "b")],
        "test far": [],
    }
    monkeypatch.setenv("MAMBASEQ_MAX_AUDITED", "100")
    audited = _Items([Batch(ids)] * 9).audited()
    assert len(audited.splits["train"]) == 2
    assert audited.notes == ["train: the first 2 of 9 items are looked at (MAMBASEQ_MAX_AUDITED)."]
    with pytest.raises(DataError, match="only data of tokens can be audited"):
        _Items([Batch(torch.zeros(1, 5, 2))]).audited()
    with pytest.raises(DataError, match="The train set is a stream"):
        _Items(type("Stream", (torch.utils.data.IterableDataset,), {"__iter__": lambda self: iter(())})()).audited()
