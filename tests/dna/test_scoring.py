"""`mambaseq predict` and `mambaseq test` say the same of the same bases."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mambaseq.cli.main import main


@pytest.mark.parametrize("lowercase", ["fold", "unscored"])
def test_bits_of_predict_are_those_of_the_test(tmp_path: Path, lowercase: str) -> None:
    """N is half of the record and lower case a third: were they scored, the numbers would be far apart."""
    rng = np.random.default_rng(0)
    letters = np.array(list("A" * 400), dtype="U1")  # what has been learned, so that all else is dear
    test = letters[:201].copy()
    test[50:150] = "N"
    test[20:40] = rng.choice(list("cgt"), 20)
    test[160:190] = rng.choice(list("acgtn"), 30)
    (tmp_path / "test.fa").write_text(f">test\n{''.join(test)}\n")
    (tmp_path / "train.fa").write_text(f">train\n{''.join(letters)}\n")
    config = {
        "metrics": ["bits_per_token"],
        "data": {
            "name": "dna/genome",
            "fasta": [str(tmp_path / "train.fa"), str(tmp_path / "test.fa")],
            "test_records": ["test"],
            "length": 200,
            "lowercase": lowercase,
            "drop_n": False,
            "reverse_complement": False,
            "validation_fraction": 0,
            "samples_per_epoch": 8,
            "cache": str(tmp_path / "cache"),
        },
        "loader": {"batch_size": 2},
        "model": {
            "d_model": 8,
            "backbone": {"name": "residual", "n_layers": 1},
            "mixer": {"name": "mamba"},
            "head": {"name": "lm"},
        },
        "optimizer": {"lr": 0.1},
        "trainer": {"max_steps": 4, "accelerator": "cpu"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert main(["test", "--checkpoint", str(tmp_path / "run")]) == 0
    out = tmp_path / "bits.csv"
    command = ["predict", "--checkpoint", str(tmp_path / "run"), str(tmp_path / "test.fa"), "--out", str(out)]
    assert main([*command, "--device", "cpu"]) == 0
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    expected = json.loads((tmp_path / "run" / "results.json").read_text())["test/bits_per_token"]
    assert float(row["bits_per_token"]) == pytest.approx(expected, rel=1e-4)
