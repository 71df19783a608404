"""`mambaseq generate` to the terminal, turn by turn, and from states that were kept."""

from __future__ import annotations

import io
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_generating import generated
from mambaseq_text.tokenization import ByteTokenizer
from runs.test_prediction import classifier, language_model
from safetensors.torch import load_file, save_file

import mambaseq
from mambaseq.checkpoints import load_model
from mambaseq.cli.main import main
from mambaseq.generation import generate
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.reading import prefill
from mambaseq.generation.states import Begun, load_state, save_state
from mambaseq.models import SequenceModel, build_model
from mambaseq.runs.conversation import digest_of
from mambaseq.runs.generation import generate_text


def shown(capsys: pytest.CaptureFixture, model: Path, *more: str) -> str:
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "30", "--seed", "4", *more]) == 0
    text: str = capsys.readouterr().out
    return text


def test_text_goes_to_the_terminal_as_it_comes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = language_model(tmp_path / "m")
    whole = generated(model, tmp_path / "o.jsonl", "--prompt", "To be", "-n", "30", "--seed", "4")[0]
    assert shown(capsys, model, "--prompt", "To be") == f"{whole}\n"
    given: list[str] = []
    stop = whole[20:22]
    generate_text(
        model, given.append, prompt="To be", max_new_tokens=30, seed=4, device="cpu", stop=stop, temperature=1.0
    )
    assert "".join(given) == whole[: whole.index(stop, 5)]
    command = ["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "3"]
    assert main([*command, "--samples", "2"]) == 2
    assert "cannot be shown while they are generated" in capsys.readouterr().err
    assert main([*command, "--interactive", "--samples", "2"]) == 2
    told = capsys.readouterr().err
    assert "--interactive takes turns with one text" in told
    assert "--out" not in told
    assert main([*command, "--interactive", "--out", "x"]) == 2
    assert "--interactive goes to the terminal" in capsys.readouterr().err


def test_the_text_comes_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaseq.runs.conversation._PATIENCE", 0.0)
    given: list[str] = []
    generate_text(language_model(tmp_path / "m"), given.append, prompt="a", max_new_tokens=50, device="cpu")
    assert len(given) > 10


def test_turns_go_on_from_the_state(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model(tmp_path / "m")
    read: list[int] = []

    def counted(model: SequenceModel, prompts: Prompts, *more: Any) -> Any:
        read.append(prompts.lengths[0])
        return prefill(model, prompts, *more)

    monkeypatch.setattr("mambaseq.generation.states.prefill", counted)
    monkeypatch.setattr("sys.stdin", io.StringIO("To be,\n\nor not\n"))
    greedy = ["--temperature", "0", "--interactive", "--save-state", str(tmp_path / "s.safetensors")]
    text = shown(capsys, model, *greedy)
    assert read == [1, 7, 30, 30, 7, 30]  # each position once, what was generated too
    loaded = load_model(model)
    assert loaded.tokenizer is not None
    begun = load_state(tmp_path / "s.safetensors", loaded.model, digest_of(loaded), torch.device("cpu"))
    assert len(begun.ids) == sum(read)
    for start, stop in ((8, 68), (75, 105)):
        again = generate(loaded.model, torch.from_numpy(begun.ids[None, :start]), stop - start, temperature=0)
        assert again[0].tolist() == begun.ids[:stop].tolist()
    assert text.encode(errors="replace").count(b"\n") >= 3


def test_ctrl_c_ends_an_answer_and_not_the_session(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes: here while text is shown, of the first turn, and while a line is read, of the second."""
    monkeypatch.setattr("mambaseq.runs.conversation._PATIENCE", 0.0)
    monkeypatch.setattr("mambaseq.cli.generate._lines", lambda: iter(["one\n", "two\n", "three\n"]))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    shown_so_far: list[str] = []
    encode, turns = ByteTokenizer.encode, []

    def write(text: str) -> None:
        shown_so_far.append(text)
        if len(shown_so_far) == 3:
            signal.raise_signal(signal.SIGINT)

    def encoded(self: Any, text: str) -> Any:
        turns.append(text)
        if text == "two\n":
            signal.raise_signal(signal.SIGINT)
        return encode(self, text)

    monkeypatch.setattr("mambaseq.cli.generate._write", write)
    monkeypatch.setattr(ByteTokenizer, "encode", encoded)
    try:
        shown(capsys, language_model(tmp_path / "m"), "--interactive", "--temperature", "0")
        assert turns[-3:] == ["one\n", "two\n", "three\n"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    answers = "".join(shown_so_far).encode(errors="replace")
    assert len(answers) < 60  # of three answers of 30 tokens
    assert len(shown_so_far) > 10


def test_ctrl_c_while_a_line_is_waited_for_ends_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> Iterator[str]:
        yield "one\n"
        raise KeyboardInterrupt

    given: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        generate_text(language_model(tmp_path / "m"), given.append, lines=lines(), max_new_tokens=9, device="cpu")
    assert given


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_a_kept_state_goes_on_as_if_all_were_read(tmp_path: Path, temperature: str) -> None:
    model, place = language_model(tmp_path / "m"), tmp_path / "s.safetensors"
    options = ["-n", "9", "--samples", "3", "--temperature", temperature, "--repetition-penalty", "1.2"]
    first = generated(model, tmp_path / "a.jsonl", "--prompt", "To be", "--save-state", str(place), *options)
    assert first == generated(model, tmp_path / "b.jsonl", "--from-state", str(place), *options)
    assert first == generated(model, tmp_path / "b.jsonl", "--prompt", "To be", *options)
    more = generated(model, tmp_path / "c.jsonl", "--from-state", str(place), "--prompt", ", or", *options)
    assert more == generated(model, tmp_path / "d.jsonl", "--prompt", "To be, or", *options)


@pytest.mark.parametrize("kind", ["attention", "unet"])
def test_states_of_other_kinds_are_kept(tmp_path: Path, kind: str) -> None:
    pooled: dict[str, Any] = {"name": "unet", "n_layers": 1, "pool": [2, 2]}
    model = build_model(
        {
            "d_model": 16,
            "encoder": {"name": "tokens", "vocab_size": 29},
            "mixer": {"name": "mamba" if kind == "unet" else kind},
            "backbone": pooled if kind == "unet" else {"name": "residual", "n_layers": 2},
            "head": {"name": "lm", "vocab_size": 29},
        }
    ).eval()
    ids, cpu = torch.randint(0, 29, (19,)).numpy(), torch.device("cpu")
    save_state(Begun.of(model, ids[:9], None, cpu), tmp_path / "s.safetensors", "one")
    begun = load_state(tmp_path / "s.safetensors", model, "one", cpu).on(model, ids[9:])
    torch.testing.assert_close(begun.told, Begun.of(model, ids, None, cpu).told)
    assert begun.ids.tolist() == ids.tolist()


def test_states_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, place = language_model(tmp_path / "m"), tmp_path / "s.safetensors"
    out = ["--out", str(tmp_path / "o.jsonl")]
    shown(capsys, model, "--prompt", "To be", "--save-state", str(place), *out)
    kept, bad = load_file(place), tmp_path / "bad.safetensors"
    bad.write_bytes(place.read_bytes()[:-7])
    other = tmp_path / "other.safetensors"
    save_file(kept, other)
    cases = [
        (language_model(tmp_path / "n"), [], place, "is the state of another model"),
        (model, [], bad, "cannot be read"),
        (model, [], tmp_path / "none", "There is no file"),
        (model, [], other, "holds no state that this mambaseq knows"),
        (model, ["--condition", "a"], place, "under its own condition"),
    ]
    for which, more, state, message in cases:
        command = ["generate", "--checkpoint", str(which), "--device", "cpu", *out, "--from-state", str(state), *more]
        assert main(command) == 2
        assert message in capsys.readouterr().err
    several = ["generate", "--checkpoint", str(model), "--device", "cpu", *out, "--save-state", str(place)]
    (tmp_path / "p.txt").write_text("a\nb\n")
    assert main([*several, "--prompts", str(tmp_path / "p.txt")]) == 2
    assert "one prompt under one condition" in capsys.readouterr().err
    loaded = load_model(model)
    begun = load_state(place, loaded.model, digest_of(loaded), torch.device("cpu"))
    begun.state[0].conv = begun.state[0].conv[:, :-1]
    save_state(begun, bad, "x")
    with pytest.raises(Exception, match=r"is damaged, or not this model's state: layer 0's conv is \(1, "):
        load_state(bad, loaded.model, "x", torch.device("cpu"))
    assert main(["generate", "--checkpoint", str(classifier(tmp_path / "c")), "--device", "cpu"]) == 2


def test_the_page_on_generating_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = (Path(__file__).parents[2] / "docs/text/generating.md").read_text(encoding="utf-8")
    model = str(language_model(tmp_path / "m"))
    (tmp_path / "long.txt").write_text("To be, or not to be")
    code = page.split("```python\n")[1].split("```")[0].replace('"RUN"', repr(model))
    exec(code, {"ms": mambaseq})
    assert "To be" in capsys.readouterr().out
    for line in page.splitlines():
        if line.startswith("    mambaseq generate"):
            line = (
                line.replace("RUN", model)
                .replace("SMALLER", model)
                .replace("long.", f"{tmp_path}/long.")
                .replace(" 100", " 5")
            )
            assert main([*shlex.split(line)[1:], "--device", "cpu"]) == 0
    assert "To be, or not to be And then" in capsys.readouterr().out
