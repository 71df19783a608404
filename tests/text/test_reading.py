from __future__ import annotations

import errno
import gzip
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mambaseq_text.reading import CHUNK, decoded, documents, read_bytes, read_text, text_files
from mambaseq_text.tokenization import ByteTokenizer
from mambaseq_text.writing import write_text

from mambaseq.errors import DataError, UserError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def whole(name: str, encoding: str = "utf-8") -> str:
    data = read_bytes(name, encoding)
    return "".join(decoded(name, data, 0, len(data)))


def texts(name: str, **options: Any) -> list[str]:
    return [text for _, text in documents(name, **options)]


def test_plain_text_is_read_byte_by_byte(tmp_path: Path, sample: str) -> None:
    content = "\ufeffdos\r\nline\u2028" + sample
    assert whole(write(tmp_path / "a.txt", content)) == content
    assert whole(write(tmp_path / "a.txt.gz", gzip.compress(content.encode()))) == content
    assert whole(write(tmp_path / "b.txt", "café".encode("latin-1")), "latin-1") == "café"
    assert whole(write(tmp_path / "c.txt", "café".encode("utf-16")), "utf-16") == "café"


@pytest.mark.parametrize("line", ["東京\n", "東京"])
def test_long_text_comes_in_whole_characters(tmp_path: Path, line: str) -> None:
    content = "a" + line * (CHUNK // 3)
    name = write(tmp_path / "long.txt", content)
    data = read_bytes(name)
    pieces = list(decoded(name, data, 0, len(data)))
    assert len(pieces) > 1
    assert max(len(piece.encode()) for piece in pieces) <= CHUNK
    assert "".join(pieces) == content


@pytest.mark.parametrize("before", [3, CHUNK + 5])
def test_not_utf8(tmp_path: Path, before: int) -> None:
    name = write(tmp_path / "latin.txt", b"x" * before + "é\n".encode("latin-1"))
    with pytest.raises(DataError, match=rf"latin\.txt is not UTF-8 text: byte 0xe9 at offset {before:,} .*encoding"):
        whole(name)
    with pytest.raises(DataError, match=rf"latin\.txt is not UTF-8 text: byte 0xe9 at offset {before:,} "):
        texts(name)
    packed = write(tmp_path / "latin.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "\xe9"}\n'))
    with pytest.raises(DataError, match=r"latin\.jsonl\.gz is not UTF-8 text: byte 0xe9 at offset 24 "):
        texts(packed)


def test_unknown_encoding(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", "a")
    for read in (whole, lambda name, encoding: texts(name, encoding=encoding)):
        with pytest.raises(DataError, match="utf-88"):
            read(name, "utf-88")


def test_empty_and_missing(tmp_path: Path) -> None:
    name = write(tmp_path / "empty.txt", "")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        read_bytes(name)
    with pytest.raises(DataError, match=r"empty\.jsonl holds no document"):
        list(read_text(write(tmp_path / "empty.jsonl", "\n"), ByteTokenizer()))
    with pytest.raises(DataError, match=r"no data file .*gone\.txt"):
        text_files(str(tmp_path / "gone.txt"))
    (tmp_path / "books").mkdir()
    with pytest.raises(DataError, match=r"is a folder\. Name the files in it, with a pattern: .*books/\*\.txt"):
        text_files(str(tmp_path / "books"))


def test_plain_units(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", "one\ntwo\n\nthree\n")
    assert texts(name) == ["one\ntwo\n\nthree\n"]
    assert texts(name, unit="paragraph") == ["one\ntwo", "three\n"]
    assert texts(name, unit="line") == ["one\n", "two\n", "\n", "three\n"]


def test_jsonl(tmp_path: Path) -> None:
    # a reader that guesses types makes a time of the first and turns the second into a string with quotes
    rows = [{"text": "2020-01-01"}, {"n": 1, "text": "5"}, {"text": "line\nand \u2028 é"}, {"text": ""}]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    wanted = [row["text"] for row in rows]
    assert texts(write(tmp_path / "a.jsonl", content)) == wanted
    assert texts(write(tmp_path / "a.jsonl.gz", gzip.compress(content.encode()))) == wanted
    places = [where for where, _ in documents(str(tmp_path / "a.jsonl"))]
    assert places[2] == f"{tmp_path / 'a.jsonl'}, line 5"


def test_a_name_with_pattern_characters(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a[1]*.jsonl", '{"text": "x"}')) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "is not JSON: Expecting ',' delimiter at column"),
        ('["a"]', "is not a JSON object but list"),
        ('{"txt": "a"}', "has no field 'text'. Did you mean 'txt'"),
        ('{"text": 5}', "is not text but int"),
        ('{"text": null}', "is not text but NoneType"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_broken_lines(tmp_path: Path, line: str, message: str) -> None:
    name = write(tmp_path / "bad.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError, match=r"[Ll]ine 3 of .*bad\.jsonl") as caught:
        texts(name)
    assert message in str(caught.value)


def test_truncated_gz(tmp_path: Path) -> None:
    packed = gzip.compress(np.random.default_rng(0).integers(32, 127, 10_000).astype(np.uint8).tobytes())
    for suffix in ("txt", "jsonl"):
        name = write(tmp_path / f"cut.{suffix}.gz", packed[:-500])
        with pytest.raises(DataError, match=rf"cut\.{suffix}\.gz cannot be read.*copy it again"):
            texts(name)
    with pytest.raises(DataError, match=r"cut\.txt\.gz cannot be read"):
        read_bytes(str(tmp_path / "cut.txt.gz"))


def test_parquet(tmp_path: Path) -> None:
    name = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["one", "zwei é"], "n": [1, 2]}), name)
    assert texts(name) == ["one", "zwei é"]
    with pytest.raises(DataError, match=r"a\.parquet has no column 'txt'. Did you mean 'text'"):
        texts(name, field="txt")
    with pytest.raises(DataError, match=r"Row 1 of .*a\.parquet holds int in 'n'"):
        texts(name, field="n")
    pq.write_table(pa.table({"text": ["one", None]}), name)
    with pytest.raises(DataError, match=r"Row 2 of .*a\.parquet holds NoneType"):
        texts(name)
    content = Path(name).read_bytes()
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read"):
        texts(write(tmp_path / "cut.parquet", content[: len(content) // 2]))


def test_local_files_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    assert texts(write(tmp_path / "a.jsonl", '{"text": "x"}')) == ["x"]
    with pytest.raises(DataError, match=r"https://example\.org/a\.jsonl cannot be read.*network"):
        texts("https://example.org/a.jsonl")


def test_read_text(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer(bos=True)
    (record,) = read_text(write(tmp_path / "a.txt", "ab\n\nc"), tokenizer)
    assert record.name == "a.txt"
    assert record.ids is not None
    assert record.ids.tolist() == [256, 97, 98, 10, 10, 99]
    name = write(tmp_path / "b.jsonl", '{"body": "x"}\n{"body": "yz"}\n')
    assert [len(record) for record in read_text(name, tokenizer, field="body")] == [2, 3]
    assert len(list(read_text(tmp_path / "*.txt", tokenizer))) == 1


def test_write_text(tmp_path: Path, sample: str) -> None:
    tokenizer = ByteTokenizer()
    ids = [tokenizer.encode(text) for text in (sample, "two\r\n")]
    assert write_text(tmp_path / "a.txt", ids[:1], tokenizer) == [tmp_path / "a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == sample.encode()
    files = write_text(tmp_path / "b.txt", ids, tokenizer)
    assert [file.name for file in files] == ["b-000.txt", "b-001.txt"]
    assert files[1].read_bytes() == b"two\r\n"
    (lines,) = write_text(tmp_path / "c.jsonl", ids, tokenizer)
    assert texts(str(lines)) == [sample, "two\r\n"]


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_text(tmp_path / "a.txt", [np.array([97])], ByteTokenizer())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
