"""docs/dna/genomes.md: its settings are read, its sizes are those of models, its ladder of lengths reaches the top."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mambaseq_dna.genome import GenomeData
from mambaseq_dna.tokenizer import BaseTokenizer

from mambaseq.batch import Batch
from mambaseq.cli.main import main
from mambaseq.models import build_model
from mambaseq.runs.parsing import parse_config
from mambaseq.tasks.task import shorten

PAGE = (Path(__file__).parents[2] / "docs" / "dna" / "genomes.md").read_text(encoding="utf-8")


def test_its_settings_and_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    records = {name: BaseTokenizer().decode(rng.integers(0, 4, 3000)) for name in ("chr1", "chr2A", "chr2B", "chr3")}
    records["chr1_alt"] = records["chr1"][:2000]
    Path("genome.fa").write_text("".join(f">{name}\n{letters}\n" for name, letters in records.items()))
    Path("splits.bed").write_text("chr1\t0\t1500\ttrain\nchr1\t1600\t1700\ttrain\nchr2A\t0\t3000\ttest\n")
    one, other = (yaml.safe_load(text)["data"] for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    found = []
    for settings in (one, other):
        settings.pop("name")
        splits = GenomeData(**settings, cache=str(tmp_path)).splits
        found.append(
            [
                sorted({i.store.names[i.record] for g in part for i in g.intervals})
                for part in (splits.train, splits.test)
            ]
        )
    assert found == [[["chr1"], ["chr2A", "chr2B"]], [["chr1"], ["chr2A"]]]
    (command,) = re.findall(r"^    (mambaseq dna/split-leak .*)$", PAGE, re.MULTILINE)
    assert main(shlex.split(command)[1:]) == 0
    assert "1,048,576 mamba" in capsys.readouterr().out


def test_its_sizes_are_those_of_the_models() -> None:
    rows = re.findall(r"^\| ([\d.]+) ([KM]) \| (\d+) \| (\d+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    settings = parse_config("dna/hg38", [])
    spec = settings.model_spec(settings.make_data())

    def count(d_model: str, n_layers: int) -> int:
        spec["d_model"], spec["backbone"]["n_layers"] = int(d_model), n_layers
        with torch.device("meta"):
            return build_model(spec).n_parameters()

    for about, unit, d_model, n_layers, exactly in rows:
        first, second = count(d_model, 1), count(d_model, 2)  # the other layers are alike
        parameters = first + (int(n_layers) - 1) * (second - first)
        assert f"{parameters:,}" == exactly
        assert parameters == pytest.approx(float(about) * {"K": 1e3, "M": 1e6}[unit], rel=0.06)


def test_its_ladder_of_lengths_keeps_the_bases_of_a_step() -> None:
    (command,) = re.findall(r"^    mambaseq fit --config (dna/hg38 .*\\\n.*)$", PAGE, re.MULTILINE)
    name, *written = shlex.split(command.replace("\\\n", ""))
    overrides = [f"{key}={value}" for key, value in zip(written[::2], written[1::2], strict=True)]
    settings = parse_config(name, overrides)
    warmup, length = settings.length_warmup(), settings.settings["data"]["length"]
    a_step = settings.trainer["accumulate_grad_batches"] * settings.settings["loader"]["batch_size"]
    assert a_step * length == 2**24
    ids = torch.zeros(1, length, dtype=torch.int64)
    whole = Batch(inputs=ids, targets=ids)
    for stage in range(12):
        for step in (500 * stage, 500 * stage + 499):
            batch = shorten(whole, warmup.length(step, length))
            assert batch.inputs.shape == (2 ** max(10 - stage, 0), 2 ** min(10 + stage, 20))
    assert settings.trainer["max_steps"] > 500 * 10
