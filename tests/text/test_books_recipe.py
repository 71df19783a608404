"""The recipe on books at a tiny scale: what is trained, resumed, counted and drawn."""

from __future__ import annotations

import math
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from mambaseq_text.baselines import interpolated
from mambaseq_text.recipes import books, books_training, shelf
from mambaseq_text.recipes.books import tables
from mambaseq_text.recipes.books_training import CONTENDERS, ENTRIES, PIECES, RATES, TODAY, Shelf
from mambaseq_text.recipes.shelf import Split, Texts, Tokens
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer

from mambaseq.errors import UserError
from mambaseq.models import causal_lm
from mambaseq.reproduction import Context, training
from mambaseq.resources import find

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("uninterpreted")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Pieces of Shakespeare as books, and a letter of two bytes at the end of one."""
    text = find("mambaseq:data/text/tinyshakespeare.txt").read_bytes()
    folder = tmp_path_factory.mktemp("books")
    places = {"train/b": 0, "train/a": 9000, "valid/c": 18_000, "test/e": 20_000, "test/d": 22_000}
    for name, start in places.items():
        path = folder / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text[start : start + (6000 if "train" in name else 500)] + "é".encode() * (name == "test/e"))
    return Texts.read(folder)


def context(folder: Path, *only: str, seeds: tuple[int, ...] = (0,)) -> Context:
    (folder / "trials").mkdir(exist_ok=True)
    return Context(CPU, "tiny", list(seeds), folder, only=list(only))


def test_all_of_it_and_once_only(texts: Texts, tmp_path: Path, tokenizer_json: Path) -> None:
    made = context(tmp_path)
    table, mixers = tables(made, texts, lambda: HFTokenizer(str(tokenizer_json)))
    assert {line.name for line in mixers.lines} >= {*CONTENDERS, *TODAY}
    assert {line.name for line in mixers.lines if line.paper} == set(books.PUBLISHED)
    assert not [line.name for line in table.lines if line.paper or line.name in TODAY]
    named = {line.name: line for line in table.lines}
    first, second = sorted(CONTENDERS, key=lambda name: named[name].values["validation"][0])[:2]
    assert set(named) >= {*CONTENDERS, f"{first}, {PIECES}", f"{second}, {PIECES}", f"{first} is ahead of {second} by"}
    for name in (*CONTENDERS, f"{first}, {PIECES}"):
        values = named[name].values
        assert 3 < values["bits"][0] < 9
        assert values["at 2"], values["at 4"]
        assert values["validation"][0] == min(values["at 2"][0], values["at 4"][0])
        assert bool(values["carried"]) == (name.partition(",")[0] in ("Mamba", "Mamba-2"))
        assert values["minutes"][0] > 0
    markov = named["Markov model of order 2, interpolated"].values["bits"][0]
    assert markov < named["bytes by their frequency"].values["bits"][0] < 8
    assert named["Mamba"].wanted[0].value == markov
    assert named["xz -9, what the books add behind the training books"].values["bits"] < [6.0]
    svg = xml.etree.ElementTree.parse(tmp_path / "books.svg").getroot()
    drawn = " ".join(svg.itertext())
    assert "MB of text read" in drawn
    assert "minutes of training" in drawn
    assert f"{second}, {PIECES}" in drawn
    before = {path.name: path.read_bytes() for path in (tmp_path / "trials").iterdir()}
    again = tables(context(tmp_path), texts, lambda: HFTokenizer(str(tokenizer_json)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "trials").iterdir()} == before
    assert [line.name for line in again[0].lines] == list(named)


def test_the_mixers_of_today_beside_the_published_order(texts: Texts, tmp_path: Path) -> None:
    made = context(tmp_path, "Mamba-2", "Mamba-3, rank 4", "KDA")
    first, table = tables(made, texts, ByteTokenizer)
    assert [(line.name, line.paper) for line in first.lines] == [("Mamba-2", "")]
    lines = {line.name: line for line in table.lines}
    assert lines["KDA"].paper == "52.28"
    first, second = (lines[name].values["bits"][0] for name in ("Mamba-3, rank 4", "KDA"))
    ahead = lines["Mamba-3, rank 4 is ahead of KDA by"]
    assert ahead.values == {"bits": [second - first], "ahead": [float(first < second)]}
    assert ahead.note.startswith("as" if first < second else "the other way")
    drawn = " ".join(xml.etree.ElementTree.parse(tmp_path / "books_mixers.svg").getroot().itertext())
    assert "KDA" in drawn
    assert "rank 4" not in drawn  # which is in the other picture


def test_pieces_of_several_calls_are_collected_and_what_is_missing_is_told(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = tables(context(tmp_path, "Mamba-2"), texts, ByteTokenizer)
    assert first.lines[0].values["minutes"][0] > 0  # of the training itself
    tables(context(tmp_path, "Mamba-2", "speed"), texts, ByteTokenizer)
    (again,) = tables(context(tmp_path, "Mamba-2", seeds=(0, 2)), texts, ByteTokenizer)
    assert again.lines[0].note == ""
    monkeypatch.setattr(books_training, "train", lambda *_args, **_more: pytest.fail("something is trained"))
    table, mixers = tables(context(tmp_path, "finished", seeds=(0, 1, 2)), texts, ByteTokenizer)
    assert {line.name for line in table.lines} == set(CONTENDERS)
    notes = {line.name: line.note for line in (*table.lines, *mixers.lines)}
    assert notes.pop("Mamba-2") == "missing: seed 1"
    assert notes == {name: "missing: seeds 0, 1, 2" for name in notes}
    assert set(notes) == {*CONTENDERS, *TODAY} - {"Mamba-2"}
    (mamba2,) = (line for line in table.lines if line.name == "Mamba-2")
    assert len(mamba2.values["bits"]) == 2
    assert mamba2.values["minutes"]


def test_those_that_lead_do_so_with_the_first_seed_of_each() -> None:
    found = {name: {0: {"validation": 2.0 + at}, 1: {"validation": 1.0}} for at, name in enumerate(CONTENDERS)}
    assert books._leading(found, 0) == list(CONTENDERS)[:2]
    del found["Transformer++"][0]  # which another call may have left for later
    assert books._leading(found, 0) == []


@pytest.mark.parametrize(("best", "asked"), [(1e-3, 3), (2e-3, 3), (8e-3, 4), (2.5e-4, 4)])
def test_the_rate_is_looked_for_on_the_better_side(
    best: float, asked: int, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, tried = Shelf(context(tmp_path), texts, ByteTokenizer), []
    of.context.scale = "small"
    monkeypatch.setattr(of, "tried", lambda name, rate: tried.append(rate) or abs(math.log(rate / best)))
    assert of.rate("Mamba") == best
    assert len(tried) == asked
    monkeypatch.setattr(of, "tried", lambda name, rate: math.nan)
    with pytest.raises(UserError, match="diverged at every rate"):
        of.rate("Mamba")
    assert best in RATES


def test_a_killed_training_goes_on_with_its_curve_and_its_best_weights(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SAVE_EVERY_S", 0.0)
    (tmp_path / "whole").mkdir()
    whole = Shelf(context(tmp_path / "whole"), texts, ByteTokenizer).learned("Mamba-2", 1e-2, 0)
    bits, asked = Split.bits, []

    def killed(self: Split, *args: int) -> float:
        asked.append(1)
        if len(asked) == 2:  # at the second look, when the checkpoint of the first is there
            raise KeyboardInterrupt
        return bits(self, *args)

    monkeypatch.setattr(Split, "bits", killed)
    with pytest.raises(KeyboardInterrupt):
        Shelf(context(tmp_path), texts, ByteTokenizer).learned("Mamba-2", 1e-2, 0)
    found = Shelf(context(tmp_path), texts, ByteTokenizer).learned("Mamba-2", 1e-2, 0)
    assert len(asked) == 4  # the look that was not answered, and the test
    for key in ("bits", "validation", "at 2", "at 4", "best_at"):
        assert found[key] == whole[key], key
    assert [path.suffix for path in (tmp_path / "trials").iterdir()] == [".json"]


def test_models_are_of_one_size() -> None:
    sizes = {}
    with torch.device("meta"):
        for name, of in {**CONTENDERS, **TODAY}.items():
            sizes[name] = causal_lm(256, books_training.D_MODEL, of.n_layers, of.mixer, **of.more).n_parameters()
    assert max(sizes.values()) < 1.05 * min(sizes.values()), sizes
    assert set(ENTRIES) > {*CONTENDERS, *TODAY}


def test_all_bytes_of_a_book_count_once_whatever_the_tokens(texts: Texts, tokenizer_json: Path) -> None:
    size = sum(len(book) - 1 for book in texts.test)
    torch.manual_seed(0)
    for tokenizer in (ByteTokenizer(), HFTokenizer(str(tokenizer_json))):
        tokens = Tokens.of(texts, tokenizer, CPU)
        assert tokens.test.n_bytes == size == 1002
        assert tokens.train_bytes == 2 * 6001
        assert len(tokens.train) <= tokens.train_bytes
        model = causal_lm(tokens.vocab_size, 8, 1, "mamba2", d_state=4).eval()
        nats = 0.0
        for book in tokens.test.books:
            with torch.no_grad():
                log_p = model(book[None, :-1].long()).logits[0].log_softmax(-1)
            nats -= float(log_p.gather(1, book[1:, None].long()).sum())
        whole = nats / size / math.log(2)
        assert tokens.test.bits(model, 2000, 4000) == pytest.approx(whole, rel=1e-5)
        assert tokens.test.carried(model) == pytest.approx(whole, rel=1e-5)
        assert tokens.test.bits(model, 3, 9) != pytest.approx(whole, rel=1e-5)  # in pieces that know only themselves
    assert math.isnan(tokens.test.carried(causal_lm(tokens.vocab_size, 8, 1, "attention")))


def test_beginnings_of_books_end_with_a_character() -> None:
    books = [np.frombuffer(text.encode(), np.uint8) for text in ("aéb", "ab")]
    cut = Texts(books, books, books).beginnings(2, 3)
    assert [book.tobytes().decode() for book in cut.train] == ["a", "ab"]
    assert [book.tobytes().decode() for book in (*cut.validation, *cut.test)] == ["aé", "ab"] * 2


def test_a_count_model_by_hand() -> None:
    train, text = (np.frombuffer(some, np.uint8) for some in (b"abac", b"xab"))
    # order 0: a twice, b and c once, of 4; 3 kinds. Order 1: after a come b and c, once each
    a, b = (2 + 3 / 256) / 7, (1 + 3 / 256) / 7
    bits = interpolated(train, [text], 1)[:, 0]
    assert bits[0] == pytest.approx(-math.log2(a) - math.log2(b))
    assert bits[1] == pytest.approx(-math.log2(a) - math.log2((1 + 2 * b) / 4))


def test_the_books_are_unpacked_from_the_archive_that_is_asked_for(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(archive: Path, folder: Path) -> None:
        for name, some in zip(("train", "valid", "test"), texts, strict=True):
            (folder / name).mkdir()
            (folder / name / "a.txt").write_bytes(some[0][1:].tobytes())

    monkeypatch.setattr(shelf, "unpack", made)
    monkeypatch.setattr(Context, "brought", lambda self, name, sha256, source: tmp_path / name)
    (table,) = books.run(context(tmp_path, "floors"))
    assert len(table.lines) == 5
