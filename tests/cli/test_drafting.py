"""`mambaseq generate --draft`: the same text, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.test_generating import generated
from mambaseq_text.tokenization import ByteTokenizer
from runs.test_prediction import TEXT, language_model, saved

import mambaseq
from mambaseq.cli.main import main


def test_drafts_change_no_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, smaller = language_model(tmp_path / "m"), language_model(tmp_path / "n")
    texts = tmp_path / "p.txt"
    texts.write_text("To be or not to be or not\nLine by line\n")
    options = ["-n", "24", "--samples", "2", "--seed", "3", "--prompts", str(texts), "--repetition-penalty", "1.1"]
    plain = generated(model, tmp_path / "a.jsonl", *options)
    assert len(plain) == 4
    for draft in ("ngram", str(smaller), str(model)):
        capsys.readouterr()
        assert generated(model, tmp_path / "b.jsonl", *options, "--draft", draft, "--draft-tokens", "3") == plain
        told = capsys.readouterr().err
        assert "tokens/s" in told
        assert "mambaseq: no tokens were guessed" in told or "of the guessed tokens were right" in told
    found = mambaseq.load(model).generate("To be", max_new_tokens=9, draft=str(model), device="cpu")
    assert found.speculation is not None
    assert found.speculation.added == 9
    assert main(["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "9", "--draft", str(model)]) == 0
    assert "9 tokens" not in capsys.readouterr().out


def test_drafts_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = language_model(tmp_path / "m")
    ends = ByteTokenizer(eos=True)
    other = saved(tmp_path / "o", {"name": "lm", "vocab_size": ends.vocab_size}, ends, length=32, **TEXT)
    cases = [
        (["--draft", "ngram", "--draft-tokens", "0"], "--draft-tokens must be a whole number"),
        (["--draft-tokens", "3"], "--draft-tokens is of --draft"),
        (["--draft", "ngram", "--beams", "2"], "--draft is for drawing"),
        (["--draft", "ngram", "--guidance", "2"], "does not go with --guidance"),
        (["--draft", str(tmp_path / "none")], "none"),
        (["--draft", str(other)], "has another tokenizer"),
    ]
    for options, message in cases:
        out = str(tmp_path / "x.txt")
        assert main(["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "4", "--out", out, *options]) == 2
        assert message in capsys.readouterr().err
