"""`mambaseq data audit` finds copies in disguise, shared stretches and what gives species away, and says where."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mambaseq_dna.auditing import audited_dna
from mambaseq_dna.genome import GenomeData
from mambaseq_dna.labelled.data import LabelledData
from mambaseq_dna.species import SHIPPED, SHIPPED_TEST, SpeciesData
from mambaseq_dna.tokenizer import BaseTokenizer
from pages import blocks

from mambaseq.auditing.findings import audit
from mambaseq.auditing.shortcuts import shortcuts
from mambaseq.auditing.text import lines
from mambaseq.cli.main import main
from mambaseq.data.audited import AuditedSequence

ROOT = Path(__file__).parents[2]
TOKENIZER = BaseTokenizer()


def bases(n: int, seed: int) -> str:
    return TOKENIZER.decode(np.random.default_rng(seed).integers(0, 4, n))


def turned(letters: str) -> str:
    return TOKENIZER.decode(TOKENIZER.reverse_complement(TOKENIZER.encode(letters)))


def wrapped(letters: str) -> str:
    return "".join(f"{letters[start : start + 9]}\r\n" for start in range(0, len(letters), 9))


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """Records of training files that test files hold in disguise, and a stretch of 200 bases of one within another."""
    train = {name: bases(3000, seed) for seed, name in enumerate(("a", "b", "c", "d", "e", "f"))}
    host = bases(5000, 10)
    stretch = train["f"][500:700]
    files = {
        "train.fa": "".join(f">{name} told\n{letters}\n" for name, letters in train.items()).encode(),
        "wrapped.fa": f">t1\n{wrapped(train['a'])}".encode(),
        "lower.fa": f">t2\n{train['b'].lower()}\n".encode(),
        "packed.fa.gz": gzip.compress(f">t3\n{train['c']}\n".encode()),
        "renamed.fa": f">t4 other\n{train['d']}\n".encode(),
        "turned.fa": f">t5\n{turned(train['e'])}\n".encode(),
        "stretch.fa": f">t6\n{host[:1000]}{turned(stretch)}{host[1000:]}\n>t7\n{bases(4000, 11)}\n".encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return {name: str(tmp_path / name) for name in files}


def test_planted_copies_are_found_and_located(
    planted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    data: dict[str, Any] = {
        "name": "dna/genome",
        "fasta": list(planted.values()),
        "test_records": ["t?"],
        "validation_fraction": 0.1,
        "length": 500,
        "cache": str(tmp_path),
    }
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    out = [tmp_path / "audit.json", tmp_path / "audit.html"]
    argv = ["data", "audit", str(run), "--strict", *(f"--out={path}" for path in out)]
    assert main(argv) == 1
    told = capsys.readouterr().out
    assert (
        "bad   test against train: 5 of 7 records are there as a whole (1 of them on the other strand alone)." in told
    )
    first = "The first: test: wrapped.fa, t1 from 0 = train: train.fa, a from 0."
    assert first in told
    found = json.loads(out[0].read_text())
    assert found["clean"] is False
    against_train = next(one for one in found["splits"] if (one["split"], one["other"]) == ("test", "train"))
    assert (against_train["copies"]["exact"], against_train["copies"]["reverse"]) == (4, 1)
    places = [
        (each["one"]["source"], each["one"]["record"], each["one"]["start"]) for each in against_train["stretches"]
    ]
    assert {place[:2] for place in places} == {
        ("wrapped.fa", "t1"),
        ("lower.fa", "t2"),
        ("packed.fa.gz", "t3"),
        ("renamed.fa", "t4"),
        ("turned.fa", "t5"),
    }
    assert {each["length"] for each in against_train["stretches"]} == {2700}  # the rest of each record is validation
    page = out[1].read_text()
    assert "<svg" in page
    assert "5 of 7 records are there as a whole" in page
    rest = audit(
        GenomeData(**{key: value for key, value in data.items() if key != "name"}, duplicates="drop").audited()
    )
    assert rest.clean
    assert [line for line in lines(rest) if line.startswith("  200 bases")] == [
        "  200 bases: test: stretch.fa, t6 from 1,000 = train: train.fa, f from 500, on the other strand"
    ]
    assert main(["data", "audit", str(run), "--out", "x.txt"]) == 2
    assert "must end in .json or .html" in capsys.readouterr().err


def test_records_that_do_not_share_are_clean(planted: dict[str, str], tmp_path: Path) -> None:
    data = GenomeData(fasta=[planted["train.fa"]], test_records=["a"], length=500, cache=str(tmp_path))
    found = audit(data.audited())
    assert found.clean
    assert {finding.level for finding in found.findings} == {"good"}


def test_a_copy_in_two_species_is_told(planted: dict[str, str], tmp_path: Path) -> None:
    species = {"one": [planted["renamed.fa"], planted["stretch.fa"]], "two": [planted["train.fa"]]}
    data = SpeciesData(species=dict(species), length=400, test_records=["t4", "f"], cache=str(tmp_path))
    found = audit(data.audited())
    bad = [finding.told for finding in found.findings if finding.level == "bad"]
    assert any("1 of 2 records are there as a whole; 1 have a copy of another class" in text for text in bad)
    assert any(text.startswith("classes: 1 of one are in two as a whole") for text in bad)
    (pair,) = found.sharing.classes
    assert [stretch.length for stretch in pair.stretches] == [2700, 300, 200]


def test_n_soft_mask_and_gc_are_read_from_bases() -> None:
    tokenizer = BaseTokenizer("keep")
    rng = np.random.default_rng(0)

    def split(name: str) -> list[AuditedSequence]:
        plain = [tokenizer.decode(rng.integers(0, 4, 80)) for _ in range(100)]
        rows = [(f"{letters[:60]}NNNNNNNNNNnnnnnnnnnn", "gaps") for letters in plain[:50]]
        rows += [(f"{letters[:60]}{letters[60:].lower()}", "mask") for letters in plain[50:]]
        return [AuditedSequence(tokenizer.encode(letters), label, name) for letters, label in rows]

    for case_seen in (False, True):
        told = shortcuts(audited_dna({"train": split("train"), "test": split("test")}, case_seen=case_seen))
        assert told is not None
        of_n, mask, gc, length = told.rows
        assert (of_n.means, mask.means) == ({"gaps": 0.25, "mask": 0.0}, {"gaps": 0.125, "mask": 0.25})
        assert (of_n.accuracy, mask.accuracy, mask.seen, length.alike) == (1.0, 1.0, case_seen, True)
        assert gc.means["gaps"] == pytest.approx(0.5, abs=0.05)
        assert gc.accuracy < 0.85  # of as few sequences


def test_the_page_tells_what_its_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = ROOT / "docs" / "dna" / "audit.md"
    ((_, command, _),) = blocks(page)
    monkeypatch.chdir(tmp_path)
    assert main(command.split()[1:]) == 0
    printed = capsys.readouterr().out
    text = page.read_text()
    told = re.findall(r"^\| (bad|note|good) \| (.*) \|$", text, re.MULTILINE)
    assert len(told) == 5
    for level, finding in told:
        words = finding.replace("test sequences are in train as a whole", "sequences are there as a whole")
        assert any(line.split(maxsplit=1)[0] == level and words in line for line in printed.splitlines() if line), (
            finding
        )
    found = json.loads((tmp_path / "audit.json").read_text())["splits"][0]
    assert (found["pieces"], found["touched"], found["half"]) == (613, 34, 26)
    assert (tmp_path / "audit.html").stat().st_size > 10_000
    dropped = audit(LabelledData(duplicates="drop").audited()).sharing.splits[0]
    assert (dropped.copies.copied, f"{dropped.share:.1%} of the words of test" in text) == (0, True)


def test_repeats_of_a_genome_are_told_and_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a twentieth of the words. SINEs and LINEs are in both regions of a genome."""
    monkeypatch.setenv("MAMBASEQ_MAX_AUDITED_WORDS", str(5_600_000 // 20))
    found = audit(SpeciesData({name: SHIPPED[name] for name in ("human", "mouse")}, SHIPPED_TEST).audited())
    assert found.clean
    test = found.sharing.splits[0]
    assert (test.split, test.other) == ("test", "train")
    assert 0.02 < test.share < 0.05
    assert test.same_label > 50 * test.another_only
    assert found.shortcuts is not None
    assert [row.alike for row in found.shortcuts.rows] == [True, False, False, True]
