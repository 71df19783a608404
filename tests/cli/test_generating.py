"""`mambaseq generate` on models that were saved, not trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_predicting import classifier, language_model

from mambaseq.cli.main import main


def test_a_prompt_longer_than_a_files_name(tmp_path: Path) -> None:
    model, prompt = language_model(tmp_path / "m"), "To be " * 100
    out = tmp_path / "out.txt"
    arguments = ["--prompt", prompt, "-n", "3", "--out", str(out), "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(model), *arguments]) == 0
    assert out.read_bytes().startswith(prompt.encode())


def test_the_datas_length_where_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["--out", str(out), "--samples", "3", "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(language_model(tmp_path / "m")), *arguments]) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 3
    assert main(["generate", "--checkpoint", str(language_model(tmp_path / "n", length=0)), *arguments]) == 2
    assert "give --max-new-tokens" in capsys.readouterr().err


def test_the_prompts_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, prompt = language_model(tmp_path / "m"), tmp_path / "prompt.txt"
    prompt.write_text("To be")
    arguments = ["--prompt", str(prompt), "-n", "3", "--out", str(tmp_path / "m" / ".." / "prompt.txt")]
    assert main(["generate", "--checkpoint", str(model), *arguments, "--device", "cpu"]) == 2
    assert "is the prompt's file and would be overwritten" in capsys.readouterr().err
    assert prompt.read_text() == "To be"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "-1"], "--samples must be at least 1, not -1"),
        (["--samples", "0"], "--samples must be at least 1, not 0"),
        (["-n", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["-n", "-3"], "--max-new-tokens must be at least 1, not -3"),
        (["--seed", "-1"], "--seed must be"),
        (["--seed", str(2**70)], "--seed must be"),
        (["--device", "nope"], "device 'nope' cannot be used"),
        (["--temperature", "-1"], "temperature must be positive"),
        (["--prompt", ""], "at least one token"),
        (["--condition", "7"], "not conditional"),
        (["--writer", "audio/wav"], "'audio/wav' needs sample_rate"),
        (["--writer", f"{__name__}:badly"], "cannot write what this model generates (no wave)"),
    ],
)
def test_mistakes_are_told_in_a_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], message: str
) -> None:
    model, out = language_model(tmp_path / "m"), tmp_path / "out"
    device = [] if "--device" in more else ["--device", "cpu"]
    assert main(["generate", "--checkpoint", str(model), "--out", str(out), *device, *more]) == 2
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("mambaseq")]
    assert len(told) == 1
    assert message in told[0]
    assert not out.exists()


def badly(path, sequences, tokenizer):
    raise ValueError("no wave")


def test_a_classifier_does_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = classifier(tmp_path / "m", writer="dna/fasta")
    assert main(["generate", "--checkpoint", str(model), "--out", str(tmp_path / "x.fa"), "--device", "cpu"]) == 2
    assert "lm head" in capsys.readouterr().err
