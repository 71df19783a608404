"""`mambaseq predict` on models that were saved, not trained."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mambaseq_dna.tokenizer import BaseTokenizer
from mambaseq_text.tokenization import ByteTokenizer

from mambaseq.checkpoints import ModelCard, load_model, save_model
from mambaseq.cli.main import main
from mambaseq.data.records import Record
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.models import build_model

DNA: dict[str, Any] = {"reader": "dna/fasta", "tokenizer": {"name": "dna/base", "options": {}}}
TEXT: dict[str, Any] = {
    "reader": "text/text",
    "writer": "text/text",
    "tokenizer": {"name": "text/bytes", "options": {}},
    "reader_options": {"field": "text"},
}


def saved(
    folder: Path,
    head: dict,
    coding: Tokenizer | None,
    n_conditions: int = 0,
    encoder: dict | None = None,
    backbone: dict | None = None,
    mixer: str = "mamba",
    **card: Any,
) -> Path:
    vocab_size = 0 if coding is None else coding.vocab_size
    spec = {
        "d_model": 8,
        "encoder": encoder or {"name": "tokens", "vocab_size": vocab_size, "n_conditions": n_conditions},
        "backbone": backbone or {"name": "residual", "n_layers": 1},
        "mixer": {"name": mixer},
        "head": head,
    }
    model = build_model(spec)
    with torch.no_grad():  # what a window says must depend on the window
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_model(folder, model, ModelCard(spec=spec, **card), coding)
    return folder


def classifier(folder: Path, **card: Any) -> Path:
    card = {"class_names": ["a", "b", "c"], "length": 64, **DNA, **card}
    return saved(folder, {"name": "classification", "n_classes": 3}, BaseTokenizer(), **card)


def language_model(folder: Path, **card: Any) -> Path:
    tokenizer = ByteTokenizer()
    head = {"name": "lm", "vocab_size": tokenizer.vocab_size}
    return saved(folder, head, tokenizer, **{"length": 32, **TEXT, **card})


def fasta(folder: Path, *lengths: int) -> Path:
    bases = np.random.default_rng(0).choice(list("ACGT"), size=sum(lengths))
    path = folder / "in.fa"
    ends = np.cumsum(lengths)
    path.write_text(
        "".join(
            f">r{i}\n{''.join(bases[end - n : end])}\n" for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
        )
    )
    return path


def predict(model: Path, source: Path, *more: str) -> list[dict[str, str]]:
    out = source.parent / "out.csv"
    assert main(["predict", "--checkpoint", str(model), str(source), "--out", str(out), "--device", "cpu", *more]) == 0
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def spans(rows: list[dict[str, str]]) -> list[tuple[str, int, int]]:
    return [(row["record"], int(row["start"]), int(row["stop"])) for row in rows]


@pytest.mark.parametrize("batch_size", ["1", "2", "16"])
def test_every_base_is_in_one_window(tmp_path: Path, batch_size: str) -> None:
    model, source = classifier(tmp_path / "m"), fasta(tmp_path, 100, 40, 80, 1, 41)
    rows = predict(model, source, "--window", "40", "--batch-size", batch_size)
    expected = [("r0", 0, 40), ("r0", 40, 80), ("r0", 80, 100), ("r1", 0, 40), ("r2", 0, 40), ("r2", 40, 80)]
    assert spans(rows) == [*expected, ("r3", 0, 1), ("r4", 0, 40), ("r4", 40, 41)]
    loaded = load_model(model)
    assert loaded.tokenizer is not None
    ids = torch.from_numpy(loaded.tokenizer.encode(source.read_text().split("\n")[1]).astype(np.int64))
    for row in rows[:3]:
        with torch.no_grad():
            shares = loaded.model(ids[None, int(row["start"]) : int(row["stop"])]).logits.softmax(-1)[0]
        assert [float(row[name]) for name in "abc"] == pytest.approx(shares.tolist(), abs=2e-6)
        assert row["predicted"] == "abc"[int(shares.argmax())]


def test_the_window_of_training_or_the_whole_record(tmp_path: Path) -> None:
    source = fasta(tmp_path, 70)
    assert spans(predict(classifier(tmp_path / "m"), source)) == [("r0", 0, 64), ("r0", 64, 70)]
    assert spans(predict(classifier(tmp_path / "n", length=0), source)) == [("r0", 0, 70)]


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "first"])
def test_a_long_window_is_pooled_part_by_part(tmp_path: Path, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values as of all positions at once, which are never read together."""
    head = {"name": "regression", "n_outputs": 2, "pooling": pooling}
    model, source = saved(tmp_path / "m", head, BaseTokenizer(), length=200, **DNA), fasta(tmp_path, 200, 140)
    loaded = load_model(model)
    texts = source.read_text().split("\n")[1::2]
    with torch.no_grad():
        whole = [loaded.model(torch.from_numpy(BaseTokenizer().encode(text).astype(np.int64))[None]) for text in texts]
    monkeypatch.setattr("mambaseq.runs.answers.CHUNK", 60)
    monkeypatch.setattr("mambaseq.runs.answers.WHOLE", {"cpu": 100})
    monkeypatch.setattr(type(loaded.model), "forward", None)
    for row, output in zip(predict(model, source), whole, strict=True):
        found = [float(row["value_1"]), float(row["value_2"])]
        assert found == pytest.approx(output.logits[0].tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("n_outputs", "columns"), [(1, ["value"]), (3, ["value_1", "value_2", "value_3"])])
def test_a_regression_gives_values(tmp_path: Path, n_outputs: int, columns: list[str]) -> None:
    head = {"name": "regression", "n_outputs": n_outputs}
    # a dataset of labels may be regressed too; their names are no columns then
    model = saved(tmp_path / "m", head, BaseTokenizer(), length=40, class_names=["a", "b"], **DNA)
    source = fasta(tmp_path, 100)
    rows = predict(model, source)
    assert spans(rows) == [("r0", 0, 40), ("r0", 40, 80), ("r0", 80, 100)]
    assert list(rows[0]) == ["file", "record", "start", "stop", *columns, "note"]
    loaded = load_model(model)
    assert loaded.tokenizer is not None
    ids = torch.from_numpy(loaded.tokenizer.encode(source.read_text().split("\n")[1]).astype(np.int64))
    with torch.no_grad():
        values = loaded.model(ids[None, 80:]).logits[0].tolist()
    assert [float(rows[-1][name]) for name in columns] == pytest.approx(values, rel=1e-5)


def test_a_regression_from_configuration_to_prediction(tmp_path: Path) -> None:
    config, run, source = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "digits.txt"
    config.write_text(
        'data: {name: "tiny:TinyValues"}\nmodel: {d_model: 8, head: {name: regression, n_outputs: 3, pooling: last}}\n'
        "loader: {batch_size: 4}\nlength_warmup: {start: 8, steps_per_stage: 2}\n"
        "trainer: {max_steps: 4, accelerator: cpu, enable_progress_bar: false}\n"
    )
    assert main(["fit", "--config", str(config), "--out", str(run)]) == 0
    source.write_text("0123456012345601\n012\n")
    rows = predict(run, source)
    assert spans(rows) == [("line 0", 0, 16), ("line 1", 0, 3)]
    assert all(math.isfinite(float(row[f"value_{number}"])) for row in rows for number in (1, 2, 3))


def test_a_conditional_language_model_is_told_its_condition(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = language_model(tmp_path / "m", n_conditions=2, condition_names=["low", "high"])
    source = tmp_path / "in.txt"
    source.write_text("To be or not to be")
    bits = {}
    for index, name in enumerate(("low", "high")):
        (row,) = predict(model, source, "--condition", name)
        bits[name] = float(row["bits_per_token"])
        loaded = load_model(model)
        assert loaded.tokenizer is not None
        ids = torch.from_numpy(loaded.tokenizer.encode(source.read_text()).astype(np.int64))[None]
        with torch.no_grad():
            loss = loaded.model(ids[:, :-1], ids[:, 1:], condition=torch.tensor([index])).loss
        assert bits[name] == pytest.approx(float(loss) / math.log(2), abs=2e-6)
    assert bits["low"] != bits["high"]
    arguments = [
        "predict",
        "--checkpoint",
        str(model),
        str(source),
        "--out",
        str(tmp_path / "o.csv"),
        "--device",
        "cpu",
    ]
    for more, message in (
        ([], "--condition: low, high"),
        (["--condition", "lo"], "Did you mean 'low'"),
        (["--condition", "low,high"], "Run once for each"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


def test_a_conditional_classifier(tmp_path: Path) -> None:
    source = fasta(tmp_path, 100)
    model = classifier(tmp_path / "m", n_conditions=2)  # conditions without names go by their numbers
    first, second = (predict(model, source, "--condition", number) for number in "01")
    assert spans(first) == [("r0", 0, 64), ("r0", 64, 100)]
    assert [row["a"] for row in first] != [row["a"] for row in second]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "x.xyz"], "A table is written as .csv, .tsv, .parquet, .npz, .bdg, "),
        (["--out", "x.csv.gz"], "not as x.csv.gz"),
        (["--device", "nope"], "device 'nope' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--window", "-5"], "--window must be at least 1, not -5"),
        (["--window", "0"], "--window must be at least 1, not 0"),
        (["--reader", "audio/audio"], "'audio/audio' needs sample_rate"),
        (["--reader", "text/txt"], "Did you mean 'text/text'"),
        (["--reader", f"{__name__}:numbers"], "cannot be turned into tokens"),
        (["--reader", f"{__name__}:signals"], "is a signal"),
        (
            ["--condition", "a"],
            "not conditional; leave --condition out, or train one that is: for sounds with data.condition",
        ),
    ],
)
def test_mistakes_are_told_in_a_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], message: str
) -> None:
    model, source, out = classifier(tmp_path / "m"), fasta(tmp_path, 100), tmp_path / "out.csv"
    device = [] if "--device" in more else ["--device", "cpu"]
    assert main(["predict", "--checkpoint", str(model), str(source), "--out", str(out), *device, *more]) == 2
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("mambaseq")]
    assert len(told) == 1
    assert message in told[0]
    assert not out.exists()


def numbers(path: Path, tokenizer: Tokenizer):
    yield Record("one", ids=tokenizer.encode(np.zeros(3)))


def signals(path: Path, tokenizer: Tokenizer):
    yield Record("one", signal=np.zeros((3, 1), dtype=np.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, source = classifier(tmp_path / "m"), fasta(tmp_path, 100)
    out = str(tmp_path / "out.csv")
    assert main(["predict", "--checkpoint", str(model), str(source), "--out", out, "--device", "cuda"]) == 2
    assert "Give --device cpu" in capsys.readouterr().err


def test_inputs_are_looked_at_before_the_first_is_worked_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, source = classifier(tmp_path / "m"), fasta(tmp_path, 100)
    before, out = source.read_bytes(), tmp_path / "out.csv"
    (tmp_path / "link.csv").symlink_to(source)
    command = ["predict", "--checkpoint", str(model), "--device", "cpu"]
    for given in (
        [str(source), "--out", str(source)],
        [str(source), "--out", str(tmp_path / "link.csv")],
        [str(tmp_path / "*.fa"), "--out", str(source)],
        [str(tmp_path), "--out", str(source)],
    ):
        assert main([*command, *given]) == 2
        assert "is an input and would be overwritten" in capsys.readouterr().err
        assert source.read_bytes() == before
    assert main([*command, str(source), str(tmp_path / "nothere.fa"), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "There is no data file" in told
    assert "in.fa" not in told  # no progress of the first
    assert not out.exists()


def test_a_window_that_the_encoder_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    head = {"name": "classification", "n_classes": 3}
    encoder = {"name": "dna/kmer", "k": 6, "stride": 3}
    model = saved(tmp_path / "m", head, BaseTokenizer(), encoder=encoder, class_names=["a", "b", "c"], length=64, **DNA)
    source, out = fasta(tmp_path, 20), tmp_path / "o.csv"
    command = ["predict", "--checkpoint", str(model), str(source), "--out", str(out), "--device", "cpu", "--window"]
    assert main([*command, "5"]) == 2
    assert "--window must be at least 6 for this model, not 5" in capsys.readouterr().err
    assert not out.exists()
    assert spans(predict(model, source, "--window", "6"))[0] == ("r0", 0, 6)


def partly_scored(path: Path, tokenizer: Tokenizer, **options: Any):
    """The bytes of each line; capital letters are not scored."""
    for line in path.read_text().splitlines():
        yield Record(line, ids=tokenizer.encode(line), scored=np.array([not letter.isupper() for letter in line]))


def test_tokens_that_training_leaves_out_are_not_scored(tmp_path: Path) -> None:
    model, source = language_model(tmp_path / "m"), tmp_path / "in.txt"
    text = "To BE or NOT to be"
    source.write_text(f"ABC\n{text}\n")
    unscored, row = predict(model, source, "--reader", f"{__name__}:partly_scored")
    assert (unscored["tokens"], unscored["bits_per_token"], unscored["note"]) == ("", "", "no token that is scored")
    loaded = load_model(model)
    assert loaded.tokenizer is not None
    ids = torch.from_numpy(loaded.tokenizer.encode(text).astype(np.int64))
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(loaded.model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
    wanted = torch.tensor([not letter.isupper() for letter in text[1:]])
    assert row["tokens"] == str(int(wanted.sum())) == "12"
    assert float(row["bits_per_token"]) == pytest.approx(float(losses[wanted].mean()) / math.log(2), abs=2e-6)


def spoil(model: Path, value: float = math.nan, name: str = "backbone.norm_f.weight") -> None:
    """Make all of a saved model's tensor of a name this value."""
    loaded = load_model(model)
    with torch.no_grad():
        loaded.model.get_parameter(name).fill_(value)
    save_model(model, loaded.model, loaded.card, loaded.tokenizer)
