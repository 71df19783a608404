"""What `mambaseq predict` writes whatever stands in its inputs: no record is dropped, no finished row is lost."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mambaseq_audio.io import write_wav
from mambaseq_audio.mulaw import MuLaw
from mambaseq_dna.tokenizer import BaseTokenizer
from runs.test_prediction import DNA, classifier, fasta, language_model, predict, saved, spans, spoil

from mambaseq.checkpoints import load_model
from mambaseq.cli.main import main
from mambaseq.errors import DataError
from mambaseq.outputs import Lines, safe_cell
from mambaseq.runs import answers

AUDIO: dict[str, Any] = {
    "reader": "audio/audio",
    "tokenizer": {"name": "audio/mulaw", "options": {}},
    "reader_options": {"sample_rate": 8000},
}


def jsonl(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def bits(model: Path, text: str) -> float:
    """Bits a token of a text, by one call of the model."""
    loaded = load_model(model)
    assert loaded.tokenizer is not None
    ids = torch.from_numpy(loaded.tokenizer.encode(text).astype(np.int64))[None]
    with torch.no_grad():
        return float(loaded.model(ids[:, :-1], ids[:, 1:]).loss) / math.log(2)


def run(model: Path, inputs: list[Path], out: Path, *more: str) -> int:
    command = ["predict", "--checkpoint", str(model), *map(str, inputs), "--out", str(out), "--device", "cpu"]
    return main([*command, *more])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def told(capsys: pytest.CaptureFixture) -> list[str]:
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("mambaseq")]


def test_every_record_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, source = language_model(tmp_path / "m"), jsonl(tmp_path / "in.jsonl", "", "a", "to be", "", "or", "x")
    rows = predict(model, source)
    assert [row["tokens"] for row in rows] == ["", "", "4", "", "1", ""]
    assert [(row["start"], row["stop"]) for row in rows] == [
        ("0", "0"), ("0", "1"), ("0", "5"), ("0", "0"), ("0", "2"), ("0", "1"),
    ]  # fmt: skip
    assert [bool(row["bits_per_token"]) for row in rows] == [False, False, True, False, True, False]
    one = "only one token, so there is nothing to predict"
    assert [row["note"] for row in rows] == ["empty", one, "", "empty", "", one]
    assert told(capsys) == [f"mambaseq predict: 4 of 6 rows have no prediction: empty (2); {one} (2)."]
    assert run(model, [jsonl(tmp_path / "none.jsonl", "", "")], tmp_path / "none.csv") == 2
    assert "nothing was written: empty. Give longer records." in told(capsys)[0]
    assert not (tmp_path / "none.csv").exists()


def test_shorter_than_the_encoder_reads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    head, encoder = {"name": "classification", "n_classes": 3}, {"name": "dna/kmer", "k": 6, "stride": 3}
    model = saved(tmp_path / "m", head, BaseTokenizer(), encoder=encoder, class_names=["a", "b", "c"], length=64, **DNA)
    rows = predict(model, fasta(tmp_path, 3, 70, 67, 6))
    assert spans(rows) == [("r0", 0, 3), ("r1", 0, 64), ("r1", 64, 70), ("r2", 0, 64), ("r2", 64, 67), ("r3", 0, 6)]
    note = "shorter than the 6 tokens that the model reads at once"
    assert [row["note"] for row in rows] == [note, "", "", "", note, ""]
    assert [row["predicted"] for row in rows][::4] == ["", ""]
    assert f"2 of 6 rows have no prediction: {note}." in told(capsys)[0]


def test_windows_of_a_language_model_are_scored_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, text = language_model(tmp_path / "m"), "To be or not to be, that is"
    source = jsonl(tmp_path / "in.jsonl", text)
    rows = predict(model, source, "--window", "13")
    assert [(row["start"], row["stop"], row["tokens"]) for row in rows] == [
        ("0", "13", "12"), ("13", "26", "12"), ("26", "27", ""),
    ]  # fmt: skip
    for row in rows[:2]:
        part = text[int(row["start"]) : int(row["stop"])]
        assert float(row["bits_per_token"]) == pytest.approx(bits(model, part), abs=2e-6)
    capsys.readouterr()
    assert run(model, [source], tmp_path / "o.csv", "--window", "1") == 2
    assert "--window must be at least 2 for a language model" in told(capsys)[0]


@pytest.mark.parametrize("mixer", ["mamba", "attention"])
def test_long_records_are_read_in_parts(tmp_path: Path, mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(tmp_path / "m", mixer=mixer)
    texts = ["To be or not to be, that is the question", "Whether 'tis nobler", "x" * 100]
    source = jsonl(tmp_path / "in.jsonl", *texts)
    monkeypatch.setattr(answers, "CHUNK", 7)
    for row, text in zip(predict(model, source), texts, strict=True):
        assert row["tokens"] == str(len(text) - 1)
        assert float(row["bits_per_token"]) == pytest.approx(bits(model, text), abs=2e-6)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", {"name": "lm", "vocab_size": 256}, MuLaw(), length=32, **AUDIO)
    folder = tmp_path / "clips"
    for number, place in enumerate(("a/x.wav", "b/x.wav", "b/x.flac")):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        write_wav(folder / place, [np.full(50, 40 * number, dtype=np.uint8)], MuLaw(), sample_rate=8000)
    assert run(model, [folder], tmp_path / "o.csv") == 0
    rows = rows_of(tmp_path / "o.csv")
    assert [row["file"] for row in rows] == [str(folder / place) for place in ("a/x.wav", "b/x.flac", "b/x.wav")]
    assert len({(row["file"], row["record"]) for row in rows}) == 3
    model = language_model(tmp_path / "n")
    for place in ("a", "b"):
        (folder / place / "t.txt").write_text(f"to be {place}")
        jsonl(folder / place / "t.jsonl", f"to be {place}")
    assert run(model, [folder / "*" / "t.*"], tmp_path / "p.csv") == 0
    rows = rows_of(tmp_path / "p.csv")
    assert [row["file"] for row in rows] == [str(folder / p) for p in ("a/t.jsonl", "a/t.txt", "b/t.jsonl", "b/t.txt")]


@pytest.mark.parametrize("batch_size", ["1", "16"])
def test_what_was_finished_before_a_bad_file_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture, batch_size: str
) -> None:
    model, out = language_model(tmp_path / "m"), tmp_path / "o.csv"
    good = [jsonl(tmp_path / f"good{number}.jsonl", "to be", "or not to be") for number in range(2)]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "that is"}\n{"text": \n')
    out.write_text("older")
    inputs = [good[0], bad, good[1]]
    assert run(model, inputs, out, "--batch-size", batch_size) == 2
    (line,) = told(capsys)
    assert "bad.jsonl" in line
    assert f"What was finished before it, 3 rows, is in {tmp_path / 'o.partial.csv'}." in line
    assert out.read_text() == "older"
    kept = rows_of(tmp_path / "o.partial.csv")
    assert [row["tokens"] for row in kept] == ["4", "11", "6"]
    assert run(model, inputs, out, "--skip-bad") == 0
    out_text, err = capsys.readouterr()
    assert "5 rows in" in out_text
    assert "1 file or record left out" in out_text
    assert not (tmp_path / "o.partial.csv").exists()  # it would say that this is unfinished
    assert "left out: Line 2 of" in err
    assert rows_of(out) == [*kept, *rows_of(out)[3:]]
    assert run(model, [bad, bad], tmp_path / "n.csv", "--skip-bad", "--window", "100") == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "n"))) == ["n.csv"]


def test_what_comes_after_a_bad_file_or_record_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In a folder, a file of records, whatever is bad first; a reader that cannot go on is told by the file's name."""
    out = tmp_path / "o.csv"

    def kept(model: Path, source: Path, left: int) -> tuple[list[str], str]:
        assert run(model, [source], out, "--skip-bad") == 0
        printed, err = capsys.readouterr()
        assert f"{left} {'file or record' if left == 1 else 'files or records'} left out" in printed
        assert err.count("left out: ") == left
        return [row["record"] for row in rows_of(out)], err

    sounds = tmp_path / "clips"
    sounds.mkdir()
    write_wav(
        sounds / "z", [np.full(50, 40 * number, dtype=np.uint8) for number in range(2)], MuLaw(), sample_rate=8000
    )
    (sounds / "a.wav").write_text("no sound")
    (sounds / "z" / "000b.wav").write_bytes(b"")
    audio = saved(tmp_path / "a", {"name": "lm", "vocab_size": 256}, MuLaw(), length=32, **AUDIO)
    names, err = kept(audio, sounds, 2)
    assert names == ["z/000", "z/001"]
    assert "a.wav cannot be read as audio" in err
    assert "000b.wav cannot be read as audio" in err
    assert run(audio, [sounds], out) == 2
    assert "a.wav" in told(capsys)[0]

    letters = tmp_path / "in.fa"
    letters.write_text(">a\nAC!T\nACGT\n>b\nACGTAC\n>c\n>d\nACGTACGT\n>b\nACGT\n>e\nACGTAC\n")
    names, err = kept(classifier(tmp_path / "c"), letters, 3)
    assert names == ["b", "d", "e"]
    for what in ("record 'a'", "record 'c' has a header and no", "two records are named 'b'"):
        assert what in err

    texts = language_model(tmp_path / "t")
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"text": 1}\n{"text": "to be"}\n{"text": \n{"text": "or not"}\n')
    names, err = kept(texts, lines, 2)
    assert names == [f"{lines}, line 2", f"{lines}, line 4"]

    ecg = {"reader": f"{__name__}:numbers", "class_names": [], "length": 4}
    signals = saved(tmp_path / "s", {"name": "regression"}, None, encoder={"name": "signal", "n_channels": 1}, **ecg)
    values = tmp_path / "in.txt"
    values.write_text("1 2 3 4\nstop\n1 2 3 4\n")
    names, err = kept(signals, values, 1)
    assert names == ["line 0"]
    assert f"What comes after it in {values} was not read." in err


def test_nothing_is_kept_where_nothing_was_finished(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, bad = language_model(tmp_path / "m"), tmp_path / "bad.jsonl"
    bad.write_text('{"text": \n')
    for more in ([], ["--skip-bad"]):
        assert run(model, [bad], tmp_path / "o.csv", *more) == 2
        assert "Line 1 of" in told(capsys)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "m"]


def test_weights_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sources = [fasta(tmp_path, 100), jsonl(tmp_path / "in.jsonl", "to be", "or")]
    for number, (model, source) in enumerate(
        zip((classifier(tmp_path / "c"), language_model(tmp_path / "l")), sources, strict=True)
    ):
        spoil(model)
        for more in ([], ["--skip-bad"]):
            assert run(model, [source], tmp_path / f"{number}.csv", *more) == 2
            (line,) = told(capsys)
            assert "model.safetensors hold values that are not finite numbers" in line
    assert not list(tmp_path.glob("*.csv"))


def test_a_record_whose_prediction_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    head, encoder = {"name": "regression"}, {"name": "signal", "n_channels": 1}
    ecg = {"reader": f"{__name__}:numbers", "class_names": [], "length": 4}
    model = saved(tmp_path / "m", head, None, encoder=encoder, **ecg)
    source = tmp_path / "in.txt"
    source.write_text("1 2 3 4 5\n1 2 3 4 nan 6\n3 4\n")
    assert run(model, [source], tmp_path / "o.csv") == 2
    (line,) = told(capsys)
    assert "record 'line 1', 4 to 6: the signal holds values that are not finite numbers" in line
    assert "--skip-bad leaves out what cannot be used and goes on. What was finished before it, 3 rows, is in" in line
    assert run(model, [source], tmp_path / "o.csv", "--skip-bad") == 0
    rows = rows_of(tmp_path / "o.csv")
    assert [bool(row["value"]) for row in rows] == [True, True, True, False, True]
    assert rows[3]["note"] == "the prediction is not a finite number"
    spoil(model, 3e38, "head.linear.bias")
    spoil(model, 3e38, "head.linear.weight")
    assert run(model, [source], tmp_path / "p.csv") == 2
    assert "the model's computation overflows" in capsys.readouterr().err


def numbers(path, tokenizer):
    from mambaseq.data.records import Record

    for number, line in enumerate(path.read_text().splitlines()):
        if line == "stop":
            raise DataError(f"Line {number} of {path} holds no numbers. Correct it.")
        yield Record(f"line {number}", signal=np.array(line.split(), dtype=np.float32)[:, None])


def test_text_is_no_formula(tmp_path: Path) -> None:
    cells = ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "\tx", "\rx", "-", "+cmd|' /C calc'!A0", "-1e"]
    assert [safe_cell(cell) for cell in cells] == [f"'{cell}" for cell in cells]
    plain = ["", "chr1", "-1", "+1.5", "-2.5e-3", "1=1", "a@b", "-.5", "'x"]
    assert [safe_cell(cell) for cell in plain] == plain
    source = fasta(tmp_path, 10)
    source.write_text(source.read_text().replace(">r0", ">=HYPERLINK(1)"))
    (row,) = predict(classifier(tmp_path / "m", class_names=["=a", "-b", "@c"]), source)
    assert row["record"] == "'=HYPERLINK(1)"
    assert row["predicted"] in ("'=a", "'-b", "'@c")
    assert list(row)[5:8] == ["'=a", "'-b", "'@c"]
    values = predict(saved(tmp_path / "n", {"name": "regression", "n_outputs": 9}, BaseTokenizer(), **DNA), source)[0]
    assert any(float(values[f"value_{number}"]) < 0 for number in range(1, 10))


def test_lines_end_alike_and_cells_stay_whole(tmp_path: Path) -> None:
    """A lone carriage return ends a line for readers of CSV, so its cell has quotes."""
    cells = ["a\rb", "c\nd", 'e"f', "g,h", "plain", "\r\n"]
    with (tmp_path / "o.csv").open("w", newline="") as file:
        csv.writer(Lines(file)).writerows([cells, ["next"]])
    assert (tmp_path / "o.csv").read_bytes().endswith(b'"\r\n"\nnext\n')
    with (tmp_path / "o.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [cells, ["next"]]
    model = language_model(tmp_path / "m")
    for name in ("p.csv", "p.tsv"):
        assert run(model, [jsonl(tmp_path / "a.jsonl", "To be", "or not")], tmp_path / name) == 0
        written = (tmp_path / name).read_bytes()
        assert b"\r" not in written
        assert written.count(b"\n") == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("7", "No condition is named '7'. Did you mean one of these: 7 theo, '7 ann, the second'?"),
        ("seven", "Did you mean one of these: 7 theo, '7 ann, the second'?"),
        ("theo seven", "Did you mean '7 theo'?"),
        ("07-theo", "Did you mean '7 theo'?"),
        ("7 teo", "Did you mean '7 theo'?"),
        ("8", "The model knows: 7 theo, '7 ann, the second', 6 theo."),
        ("6 theo,7", "No condition is named '7'."),
        ("6 theo, 7 theo", "under one condition, not under 2"),
        (None, "Give one with --condition: 7 theo, '7 ann, the second', 6 theo."),
    ],
)
def test_conditions_that_could_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture, given: str | None, message: str
) -> None:
    names = ["7 theo", "7 ann, the second", "6 theo"]
    model, source = classifier(tmp_path / "m", n_conditions=3, condition_names=names), fasta(tmp_path, 20)
    assert run(model, [source], tmp_path / "o.csv", *([] if given is None else ["--condition", given])) == 2
    assert message in told(capsys)[0]
    assert run(model, [source], tmp_path / "o.csv", "--condition", "7 ann, the second") == 0


def test_accents_of_conditions_may_be_written_either_way(tmp_path: Path) -> None:
    for stored in ("\u00c5sa", "A\u030asa"):
        model = classifier(tmp_path / f"m{len(stored)}", n_conditions=2, condition_names=["ben", stored])
        for given in ("\u00c5sa", "A\u030asa"):
            assert run(model, [fasta(tmp_path, 20)], tmp_path / "o.csv", "--condition", given) == 0


def test_many_conditions_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [f"speaker {'x' * 100}{number}" for number in range(300)]
    model, source = classifier(tmp_path / "m", n_conditions=300, condition_names=names), fasta(tmp_path, 20)
    for more in ([], ["--condition", "q" * 2000], ["--condition", "speaker"]):
        assert run(model, [source], tmp_path / "o.csv", *more) == 2
        (line,) = told(capsys)
        assert "and 297 more" in line
        assert len(line) < 1000


def test_too_many_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, source = classifier(tmp_path / "m"), fasta(tmp_path, 20)
    assert run(model, [source], tmp_path / "o.csv", "--batch-size", str(10**9)) == 2
    assert "--batch-size asks for 1,000,000,000 windows at once" in told(capsys)[0]
    assert run(model, [source], tmp_path / "o.csv", "--window", str(10**18)) == 0


def test_a_table_that_flows_away(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model, source = classifier(tmp_path / "m"), fasta(tmp_path, 20)
    assert run(model, [source], Path("/dev/stdout")) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[0] == "file,record,start,stop,predicted,a,b,c,note"
    assert len(out.splitlines()) == 2
    assert "1 row in /dev/stdout" in err
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert run(model, [source], tmp_path / "link.csv") == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert spans(rows_of(tmp_path / "real.csv")) == [("r0", 0, 20)]


def test_places_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, source = classifier(tmp_path / "m"), fasta(tmp_path, 20)
    for out, message in (
        ("/dev/full", "disk is full"),
        ("/proc/nothing/o.csv", "cannot be written"),
        (str(tmp_path), "is a folder"),
        ("", "--out is empty"),
        ("/proc/o.csv", "cannot be written"),
        ("a\0b", "is not a file name"),
        ("n" * 300, "too long for a file's name"),
        (str(source / "o.csv"), "cannot be written"),
    ):
        command = ["predict", "--checkpoint", str(model), str(source), "--out", out, "--device", "cpu"]
        assert main(command) == 2
        assert message in told(capsys)[0]


def test_only_bad_inputs_are_to_be_mended(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, bad = classifier(tmp_path / "m"), tmp_path / "bad.fa"
    bad.write_text(">a\nMKVLW\n")
    argv = ["predict", "--checkpoint", str(model), "--out", str(tmp_path / "o.csv"), "--device", "cpu", "--skip-bad"]
    assert main([*argv, str(bad)]) == 2
    assert told(capsys)[0].rstrip().endswith(". Mend what there is, or give something else.")
    assert main([*argv, str(bad), "--reader", "text/text"]) == 2
    assert "bad.fa: The letter '>' at position 1 is not a base." in told(capsys)[0]


def test_inputs_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty, binary, folder = tmp_path / "empty.fa", tmp_path / "b.fa", tmp_path / "folder"
    empty.write_bytes(b"")
    binary.write_bytes(bytes(range(256)) * 20)
    folder.mkdir()
    models = {
        "dna": classifier(tmp_path / "dna"),
        "text": language_model(tmp_path / "text"),
        "audio": saved(tmp_path / "audio", {"name": "lm", "vocab_size": 256}, MuLaw(), length=32, **AUDIO),
    }
    inputs = [empty, binary, folder, tmp_path / "none", Path("a\0b"), Path("n" * 300), tmp_path / "*.xyz"]
    if os.geteuid():
        (tmp_path / "closed.fa").touch(mode=0)
        inputs.append(tmp_path / "closed.fa")
    for model in models.values():
        for path in inputs:
            assert run(model, [path], tmp_path / "o.csv") == 2, path
            (line,) = told(capsys)
            assert len(line) < 1000
    assert not (tmp_path / "o.csv").exists()


def test_several_labels_have_a_probability_each(tmp_path: Path) -> None:
    head = {"name": "multilabel", "n_classes": 2}
    names, task = ["coding", "repeat"], "multilabels"
    model = saved(tmp_path / "m", head, BaseTokenizer(), class_names=names, length=8, task=task, **DNA)
    (row, _) = predict(model, fasta(tmp_path, 11))[:2]
    loaded, ids = load_model(model), BaseTokenizer().encode((tmp_path / "in.fa").read_text().split()[1])
    with torch.no_grad():
        shares = loaded.model(torch.from_numpy(ids.astype(np.int64))[None, :8]).logits.sigmoid()[0]
    assert [float(row[name]) for name in names] == pytest.approx(shares.tolist(), abs=1e-6)
    assert "predicted" not in row
