"""Sound is generated under conditions, said by hand or in a manifest, and made again by settings that are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from audio.test_speaking import RATE, made, speaker

from mambaseq.cli.main import main


def conditional(folder: Path, **card: Any) -> Path:
    conditions = [
        {"name": "word", "names": ["seven", "three"], "missing": False},
        {"name": "age", "low": 20.0, "high": 70.0, "mean": 40.0, "std": 10.0, "missing": True},
    ]
    of = {"n_conditions": 2, "condition_sizes": [2], "condition_means": [40.0], "condition_stds": [10.0]}
    return speaker(folder, encoder={"name": "tokens", "vocab_size": 256, **of}, conditions=conditions, **card)


def test_conditions_of_a_manifest_are_used_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    model, table, rng = conditional(tmp_path / "m"), tmp_path / "m.csv", np.random.default_rng(0)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", rng.uniform(-0.5, 0.5, 20), RATE)
    table.write_text("file,word,age\na.wav,seven,31\nb.wav,three,\n", encoding="utf-8")
    arguments = ["generate", "--checkpoint", str(model), "-n", "5", "--device", "cpu", "--pictures", "0"]
    assert main([*arguments, "--prompt", str(table), "--out", str(tmp_path / "o.wav")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    said = [json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["condition"] for file in files]
    assert said == ["word=seven age=31", "word=three"]
    again = ["generate", "--repeat", str(tmp_path / "o-000.json"), "--device", "cpu", "--pictures", "0"]
    assert main([*again, "--out", str(tmp_path / "again.wav")]) == 0
    assert (tmp_path / "again.wav").read_bytes() == files[0].read_bytes()
    assert (
        main([*arguments, "--prompt", str(table), "--condition", "word=three", "--out", str(tmp_path / "p.wav")]) == 0
    )
    settings = json.loads((tmp_path / "p-000.json").read_text(encoding="utf-8"))
    assert settings["condition"] == "word=three"  # what is said goes before what the manifest says

    predict = ["predict", "--checkpoint", str(model), "--device", "cpu", "--out"]
    assert main([*predict, str(tmp_path / "t.csv"), str(table)]) == 0
    rows = {}
    for name, words in (("a.wav", ["word=seven", "age=31"]), ("b.wav", ["word=three"])):  # words, then the input
        assert main([*predict, str(tmp_path / f"{name}.csv"), "--condition", *words, str(tmp_path / name)]) == 0
        rows[name] = (tmp_path / f"{name}.csv").read_text(encoding="utf-8").splitlines()[1].split(",")[2:]
    assert [line.split(",")[2:] for line in (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()[1:]] == [
        rows["a.wav"], rows["b.wav"]
    ]  # fmt: skip

    capsys.readouterr()
    for text, message in (
        (
            "file,wrd\na.wav,seven\n",
            "m.csv has no column 'word'. Did you mean 'wrd'? This model needs word=seven, three",
        ),
        (
            "file,word\na.wav,seven\nb.wav,tree\n",
            "m.csv, line 3: the column 'word': the condition word knows no 'tree'. D",
        ),
        ("file,word\na.wav,\n", "m.csv, line 2: the column 'word' is '', which names no condition"),
        ("file,word,age\na.wav,seven,old\n", "m.csv, line 2: the column 'age': age is a number, not 'old'"),
    ):
        table.write_text(text, encoding="utf-8")
        for command in ([*predict, str(tmp_path / "q.csv"), str(table)], [
            *arguments, "--prompt", str(table), "--out", str(tmp_path / "q.wav")
        ]):  # fmt: skip
            assert main(command) == 2
            assert message in " ".join(capsys.readouterr().err.split())
    table.write_text("file,word,aeg\na.wav,seven,31\n", encoding="utf-8")  # told, since the model can do without
    caplog.clear()
    assert main([*arguments, "--prompt", str(table), "--out", str(tmp_path / "q.wav")]) == 0
    assert [line.partition("m.csv ")[2] for line in caplog.messages] == [
        "has no column 'age', so that its records are taken without. Did you mean 'aeg'?"
    ]
    for command in ("test", "validate"):
        assert main([command, "--checkpoint", str(model), "--condition", "word=seven"]) == 2
        assert "each sequence of the set is measured under its own condition" in " ".join(
            capsys.readouterr().err.split()
        )


def test_settings_that_were_edited_are_told_by_file_and_key(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, prompt, out = conditional(tmp_path / "m"), tmp_path / "in.wav", tmp_path / "a.wav"
    soundfile.write(prompt, np.zeros(30), RATE)
    told = made(model, out, "-n", "5", "--prompt", str(prompt), "--condition", "word=seven", "--pictures", "0")
    edited = tmp_path / "s.json"
    wrong: list[tuple[str, Any]] = [(key, [["a"]]) for key in told if key not in ("format", "checkpoint")]
    wrong += [(f"prompt.{key}", [["a"]]) for key in told["prompt"]]
    wrong += [
        ("condition_ids", value) for value in ([7, 0], [0], 0, [-1, 0], [True, 0], None, [1, told["condition_ids"][1]])
    ]
    wrong += [("condition", "word=three"), ("condition", None), ("sample", -1), ("seed", 2**63), ("top_k", 2.5)]
    wrong += [("temperature", -1), ("top_p", 0), ("min_p", 2), ("guidance", 1e9), ("max_new_tokens", 0), ("prompt", {})]
    wrong += [("writer", "audio/wave"), ("writer_options", {"sample_rate": 7}), ("prompt_tokens", 29), ("sha256", "0")]
    wrong += [("prompt.record", 3), ("prompt.sha256", "1" * 64), ("tempratur", 1.0), ("prompt.recrd", 0)]
    wrong += [(key, ...) for key in ("seed", "sha256", "condition_ids", "prompt", "prompt.sha256", "prompt.record")]
    again = [
        "generate",
        "--repeat",
        str(edited),
        "--device",
        "cpu",
        "--pictures",
        "0",
        "--out",
        str(tmp_path / "b.wav"),
    ]
    for name, value in [*wrong, ("", None)]:
        given = json.loads(json.dumps(told))
        place, key = (given["prompt"], name.partition(".")[2]) if "." in name else (given, name)
        if value is ...:
            del place[key]
        elif name:
            place[key] = value
        edited.write_text(json.dumps(given), encoding="utf-8")
        code = main(again)
        error = " ".join(capsys.readouterr().err.split())
        assert code == (2 if name else 0), (name, value)
        if name:
            assert str(edited) in error, (name, value, error)
            assert len(error) < 1000
            # a checksum is told by what it is of, a condition without ids by its name
            other = {"prompt.sha256": "in.wav is another file", "condition_ids": "condition is"}.get(name, name)
            assert name in error or other in error, (name, value, error)
    assert (tmp_path / "b.wav").read_bytes() == out.read_bytes()
