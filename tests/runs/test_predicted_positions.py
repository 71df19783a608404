"""Tables of predictions that have a row a position, or a bin of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mambaseq_dna.tokenizer import BaseTokenizer
from runs.test_predicted_rows import run, told
from runs.test_prediction import DNA, classifier, fasta, predict, saved, spans

from mambaseq.checkpoints import load_model
from mambaseq.runs import answers


def labels(folder: Path, n_classes: int = 3, **options: Any) -> Path:
    card = {"class_names": ["helix", "sheet", "coil"], "length": 16, "task": "labels", **DNA, **options}
    return saved(folder, {"name": "lm", "vocab_size": n_classes}, BaseTokenizer(), **card)


@pytest.mark.parametrize("task", ["labels", None])
def test_labels_of_positions(tmp_path: Path, task: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = labels(tmp_path / "m", task=task), fasta(tmp_path, 40, 1, 9)
    monkeypatch.setattr(answers, "CHUNK", 8)
    rows = predict(model, source)
    assert spans(rows) == [(f"r{r}", t, t + 1) for r, n in enumerate((40, 1, 9)) for t in range(n)]
    assert list(rows[0])[4:] == ["predicted", "helix", "sheet", "coil", "note"]
    loaded = load_model(model)
    assert loaded.tokenizer is not None
    ids = torch.from_numpy(loaded.tokenizer.encode(source.read_text().split("\n")[1]).astype(np.int64))
    with torch.no_grad():
        shares = loaded.model(ids[None]).logits.softmax(-1)[0]
    for row, share in zip(rows[:40], shares, strict=True):
        assert [float(row[name]) for name in ("helix", "sheet", "coil")] == pytest.approx(share.tolist(), abs=3e-6)
        assert row["predicted"] == ("helix", "sheet", "coil")[int(share.argmax())]


def test_labels_by_a_model_that_sees_both_ways(tmp_path: Path) -> None:
    model, source = labels(tmp_path / "m", backbone={"name": "bidirectional", "n_layers": 1}), fasta(tmp_path, 40)
    rows = predict(model, source)  # windows of 16, as in training
    assert spans(rows) == [("r0", t, t + 1) for t in range(40)]
    loaded = load_model(model)
    assert loaded.tokenizer is not None
    ids = torch.from_numpy(loaded.tokenizer.encode(source.read_text().split("\n")[1]).astype(np.int64))
    with torch.no_grad():
        shares = torch.cat([loaded.model(part[None]).logits.softmax(-1)[0] for part in ids.split(16)])
        whole = loaded.model(ids[None]).logits.softmax(-1)[0]
    assert [float(row["helix"]) for row in rows] == pytest.approx(shares[:, 0].tolist(), abs=3e-6)
    rows = predict(model, source, "--window", "1000")
    assert [float(row["helix"]) for row in rows] == pytest.approx(whole[:, 0].tolist(), abs=3e-6)


def test_labels_by_an_encoder_that_looks_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, source = {"name": "dna/kmer", "k": 6, "stride": 1}, fasta(tmp_path, 40)
    model = labels(tmp_path / "m", encoder=encoder, length=0)
    whole = predict(model, source)
    monkeypatch.setattr(answers, "CHUNK", 8)  # no part would see beyond itself
    assert predict(model, source) == whole
    assert len(whole) == 40


def test_values_of_positions_and_many_classes(tmp_path: Path) -> None:
    source = fasta(tmp_path, 5)
    rows = predict(labels(tmp_path / "m", 1, class_names=[], task="values"), source)
    assert list(rows[0])[4:] == ["value", "note"]
    assert len({row["value"] for row in rows}) > 1
    rows = predict(labels(tmp_path / "n", 200, class_names=[]), source)
    assert list(rows[0])[4:] == ["predicted", "probability", "note"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": [], "task": None, "backbone": {"name": "bidirectional", "n_layers": 1}}, "does not say what"),
        ({"n_classes": 5}, "gives 5 numbers, but its description names 3 classes"),
        ({"task": "next_token", "backbone": {"name": "bidirectional", "n_layers": 1}}, "its bits mean nothing"),
        ({"task": "next_token", "encoder": {"name": "dna/kmer", "k": 3, "stride": 1}}, "its bits mean nothing"),
    ],
)
def test_numbers_without_a_meaning_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: dict, message: str
) -> None:
    assert run(labels(tmp_path / "m", **options), [fasta(tmp_path, 20)], tmp_path / "o.csv") == 2
    (line,) = told(capsys)
    assert message in line
    assert str(tmp_path / "m") in line
    assert not (tmp_path / "o.csv").exists()


def test_one_answer_a_sequence_for_what_has_one_a_position(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for task in ("labels", "next_token"):
        assert run(classifier(tmp_path / task, task=task), [fasta(tmp_path, 20)], tmp_path / "o.csv") == 2
        assert f"was trained on one a position ({task})" in told(capsys)[0]


@pytest.mark.parametrize("task", ["labels", "multilabels", "values"])
def test_bins_have_a_row_each(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "CHUNK", 8)  # no record is read part by part: a bin would be cut
    kind = {"labels": "classification", "multilabels": "multilabel", "values": "regression"}[task]
    outputs = {"n_outputs": 2} if task == "values" else {"n_classes": 2}
    head = {"name": f"token_{kind}", "stride": 3, **outputs}
    names = [] if task == "values" else ["x", "y"]
    model = saved(tmp_path / "m", head, BaseTokenizer(), class_names=names, length=12, task=task, **DNA)
    rows = predict(model, fasta(tmp_path, 17))
    assert spans(rows) == [("r0", *span) for span in
                           [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15), (15, 17)]]  # fmt: skip
    columns = {"labels": ["predicted", "x", "y"], "multilabels": ["x", "y"], "values": ["value_1", "value_2"]}[task]
    assert list(rows[0])[4:-1] == columns
