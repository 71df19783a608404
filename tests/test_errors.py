"""What the command line says of an error is one short paragraph, whatever a file or an argument holds."""

from __future__ import annotations

import ast
import inspect
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mambaseq.cli.main import main
from mambaseq.data.addresses import redacted
from mambaseq.domain import catalog
from mambaseq.errors import UserError, cut_list, did_you_mean, paragraph, shown
from mambaseq.mixers.s4d import S4D

SOURCES = [path for folder in ("mambaseq", "domains", "examples", "benchmarks") for path in Path(folder).rglob("*.py")]


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


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "null"),
        ("a'b", '"a\'b"'),
        (True, "True"),
        (Path("a/b"), "'a/b'"),
        (10**79, f"1{'0' * 79}"),
        (-(10**80), "a number of more than 80 digits"),
        ([10**5000], "a list"),
        (nested(100_000), "a list"),
        ("x" * 10**6, f"'{'x' * 78}…"),
        ([7] * 10**6, f"[{'7, ' * 26}…"),
        ({number: number for number in range(10**6)}, "{0: 0, 1: 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_a_value_in_a_message_is_short_whatever_it_holds(value: object, told: str) -> None:
    began = time.process_time()
    text = shown(value)
    assert text.startswith(told)
    assert len(text) <= 80
    assert time.process_time() - began < 0.1


def test_names_in_messages_are_short() -> None:
    assert did_you_mean("mamb" + "a" * 10**6, ["mamba"]) == ""
    assert len(did_you_mean("x" * 199, ["x" * 5000, "y"])) < 100
    assert cut_list(["a; b", "c", "d"], 2, separator="; ") == "a; b; c and 1 more"


def calls(path: Path) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        yield f"{path}:{getattr(node, 'lineno', 0)}", node


def test_values_are_cut_wherever_a_message_has_one() -> None:
    found = [
        where
        for path in SOURCES
        for where, node in calls(path)
        if isinstance(node, ast.FormattedValue) and node.conversion == ord("r")
    ]
    assert len(SOURCES) > 200
    assert [where for where in found if "__init__" not in where] == [], "use mambaseq.errors.shown(value), not !r"


def test_no_json_of_ours_has_numbers_that_json_has_not() -> None:
    found = [
        where
        for path in SOURCES
        for where, node in calls(path)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("json.dump", "json.dumps")
        and not any(word.arg == "allow_nan" and ast.unparse(word.value) == "False" for word in node.keywords)
    ]
    assert found == [], "use mambaseq.atomic.json_text"


@pytest.mark.parametrize("kind", ["mixers", "backbones", "heads", "encoders", "tokenizers", "datasets"])
def test_parts_that_python_makes_refuse_in_short_words(kind: str) -> None:
    """Where no file was read, nothing has looked at a value before the part does."""
    provided = {"d_model": 16, "vocab_size": 16, "n_classes": 3, "n_channels": 2, "make_mixer": lambda *a, **k: S4D(16)}
    told: list[tuple[str, str, str]] = []
    for entry in catalog()[kind]:
        part = entry.load()
        parameters = inspect.signature(part).parameters
        given = {name: value for name, value in provided.items() if name in parameters}
        for option in parameters.keys() - provided.keys():
            for value in ("x" * 10**5, ["y" * 10**5]):
                try:
                    with torch.device("meta"):
                        part(**{**given, option: value})
                except UserError as error:
                    told.append((entry.name, option, str(error)))
                except Exception:  # TypeError and the like: what is missing, or no value of that kind
                    pass
    assert [(name, option, text[:80]) for name, option, text in told if len(text) >= 1000] == []
    assert told or kind == "heads"


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
