"""`mambaseq generate` on models that were saved, not trained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mambaseq_dna.tokenizer import BaseTokenizer
from mambaseq_text.tokenization import ByteTokenizer
from runs.test_prediction import DNA, TEXT, classifier, language_model, saved, spoil

from mambaseq.cli.main import main
from mambaseq.data.records import Record
from mambaseq.errors import ConfigError, DataError
from mambaseq.runs.conversation import Conversation
from mambaseq.runs.generation import generate_to
from mambaseq.runs.run import load


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
        (["--temperature", "-1"], "temperature must be a finite number of at least 0, not -1"),
        (["--prompt", ""], "--prompt is empty, and a prompt has at least one token"),
        (["--prompt", "a\udcff"], "no text that this model's tokenizer reads"),  # a byte of no text
        (["--condition", "7"], "not conditional"),
        (["--temperature", "nan"], "temperature must be a finite number of at least 0, not nan"),
        (["--temperature", "inf"], "temperature must be a finite number"),
        (["--top-p", "nan"], "top_p must be above 0 and at most 1, not nan"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--min-p", "2"], "min_p must be a number from 0 to 1, not 2.0"),
        (["--repetition-penalty", "-1"], "repetition_penalty must be a number from 0.01 to 100, not -1.0"),
        (["--presence-penalty", "nan"], "presence_penalty must be a number from -100 to 100, not nan"),
        (["--beams", "0"], "beams must be at least 1"),
        (["--beams", "2", "--top-k", "3"], "--beams searches, and --top-k is for drawing"),
        (["--beams", "2", "--samples", "3"], "--beams 2 finds no 3 results"),
        (["--length-penalty", "1"], "--length-penalty is of a search"),
        (["--stop", ""], "stop must be texts of 1 to 1,000 characters"),
        (["--top-k", "-1"], "top_k must be a whole number of at least 0, not -1"),
        (["--samples", "1000000000"], "--samples asks for 1,000,000,000 sequences"),
        (["-n", "1000000000000"], "MAMBASEQ_MAX_GENERATED"),
        (["--samples", "1000000", "-n", "1000"], "--max-new-tokens 1000 for 1,000,000 sequences asks for"),
        (["-n", "9" * 400], "MAMBASEQ_MAX_GENERATED"),
        (["--out", "."], "is not a file name"),
        (["--out", "n" * 300], "too long for a file's name"),
        (["--out", "/proc/nothing/x"], "cannot be written"),
        (["--checkpoint", "n" * 300], "There is no model at"),
        (["--out", "x.wav"], "Text is written as .txt, .text, .md, .jsonl, .ndjson, not as x.wav"),
        (["--out", "x.txt.gz"], "not as x.txt.gz"),
        (["--out", "/tmp"], "--out /tmp is a folder"),
        (["--pictures", "-1"], "--pictures must be at least 0"),
        (["--save-state", "s.txt"], "--save-state writes safetensors, not s.txt"),
        (["--prompt", "promts.txt"], "no file 'promts.txt' (--prompt). Check the path. To continue these words"),
        (["--prompt", "./one"], "no file './one'"),
        (["--prompt", "/usr/one"], "no file '/usr/one'"),
        (["--prompt", "mambaseq:a/b"], "no file 'mambaseq:a/b'"),
        (["--prompt", "texts/one.txt"], "no file 'texts/one.txt'"),
        (["--prompt", "texts/*.md"], "no file 'texts/*.md'"),
        (["--prompt-text", "a", "--prompt", "b"], "another one is given"),
        (
            ["--draft", "ngrm"],
            "no model/model.json. Did you mean 'ngram'? Give ngram, or the folder",
        ),
        (["--prompts-key", "q", "--prompt-text", "b"], "--prompts-key is of the file --prompts"),
        (["--writer", "audio/wav"], "'audio/wav' needs sample_rate"),
        (["--writer", f"{__name__}:badly"], "cannot write what this model generates (no wave)"),
    ],
)
def test_mistakes_are_told_in_a_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], message: str
) -> None:
    model, out = language_model(tmp_path / "m"), tmp_path / "out"
    device = [] if "--device" in more else ["--device", "cpu"]
    place = [] if "--out" in more else ["--out", str(out)]
    assert main(["generate", "--checkpoint", str(model), *place, *device, *more]) == 2
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("mambaseq")]
    assert len(told) == 1
    assert message in told[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        ("dna/fasta", "FASTA holds sequences of letters"),
        ("csv", "The writer csv writes signals (length, channels)"),
        ("audio/codes", "Codes are written for a model of codes"),
        ("audio/wav", "Sound is written of a model of sound"),
    ],
)
def test_what_a_writer_cannot_write_is_not_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, message: str
) -> None:
    def generates(*_: object) -> None:
        pytest.fail("It was generated in vain.")

    for name in ("_collected", "written"):
        monkeypatch.setattr(f"mambaseq.runs.generation.{name}", generates)
    model = language_model(tmp_path / "m", writer_options={"sample_rate": 8000}, writer=f"{__name__}:at_a_rate")
    for prompt in (None, "ACGT"):
        with pytest.raises(ConfigError, match=re.escape(message)):
            generate_to(model, tmp_path / "out", prompt=prompt, writer=writer, device="cpu")
    assert not (tmp_path / "out").exists()


def at_a_rate(path, sequences, tokenizer, sample_rate):
    return []


def badly(path, sequences, tokenizer):
    raise ValueError("no wave")


def test_a_classifier_does_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = classifier(tmp_path / "m", writer="dna/fasta")
    assert main(["generate", "--checkpoint", str(model), "--out", str(tmp_path / "x.fa"), "--device", "cpu"]) == 2
    assert "lm head" in capsys.readouterr().err


def generated(model: Path, out: Path, *more: str) -> list[str]:
    command = ["generate", "--checkpoint", str(model), "--out", str(out), "--device", "cpu", *more]
    assert main(command) == 0
    return [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_every_prompt_of_a_file_is_continued_as_if_it_were_alone(tmp_path: Path, temperature: str) -> None:
    model, source = language_model(tmp_path / "m"), tmp_path / "prompts.jsonl"
    prompts = ["To be", "or", "not to be: that is", "Ay", "or", "Whether"] * 50
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts))
    settings = ["-n", "6", "--samples", "2", "--temperature", temperature, "--seed", "3"]
    texts = generated(model, tmp_path / "out.jsonl", "--prompt", str(source), *settings)
    assert len(texts) == 600
    assert all(text.startswith(prompt) for text, prompt in zip(texts[::2], prompts, strict=True))
    for number in (0, 1, 2, 3, 5):
        alone = generated(model, tmp_path / "alone.jsonl", "--prompt", prompts[number], *settings)
        assert alone == texts[2 * number : 2 * number + 2]
    if temperature == "1":
        assert len(set(texts)) > 590  # equal prompts are continued in other ways


def test_results_end_before_a_stop(tmp_path: Path) -> None:
    model, options = language_model(tmp_path / "m"), ["-n", "40", "--samples", "3", "--seed", "3", "--prompt", "To be"]
    whole = generated(model, tmp_path / "a.jsonl", *options)
    signs = [next(sign for sign in text[25:] if sign != "\ufffd" and sign not in text[:25]) for text in whole]
    stops = [word for sign in signs for word in ("--stop", sign)]
    ended = generated(model, tmp_path / "b.jsonl", *options, *stops)
    assert ended == [text[: min(text.find(sign, 5) % 999 for sign in signs)] for text in whole]


def test_prompts_conditions_and_samples_in_order(tmp_path: Path) -> None:
    model = language_model(tmp_path / "m", n_conditions=3, condition_names=["low", "high, very", "a,b"])
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"text": "one"}\n{"text": "seven"}\n')
    texts = generated(
        model, tmp_path / "o.jsonl", "--prompt", str(source), "-n", "9", "--samples", "2",
        "--condition", "low,a,b", "--condition", "high, very",
    )  # fmt: skip
    assert [text[:3] for text in texts] == ["one"] * 6 + ["sev"] * 6
    second = generated(
        model, tmp_path / "p.jsonl", "--prompt", "seven", "-n", "9", "--samples", "2", "--condition", "high, very"
    )
    assert second == texts[10:]


def test_samples_do_not_depend_on_how_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = language_model(tmp_path / "m"), ["-n", "5", "--samples"]
    some = generated(model, tmp_path / "a.jsonl", *settings, "7")
    monkeypatch.setattr("mambaseq.runs.continuing.AT_ONCE", 3)
    more = generated(model, tmp_path / "b.jsonl", *settings, "10")
    assert more[:7] == some
    assert len(set(more)) == 10


def test_an_ended_sequence_is_not_filled(tmp_path: Path) -> None:
    ends = ByteTokenizer(eos=True)
    head, card = {"name": "lm", "vocab_size": ends.vocab_size}, {**TEXT, "reader": f"{__name__}:lines"}
    card["tokenizer"] = {"name": "text/bytes", "options": ends.options}
    model = saved(tmp_path / "m", head, ends, length=32, **{**card, "writer": f"{__name__}:ids"})
    source, out = tmp_path / "prompts.txt", tmp_path / "ids"
    source.write_text("\n".join(f"{number:02}" for number in range(60)))
    command = ["generate", "--checkpoint", str(model), "--out", str(out), "--device", "cpu", "--prompt", str(source)]
    assert main([*command, "-n", "300", "--temperature", "3"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    lengths = {len(row) for row in rows}
    assert len(lengths) > 10
    for row in rows:
        assert 256 not in row[:-1]
        assert row[-1] == 256 or len(row) == 302


def lines(path, tokenizer, **options):
    for line in path.read_text().splitlines():
        yield Record(line, ids=tokenizer.encode(line))


def ids(path, sequences, tokenizer):
    path.write_text("".join(json.dumps(row.tolist()) + "\n" for row in sequences))
    return [path]


def test_weights_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, out = language_model(tmp_path / "m"), tmp_path / "out.txt"
    spoil(model)
    assert main(["generate", "--checkpoint", str(model), "--out", str(out), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "model.safetensors" in told
    assert "not finite numbers" in told
    assert not out.exists()


def test_standard_output(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model = language_model(tmp_path / "m")
    arguments = ["--out", "/dev/stdout", "--prompt", "To be", "-n", "3", "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(model), *arguments]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("To be")
    assert "/dev/stdout" not in out
    assert "/dev/stdout" in err


def test_a_prompt_file_with_an_empty_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, source = language_model(tmp_path / "m"), tmp_path / "prompts.jsonl"
    source.write_text('{"text": "one"}\n{"text": ""}\n')
    arguments = ["--prompt", str(source), "-n", "3", "--out", str(tmp_path / "o.jsonl"), "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(model), *arguments]) == 2
    told = capsys.readouterr().err
    assert "has an empty record" in told
    assert "line 2" in told


@pytest.mark.parametrize("prompt", ["ACGT!", "x" * 400])
def test_a_prompt_that_is_no_sequence_is_named(tmp_path: Path, capsys: pytest.CaptureFixture, prompt: str) -> None:
    coding = BaseTokenizer()
    head = {"name": "lm", "vocab_size": coding.vocab_size}
    model = saved(tmp_path / "m", head, coding, length=32, writer="dna/fasta", **DNA)
    out = tmp_path / "o.fa"
    assert main(["generate", "--checkpoint", str(model), "--prompt", prompt, "--out", str(out), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert f"--prompt {prompt[:60]!r}"[:60] in told
    assert "is not a base" in told
    assert not out.exists()


def test_every_line_of_a_file_of_prompts_is_continued(tmp_path: Path) -> None:
    model, options = language_model(tmp_path / "m"), ["-n", "6", "--seed", "3"]
    prompts = ["To be", "or", " not é", "or", "Whether 'tis nobler"]
    plain, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes("".join(text + "\r\n" for text in prompts).encode("utf-8-sig"))
    rows.write_text("\n".join(json.dumps({"text": "no", "q": text}) + "\n" for text in prompts))
    texts = generated(model, tmp_path / "a.jsonl", "--prompts", str(plain), *options)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    assert texts[0] == generated(model, tmp_path / "b.jsonl", "--prompt", "To be", *options)[0]
    assert texts[1] != texts[3]
    assert generated(model, tmp_path / "c.jsonl", "--prompts", str(rows), "--prompts-key", "q", *options) == texts
    rows.write_text("\n".join(json.dumps({"id": 1, "prompt": text}) for text in prompts))
    assert generated(model, tmp_path / "d.jsonl", "--prompts", str(rows), *options) == texts
    assert generated(model, tmp_path / "e.jsonl", "--prompt", str(rows), *options) == texts
    run = load(model)
    rows.write_text('{"q": "To be"}')
    with pytest.raises(DataError, match=r"no field 'text', nor 'prompt'. It has: 'q'.*--prompts FILE --prompts-key"):
        run.generate(str(rows), device="cpu")
    # `--prompt` reads one column of the file, that of its first row; `--prompts` looks at each row
    rows.write_text('{"prompt": "To be"}\n{"text": "or", "prompt": "not"}')
    for option, second in (("--prompt", "not"), ("--prompts", "or")):
        mixed = generated(model, tmp_path / f"f{second}.jsonl", option, str(rows), *options)
        assert [text.startswith(prompt) for text, prompt in zip(mixed, ("To be", second), strict=True)] == [True] * 2
    rows.write_text('{"prompt": "To be"}\n{"q": "or"}')  # a later row, of which the columns of the file say nothing
    with pytest.raises(DataError, match=r"line or row 2, has no field 'prompt'.*--prompts-key") as caught:
        run.generate(str(rows), device="cpu")
    assert "data.field" not in str(caught.value)
    rows.write_text('{"prompt": "To be"}\n{"q": "or"}\n[1]\n{"prompt": "not"}\n{"q": "to"}\n')  # all of them
    with pytest.raises(DataError, match=r"3 of 5 prompts cannot be used: .*, line 2', .*, line 5' \(has no field"):
        run.generate(str(rows), device="cpu")
    assert run.generate(prompts, max_new_tokens=6, seed=3, device="cpu").sequences == texts
    for wrong, meant in (("max_tokens", "max_new_tokens"), ("temprature", "temperature")):
        for out in (None, tmp_path / "f.txt"):
            with pytest.raises(ConfigError, match=f"generate has no option '{wrong}'. Did you mean '{meant}'"):
                run.generate("To be", out=out, **{wrong: 3})
    with pytest.raises(ConfigError, match="no prompt to continue"):
        run.generate([], device="cpu")
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        run.generate(["a", ""], device="cpu")


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("p.txt", b"a\n\nb\n", [], "p.txt, line 2 is empty, and a prompt has at least one token"),
        ("p.txt", b"", [], "p.txt is empty. Write a prompt"),
        ("p.txt", b"a\n\xff\n", [], "p.txt, line 2, is not UTF-8 at byte 0"),
        ("p.txt", b"a\n", ["--prompts-key", "q"], "--prompts-key is of a .jsonl file"),
        ("p.txt", b"a\n", ["--prompt", "b"], "--prompt and --prompts were both given"),
        ("p.jsonl", b'{"text": "a"}\n{"text": "b"\n', [], "p.jsonl, line 2, is not JSON"),
        (
            "p.jsonl",
            b'{"q": "a"}\n',
            [],
            "line 1, has no text under 'text' or 'prompt'; it is an object with q",
        ),
        ("p.jsonl", b"[1]\n", ["--prompts-key", "q"], "p.jsonl, line 1, has no text under 'q'; it is a list"),
    ],
)
def test_prompts_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, content: bytes, more: list[str], message: str
) -> None:
    model, path = language_model(tmp_path / "m"), tmp_path / name
    path.write_bytes(content)
    command = ["generate", "--checkpoint", str(model), "--out", str(tmp_path / "o.txt"), "--device", "cpu"]
    assert main([*command, "--prompts", str(path), *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--prompts", str(tmp_path / "none.txt")]) == 2


def test_what_seems_to_be_a_file_is_a_prompt_where_that_is_said(tmp_path: Path) -> None:
    model, options = language_model(tmp_path / "m"), ["-n", "3", "--seed", "3"]
    folder = tmp_path / "a folder whose name is long enough for a path to be cut in messages of eighty characters"
    folder.mkdir()
    (folder / "my prompts.txt").write_text("To be")
    told = "no file .*my promts.txt'.* Did you mean 'my prompts.txt'"
    with pytest.raises(ConfigError, match=told):
        load(model).generate(str(folder / "my promts.txt"), device="cpu")
    for text in ("promts.txt", "and/or", "my promts.txt"):
        assert generated(model, tmp_path / "a.jsonl", "--prompt-text", text, *options)[0].startswith(text)
    for text in ("To be and/or not", "and/or", "C/C=C/C", "</s>", "a. b", "3.14", "..."):
        assert generated(model, tmp_path / "a.jsonl", "--prompt", text, *options)[0].startswith(text)


def test_rows_tell_their_prompt_and_sample(tmp_path: Path) -> None:
    model = language_model(tmp_path / "m", n_conditions=2, condition_names=["low", "high"])
    source, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    source.write_text('{"text": "one"}\n\n{"text": "seven"}\n')
    command = ["generate", "--checkpoint", str(model), "--out", str(out), "--device", "cpu", "-n", "2", "--seed", "3"]
    more = ["--samples", "2", "--condition", "low,high", "--top-k", "5", "--stop", "zz"]
    for option in ("--prompt", "--prompts"):
        assert main([*command, option, str(source), *more]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(row["prompt"], row["condition"], row["sample"]) for row in rows] == [
            (prompt, name, sample) for prompt in (0, 1) for name in ("low", "high") for sample in (0, 1)
        ]
        for row in rows:
            assert row["text"].startswith(("one", "seven")[row["prompt"]])
            assert row["file"] == str(source)
            assert row["record"].endswith(f"line {(1, 3)[row['prompt']]}")
            settings = {"max_new_tokens": 2, "temperature": 1.0, "seed": 3, "top_k": 5, "stop": ["zz"]}
            assert row["settings"] == settings
    for given in ({"prompt_text": "one"}, {"prompt": ["one"]}, {"prompt": "one"}):  # in no file
        generate_to(model, out, condition="low", max_new_tokens=2, device="cpu", **given)
        assert set(json.loads(out.read_text())) == {"prompt", "condition", "sample", "settings", "text"}
    assert main([*command[:-2], "--condition", "low", "--beams", "2", "--samples", "2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    settings = {"max_new_tokens": 2, "beams": 2, "length_penalty": 1.0}
    assert [{**row, "text": ""} for row in rows] == [
        {"prompt": 0, "condition": "low", "sample": sample, "settings": settings, "text": ""} for sample in (0, 1)
    ]


def test_beams_find_likelier_results(tmp_path: Path) -> None:
    model, source = language_model(tmp_path / "m"), tmp_path / "p.txt"
    source.write_text("To be\nor\n")
    options = ["--prompts", str(source), "-n", "5"]
    texts = generated(model, tmp_path / "a.jsonl", *options, "--beams", "4", "--samples", "2")
    assert len(set(texts)) == 4
    alone = generated(model, tmp_path / "b.jsonl", "--prompt", "or", "-n", "5", "--beams", "4")
    assert alone == texts[2:3]
    one = generated(model, tmp_path / "c.jsonl", *options, "--beams", "1")
    assert one == generated(model, tmp_path / "d.jsonl", *options, "--temperature", "0")


def test_the_prompt_is_shown_with_the_first_token(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels may be compiled for it, and what is said of that stands before the text."""
    model = language_model(tmp_path / "m")
    answer = Conversation.answer

    def watched(self: Conversation) -> Iterator[str]:
        for number, text in enumerate(answer(self)):
            assert bool(capsys.readouterr().out) == bool(number)
            yield text

    monkeypatch.setattr(Conversation, "answer", watched)
    assert main(["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "8", "--prompt-text", "To be"]) == 0
