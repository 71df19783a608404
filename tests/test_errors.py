"""What the command line says of an error is one short paragraph, whatever a file or an argument holds."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from mambaseq.cli.main import main
from mambaseq.data.addresses import redacted
from mambaseq.errors import paragraph


def test_a_paragraph_has_no_line_ends_and_no_control_characters() -> None:
    assert paragraph("one\n  two\r\n\tthree") == "one two three"
    assert paragraph("a\x1b[31mb\0c\u202ed\ud800") == "a\\x1b[31mb\\x00c\\u202ed\\ud800"
    assert paragraph("Größe 𝄞") == "Größe 𝄞"


def test_of_a_long_text_the_beginning_and_the_end_are_shown() -> None:
    text = paragraph(f"data.files names {'x' * 5000}, which is not there. Check the path.")
    assert len(text) == 980
    assert text.startswith("data.files names xxx")
    assert text.endswith("xxx, which is not there. Check the path.")
    assert paragraph("x" * 980) == "x" * 980


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["predict", "in.fa", "--checkpoint", "run", "--out", "o.csv", "--window", "9" * 5 + "x\n\n" + "y" * 5000],
            "--window",
        ),
        (["data", "info", "\u202e.yaml"], "\\u202e.yaml"),
        (["generate", "--out", "o.txt"], "--checkpoint"),
        (["data", "no\nsuch", "x"], "no\\nsuch"),
        (["list", "encoder" * 1000], "encoder"),
        (["fit", "--config", "https://me:hidden@localhost/c.yaml"], "https://me:***@localhost/c.yaml"),
        (["no\nsuch"], "no\\nsuch"),
    ],
)
def test_every_refusal_is_one_paragraph(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err.partition("\n\nmambaseq ")[0].rstrip("\n")  # an unknown command's list follows
    assert told.startswith("mambaseq ") or told.startswith("mambaseq: ")
    assert named in told
    assert "\n" not in told
    assert "\x1b" not in told
    assert "hidden" not in told
    assert len(told) < 1000


@pytest.mark.parametrize("text", ["x" * 200_000, "a:/" * 70_000, "a://b:" * 20_000, "?a=" * 70_000, "::" * 100_000])
def test_secrets_are_looked_for_in_long_texts(text: str) -> None:
    began = time.process_time()
    assert redacted(text) == text
    assert time.process_time() - began < 5


def test_an_interruption_that_became_an_exit_is_told(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(arguments: list[str], command: str) -> int:  # as Lightning does it
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.exit(1)

    monkeypatch.setattr("mambaseq.cli.listing.run", run)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(["list"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.strip() == "mambaseq list: interrupted."
