"""What the tests of labelled sequences write and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mambaseq_dna.labelled.data import LabelledData
from mambaseq_dna.tokenizer import BaseTokenizer

TOKENIZER = BaseTokenizer()
RNG = np.random.default_rng(0)


def bases(length: int = 12) -> str:
    return "".join(RNG.choice(list("ACGT"), length))


def text(batch: Any, row: int = 0) -> str:
    return TOKENIZER.decode(batch.inputs[row].numpy().astype(np.uint8))


def rows(count: int, label: Any = lambda number: number % 2, length: int = 12) -> list[tuple[str, str]]:
    return [(bases(length), str(label(number))) for number in range(count)]


def written(path: Path, lines: list[Any], header: str = "", sign: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    told = [header] if header else []
    path.write_text("\n".join([*told, *(sign.join(map(str, one)) for one in lines)]) + "\n")
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "cache"))


def made(**options: Any) -> LabelledData:
    data = LabelledData(**options)
    data.setup()
    return data
