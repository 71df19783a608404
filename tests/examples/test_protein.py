"""examples/protein: masked pretraining, then a label a residue from its weights."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from installed import installed

from mambaseq.checking import check
from mambaseq.cli.main import main
from mambaseq.errors import DataError

EXAMPLE = Path(__file__).parents[2] / "examples" / "protein"


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with installed(EXAMPLE, tmp_path / "site"):
        yield


def test_labels_begin_with_what_was_pretrained(capsys: pytest.CaptureFixture) -> None:
    small = ["--model.d_model=8", "--model.backbone.n_layers=1", "--trainer.max_steps=2", "--data.length=32",
             "--trainer.val_check_interval=2", "--trainer.accelerator=cpu"]  # fmt: skip
    assert main(["fit", "--config", "protein/pretrain", "--out", "first", *small]) == 0
    capsys.readouterr()
    begin = ["fit", "--config", "protein/structure", "--out", "second", "--init-from", "first", *small]
    assert main(begin) == 0
    assert "the head differs, 'lm' -> 'token_classification'; new: head.linear;" in capsys.readouterr().err
    assert "each residue by itself" in Path("second/report.html").read_text()
    chains = str(EXAMPLE / "chains.fa")
    for run in ("first", "second"):
        assert main(["predict", "--checkpoint", run, chains, "--out", f"{run}.csv", "--device", "cpu"]) == 0
    with Path("second.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 96
    assert {row["record"] for row in rows} == {f"made-up-{number}" for number in (1, 2, 3)}
    assert {row["predicted"] for row in rows} <= {"helix", "strand", "coil"}
    with Path("first.csv").open(newline="") as file:
        assert all(3 < float(row["bits_per_token"]) < 6 for row in csv.DictReader(file))


def test_it_keeps_the_laws_and_is_short() -> None:
    assert [str(finding) for finding in check("protein") if finding.failed] == []
    files = [*EXAMPLE.rglob("*.py"), *EXAMPLE.rglob("*.yaml")]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 150


def test_chains_are_those_of_a_hidden_markov_model() -> None:
    """The README's figures: who knows the rules labels 0.80 of residues from all of a chain, 0.53 from each alone."""
    from mambaseq_protein.chains import STATES, STAY, Chains, preferences

    data, found = Chains("labels"), preferences()
    move = STAY * np.eye(len(STATES)) + (1 - STAY) / len(STATES)
    right, alone, stays = [], [], []
    chains = data.test()
    for number in range(200):
        residues, states = chains[number].inputs[0].numpy(), chains[number].targets[0].numpy()
        ahead = found[:, residues].T.copy()
        behind = np.ones_like(ahead)
        for at in range(1, len(ahead)):  # forward and backward sums
            ahead[at] *= ahead[at - 1] / ahead[at - 1].sum() @ move
            behind[-at - 1] = move @ (found[:, residues[-at]] * behind[-at] / behind[-at].sum())
        right.append(((ahead * behind).argmax(1) == states).mean())
        alone.append((found.argmax(0)[residues] == states).mean())
        stays.append((states[1:] == states[:-1]).mean())
    assert np.mean(right) == pytest.approx(0.80, abs=0.015)
    assert np.mean(alone) == pytest.approx(0.53, abs=0.015)
    assert np.mean(stays) == pytest.approx(STAY + (1 - STAY) / 3, abs=0.01)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (">one\nAC\n>two x\nAC\nDX\n", r"bad\.fa, chain 'two x': The letter 'X' at position 4 .* Remove it"),
        ("hello\nworld\n", r"bad\.fa: its first line is not > and"),
        ("AC\n>one\nAC\n", r"bad\.fa: its first line is not > and"),
        ("", r"bad\.fa: its first line is not > and"),
        (">one\nAC\n>two\n\n>three\nAC\n", r"bad\.fa, chain 'two': it has no residues\. Remove it"),
    ],
)
def test_what_is_no_chain_is_refused_by_its_name(tmp_path: Path, text: str, told: str) -> None:
    from mambaseq_protein.chains import Chains, read_fasta

    (tmp_path / "bad.fa").write_text(text)
    with pytest.raises(DataError, match=told) as caught:
        list(read_fasta(tmp_path / "bad.fa", Chains.tokenizer))
    assert "FASTA file" not in str(caught.value)  # one remedy
    (tmp_path / "good.fa").write_text("\ufeff\n>one\nac\nd\n", encoding="utf-8")
    (record,) = read_fasta(tmp_path / "good.fa", Chains.tokenizer)
    assert (record.name, record.ids.tolist()) == ("one", [0, 1, 2])
