"""The recipe on the Genomic Benchmarks, on made sets in the layouts that people bring, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mambaseq_dna.recipes import classifying, genomic_benchmarks
from mambaseq_dna.recipes.classifying import CNN, WAYS, make_model
from mambaseq_dna.recipes.common import VOCABULARY
from mambaseq_dna.recipes.genomic_benchmarks import SETS, load, recipe, settings
from mambaseq_dna.tokenizer import BASES, N

from mambaseq.errors import UserError
from mambaseq.reproduction import Context

CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out/trials").mkdir(parents=True)
    return Context(CPU, "tiny", [0], tmp_path / "out", data=tmp_path)


def letters(seed: int, length: int) -> str:
    return "".join(BASES[base] for base in np.random.default_rng(seed).integers(0, 4, length))


def made(folder: Path, lengths: dict[str, int], train: int = 20, test: int = 8) -> None:
    """A folder as the package writes it: a file a sequence, each class of another length."""
    for split, count in (("train", train), ("test", test)):
        for number, (label, length) in enumerate(lengths.items()):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                text = letters(1000 * number + i + 100 * (split == "test"), length)
                (folder / split / label / f"{i}.txt").write_text(text)


def test_a_set_of_files_is_read_and_scored(context: Context, tmp_path: Path) -> None:
    name = "human_ensembl_regulatory"
    made(tmp_path / name, {"enhancer": 30, "ocr": 41, "promoter": 36})
    copied = tmp_path / name / "train/ocr/3.txt"  # of the test half: left out of training
    copied.write_text((tmp_path / name / "test/ocr/0.txt").read_text())
    of = load(context, name)
    assert of.counts == {"brought": 84, "train": 53, "dev": 6, "test": 24}
    inputs, labels = of.examples["test"].numpy()
    assert inputs.shape == (24, 41)
    row = int(np.flatnonzero(labels == 0)[0])
    assert (inputs[row, :6] == N).all()
    assert (inputs[row, 36:] == N).all()
    assert "".join(BASES[base] for base in inputs[row, 6:36]) == (tmp_path / name / "test/enhancer/0.txt").read_text()
    context.only = [name, "from scratch", "CNN", "words of 5 bases", "length alone"]
    (table,) = recipe.run(context)
    (line,) = table.lines
    assert line.values["length alone"] == [1.0]
    assert line.values["chosen"] == line.values["from scratch"]
    assert line.paper.startswith("CNN 0.872 ±0.005, HyenaDNA 0.869 ±0.012, Mamba 0.814 ±0.211")
    assert "84 sequences were brought, not the set's 289,061: no verdict" in line.note
    assert "length alone is best" in line.note
    assert line.verdict == ""


def test_a_set_of_tables_is_read_by_a_pretrained_model(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "human_nontata_promoters"
    (tmp_path / name).mkdir()
    for split, first in (("train", 0), ("test", 100)):
        rows = [f"{letters(first + i, 24)},{i % 2}" for i in range(40)]
        (tmp_path / name / f"{split}.csv").write_text("\n".join(["sequence,label", *rows]))
    before = make_model(context, WAYS["from scratch"], {"name": "lm", "vocab_size": VOCABULARY}).state_dict()
    weights = {key: torch.full_like(of, 0.01) for key, of in before.items() if not key.startswith("head.")}
    monkeypatch.setattr(classifying, "pretrained", lambda context, objective: weights)
    seen = []
    original = classifying.fitted

    def watched(context, model, *rest):  # type: ignore[no-untyped-def]
        seen.append({key: of.clone() for key, of in model.state_dict().items()})
        return original(context, model, *rest)

    monkeypatch.setattr(classifying, "fitted", watched)
    context.only = [name, "pretrained, masked"]
    (table,) = recipe.run(context)
    assert len(table.lines[0].values["chosen"]) == 1
    assert all(torch.equal(seen[0][key], of) for key, of in weights.items())


def test_half_a_set_is_refused(context: Context, tmp_path: Path) -> None:
    """Only the test half is there, in any layout: no figure."""
    context.only = ["human_enhancers_cohn"]
    with pytest.raises(UserError, match=r"There is no .*human_enhancers_cohn\. This recipe needs the folder"):
        recipe.run(context)
    folder = tmp_path / "human_enhancers_cohn"
    folder.mkdir()
    table = f"sequence,label\n{letters(0, 20)},0\n{letters(1, 20)},1\n"
    for file, half in (("test.csv", "train"), ("human_enhancers_cohn_TESTONLY.csv", "train"), ("train.csv", "test")):
        (folder / file).write_text(table)
        with pytest.raises(UserError, match=rf"has no {half} half .*Figures of this benchmark need both"):
            recipe.run(context)
        (folder / file).unlink()
    assert not list((context.folder / "trials").iterdir())


def test_models_have_less_than_half_a_million_parameters_and_read_what_fits(context: Context) -> None:
    full = Context(CPU, "full", [0], context.folder)
    for name in SETS:
        assert len(SETS[name].published) == len(genomic_benchmarks.PUBLISHED)
        assert settings(name, "from scratch", 4776).batch_size * 4776 <= 2**17
        assert not settings(name, "from scratch", 251).positions
        assert settings(name, CNN, 251)._replace(positions=False) == settings(name, "from scratch", 251)
    for way in genomic_benchmarks.WAYS:
        model = make_model(full, WAYS[way], {"name": "classification", "n_classes": 3, "pooling": "max"})
        assert model.n_parameters() < 500_000
