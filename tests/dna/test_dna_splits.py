"""What goes where: names of records, copies, splits that would be empty, records that are too short."""

from __future__ import annotations

import gzip
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from Bio.Seq import Seq
from mambaseq_dna.genome import GenomeData
from mambaseq_dna.species import SpeciesData
from mambaseq_dna.tokenizer import BaseTokenizer

from mambaseq.data.windows import warn_once
from mambaseq.errors import ConfigError, DataError
from mambaseq.runs.parsing import parse_config


def fasta(folder: Path, name: str, **records: str) -> str:
    path = folder / name
    path.write_text("".join(f">{record}\n{letters}\n" for record, letters in records.items()))
    return str(path)


def bases(n: int, seed: int = 0) -> str:
    return BaseTokenizer().decode(np.random.default_rng(seed).integers(0, 4, n))


def rewrapped(letters: str) -> str:
    return "".join(f"{letters[start : start + 7]}\r\n\r\n" for start in range(0, len(letters), 7))


COPIES = {
    "renamed": lambda letters: f">b\n{letters}\n".encode(),
    "wrapped anew": lambda letters: f">b\n{rewrapped(letters)}".encode(),
    "in lower case": lambda letters: f">b\n{letters.lower()}\n".encode(),
    "packed": lambda letters: gzip.compress(f">b\n{letters}\n".encode()),
    "the other strand": lambda letters: f">b\n{Seq(letters).reverse_complement()}\n".encode(),
    "RNA among others": lambda letters: f">c\nAC\n>b\n{letters.replace('T', 'U')}\n".encode(),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_in_two_species_or_splits_are_refused(tmp_path: Path, how: str) -> None:
    letters = bases(100)
    path = fasta(tmp_path, "x.fa", a=letters)
    copy = tmp_path / "y.fa"
    copy.write_bytes(COPIES[how](letters))
    options: dict[str, Any] = {"validation_fraction": 0.0, "cache": str(tmp_path)}
    with pytest.raises(DataError, match=r"in train \([xy]\), holds the same as.*data\.duplicates to drop"):
        SpeciesData(species={"x": [path], "y": [str(copy)]}, **options).setup()
    with pytest.raises(
        DataError, match=r"Record 'b' of y\.fa, in test .*, holds the same as record 'a' of x\.fa, in tr"
    ):
        GenomeData(fasta=[path, str(copy)], test_records=["b"], **options).setup()
    other = fasta(tmp_path, "z.fa", z=bases(60, 1))
    data = GenomeData(fasta=[path, str(copy), other], test_records=["b"], duplicates="drop", **options)
    assert {interval.source for interval in data.splits.train[0].intervals} >= {"record 'z' of z.fa"}
    assert "record 'a' of x.fa" not in {interval.source for interval in data.splits.train[0].intervals}
    assert [interval.source for interval in data.splits.test[0].intervals] == ["record 'b' of y.fa"]


def test_dropped_copies_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fasta(tmp_path, "x.fa", a="ACGTT", b="ACGTT", c="GGGGGGG", d="AACGT")
    GenomeData(fasta=[path], test_records=["b"], duplicates="drop", validation_fraction=0, cache=str(tmp_path)).setup()
    (told,) = caplog.records
    assert "2 stretches of records with 10 bases are left out" in told.getMessage()


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("length", 2**63, r"data\.length must be at least 1 and below 2\^63"),
        ("samples_per_epoch", 2**63, r"data\.samples_per_epoch must be"),
        ("n_test", 0, r"data\.n_test must be at least 1"),
        ("n_validation", -1, r"data\.n_validation must be at least 1"),
        ("validation_fraction", float("nan"), r"validation_fraction must be in \[0, 1\)"),
        ("duplicates", "keep", r"data\.duplicates must be 'refuse' or 'drop'"),
        ("test_records", [True], r"data\.test_records holds True, which is not a name.*in quotes"),
        ("validation_records", [1.1], r"data\.validation_records holds 1\.1, which is not a name.*in quotes"),
    ],
)
def test_settings_are_refused_by_name(setting: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        GenomeData(**{setting: value})


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    data = GenomeData(fasta=[fasta(tmp_path, "x.fa", a=bases(100))], length=5, cache=str(tmp_path), seed=-1)
    for make in (data.train, data.validation):
        with pytest.raises(ConfigError, match=r"data\.seed must be at least 0, not -1"):
            make()


@pytest.mark.parametrize("names", [[8], ["8"], 8, "8"])
def test_names_of_records_may_be_numbers(tmp_path: Path, names: Any) -> None:
    path = fasta(tmp_path, "x.fa", **{"8": bases(90), "18": bases(90, 1), "9": bases(90, 2)})
    data = GenomeData(fasta=[path], test_records=names, validation_records=[9], length=20, cache=str(tmp_path))
    for split, name in (("train", "18"), ("validation", "9"), ("test", "8")):
        (group,) = getattr(data.splits, split)
        assert [interval.store.names[interval.record] for interval in group.intervals] == [name]


def test_the_great_apes_by_their_configuration(tmp_path: Path) -> None:
    """Chromosome 2, which is 2A and 2B but in humans, is training data; scaffolds and alternates are not used."""
    names = [f"chr{k}" for k in (*range(3, 23), "X", "Y", "M", "5_KI270791v1_alt", "Un_scaffold")]
    species = {
        ape: fasta(
            tmp_path, f"{ape}.fa", **{k: bases(120, 40 * seed + n) for n, k in enumerate(["chr1", *two, *names])}
        )
        for seed, (ape, two) in enumerate((("human", ["chr2"]), ("gorilla", ["chr2A", "chr2B"])))
    }
    listed = ", ".join(f"{ape}: {path}" for ape, path in species.items())
    small = [f"--data.species={{{listed}}}", "--data.length=20", f"--data.cache={tmp_path}"]
    data: Any = parse_config("dna/great_apes", small).make_data(setup=True)
    used = {
        split: [
            sorted(group.intervals.stores[0].names[record] for record in group.intervals.table[:, 1])
            for group in getattr(data.splits, split)
        ]
        for split in ("train", "validation", "test")
    }
    rest = [f"chr{k}" for k in (14, 15, 16, 17, 18, 19)]
    for ape, two in enumerate((["chr2"], ["chr2A", "chr2B"])):
        assert set(used["train"][ape]) == {
            *rest,
            *two,
            "chr20",
            "chr21",
            "chr22",
            "chr4",
            "chr6",
            "chr8",
            "chrX",
            "chrY",
        }
        assert used["validation"][ape] == ["chr1", "chr12", "chr13", "chr3"]
        assert used["test"][ape] == ["chr10", "chr11", "chr5", "chr7", "chr9"]


def test_chromosome_2_is_held_out_whole(tmp_path: Path) -> None:
    apes = {"chr2A": bases(90), "chr2B": bases(90, 1), "chr3": bases(90, 2)}

    def test_set(name: str, **records: str) -> list[str]:
        options: dict[str, Any] = {"length": 20, "validation_fraction": 0, "cache": str(tmp_path)}
        data = GenomeData(fasta=[fasta(tmp_path, "x.fa", **records)], test_records=[name], **options)
        return [interval.store.names[interval.record] for interval in data.splits.test[0].intervals]

    assert test_set("chr2", **apes) == ["chr2A", "chr2B"]
    assert test_set("chr2B", **apes) == ["chr2B"]
    assert test_set("2", **{name[3:]: letters for name, letters in apes.items()}) == ["2A", "2B"]
    with pytest.raises(DataError, match=r"pattern 'chr2' of data\.test_records matches no record"):
        test_set("chr2", **apes, chr2D=bases(90, 3))  # wheat: three genomes, and no chromosome 2
    with pytest.raises(DataError, match=r"pattern 'chr7' of data\.test_records matches no record.*There are: chr2A"):
        test_set("chr7", **apes)


def test_a_record_in_two_splits_is_refused(tmp_path: Path) -> None:
    path = fasta(tmp_path, "x.fa", chr1=bases(90), chr2=bases(90, 1), chr3=bases(90, 2))
    with pytest.raises(DataError, match=r"record 'chr2' of x\.fa \(and 1 more\) matches both data\.test_records and"):
        GenomeData(
            fasta=[path], test_records=["chr[23]"], validation_records=["chr2", "*3"], cache=str(tmp_path)
        ).setup()


TRAINING, VALIDATION, TEST = (
    rf"The {split} set has no base .* of 'genome' \(x\.fa\)\. " for split in ("training", "validation", "test")
)
EMPTY = {
    "N alone": ({"a": "NNNNnnnn"}, {}, TRAINING + "Check the files"),
    "test data alone": ({"a": "ACGT"}, {"test_records": ["*"]}, TRAINING),
    "test data of N": ({"a": "ACGT" * 9, "b": "NNN"}, {"test_records": ["b"]}, TEST + r"Name .* data\.test_records"),
    "validation data of N": (
        {"a": "ACGT" * 9, "b": "NNN"},
        {"validation_records": ["b"]},
        VALIDATION + r"Name .* data\.validation_records",
    ),
    "too little for a fraction": (
        {"a": "ACGTACGTA"},
        {},
        VALIDATION + r"It is the last part .* data\.validation_fraction \(0\.1\): .* 0 for none",
    ),
    "a fraction of N": ({"a": "ACGTACGTANN"}, {"validation_fraction": 0.2}, VALIDATION + "It is the last part"),
}


@pytest.mark.parametrize("what", EMPTY)
def test_a_split_that_would_be_empty_is_refused(tmp_path: Path, what: str) -> None:
    records, options, told = EMPTY[what]
    path = fasta(tmp_path, "x.fa", **records)
    with pytest.raises(DataError, match=told):
        GenomeData(fasta=[path], length=3, cache=str(tmp_path), **options).setup()


def test_a_species_that_is_not_in_a_split_is_refused(tmp_path: Path) -> None:
    species = {"x": fasta(tmp_path, "x.fa", a=bases(90), t=bases(90, 1)), "y": fasta(tmp_path, "y.fa", b=bases(90, 2))}
    with pytest.raises(
        DataError, match=r"The test set has no base .* of 'y' .*Name other records in data\.test_records"
    ):
        SpeciesData(species=dict(species), test_records=["t"], cache=str(tmp_path)).setup()
    with pytest.raises(ConfigError, match="have no FASTA file"):
        GenomeData(fasta=[], cache=str(tmp_path)).setup()


def test_one_base_and_files_that_are_none(tmp_path: Path) -> None:
    options: dict[str, Any] = {"length": 1, "validation_fraction": 0, "cache": str(tmp_path)}
    with pytest.raises(DataError, match=r"no stretch of 'genome' .* reads 2 tokens; .* has 1 \(.* Give more"):
        GenomeData(fasta=[fasta(tmp_path, "x.fa", a="A")], **options).train()
    assert GenomeData(fasta=[fasta(tmp_path, "y.fa", a="AC")], **options).train()[0].inputs.shape == (1, 1)
    with pytest.raises(DataError, match=r"is a folder\. Name the files in it"):
        GenomeData(fasta=[str(tmp_path)], **options).setup()


@pytest.mark.parametrize("kind", ["species", "genome"])
def test_the_length_that_is_named_fits(tmp_path: Path, kind: str) -> None:
    path, other = fasta(tmp_path, "x.fa", a=bases(100)), fasta(tmp_path, "y.fa", a=bases(300, 1))

    def make(length: int) -> Any:
        options: dict[str, Any] = {"length": length, "validation_fraction": 0, "cache": str(tmp_path)}
        if kind == "genome":
            return GenomeData(fasta=[path], **options)
        return SpeciesData(species={"x": [path], "y": [other]}, **options)

    fits = 100 if kind == "species" else 99
    with pytest.raises(DataError, match=rf"Lower data\.length to at most {fits}, "):
        make(fits + 1).train()
    assert make(fits).train()[0].inputs.shape == (1, fits)


def test_records_that_are_too_short_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fasta(tmp_path, "x.fa", **{f"short{k}": bases(20, k) for k in range(9)}, a=bases(400, 20), b=bases(380, 21))
    options: dict[str, Any] = {"length": 50, "validation_records": ["b", "short1"], "cache": str(tmp_path)}
    data = GenomeData(fasta=[path], test_records=["a"], **options)
    with pytest.raises(DataError, match="training set: no stretch of 'genome'"):
        data.train()
    data = GenomeData(fasta=[path], **options)
    warn_once.cache_clear()
    for _ in range(2):
        data.train()
        data.validation()
    train, validation = (record.getMessage() for record in caplog.records)
    assert train.startswith("training set: 8 of 9 records are left out, with 28.6% of the tokens")
    assert validation.startswith("validation set: 1 of 2 records are left out, with 5.0% of the tokens")


def test_lower_case_alone(tmp_path: Path) -> None:
    """It is read like any other, unless lower case is no target."""
    options: dict[str, Any] = {"length": 20, "cache": str(tmp_path)}
    path = fasta(tmp_path, "x.fa", a=bases(300).lower(), b="n" * 20)
    assert GenomeData(fasta=[path], **options).train()[0].inputs.max() < 4
    with pytest.raises(DataError, match=r"All training data are in lower case.*Set data\.lowercase to fold"):
        GenomeData(fasta=[path], lowercase="unscored", **options).setup()
    with_one = fasta(tmp_path, "y.fa", a=bases(300).lower(), c=bases(100).lower() + "A" + bases(199, 1).lower())
    GenomeData(fasta=[with_one], lowercase="unscored", **options).setup()


def test_sources_follow_what_files_hold(tmp_path: Path) -> None:
    path = fasta(tmp_path, "x.fa", a=bases(100))
    (tmp_path / "more").mkdir()
    same = fasta(tmp_path / "more", "x.fa", b=bases(100, 1))
    one = GenomeData(fasta=[path], cache=str(tmp_path)).sources()
    assert one == {"x.fa": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    assert set(GenomeData(fasta=[path, same], cache=str(tmp_path)).sources()) == {path, same}
    fasta(tmp_path, "x.fa", a=bases(100, 2))
    assert GenomeData(fasta=[path], cache=str(tmp_path)).sources() != one


def test_many_records_and_many_names(tmp_path: Path) -> None:
    """Nothing is quadratic: 20,000 records of which 10,000 are named one by one."""
    path = fasta(tmp_path, "x.fa", **{f"r{k}": bases(20, k) for k in range(20_000)})
    names = [f"r{k}" for k in range(0, 20_000, 2)]
    data = GenomeData(fasta=[path], length=10, test_records=names, validation_fraction=0, cache=str(tmp_path))
    start = time.perf_counter()
    data.setup()
    assert (len(data.splits.train[0].intervals), len(data.splits.test[0].intervals)) == (10_000, 10_000)
    assert len(data.test() or ()) == 10_000
    assert data.train()[3].inputs.shape == (1, 10)
    assert time.perf_counter() - start < 20
