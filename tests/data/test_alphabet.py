"""Letters to ids: by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mambaseq.data.tokenizer import Alphabet
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError


def test_letters_by_hand() -> None:
    plain, folding = Alphabet("HEC"), Alphabet("ACDX", other="X", fold=True)
    assert plain.encode("CCH").tolist() == [2, 2, 0]
    assert plain.decode(np.array([2, 2, 0])) == "CCH"
    assert folding.encode("aDz?").tolist() == [0, 2, 3, 3]
    assert plain.encode("").dtype == np.uint8
    assert Alphabet("".join(map(chr, range(0x100, 0x300)))).encode(chr(0x2FF)).tolist() == [511]
    again = catalog()["tokenizers"].get("alphabet")(**folding.options)
    assert again.options == folding.options
    with pytest.raises(DataError, match="'h' at position 2 is none of 'HEC'"):
        plain.encode("Hh")


@pytest.mark.parametrize("options", [{"letters": ""}, {"letters": "AA"}, {"letters": "Aa", "fold": True},
                                     {"letters": "AB", "other": "C"}, {"letters": "AB", "other": "AB"}])  # fmt: skip
def test_what_is_no_alphabet_is_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="alphabet"):
        Alphabet(**options)
