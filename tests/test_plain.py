"""What is read from a file is plain, bounded, and refused with the file's name and line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from mambaseq.errors import UserError
from mambaseq.plain import dump_yaml, parse_yaml, read_json, read_yaml

YAML = {  # text of a file, and what the message says
    "bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        r"line 5, asks for 101,\d\d\d values.*MAMBASEQ_MAX_YAML_NODES",
    ),
    "itself": ("a: &a [*a]", "line 1, refers to 'a'"),
    "merged itself": ("a: &a {<<: *a}", "line 1, refers to 'a'"),
    "deep, in brackets": ("a: " + "[" * 1_000_000, "line 1, "),
    "deep, in lines": ("".join(" " * i + "a:\n" for i in range(2000)), "line 101, has more than 100"),
    "deep, in dashes": ("- " * 100_000, "line 1, has more than 100"),
    "deep, in aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300)),
        "line 100, has more than 100",
    ),
    "long": ("a: " + "x" * 5 * 2**20, "5,242,883 bytes of YAML.*MAMBASEQ_MAX_YAML_BYTES"),
    "many": ("a: [" + "1," * 1_000_000 + "]", "line 1, asks for 100,001 values"),
    "digits": ("a: " + "9" * 3_000_000, "more than 400 digits"),
    "base 60": ("a: !!int 1" + ":59" * 1_000_000, "line 1, .*not a number"),
    "twice": ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4, has the key 'c' a second time"),
    "number as key": ("1: 2\n", "the key 1 is not text"),
    "list as key": ("[1, 2]: 2\n", "line 1, .*unhashable"),
    "code": ("a: !!python/object/apply:os.system [ls]\n", "line 1, .*constructor"),
    "bytes": ("a: !!binary aGk=\n", "a value is a bytes"),
    "wrong tag": ("a: !!bool maybe\n", "maybe"),
    "wrong date": ("a: !!timestamp soon\n", "is not valid YAML"),
    "nothing": ("", "holds nothing"),
    "list": ("[1]", "holds one list"),
    "unclosed": ("a: 1\nb: [1\nc: {", "line 3, is not valid YAML"),
    "two": ("a: 1\n---\nb: 2\n", "line 2, .*another document"),
}
JSON = {
    "nan": ('{"a":\n NaN}', "line 2, has the number NaN"),
    "infinite": ('{"a": -Infinity}', "line 1, has the number -Infinity"),
    "too large": ('{"a": 1e999}', "1e999 is too large"),
    "deep": ("[" * 2_000_000, "line 1, has more than 100"),
    "deep text": ('{"' + '\\"' * 1_000_000, "line 1, is not valid JSON: Unterminated"),
    "digits": ('{"a": ' + "9" * 3_000_000 + "}", "more than 400 digits"),
    "twice": ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    "list": ("[1]", "holds one list"),
    "comma": ('{"a": 1,\n}', "line 2, is not valid JSON"),
    "half a character": ('{"a": "\\ud800"}', "surrogates"),
}


def _refusal(read, path: Path, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as caught:
        read(path, "Write it anew.")
    assert time.perf_counter() - start < 10
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", YAML)
def test_yaml_is_refused_by_file_and_line(case, tmp_path):
    text, message = YAML[case]
    path = tmp_path / "a.yaml"
    path.write_text(text)
    _refusal(read_yaml, path, message)


@pytest.mark.parametrize("case", JSON)
def test_json_is_refused_by_file_and_line(case, tmp_path):
    text, message = JSON[case]
    path = tmp_path / "a.json"
    path.write_text(text)
    _refusal(read_json, path, message)


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_what_is_no_text_file_is_refused(read, tmp_path):
    path = tmp_path / "a"
    _refusal(read, path, "does not exist")
    path.write_bytes(b"a: 1\nb: \xff\n")
    _refusal(read, path, "line 2, is not text in UTF-8")
    path.unlink()
    os.mkfifo(path)  # it would be waited for
    _refusal(read, path, "is not a file")
    _refusal(read, tmp_path, "is not a file")


def test_values_are_plain_and_their_own(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "a: 1e-3\nb: 1:30\nc: 2026-01-01\nd: [1, .5, true, null, no, 0x1f, .inf]\n"
        "e: &x {q: 1}\nf: {<<: *x, q: 2, r: 3}\ng: *x\nh: 08\ni: '1e-3'\nj: 010\n",
        encoding="utf-8-sig",
    )
    read = read_yaml(path)
    assert read == {
        "a": 0.001,
        "b": "1:30",
        "c": "2026-01-01",
        "d": [1, 0.5, True, None, False, 31, float("inf")],
        "e": {"q": 1},
        "f": {"q": 2, "r": 3},
        "g": {"q": 1},
        "h": "08",
        "i": "1e-3",
        "j": "010",
    }
    read["g"]["q"] = 5
    assert read["e"] == {"q": 1}
    written = dump_yaml(read)
    assert parse_yaml(written, "what was written") == read
    assert yaml.safe_load(written) == read
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, "NaN", null]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, "NaN", None]}


def test_limits_can_be_raised(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("a: [" + "1," * 100_000 + "]")
    monkeypatch.setenv("MAMBASEQ_MAX_YAML_NODES", "200000")
    assert len(read_yaml(path)["a"]) == 100_000
