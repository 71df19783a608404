from __future__ import annotations

import bz2
import errno
import gzip
import http.server
import json
import lzma
import re
import socket
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mambaseq_text.documents import DocumentData
from mambaseq_text.reading import CHUNK, decoded, read_bytes, read_text, text_files
from mambaseq_text.rows import documents
from mambaseq_text.tokenization import ByteTokenizer
from mambaseq_text.writing import write_text

from mambaseq.errors import ConfigError, DataError, UserError


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
    with pytest.raises(DataError, match=rf"'gone\.txt' \(looked for at {re.escape(str(Path.cwd()))}/gone\.txt\)"):
        text_files("gone.txt")
    (tmp_path / "books").mkdir()
    with pytest.raises(DataError, match=r"is a folder\. Name the files in it, with a pattern: .*books/\*\*/\*\.txt"):
        text_files(str(tmp_path / "books"))


def test_plain_units(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", "one\ntwo\n\nthree\n")
    assert texts(name) == ["one\ntwo\n\nthree\n"]
    assert texts(name, unit="paragraph") == ["one\ntwo", "three\n"]
    assert texts(name, unit="line") == ["one\n", "two\n", "\n", "three\n"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_stay_as_they_are(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = end.join(["", "", "one", "two\u2028", "", "", "three", "", "", "", "", "four", ""])
    name = write(tmp_path / "a.txt", content)
    wanted = [f"one{end}two\u2028", f"{end}three", f"{end}four{end}"]
    for size in (2**20, 1, 2, 3, 5):  # wherever a file is cut into pieces
        monkeypatch.setattr("mambaseq_text.opening.CHUNK", size)
        assert texts(name) == [content]
        assert "".join(texts(name, unit="line")) == content
        assert len(texts(name, unit="line")) == 12
        assert texts(name, unit="paragraph") == wanted
    if end == "\n":
        assert wanted == [text for text in content.split("\n\n") if text]


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


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACKERS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard}


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_files(tmp_path: Path, kind: str) -> None:
    content = "".join(json.dumps({"text": f"é {i}\r\n"}) + "\n" for i in range(1000))
    pack = PACKERS[kind]
    halves = content.encode()[:5000], content.encode()[5000:]
    for name in ("a.jsonl.", "a.txt."):
        path = write(tmp_path / (name + kind), pack(halves[0]) + pack(halves[1]))  # two streams end to end
        assert whole(path) == content
    assert texts(str(tmp_path / f"a.jsonl.{kind}")) == [f"é {i}\r\n" for i in range(1000)]
    assert whole(write(tmp_path / "unnamed.txt", pack(content.encode()))) == content


@pytest.mark.parametrize("kind", PACKERS)
def test_truncated(tmp_path: Path, kind: str) -> None:
    packed = PACKERS[kind](np.random.default_rng(0).integers(32, 127, 10_000).astype(np.uint8).tobytes())
    for suffix in ("txt", "jsonl"):
        name = write(tmp_path / f"cut.{suffix}.{kind}", packed[:-500])
        with pytest.raises(DataError, match=rf"cut\.{suffix}\.{kind} is cut short.*in line 1.*again"):
            texts(name)
    with pytest.raises(DataError, match=rf"cut\.txt\.{kind} is cut short"):
        read_bytes(str(tmp_path / f"cut.txt.{kind}"))


@pytest.mark.parametrize("kind", PACKERS)
def test_bombs(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaseq.limits.UNRATED", 2**20)
    monkeypatch.setattr("mambaseq.data.unpacking.UNRATED", 2**20)
    name = write(tmp_path / f"bomb.txt.{kind}", PACKERS[kind](bytes(100_000_000)))
    for read in (whole, texts):
        tracemalloc.start()
        with pytest.raises(UserError, match=r"bomb\.txt\.\w+ asks for .*MAMBASEQ_MAX_UNPACKED_RATIO"):
            read(name)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
        tracemalloc.stop()


def test_an_xz_file_that_asks_for_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaseq.data.unpacking.XZ_MEMORY", 2**20)
    name = write(tmp_path / "a.txt.xz", lzma.compress(b"text"))
    with pytest.raises(DataError, match=r"a\.txt\.xz is damaged: .*\(its header asks for more than 1 MiB"):
        whole(name)


def test_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_MAX_DOCUMENT_BYTES", "1000")
    name = write(tmp_path / "a.jsonl", '{"text": "a"}\n' + json.dumps({"text": "x" * 5000}))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 asks for 5,012 bytes in one document; .*MAX_DOCUMENT_BYTES"):
        texts(name)
    plain = write(tmp_path / "a.txt", "short\n\n" + "line\n" * 500)
    assert len(texts(plain, unit="line")) == 502
    for unit, place in (("paragraph", ", paragraph 2"), ("file", "")):
        with pytest.raises(UserError, match=rf"a\.txt{place} asks for"):
            texts(plain, unit=unit)


@pytest.mark.parametrize("kind", ["jsonl", *(f"jsonl.{kind}" for kind in PACKERS), "txt.gz", "parquet"])
def test_flipped_bytes(tmp_path: Path, kind: str) -> None:
    """Whatever comes out is text, or one paragraph that names the file."""
    rows = [f"{i} é {'abc' * (i % 7)}" for i in range(40)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": rows}), path, write_page_checksum=True)
    else:
        content = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(PACKERS.get(kind.rpartition(".")[2], bytes)(content))
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    places = rng.permutation(len(good))[:150].tolist()
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        write(path, bytes(damaged))
        message = str(path)
        try:
            found = texts(str(path))
            assert all(isinstance(text, str) for text in found)
        except UserError as error:
            message = str(error)
            refused += 1
        assert str(path) in message
        assert len(message) < 1000
        assert "\n" not in message
    assert refused > (10 if kind == "jsonl" else 0.7 * len(places))


def test_broken_json_that_is_really_a_broken_file(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b'{"text": "a"}\n' * 3000, mtime=0))
    packed[-6] ^= 1  # the checksum
    lines = b'{"text": "a"}\n' * 30 + b"{\n"
    name = write(tmp_path / "a.jsonl.gz", gzip.compress(lines)[:-8] + bytes(8))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is damaged: it cannot be unpacked .*incorrect data check"):
        texts(name)
    with pytest.raises(DataError, match=r"Line 31 of .*a\.jsonl\.gz is not JSON"):
        texts(write(tmp_path / "a.jsonl.gz", gzip.compress(lines)))
    with pytest.raises(DataError, match="incorrect data check"):
        texts(write(tmp_path / "a.jsonl.gz", bytes(packed)))


def test_marks_of_the_byte_order(tmp_path: Path) -> None:
    line = '{"text": "é"}\n'
    name = write(tmp_path / "a.jsonl", "\ufeff" + line)
    with pytest.raises(
        DataError, match=r"Line 1 of .*a\.jsonl begins with a byte order mark .*say that it is utf-8-sig"
    ):
        texts(name)
    assert texts(name, encoding="utf-8-sig") == ["é"]
    plain = write(tmp_path / "b.txt", "\ufeffé\n")
    assert whole(plain, "utf-8-sig") == "é\n"
    assert whole(plain) == "\ufeffé\n"
    for encoding, name_of in (("utf-16", "utf-16"), ("utf-32", "utf-32")):
        name = write(tmp_path / "c.jsonl", (line * 2).encode(encoding))
        for read in (whole, texts):
            with pytest.raises(
                DataError, match=rf"begins like {name_of.upper()}.*its encoding .{name_of}.: data.encoding"
            ):
                read(name)
        assert texts(name, encoding=name_of) == ["é", "é"]
        assert whole(name, name_of) == line * 2
    wrong = write(tmp_path / "d.txt", "\ufeffabc".encode() + b"\xff")
    for read in (whole, texts):
        with pytest.raises(DataError, match="byte 0xff at offset 6 "):
            read(wrong)
        with pytest.raises(DataError, match="byte 0xff at offset 6 "):
            read(wrong, encoding="utf-8-sig")
    with pytest.raises(DataError, match="not seem to be text"):
        whole(write(tmp_path / "e.txt", b"\x80\0\0\0"))


def test_encodings_that_are_none(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", "a")
    for encoding in ("base64", "a\0b", "undefined", ""):
        for read in (whole, lambda name, encoding: texts(name, encoding=encoding)):
            with pytest.raises(DataError, match="encoding"):
                read(name, encoding)


@pytest.mark.parametrize(
    ("line", "message"),
    [("[" * 100_000, "cannot be read as JSON"), ('{"n": ' + "1" * 5000 + "}", "cannot be read as JSON")],
)
def test_lines_that_the_parser_cannot_take(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"Line 1 of .*a\.jsonl {message}"):
        texts(write(tmp_path / "a.jsonl", line))


def test_messages_stay_short(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", json.dumps({"k" * 5000: 1, **{f"key{i}": 0 for i in range(5000)}}))
    with pytest.raises(DataError, match="has no field") as caught:
        texts(name)
    assert len(str(caught.value)) < 1000


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
    pq.write_table(pa.table({"text": ["a"]}, schema=pa.schema([("text", pa.large_string())])), name)
    assert texts(name) == ["a"]
    content = Path(name).read_bytes()
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read"):
        texts(write(tmp_path / "cut.parquet", content[: len(content) // 2]))


def test_parquet_that_unpacks_to_very_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaseq.limits.UNRATED", 2**20)
    name = str(tmp_path / "rows.parquet")
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 10_000]))
    pq.write_table(pa.table({"text": rows}), name)  # what the index says is little
    with pytest.raises(UserError, match=r"rows\.parquet asks for .*MAMBASEQ_MAX_UNPACKED_RATIO"):
        texts(name)
    pq.write_table(pa.table({"text": ["x" * 4_000_000]}), name, compression="zstd")
    with pytest.raises(UserError, match=r"rows\.parquet asks for .*MAMBASEQ_MAX_UNPACKED_RATIO"):
        texts(name)
    monkeypatch.setenv("MAMBASEQ_MAX_UNPACKED_RATIO", "100000")
    assert len(texts(name)[0]) == 4_000_000


def test_local_files_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    assert texts(write(tmp_path / "a.jsonl", '{"text": "x"}')) == ["x"]
    monkeypatch.setenv("SECRET", "hunter2")
    address = "https://me:${SECRET}@example.org/a.jsonl?token=${SECRET}"
    with pytest.raises(
        DataError, match=r"https://me:\$\{SECRET\}@example\.org/a\.jsonl.* cannot be read.*network"
    ) as caught:
        texts(address)
    for error in (
        caught.value,
        caught.value.__cause__,
        caught.value.__context__ if not caught.value.__suppress_context__ else None,
    ):
        assert "hunter2" not in str(error)
    with pytest.raises(ConfigError, match=r"files holds an address with a password"):
        text_files("https://me:hunter2@example.org/a.jsonl")
    assert text_files(address) == [address]


class Served(http.server.BaseHTTPRequestHandler):
    """Whatever is asked for, to who knows the password."""

    content = b""

    def do_GET(self) -> None:
        allowed = self.headers.get("Authorization", "").startswith("Basic ")
        self.send_response(200 if allowed else 401)
        self.send_header("ETag", "'one'")
        self.send_header("Content-Length", str(len(self.content) if allowed else 0))
        self.end_headers()
        if allowed and self.command == "GET":
            self.wfile.write(self.content)

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> None:
    """With a password in a variable, which stands nowhere afterwards."""
    monkeypatch.setattr(Served, "content", gzip.compress(b'{"text": "some words that are here"}\n' * 30))
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://me:${{SECRET}}@127.0.0.1:{server.server_port}/rows.jsonl.gz?x=1"
        documents = DocumentData(files=address, validation_fraction=0, test_fraction=0)
        documents.setup()
        assert len(documents._store) == 30
        assert documents.sources() == {address: "'one'"}
        with pytest.raises(DataError) as caught:
            texts(address.replace("me:${SECRET}@", "").replace("x=1", "token=${SECRET}"))
        assert "hunter2" not in str(caught.value)
        server.shutdown()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes()


def test_read_text(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer(bos=True)
    (record,) = read_text(write(tmp_path / "a.txt", "ab\n\nc"), tokenizer)
    assert record.name == "a.txt"
    assert record.ids is not None
    assert record.ids.tolist() == [256, 97, 98, 10, 10, 99]
    name = write(tmp_path / "b.jsonl", '{"body": "x"}\n{"body": "yz"}\n')
    assert [len(record) for record in read_text(name, tokenizer, field="body")] == [2, 3]
    assert len(list(read_text(tmp_path / "*.txt", tokenizer))) == 1
    (tmp_path / "one").mkdir()
    write(tmp_path / "one/a.txt", "x")
    assert [record.name for record in read_text(tmp_path / "**/a.txt", tokenizer)] == ["a.txt", "one/a.txt"]


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
