"""Last words and perplexity of texts, by hand: counts of bytes and words, bounds of documents, files that are wrong."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mambaseq_text.corpus import SHAKESPEARE
from mambaseq_text.evaluating import Reader, last_words, pair, surprise, total
from mambaseq_text.recall import SCALES, Texts, recall
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer, TextTokenizer

from mambaseq.checkpoints import ModelCard, save_model
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, DataError
from mambaseq.generation.scoring import Asked, Scored
from mambaseq.models import causal_lm


def exported(folder: Path, tokenizer: TextTokenizer, name: str, size: int | None = None) -> Path:
    torch.manual_seed(1)
    model = causal_lm(tokenizer.vocab_size if size is None else size, 16, 1)
    with torch.no_grad():
        model.encoder.embedding.weight.mul_(20)  # otherwise all tokens are alike
    card = ModelCard(spec=model.spec, tokenizer={"name": name, "options": {}}, task="next_token")
    save_model(folder, model, card, tokenizer)
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: Path) -> Path:
    tokenizer = HFTokenizer(str(tokenizer_json), eos="<|endoftext|>")
    return exported(tmp_path_factory.mktemp("pieces") / "m", tokenizer, "text/hf")


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("bytes") / "m", ByteTokenizer(), "text/bytes")


def nats(reader: Reader, ids: list[int], first: int) -> float:
    """Of ids from `first` on, by one plain reading."""
    with torch.no_grad():
        logits = reader.loaded.model(torch.tensor([ids[:-1]])).logits[0].double()
    logits = logits.log_softmax(-1)
    return -float(sum(logits[place - 1, ids[place]] for place in range(first, len(ids))))


PASSAGES = [
    "the end of the café",
    'He said "the\n\nbeginning of the end"',
    "and  two blanks before  end",
    "the end of the end",
]


def test_last_words_are_those_of_lambada(pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "lambada_test.jsonl", tmp_path / "out.json"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    reader = Reader(pieces, "cpu")
    expected, right = [], []
    for text in PASSAGES:
        context = text.rsplit(" ", 1)[0]
        both = reader.tokenizer.encode(text).tolist()
        begun = len(reader.tokenizer.encode(context.rstrip()))
        expected.append(nats(reader, both, begun))
        likeliest = reader.loaded.model(torch.tensor([both])).logits[0].argmax(-1).tolist()
        right.append(likeliest[begun - 1 : -1] == both[begun:])
    assert main(["text/lambada", "--checkpoint", str(pieces), str(file), "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["passages"] == 4
    assert found["perplexity"] == pytest.approx(math.exp(sum(expected) / 4), rel=1e-5)
    assert found["accuracy"] == sum(right) / 4
    assert f"perplexity  {found['perplexity']:,.4f}" in capsys.readouterr().out
    assert last_words(reader, str(file), limit=1).perplexity == pytest.approx(math.exp(expected[0]), rel=1e-5)
    blanks = pair(reader.tokenizer, "a b ", " c")
    assert reader.tokenizer.decode(blanks.continuation) == "  c"


def test_documents_of_any_length_have_all_that_precedes(
    byte_model: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mambaseq_text.reading.CHUNK", 16)  # several pieces, one of which ends within a word
    monkeypatch.setattr("mambaseq.generation.scoring.CHUNK", 5)
    text = "the café\nis at the endofthestreet and at\tits end "
    file = tmp_path / "a.txt"
    file.write_text(text)
    reader = Reader(byte_model, "cpu")
    ((where, found),) = surprise(reader, str(file))
    assert where == str(file)
    ids = list(text.encode())
    assert found.nats == pytest.approx(nats(reader, ids, 1), rel=1e-5)
    assert (found.tokens, found.bytes, found.words) == (len(ids) - 1, len(ids) - 1, len(text.split()))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes)
    monkeypatch.undo()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": one}) + "\n" for one in PASSAGES[:2]))
    marked = Reader(pieces, "cpu")  # with a mark before a document, its first token is predicted, too
    assert main(["text/perplexity", "--checkpoint", str(pieces), str(rows), "--each", "--device", "cpu"]) == 0
    each = [one for _, one in surprise(marked, str(rows))]
    expected = [
        nats(marked, [marked.tokenizer.eos_id, *marked.tokenizer.encode(one).tolist()], 1) for one in PASSAGES[:2]
    ]
    assert [one.nats for one in each] == pytest.approx(expected, rel=1e-5)
    whole = total(each)
    assert whole.bytes == sum(len(one.encode()) for one in PASSAGES[:2])
    assert whole.word_perplexity == pytest.approx(math.exp(sum(expected) / (5 + 7)), rel=1e-5)
    printed = capsys.readouterr().out
    assert "rows.jsonl, line 2: " in printed
    assert f"token perplexity  {whole.token_perplexity:,.4f}" in printed


def test_bad_passages_and_models_are_named(byte_model: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    reader, file = Reader(byte_model, "cpu"), tmp_path / "p.jsonl"
    for line, message in {
        '{"text": "word"}': "line 2: the passage 'word' does not end with a blank and a word",
        '{"text": "a passage "}': "line 2: the passage 'a passage ' does not end",
        '{"text": "a b"': "Line 2 of .*p.jsonl is not JSON",
    }.items():
        file.write_text('{"text": "a b"}\n' + line + "\n")
        with pytest.raises(DataError, match=message):
            last_words(reader, str(file))
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no passage"):
        last_words(reader, str(file))
    few = exported(tmp_path / "few", HFTokenizer(str(tokenizer_json)), "text/hf", size=120)
    file.write_text('{"text": "the end"}\n')
    with pytest.raises(ConfigError, match=re.escape("the model's vocabulary is of 120. Use the tokenizer")):
        last_words(Reader(few, "cpu"), str(file))
    model = causal_lm(4, 8, 1)
    save_model(tmp_path / "none", model, ModelCard(spec=model.spec))
    with pytest.raises(ConfigError, match="no tokenizer of text"):
        Reader(tmp_path / "none", "cpu")
    assert main(["text/lambada", "--checkpoint", str(byte_model), str(file), "--limit", "0"]) == 2
    assert np.isnan(last_words(reader, str(file)).accuracy_error)  # of one passage


class Finder:
    """Answers as a model that finds what stands in the text, or never does."""

    def __init__(self, reader: Reader, finds: bool) -> None:
        self.reader, self.finds = reader, finds

    def continuations(self, asked: list[Asked]) -> list[Scored]:
        said = [self.reader.tokenizer.decode(one.continuation).strip() for one in asked]
        assert all(re.fullmatch(r"The secret number of [A-Z][a-z]+ is \d{5}", one) for one in said)
        assert {self.reader.tokenizer.decode(one.continuation[one.given :])[0] for one in asked} == {" "}
        there = [one in self.reader.tokenizer.decode(where.context) for one, where in zip(said, asked, strict=True)]
        return [Scored(-1.0 if one == self.finds else -2.0, one == self.finds, 6) for one in there]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_hidden_numbers_are_where_they_are_said_to_be(
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = Reader(request.getfixturevalue({"bytes": "byte_model"}.get(kind, kind)), "cpu")
    texts = Texts(reader, SHAKESPEARE, seed=3, most=5000)
    for depth in (0.0, 0.5, 1.0):
        text = texts.text(400, [("Riga", 12345)], [depth])
        assert len(text) == 400
        said = reader.tokenizer.decode(text)
        before, _, after = said.partition("\nThe secret number of Riga is 12345.\n")
        assert len(before) / len(before + after) == pytest.approx(depth, abs=0.1)
    for finds in (True, False):
        monkeypatch.setattr(reader, "scorer", Finder(reader, finds))
        (found,) = recall(reader, texts, SCALES["tiny"], [500], progress=finds)
        told = capsys.readouterr().err
        assert ("500 tokens" in told, "0/3" in told) == (finds, finds)
        shares = (1.0, 1.0) if finds else (0.0, 0.0)
        assert found.recall == found.needles == shares
        assert found.needle.keys() == {0.0, 1.0}
    with pytest.raises(ConfigError, match="no room for 2 numbers"):
        list(recall(reader, texts, SCALES["tiny"], [50]))


def test_recall_has_a_table_and_a_picture(
    byte_model: Path, tmp_path: Path, drawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["text/recall", "--checkpoint", str(byte_model), "--device", "cpu"]
    assert main([*words, "--scale", "tiny", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "recall.txt").read_text() == printed
    rows = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert [row["length"] for row in rows] == [256, 512]
    # the state of one Mamba layer is what it is, however long the text was: three inputs and 16 states of 32 channels
    assert [row["state_bytes"] for row in rows] == [32 * (3 + 16) * 4] * 2
    assert f"{rows[1]['needle']['1']['choice']:.0%}" in printed
    assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--lengths", "1k"]) == 2
    assert "--lengths must be whole numbers" in capsys.readouterr().err
