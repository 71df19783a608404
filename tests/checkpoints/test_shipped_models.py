"""Models that ship with the project load by their names, are as small as said, and predict."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambaseq.checkpoints import load_model
from mambaseq.errors import ConfigError
from mambaseq.resources import share
from mambaseq.runs.prediction import predict

MODELS = sorted(path.name for path in (share() / "data" / "models").iterdir())
MOST = 6 * 10**6  # bytes


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loads_by_its_name(name: str) -> None:
    folder = share() / "data" / "models" / name
    assert (folder / "README.md").read_text(encoding="utf-8").startswith(f"# {name}: ")
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST
    loaded = load_model(f"mambaseq:data/models/{name}")
    assert f"{loaded.model.n_parameters():,} parameters" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_masked_model_of_dna_has_learned(tmp_path: Path) -> None:
    """A stretch of human DNA costs fewer bits than 2 a base, and fewer than the same bases in another order."""
    bases = (
        "GGCCGGGCGCGGTGGCTCACGCCTGTAATCCCAGCACTTTGGGAGGCCGAGGCGGGCGGATCACGAGGTCAGGAGATCGAGACCATCCCGGCTAAAACGGTGAAACCCCGTCTCTACTAAAAA"
        "TACAAAAAATTAGCCGGGCGTGGTGGCGGGCGCCTGTAGTCCCAGCTACTCGGGAGGCTGAGGCAGGAGAATGGCGTGAACCCGGGAGGCGGAGCTTGCAGTGAGCCGAGATCGCGCCACTGC"
    )
    (tmp_path / "alu.fa").write_text(f">alu\n{bases}\n>sorted\n{''.join(bases[i::7] for i in range(7))}\n")
    rows = predict("mambaseq:data/models/dna-masked", [tmp_path / "alu.fa"], None).table
    alu, shuffled = rows["bits_per_token"].tolist()
    assert alu < 0.8 < 1.7 < shuffled


def test_the_model_of_digits_has_learned() -> None:
    """A recording that it was not trained on costs fewer bits as what it is than as another digit by another voice."""
    recording = share() / "data" / "fsdd" / "recordings" / "7_theo_0.flac"
    rows = [
        predict("mambaseq:data/models/digits", [recording], None, condition=name).table["bits_per_token"][0]
        for name in ("7 theo", "2 jackson")
    ]
    assert rows[0] < 3.5 < rows[1]


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="'mambaseq:data/models/none' does not exist"):
        load_model("mambaseq:data/models/none")
