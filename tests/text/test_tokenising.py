"""Texts are tokenised once, in parts that a killed run does not make again, and by processes as without."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from mambaseq_text import tokenising
from mambaseq_text.corpus import CorpusData
from mambaseq_text.documents import DocumentData
from mambaseq_text.opening import source
from mambaseq_text.rows import BadRow
from mambaseq_text.tokenising import tokenised
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer
from mambaseq_text.words import Words, byte_counts
from tokenising_parts import NONE, Ends, Numbers, Refuses, same

from mambaseq.errors import ConfigError, DataError, UserError


class Counting(ByteTokenizer):
    calls = 0

    def part(self, *given: Any) -> Any:
        type(self).calls += 1
        return super().part(*given)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenising, "PART", 100)


@pytest.mark.parametrize("torn", ["nothing", "journal", "tokens"])
def test_a_killed_run_goes_on_behind_its_whole_parts(tmp_path: Path, torn: str, caplog: Any) -> None:
    """And makes the store that a run makes that was not; what is half-written does not count."""
    wanted = tokenised("whole", Numbers(), ByteTokenizer(), {}, workers=0)
    Counting.calls = 0
    with pytest.raises(KeyboardInterrupt):
        tokenised("killed", Numbers(stops_at=11), Counting(), {}, workers=0)
    (growing,) = (tmp_path / "cache" / "stores").glob("*.growing")
    assert not list((tmp_path / "cache" / "stores").glob("killed-*[0-9a-f]"))  # half of a store is none
    journal, tokens = growing / "journal.jsonl", growing / "tokens.bin"
    if torn == "journal":
        journal.write_bytes(journal.read_bytes()[:-20])
    elif torn == "tokens":
        tokens.write_bytes(tokens.read_bytes()[:-3])
    else:
        with tokens.open("ab") as file:  # of a part that is not in the journal
            file.write(b"half of a part")
    made, Counting.calls, again = Counting.calls, 0, Numbers()
    found = tokenised("killed", again, Counting(), {}, workers=0)
    assert same(found, wanted)
    whole = made - 3 * (torn != "nothing")  # the last part has three texts
    assert again.read == Counting.calls == 20 - whole
    assert "Goes on behind" in caplog.text
    Counting.calls = 0
    tokenised("killed", Numbers(), Counting(), {}, workers=0)
    assert not Counting.calls  # it is there
    tokenised("killed", Numbers(), Counting(), {"other": 1}, workers=0)
    assert Counting.calls == 20


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"No space left on device\. What is done so far is kept.*MAMBASEQ_CACHE"):
            tokenised("full", Numbers(), ByteTokenizer(), {}, workers=0)
    again = Numbers()
    assert same(
        tokenised("full", again, ByteTokenizer(), {}, workers=0),
        tokenised("whole", Numbers(), ByteTokenizer(), {}, workers=0),
    )
    assert again.read == 11


def test_what_nobody_went_on_with_is_removed(tmp_path: Path) -> None:
    for name, age in (("old", 40), ("new", 20)):
        folder = tmp_path / "cache" / "stores" / f"{name}.growing"
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age * 86400,) * 2)
    tokenised("x", Numbers(), ByteTokenizer(), {}, workers=0)
    assert [path.name for path in (tmp_path / "cache" / "stores").glob("*.growing")] == ["new.growing"]


def test_processes_give_the_same_store(tokenizer_json: Path) -> None:
    tokenizer = HFTokenizer(str(tokenizer_json), eos="<|endoftext|>")
    one = tokenised("one", Numbers(), tokenizer, {}, workers=0)
    assert same(tokenised("two", Numbers(), tokenizer, {}, workers=1), one)


def test_a_process_that_ends_is_told(tokenizer_json: Path) -> None:
    with pytest.raises(UserError, match=r"process that tokenises has ended .*what was done is kept"):
        tokenised("x", Numbers(), Ends(str(tokenizer_json)), {}, workers=1)


def test_no_more_than_so_many_tokens(tmp_path: Path) -> None:
    """The same ones whatever stops in between; held-out files are read whole."""
    for name, letter in (("train", "a"), ("test", "b")):
        rows = [json.dumps({"text": f"{letter}{number:02}" * 20}) + "\n" for number in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    options = {"test_files": str(tmp_path / "test.jsonl"), "validation_fraction": 0.0, "max_tokens": 300, "workers": 0}
    for kind in (DocumentData, CorpusData):
        data = kind(files=str(tmp_path / "train.jsonl"), **options)  # type: ignore[operator]
        data.setup()
        text = bytes(data._store.tokens)
        assert text.count(b"a") == 120  # three parts of two documents, sixty bytes each
        assert text.count(b"b") == 600


BAD = [
    '{"text": "good"}',
    '{"text": "broken',
    '{"text": 3}',
    "",
    '{"text": "fine"}',
    '{"txt": "x"}',
]


def bad_file(folder: Path) -> str:
    path = folder / "bad.jsonl"
    path.write_bytes("\n".join(BAD).encode() + b'\n{"text": "\xff"}\n{"text": "last"}\n')
    return str(path)


@pytest.mark.parametrize("kind", [DocumentData, CorpusData])
def test_broken_rows_are_told_at_once_or_left_out(tmp_path: Path, kind: Any) -> None:
    name = bad_file(tmp_path)
    with pytest.raises(DataError, match=r"Line 2 of .*bad\.jsonl is not JSON") as caught:
        kind(files=name, **NONE).setup()
    told = str(caught.value)
    assert "3 more cannot be used: " in told
    for line, reason in (
        (3, "'text' is not text but int"),
        (6, "has no field 'text'"),
        (7, "is not UTF-8: byte 0xff at offset"),
    ):
        assert re.search(rf"bad\.jsonl, line {line} \({reason}", told), told
    assert "data.skip_bad: true" in told
    assert len(told) < 1000
    for _ in range(2):  # made, and from the cache
        data = kind(files=name, skip_bad=True, **NONE)
        data.setup()
        assert bytes(data._store.tokens).replace(b"\n", b"") == b"goodfinelast"
        assert [(row["file"], row["line"]) for row in data.left_out()] == [(name, line) for line in (2, 3, 6, 7)]
        assert data.left_out()[0]["reason"] == "is not JSON: Unterminated string starting at column 10"
        assert "0xff at offset" in data.left_out()[3]["reason"]


def test_a_cause_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n' * 200 + '{"txt": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, 3, .* 11 and 189 more \(the same\); .*, line 201 \(has no"):
        DocumentData(files=str(tmp_path / "a.jsonl"), **NONE).setup()  # type: ignore[arg-type]


def test_nothing_is_left_of_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(
        DataError, match=r"There are no tokens in a\.jsonl.*1 rows were left out, the first is .*not text"
    ):
        DocumentData(files=str(tmp_path / "a.jsonl"), skip_bad=True, **NONE).setup()  # type: ignore[arg-type]


def test_a_stream_lists_what_it_leaves_out(tmp_path: Path) -> None:
    name = bad_file(tmp_path)
    data = DocumentData(files=name, streaming=True, skip_bad=True, length=3, shuffle_windows=0)
    data.left_out_file = tmp_path / "left_out.jsonl"
    data.setup()
    for _ in range(2):  # a second pass, and a second run, list nothing again
        for _, _ in zip(range(12), data.train(), strict=False):
            pass
        lines = [json.loads(line)["line"] for line in data.left_out_file.read_text().splitlines()]
        assert lines == [2, 3, 6, 7]
    with pytest.raises(DataError, match="Line 2 of"):
        next(iter(DocumentDataOf(name).train()))


def DocumentDataOf(name: str) -> DocumentData:
    data = DocumentData(files=name, streaming=True, length=30)
    data.setup()
    return data


def test_documents_without_text_are_left_out(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "ab"}\n{"text": ""}\n')
    options = {"bos": True, "eos": True}
    data = DocumentData(files=str(tmp_path / "a.jsonl"), tokenizer_options=options, **NONE)  # type: ignore[arg-type]
    data.setup()
    assert data._store is not None
    assert data._store.tokens.tolist() == [256, 97, 98, 257]
    assert "Left out: 2 documents without text" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_kinds_of_files(tmp_path: Path, kind: str) -> None:
    """A JSON array, whatever its white space, and tables, as lines of JSON."""
    rows = [{"id": number, "text": f'a, "b"\n{number}\té'} for number in range(3)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text("\n [" + " ,\n".join(json.dumps(row, indent=1) for row in rows) + "\n] \n")
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if kind == "csv" else "\t").writerows(
                [["id", "text"], *map(dict.values, rows)]
            )
    data = DocumentData(files=str(path), **NONE)  # type: ignore[arg-type]
    data.setup()
    assert data._store is not None
    assert [bytes(one).decode() for one in data._store] == [row["text"] for row in rows]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}, {"text": "b"', r"Row 2 of .*a\.json is not JSON"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', r"a\.json is no JSON array of objects after its row 1"),
        ("a.json", '[{"text": "a"}] and', r"after its row 1"),
        ("a.json", '[{"text": "a"}, 3]', r"Row 2 of .*a\.json is not a JSON object but int"),
        ("a.csv", "id,txt\n1,a\n", r"has no column 'text'\. Did you mean 'txt'"),
        ("a.csv", "id,text\n1,a,b\n", r"Line 2 of .*a\.csv has 3 cells, not 2"),
        ("a.csv", 'id,text\n1,"a"b\n', r"Line 2 of .*a\.csv is no row"),
        ("a.json", "[]", "There are no tokens"),
    ],
)
def test_broken_arrays_and_tables(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        DocumentData(files=str(tmp_path / name), **NONE).setup()  # type: ignore[arg-type]


def test_data_sets_as_the_hub_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder here, since there is no network: splits and configs are found as `datasets` does."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": f"this is {split}"}) + "\n")
    name = f"hub:{folder}"
    data = DocumentData(files=name, validation_files=name, test_files=f"{name}:default:test")
    data.setup()
    assert data._store is not None
    assert [bytes(one) for one in data._store] == [b"this is train", b"this is validation", b"this is test"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"has no split 'tst'\. Did you mean 'test'"):
        DocumentData(files=f"{name}:default:tst").setup()
    with pytest.raises(DataError, match=r"hub:.*/none cannot be looked up"):
        DocumentData(files=f"hub:{tmp_path}/none").setup()
    with pytest.raises(ConfigError, match=r"of the form hub:OWNER/NAME"):
        DocumentData(files="hub::x").setup()


def test_what_the_hub_pins_needs_no_question() -> None:
    address = f"hf://datasets/a/b@{'0f' * 20}/c/train.jsonl.zst"
    assert source(address) == {"name": address, "version": "0f" * 20}


def test_a_tokenizer_of_the_hub(tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, options["revision"]))
        if name != "tokenizer.json" or repository != "some/model":
            raise huggingface_hub.errors.EntryNotFoundError("not there")
        return str(tokenizer_json)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    assert HFTokenizer("hub:some/model@v1", eos="<|endoftext|>").path == str(tokenizer_json)
    assert asked[0] == ("some/model", "v1")
    with pytest.raises(DataError, match=r"tokenizer\.json of 'some/other' cannot be downloaded.*give the path"):
        HFTokenizer("hub:some/other")
    with pytest.raises(ConfigError, match=r"is not of the form hub:OWNER/NAME"):
        HFTokenizer("hub:model")


def test_workers_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.workers must be at least 0, not -1"):
        DocumentData(files=bad_file(tmp_path), workers=-1).setup()


def test_words_are_encoded_as_the_library_does(tokenizer_json: Path, sample: str) -> None:
    """With white of any kind, added tokens of blanks as GPT-NeoX has them, and accents in two characters."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    library.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in (2, 3, 4)])
    library.normalizer = tokenizers.normalizers.NFC()
    library.save(str(tokenizer_json.with_name("blanks.json")))
    letters = [*" \n\t\r\u00a0\x1c\u2003\u3000\x85ab1.'s!é京🎲", "  ", "the", "<|endoftext|>", "e\u0301"]
    rng = np.random.default_rng(0)
    for path in (tokenizer_json, tokenizer_json.with_name("blanks.json")):
        tokenizer = HFTokenizer(str(path))
        assert isinstance(tokenizer._words, Words)
        drawn = ["".join(rng.choice(letters[: len(letters) - number % 2], 60)) for number in range(200)]
        texts = [sample, *drawn, "x" * 500, " " * 300, "", "\n"]
        for text in [*texts, "".join(texts)]:
            wanted, ends = tokenizer._encoded(text)
            for _ in range(2):  # new words, and words that were met
                ids, counts = tokenizer.encode_counted(text)
                assert ids.tolist() == wanted.tolist()
                assert counts.sum() == len(text.encode())
                assert "\u0301" in text or counts.tolist() == byte_counts(text, ends).tolist()


@pytest.mark.parametrize("white", [" ", "\t", "\u2003", "\u3000"])
def test_white_at_the_end_of_a_text_is_not_joined_with_that_of_a_long_word(white: str, tokenizer_json: Path) -> None:
    """Both are new at the same time, and the vocabulary has what they would be together."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([f"a {white}  b"] * 3, trainer)
    path = tokenizer_json.with_name("white.json")
    library.save(str(path))
    tokenizer = HFTokenizer(str(path))
    assert isinstance(tokenizer._words, Words)
    text = f"  {'x' * 100} {white}"
    assert tokenizer.encode_counted(text)[0].tolist() == tokenizer._encoded(text)[0].tolist()


def test_long_texts_are_cut_between_words(tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch, sample: str) -> None:
    tokenizer = HFTokenizer(str(tokenizer_json))
    wanted = tokenizer._encoded(sample * 3)[0].tolist()
    monkeypatch.setattr("mambaseq_text.words._LONG", 4)
    monkeypatch.setattr("mambaseq_text.words._KEPT", 3)
    for size in (1, 7, 30):
        monkeypatch.setattr("mambaseq_text.words._BLOCK", size)
        assert tokenizer.encode_counted(sample * 3)[0].tolist() == wanted


def test_what_the_library_cannot_take_is_told_and_nothing_of_it_is_kept(tokenizer_json: Path) -> None:
    tokenizer, words = HFTokenizer(str(tokenizer_json)), "some words that are new"
    wanted = tokenizer._encoded(words)[0].tolist()
    for _ in range(2):
        with pytest.raises(DataError, match="cannot take the text"):
            tokenizer.encode_counted(f"{words} \ud800 {words}")
        assert tokenizer.encode_counted(words)[0].tolist() == wanted


def test_threads_that_share_words_get_the_ids_of_the_library(
    tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a server do; and so does one thread afterwards, from what they have kept."""
    tokenizer, rng = HFTokenizer(str(tokenizer_json)), random.Random(0)
    monkeypatch.setattr("mambaseq_text.words._KEPT", 1500)  # forgotten meanwhile, too
    texts = [" ".join("".join(rng.choices("abcdefgh", k=6)) for _ in range(60)) for _ in range(120)]
    wanted = [tokenizer._encoded(text)[0].tolist() for text in texts]
    wrong: list[object] = []

    def encode(numbers: range) -> None:
        for number in numbers:
            try:
                if tokenizer.encode(texts[number]).tolist() != wanted[number]:
                    wrong.append(number)
            except Exception as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=encode, args=(range(start, 120, 4),)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    encode(range(120))
    assert not wrong


@pytest.mark.parametrize("change", ["lstrip", "token", "dropped", "prefix"])
def test_tokenizers_that_see_over_words_are_left_to_the_library(tokenizer_json: Path, change: str) -> None:
    told = json.loads(tokenizer_json.read_text())
    if change == "lstrip":
        told["added_tokens"][0]["lstrip"] = True
    elif change == "token":
        told["added_tokens"].append({**told["added_tokens"][0], "id": 300, "content": "of the"})
    elif change == "dropped":
        told["model"]["vocab"]["zz"] = told["model"]["vocab"].pop("z")
    else:
        told["pre_tokenizer"]["add_prefix_space"] = True
    path = tokenizer_json.with_name(f"{change}.json")
    path.write_text(json.dumps(told))
    assert HFTokenizer(str(path))._words is None


def test_errors_of_processes_are_told(tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are made of several values, of which not all come back as they were."""
    monkeypatch.setattr(tokenising, "_ALONE", 0)
    with pytest.raises(BadRow, match=r"Row 3 of a\.jsonl is bad\.") as caught:
        tokenised("x", Numbers(), Refuses(str(tokenizer_json), eos="<|endoftext|>"), {}, workers=1)
    assert [caught.value.file, caught.value.line, caught.value.reason] == ["a.jsonl", 3, "bad"]
    with pytest.raises(RuntimeError, match="Strange: this and that"):
        tokenised("x", Numbers(), Refuses(str(tokenizer_json)), {}, workers=1)
