"""Each record under a condition of its own: by a column of the rows that are read, or of a table beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
from cli.test_generating import generated
from runs.test_prediction import classifier, fasta, language_model, predict

from mambaseq.cli.main import main

NAMES = ["low", "high, very", "3"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return language_model(tmp_path / "m", n_conditions=3, condition_names=NAMES)


def rows(path: Path, *conditions: object, text: str = "To be or not") -> Path:
    lines = [{"text": text + "!" * (number % 2), "level": one} for number, one in enumerate(conditions)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("what", ["answers", "tokens", "embeddings"])
@pytest.mark.parametrize("long", [False, True])
def test_each_record_is_as_under_its_own_condition(
    model: Path, tmp_path: Path, what: str, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long:  # read part by part, the states handed on
        monkeypatch.setattr("mambaseq.runs.answers.CHUNK", 5)
        monkeypatch.setattr("mambaseq.runs.embeddings.CHUNK", 5)
    source = rows(tmp_path / "in.jsonl", "low", 3, "high, very", 3.0)
    found = predict(model, source, "--what", what, "--condition-column", "level")
    under = {name: predict(model, source, "--what", what, "--condition", name) for name in NAMES}
    assert under["low"] != under["3"]
    of = {f"{source}, line {line}": name for line, name in enumerate(("low", "3", "high, very", "3"), start=1)}
    assert found == [under[of[row["record"]]][number] for number, row in enumerate(found)]


def test_a_column_of_parquet(model: Path, tmp_path: Path) -> None:
    table = pandas.DataFrame({"level": [3, 3], "text": ["To be", "or not"]})
    table.to_parquet(tmp_path / "in.parquet")
    found = predict(model, tmp_path / "in.parquet", "--condition-column", "level")
    assert found == predict(model, tmp_path / "in.parquet", "--condition", "3")


@pytest.mark.parametrize(
    ("name", "text", "of"),
    [
        ("t.csv", 'record,level\nr1,low\nr0,"high, very"\nr2,3\n', ("high, very", "low", "3")),
        ("t.tsv", "level\trecord\tfile\nlow\tr0\tin.fa\n3\tr1\tin.fa\nlow\tr2\tin.fa\n", ("low", "3", "low")),
        ("t.jsonl", '{"file": "in.fa", "level": 3}\n', ("3", "3", "3")),
    ],
)
def test_a_table_of_conditions(tmp_path: Path, name: str, text: str, of: tuple[str, ...]) -> None:
    model, source = classifier(tmp_path / "m", n_conditions=3, condition_names=NAMES), fasta(tmp_path, 20, 20, 20)
    (tmp_path / name).write_text(text)
    found = predict(model, source, "--condition-column", "level", "--condition-table", str(tmp_path / name))
    under = {name: predict(model, source, "--condition", name) for name in NAMES}
    assert under["low"] != under["3"] != under["high, very"]
    assert found == [under[name][number] for number, name in enumerate(of)]


def test_prompts_under_their_own_conditions(model: Path, tmp_path: Path) -> None:
    source = rows(
        tmp_path / "in.jsonl", "low", 3, 3, "low", text="To be"
    )  # the third is the first, but for the condition
    settings = ["-n", "6", "--samples", "2", "--seed", "3", "--prompt"]
    found = generated(model, tmp_path / "a.jsonl", *settings, str(source), "--condition-column", "level")
    for number, name in enumerate(("low", "3", "3", "low")):
        prompt = "To be" + "!" * (number % 2)
        assert found[2 * number : 2 * number + 2] == generated(
            model, tmp_path / "b.jsonl", *settings, prompt, "--condition", name
        )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--condition-column", "levle"], "Line 1 of {}/in.jsonl has no field 'levle'. Did you mean 'level'?"),
        (
            ["--condition-column", "level"],
            "line 2: the column 'level': no condition is named 'lo'. Did you mean 'low'?",
        ),
        (["--condition-column", "text"], "no condition is named 'To be or not'. The model knows: low, 'high, very', 3"),
        (["--condition-column", "level", "--condition", "low"], "Give one of them"),
        (["--condition-table", "t.csv"], "the name of the column with the conditions"),
        (["--condition-column", "level", "--condition-table", "no.csv"], "'no.csv' cannot be read: No such file"),
        (["--condition-column", "level", "--condition-table", "in.txt"], "must end in .csv, .tsv or .jsonl"),
        (["--condition-column", "level", "--condition-table", "t.csv"], "t.csv, line 3: b has a row already, line 2."),
        (["--condition-column", "l", "--condition-table", "t.csv"], "line 2: there is no 'l'."),
        (["--condition-column", "a", "--condition-table", "u.csv"], "neither a column record nor one called file"),
        (["--condition-column", "level", "--condition-table", "w.csv"], "w.csv, line 2 has more cells than there are"),
        (["--condition-column", "level", "--condition-table", "x.csv"], "x.csv has more than one column level. Rename"),
        (["--condition-column", "a", "--condition-table", "v.jsonl"], "v.jsonl has no row for it (by record)"),
    ],
)
def test_what_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, options, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = rows(tmp_path / "in.jsonl", "low", "lo")
    for name, text in (("t.csv", "record,level\nb,low\nb,3\n"), ("u.csv", "a\n1\n"), ("in.txt", "x")):
        Path(name).write_text(text)
    Path("w.csv").write_text("record,level\nb,high, very\n")
    Path("x.csv").write_text("record,level,level\nb,low,3\n")
    Path("v.jsonl").write_text('{"record": "x", "a": 3}\n')
    assert main(["predict", "--checkpoint", str(model), str(source), "--out", "o.csv", *options]) == 2
    message = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert told.format(tmp_path) in message
    assert len(message) < 1000


def test_records_without_a_condition_are_left_out_with_skip_bad(model: Path, tmp_path: Path, capsys) -> None:
    source = rows(tmp_path / "in.jsonl", "low", "lo", 3, None, True, [3])
    found = predict(model, source, "--condition-column", "level", "--skip-bad")
    assert [row["record"].rpartition(" ")[2] for row in found] == ["1", "3"]
    assert capsys.readouterr().err.count("left out: ") == 4


def test_what_has_no_columns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, source = classifier(tmp_path / "m", n_conditions=2), fasta(tmp_path, 20)
    command = ["predict", "--checkpoint", str(model), str(source), "--out", str(tmp_path / "o.csv")]
    assert main([*command, "--condition-column", "x"]) == 2
    assert "'dna/fasta' reads no columns" in capsys.readouterr().err
    text, plain = language_model(tmp_path / "t", n_conditions=2), tmp_path / "in.txt"
    plain.write_text("To be")
    again = ["--out", str(tmp_path / "o.csv"), "--condition-column", "x"]
    assert main(["predict", "--checkpoint", str(text), str(plain), *again]) == 2
    assert "is plain text and has no column 'x'" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "o.txt"), "--condition-column", "x"]
    assert main(["generate", "--checkpoint", str(text), "--prompt", "To be", *out]) == 2
    assert "--prompt is none" in capsys.readouterr().err
    assert main(["predict", "--checkpoint", str(language_model(tmp_path / "n")), str(plain), *again]) == 2
    assert "not conditional; leave --condition-column out" in capsys.readouterr().err
