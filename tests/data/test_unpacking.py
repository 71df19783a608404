"""Files in pieces; what they say of FASTA files is tested there."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from mambaseq.data.unpacking import PIECE, Unreadable, read_pieces


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_are_bounded_and_make_up_the_file(tmp_path: Path, packed: bool) -> None:
    data = np.random.default_rng(0).integers(0, 4, 3 * PIECE + 17).astype(np.uint8).tobytes()
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    pieces = list(read_pieces(path))
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= 2 * PIECE


def test_members_of_any_size_equal_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaseq.data.unpacking._PACKED_PIECE", 50)
    rng = np.random.default_rng(0)
    for _ in range(30):
        members = [gzip.compress(bytes(int(n))) + bytes(int(rng.integers(0, 3))) for n in rng.integers(0, 200, 6)]
        path = tmp_path / "a.gz"
        path.write_bytes(b"".join(members))
        assert b"".join(read_pieces(path)) == gzip.decompress(path.read_bytes())


def test_what_came_before_a_fault_is_handed_out(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"whole") + gzip.compress(b"cut")[:-3])
    found = []
    with pytest.raises(Unreadable, match=r"a\.gz is cut short: .* too early\. Copy .*gzip -t a\.gz") as caught:
        found.extend(read_pieces(path))
    assert b"".join(found).startswith(b"whole")
    assert str(caught.value.at("at its end")) == str(caught.value).replace(" early.", " early, at its end.")
