"""An answer's text: whole characters, stop strings across tokens."""

from __future__ import annotations

import random

import pytest
from mambaseq_text.tokenization import ByteTokenizer

from mambaseq.generation.stopping import StopStrings
from mambaseq.serving.text import Answer


def decode(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def pieces(data: bytes, stops: list[str], prompt: str = "") -> tuple[list[str], int]:
    """What is given out after each byte, and how many bytes were taken."""
    text, given = Answer(StopStrings(stops, ByteTokenizer()), ByteTokenizer().encode(prompt)), []
    for count, byte in enumerate(data, start=1):
        ended = text.add(byte)
        given.append(text.take(last=ended or count == len(data)))
        if ended:
            return given, count
    return given, len(data)


def test_characters_come_whole() -> None:
    given, _ = pieces("aß水🙂z".encode(), [], "é")
    assert given == ["a", "", "ß", "", "", "水", "", "", "", "🙂", "z"]


def test_bytes_that_are_no_text_are_given_out_in_time() -> None:
    data = b"a" + b"\x80" * 30 + "🙂".encode()
    given, _ = pieces(data, [])
    assert "".join(given) == decode(data)
    assert all(any(given[at : at + 10]) for at in range(len(given) - 10))
    assert "".join(pieces("ab🙂".encode()[:-1], [])[0]) == "ab\ufffd"


@pytest.mark.parametrize(
    ("data", "stops", "expected", "taken"),
    [
        ("one. two", [". "], "one", 5),
        ("aababc", ["abc"], "aab", 6),
        ("hm\n\nUser:", ["\nUser", "\n\n"], "hm", 4),
        ("水🙂水", ["🙂"], "水", 7),
        ("nothing", ["x", "ngs"], "nothing", 7),
    ],
)
def test_stop_strings_end_the_text_before_them(data: str, stops: list[str], expected: str, taken: int) -> None:
    given, count = pieces(data.encode(), stops)
    assert ("".join(given), count) == (expected, taken)


def test_no_part_of_a_stop_string_is_given_out() -> None:
    rng = random.Random(0)
    for _ in range(300):
        data = "".join(rng.choice("abé") for _ in range(12))
        stops = ["".join(rng.choice("abé") for _ in range(rng.randint(1, 4))) for _ in range(2)]
        first = min((data.find(stop) for stop in stops if stop in data), default=len(data))
        ends = [data.find(stop) + len(stop) for stop in stops if stop in data]
        given, count = pieces(data.encode(), stops)
        cut = decode(data.encode()[:count])
        assert count == len(data[: min(ends, default=len(data))].encode())
        assert "".join(given) == data[: min((cut.find(stop) for stop in stops if stop in cut), default=first)]
