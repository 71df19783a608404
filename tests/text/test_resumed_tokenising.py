"""Tokenising that is killed, or whose files change: nothing is there twice, and nothing of what changed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mambaseq_text import chats, tokenising
from mambaseq_text.chats import ChatData
from mambaseq_text.corpus import CorpusData
from mambaseq_text.documents import DocumentData
from mambaseq_text.tokenising import tokenised
from mambaseq_text.tokenization import ByteTokenizer
from tokenising_parts import NONE, Numbers, same

from mambaseq.data import growing
from mambaseq.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenising, "PART", 100)


def write_rows(path: Path, texts: list[object]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def killed(monkeypatch: pytest.MonkeyPatch, data: Any, method: str, label: str, after: int) -> None:
    """Sets up data in a process that is killed after so many calls of a method of a growing store."""
    called = []
    real = getattr(growing._Growth, method)

    def dying(self: Any, given: Any) -> None:
        if self.folder.name.startswith(f"{label}-"):
            called.append(given)
            if len(called) > after:
                raise KeyboardInterrupt
        real(self, given)

    with monkeypatch.context() as patched:
        patched.setattr(growing._Growth, method, dying)
        with pytest.raises(KeyboardInterrupt):
            data.setup()


@pytest.mark.parametrize("empty", ["validation", "test"])
@pytest.mark.parametrize("kind", [DocumentData, CorpusData])
def test_killed_before_the_index_nothing_is_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, empty: str
) -> None:
    """Neither rows that were left out, nor a file without any that can be used."""
    other = {"validation": "test", "test": "validation"}[empty]
    files = {
        "files": write_rows(tmp_path / "train.jsonl", [f"text {number}" * 5 for number in range(9)]),
        f"{other}_files": write_rows(tmp_path / f"{other}.jsonl", ["held", 4]),
        f"{empty}_files": [write_rows(tmp_path / "a.jsonl", ["b"]), write_rows(tmp_path / "none.jsonl", [3, 5])],
    }

    def made(place: str) -> Any:
        monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / place))
        return kind(**files, skip_bad=True, workers=0)

    wanted = made("whole")
    wanted.setup()
    assert len(wanted.left_out()) == 3
    label = "documents" if kind is DocumentData else "corpus"
    killed(monkeypatch, made("killed"), "finish", label, 0)
    found = made("killed")
    found.setup()
    assert same(found._store, wanted._store)


def test_an_empty_file_that_ends_a_part_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_rows(tmp_path / "a.jsonl", ["text"]), write_rows(tmp_path / "none.jsonl", [3])]
    held = write_rows(tmp_path / "held.jsonl", ["held" * 30, "out"])

    def made() -> CorpusData:
        return CorpusData(files=files, validation_files=held, test_fraction=0.0, skip_bad=True, workers=0)

    killed(monkeypatch, made(), "add", "corpus", 1)
    data = made()
    data.setup()
    assert data._store.names == ["train a.jsonl", "train none.jsonl", "validation held.jsonl"]
    assert [row["file"] for row in data.left_out()] == files[1:]


def test_byte_counts_of_all_documents_whatever_stops_in_between(
    tmp_path: Path, tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """One without text is none; those before a kill count; what is left out is told once."""
    texts: list[object] = [f"text {number} " * 10 for number in range(40)]
    files = {
        "files": write_rows(tmp_path / "train.jsonl", texts),
        "test_files": write_rows(tmp_path / "test.jsonl", ["first", "", texts[3], "", "third", "the last"]),
    }
    options = {"tokenizer_options": {"path": str(tokenizer_json)}, "duplicates": "drop", "validation_fraction": 0.3}

    def made(place: str) -> DocumentData:
        monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / place))
        return DocumentData(**files, **options, tokenizer="text/hf", max_tokens=900, workers=0)  # type: ignore[arg-type]

    wanted = made("whole")
    wanted.setup()
    assert caplog.text.count("1 texts that are in validation or test") == caplog.text.count("Left out of training") == 1
    assert caplog.text.count("documents without text") == 1
    killed(monkeypatch, made("killed"), "add", "documents-bytes", 2)
    found = made("killed")
    found.setup()
    for data in (wanted, found):
        assert data._store is not None
        for split in ("validation", "test"):
            own = [data._store[number] for number, name in enumerate(data._store.names) if name == split]
            sizes = [len(bytes(data.tokenizer.decode(ids), "utf-8")) for ids in own]  # type: ignore[union-attr]
            assert [int(counts.sum()) for counts in data._counts[split]] == sizes
    packs = found.test()
    assert packs is not None
    assert sum(int(pack.n_units.sum()) for pack in packs) > 50  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["documents", "corpus", "chats"])
def test_a_file_that_changes_while_it_is_read_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Once it is as it was, its own text is read, and no other under its checksum."""
    path = tmp_path / "a.jsonl"
    right = "".join(json.dumps({"text": f"right {n}", "answer": "yes"}) + "\n" for n in range(9))
    path.write_text(right)
    made: Any = {"documents": DocumentData, "corpus": CorpusData}.get(kind)
    if made is None:
        form = {"form": "pairs", "prompt": "text", "tokenizer": "text/bytes"}
        data = [ChatData(files=str(path), **form, **NONE) for _ in range(2)]  # type: ignore[arg-type]
        module, name = chats, "objects"
    else:
        data = [made(files=str(path), workers=0, **NONE) for _ in range(2)]
        module, name = sys.modules[made.__module__], "documents"
    real = getattr(module, name)

    def changing(*given: Any, **options: Any) -> Any:
        path.write_text(right.replace("right", "wrong, longer"))
        return real(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, changing)
        patched.setattr(growing._Growth, "finish", lambda *given: None)  # noticed before anything is kept
        with pytest.raises(DataError, match="changes while it is read"):
            data[0].setup()
    assert not list((tmp_path / "cache" / "stores").glob("*.growing"))
    path.write_text(right)
    data[1].setup()
    store = data[1]._store
    assert store is not None
    text = bytes(store.tokens.astype(np.uint8))
    assert b"right 8" in text
    assert b"wrong" not in text


def test_parts_of_a_file_that_was_written_anew_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    name = write_rows(tmp_path / "a.jsonl", [f"text {number}" * 9 for number in range(9)])

    def made() -> DocumentData:
        return DocumentData(files=name, workers=0, **NONE)  # type: ignore[arg-type]

    killed(monkeypatch, made(), "add", "documents", 2)
    os.utime(name, (1, 1))
    killed(monkeypatch, made(), "add", "documents", 2)
    assert "Goes on behind" not in caplog.text
    made().setup()
    assert "Goes on behind" in caplog.text


def test_a_store_is_on_disk_before_its_journal_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real, unlink, rename = os.fsync, Path.unlink, Path.rename

    def fsync(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    def unlinked(self: Path, *given: Any, **options: Any) -> None:
        done.append(f"-{self.name}")
        unlink(self, *given, **options)

    def renamed(self: Path, other: Path) -> Path:
        done.append(">")
        return rename(self, other)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(Path, "unlink", unlinked)
    monkeypatch.setattr(Path, "rename", renamed)
    tokenised("x", Numbers(), ByteTokenizer(), {}, workers=0)
    before, after = done[: done.index(">")], done[done.index(">") :]
    assert {"tokens.bin", "names.json", "lengths.bin", "checksums.bin", "index.json"} <= set(before)
    assert before[-1].endswith(".growing")
    assert after == [">", "stores", "-journal.jsonl"]


def test_a_part_of_many_records_takes_no_longer_for_each(tmp_path: Path) -> None:
    growth = growing._Growth(tmp_path / "x.growing", "uint8", {})
    one: list[tuple[str | None, np.ndarray]] = [("one", np.zeros(2, np.uint8))]
    began = time.process_time()
    growth.add(growing.Part(one * 40_000, None))
    growth.close()
    assert time.process_time() - began < 3  # once 17 seconds
