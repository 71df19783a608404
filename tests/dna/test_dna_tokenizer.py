"""Bases to ids and back; law 5: the complement is an involution, also on N and lower case."""

from __future__ import annotations

import numpy as np
import pytest
from Bio.Seq import Seq
from hypothesis import given
from hypothesis import strategies as st
from mambaseq_dna.tokenizer import BaseTokenizer, InvalidBase, fold_case, is_lowercase

from mambaseq.errors import ConfigError, DataError

FOLD, KEEP = BaseTokenizer(), BaseTokenizer("keep")


def test_ids() -> None:
    assert FOLD.encode("ACGTNacgtnUu").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3, 3]
    assert KEEP.encode("ACGTNacgtnUu").tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 8]
    assert FOLD.encode("").tolist() == []
    assert FOLD.encode("A").dtype == np.uint8
    assert (FOLD.vocab_size, KEEP.vocab_size) == (5, 10)


@pytest.mark.parametrize("code", "RYSWKMBDHV")
def test_ambiguity_codes_are_n(code: str) -> None:
    assert FOLD.encode(code + code.lower()).tolist() == [4, 4]
    assert KEEP.encode(code + code.lower()).tolist() == [4, 9]


@pytest.mark.parametrize(
    ("raw", "letter", "position"), [("ACGE", "E", 4), ("A-C", "-", 2), ("é", "é", 1), ("→A", "→", 1)]
)
def test_what_is_no_base(raw: str, letter: str, position: int) -> None:
    with pytest.raises(InvalidBase, match=f"letter '{letter}' at position {position} is not a base"):
        FOLD.encode(raw)
    assert issubclass(InvalidBase, DataError)


@given(st.text("ACGTNacgtn"))
def test_roundtrip(raw: str) -> None:
    assert KEEP.decode(KEEP.encode(raw)) == raw
    assert FOLD.decode(FOLD.encode(raw)) == raw.upper()
    assert fold_case(KEEP.encode(raw)).tolist() == FOLD.encode(raw).tolist()
    assert is_lowercase(KEEP.encode(raw)).tolist() == [letter.islower() for letter in raw]


@pytest.mark.parametrize("tokenizer", [FOLD, KEEP])
def test_complement_is_an_involution(tokenizer: BaseTokenizer) -> None:
    ids = np.arange(tokenizer.vocab_size)
    assert (tokenizer.complement[tokenizer.complement[ids]] == ids).all()
    assert sorted(tokenizer.complement.tolist()) == ids.tolist()
    assert tokenizer.decode(tokenizer.complement) == {5: "TGCAN", 10: "TGCANtgcan"}[tokenizer.vocab_size]


@given(st.text("ACGTNacgtn"))
def test_reverse_complement_equals_biopython(raw: str) -> None:
    expected = str(Seq(raw).reverse_complement())
    ids = KEEP.encode(raw)
    assert KEEP.decode(KEEP.reverse_complement(ids)) == expected
    assert KEEP.reverse_complement(KEEP.reverse_complement(ids)).tolist() == ids.tolist()


def test_reverse_complement_of_a_batch() -> None:
    batch = np.stack([FOLD.encode("AACG"), FOLD.encode("NTTT")])
    assert [FOLD.decode(row) for row in FOLD.reverse_complement(batch)] == ["CGTT", "AAAN"]


def test_options_make_an_equal_tokenizer() -> None:
    assert BaseTokenizer(**KEEP.options).encode("acgt").tolist() == KEEP.encode("acgt").tolist()
    with pytest.raises(ConfigError, match="lowercase must be"):
        BaseTokenizer("upper")  # type: ignore[arg-type]
