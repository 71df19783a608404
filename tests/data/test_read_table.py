"""Tables of numbers: what is read, and what is said of what cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mambaseq.data.tables import read_table
from mambaseq.errors import DataError, UserError

COLUMNS = ("a", "b")


def test_rows_of_a_file(tmp_path: Path) -> None:
    (path := tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfa, b\r\n1,2.5\r\n-3e-2, 4\r\n\r\n")
    assert np.array_equal(read_table(path, COLUMNS), [[1, 2.5], [-0.03, 4]])
    path.write_text("a,b\n\n")
    assert read_table(path, COLUMNS).shape == (0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the first line must be 'a,b'"),
        (b"b,a\n1,2\n", "not 'b,a'"),
        (b"a,b\n1,2\n1,2,3\n", "line 3 is not 2 numbers"),
        (b"a,b\n1,2,3\n1,2,3\n", "line 2 is not 2 numbers"),
        (b"a,b\n1,2\n\n1,2\n", "line 3 is not 2 numbers"),
        (b"a,b\n1,2\n1_0,2\n", "line 3 is not 2 numbers"),
        (b"a,b\n#1,2\n", "line 2 is not 2 numbers"),
        (b"a,b\n1,2\n1,nan\n", "line 3 has a gap"),
        (b"a,b\n1,-1e10\n", "line 2 has a gap"),
        (b"a,b\n\xff,2\n", "not text in UTF-8"),
        (b"\x00" * 10_000_000, "the first line must be"),
    ],
    ids=range(11),
)
def test_what_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (path := tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as told:
        read_table(path, COLUMNS)
    assert str(path) in str(told.value)
    assert len(str(told.value)) < 1000


def test_a_limit_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "t.csv").write_text("a,b\n" + "1,2\n" * 20)
    monkeypatch.setenv("MAMBASEQ_MAX_LENGTH", "10")
    with pytest.raises(UserError, match="MAMBASEQ_MAX_LENGTH"):
        read_table(path, COLUMNS)


def test_other_columns_are_left_out(tmp_path: Path) -> None:
    """As in files with dates; columns come in the order in which they are asked for."""
    (path := tmp_path / "t.csv").write_text("date,b,name, a\n2016-07-01 00:00:00,1,x_1,2\n2016-07-01 01:00:00,3,,4\n")
    assert np.array_equal(read_table(path, COLUMNS, others=True), [[2, 1], [4, 3]])
    with pytest.raises(DataError, match="first line must be 'a,b'"):
        read_table(path, COLUMNS)
    for text, message in (
        ("date,a\n1,2\n", "must name each of 'a,b', not 'date,a'"),
        ("a,b,a\n1,2,3\n", "must name each of 'a,b'"),
        ("date,a,b\nx,1,2\ny,1\n", "line 3 is not 2 numbers in 3 columns"),
        ("date,a,b\nx,1,2\ny,1,2,3\n", "line 3 is not 2 numbers in 3 columns"),
        ("date,a,b\nx,1,2\ny,z,2\n", "line 3 is not 2 numbers in 3 columns"),
        ("date,a,b\nx,1,2\ny,nan,2\n", "line 3 has a gap"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_table(path, COLUMNS, others=True)
