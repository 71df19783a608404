"""Labelled sequences that cannot be used: each is named, with its file, line and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
from labelled_files import TOKENIZER, bases, here, made, rows, written  # noqa: F401 - a fixture
from mambaseq_dna.labelled.data import LabelledData
from mambaseq_dna.labelled.reader import read_labelled

from mambaseq.errors import ConfigError, DataError
from mambaseq.models import build_model
from mambaseq.tasks.fitting import check_data

GOOD = "ACGT,0\nACCT,1\nAGGT,0\n"


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (
            "seqence,label\nACGT,0\n",
            {},
            r"t.csv has no column 'sequence' \(data.sequence\). Did you mean 'seqence'\? It has: 'seqence', 'l",
        ),
        ("sequence,lable\nACGT,0\n", {}, r"t.csv has no column 'label' \(data\.label\). Did you mean 'lable'"),
        (
            GOOD,
            {},
            r"no columns 'sequence' \(data.sequence\), 'label' \(data.label\)\. .*Column 1 of .* bases: the file has "
            r"no header\. .*data.columns: \[sequence, label\]",
        ),
        (
            f"seq,split,class\n{GOOD}",
            {"label": "class", "group": "gene"},
            r"no columns 'sequence' \(data.sequence\), 'gene' \(data.group\)\. .*, or set data.group to null",
        ),
        (
            f"sequence,label\n{GOOD}",
            {"columns": ["sequence", "label"]},
            "t.csv, line 1: The letter 'e' at position 2 .* If this line holds the names of columns, set data",
        ),
        (f"sequence,label\n{GOOD}ACGT\n", {}, "t.csv, line 5: the row has 1 cells, and there are 2 columns"),
        (f'sequence,label\n{GOOD}"ACGT,0\nAC,1\n', {}, "t.csv, line 5: the row cannot be read"),
        (f"sequence,label\n{GOOD}\n,1\n", {}, "t.csv, line 6: the sequence is empty"),
        (f"sequence,label\n{GOOD}ACEF,1\n", {}, "t.csv, line 5: The letter 'E' at position 3 is not a base"),
        (f"sequence,label\n{GOOD}ACGG,NA\n", {}, r"t.csv, line 5: the label is missing \('NA'\)"),
        (f"sequence,label\n{GOOD}ACGG,2\n", {"classes": [0, 1]}, "line 5: the label '2' is not among data.classes"),
        ("sequence,label\nACGT,1\nACCT,1\n", {}, "All training records are of one class, '1'"),
        (f"sequence,label\n{GOOD}", {"classes": [0, 1, 2]}, "The class '2' of data.classes has no training record"),
        (
            f"sequence,label\n{GOOD}ACGG,high\n",
            {"task": "values"},
            "line 5: the column 'label' has 'high', which is not a",
        ),
        (f"sequence,label\n{GOOD}ACGG,inf\n", {"task": "values"}, "'inf', which is not a finite number"),
        (f"sequence,label\n{GOOD}ACGG,,\n", {}, "has 3 cells"),
        ("sequence,label\n", {}, "t.csv has no rows"),
        ("\n\n", {}, "t.csv is empty, or has only blank lines"),
        (f"sequence,label\n{GOOD}", {"split": "label"}, "t.csv, line 2: '0' names no split"),
        (f"sequence,a\n{GOOD}", {"label": "a", "task": "multilabels"}, "Several labels are either in several columns"),
        (
            "sequence,a,b\nACGT,1,0\nACC,yes,2\n",
            {"label": ["a", "b"], "task": "multilabels"},
            "line 3: the column 'b' has '2'",
        ),
    ],
)
def test_bad_tables(content: str, options: dict[str, Any], told: str) -> None:
    Path("t.csv").write_text(content)
    with pytest.raises((DataError, ConfigError), match=told) as error:
        made(files="t.csv", test_fraction=0, validation_fraction=0, **options)
    assert len(str(error.value)) < 1000


BAD = "".join(f"{'ACGT' if n % 3 else ('', 'ACXT', 'AC,GT')[n // 3 % 3]},{n % 2}\n" for n in range(60))


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (
            f"sequence,label\n{BAD}",
            {},
            r"line 2: the sequence is empty.* 19 other .*line 5, 14, .*59 \(.*line 8, .*56 \(the same\)\.$",
        ),
        (
            f"sequence,label\n{GOOD}AC,\nAG,9\nCC,1\n,0\n",
            {},
            r"^t.csv, line 8: the sequence is empty\. Remove the row, or",
        ),
        (
            f"sequence,label\n{GOOD}AC,\nAG,9\nCC,1\n",
            {"classes": ["0", "1"]},
            r"line 5: the label is missing.* 1 other row.*line 6 \(the label '9' is not among",
        ),
        (
            f"sequence,label\n{GOOD}" + "AC,high\n" * 30 + "AC,1e99\n",
            {"task": "values"},
            r"line 5: .*'high', which is not a number.* 30 other row.*: line 6, .*and 19 more \(the same\).*'1e99'",
        ),
        (
            f"sequence,label,s\n{'AC,0,trian' + chr(10)}{'AC,1,tset' + chr(10)}",
            {"split": "s"},
            r"line 2: 'trian'.*line 3",
        ),
        (
            "sequence;a\nACGT;x,y\nACC;z,q\nACA;x\nAAA;q\n",
            {"label": "a", "task": "multilabels", "separator": ",", "classes": ["x", "y"]},
            r"line 3: the label 'z' is not among data\.classes.*line 5 \(the label 'q'",
        ),
        (
            f"sequence,label,g\n{'AC,0,g1' + chr(10)}{'AG,1,' + chr(10)}{'AA,1, ' + chr(10)}",
            {"group": "g"},
            r"t\.csv, line 3: the group is missing.*line 4",
        ),
        (
            "sequence,a,b\nACGT,1,0\nACC,0,1\n",
            {"label": ["a", "b"], "task": "multilabels", "classes": ["a", "c"]},
            "data.classes and data.label differ: 'c' is in one",
        ),
    ],
)
def test_bad_rows_are_told_at_once(content: str, options: dict[str, Any], told: str) -> None:
    Path("t.csv").write_text(content)
    with pytest.raises((DataError, ConfigError), match=told) as error:
        made(files="t.csv", test_fraction=0, validation_fraction=0, **options)
    assert len(str(error.value)) < 1000


def test_bad_intervals_and_headers_are_told_at_once() -> None:
    Path("g.fa").write_text(f">chr1\n{'ACGT' * 10}\n")
    written(
        Path("a.bed"), [("chr1", 0, 9, "a"), ("chr1", 0, 41, "b"), ("chrX", 0, 4, "a"), ("chrX", 5, 9, "a")], sign="\t"
    )
    with pytest.raises(
        DataError, match=r"a\.bed, line 2: the interval ends at 41.* 2 other row.*line 3, 4 \(the assembly"
    ):
        made(files="a.bed", assembly="g.fa")
    Path("r.fa").write_text(">a label=x\nAC\n>b\nAG\n>c lable=y\nAA\n")
    with pytest.raises(DataError, match=r"r\.fa, record 'b': the header has no 'label='.* 1 other row.*record 'c' \("):
        made(files="r.fa")


def test_labels_in_columns_have_the_order_of_the_classes() -> None:
    written(Path("t.csv"), [("ACGT", 1, 0), ("ACCT", 0, 1), ("AAAA", 1, 1)], "sequence,a,b")
    data = made(
        files="t.csv", task="multilabels", label=["a", "b"], classes=["b", "a"], test_fraction=0, validation_fraction=0
    )
    assert data.class_names == ["b", "a"]
    assert data.train().targets.tolist() == [[0, 1], [1, 0], [1, 1]]


def test_rows_have_the_names_of_a_column_of_ids() -> None:
    written(Path("t.csv"), [("r7", "ACGT"), ("", "AC")], "id,sequence")
    assert [record.name for record in read_labelled("t.csv", TOKENIZER)] == ["r7", "t.csv:3"]
    pandas.DataFrame({"id": ["r7", None], "sequence": ["ACGT", "AC"]}).to_parquet("t.parquet")
    assert [record.name for record in read_labelled("t.parquet", TOKENIZER)] == ["r7", "t.parquet:2"]


def test_words_that_are_no_choice() -> None:
    written(Path("t.csv"), rows(4), "sequence,label")
    for key, value in (("format", "csv"), ("task", "regression"), ("align", "center"), ("duplicates", "keep")):
        with pytest.raises(ConfigError, match=f"data.{key} must be one of .*; it is '{value}'"):
            LabelledData(files="t.csv", **{key: value})
    with pytest.raises(ConfigError, match=r"data.separator is empty"):
        LabelledData(files="t.csv", task="multilabels", separator="")
    with pytest.raises(ConfigError, match=r"reader_options.align must be one of centre, start, end"):
        list(read_labelled("t.csv", TOKENIZER, length=3, align="center"))  # type: ignore[arg-type]


def test_one_bad_file_among_several_is_named() -> None:
    for number in range(3):
        written(Path(f"{number}.csv"), rows(6), "sequence,label")
    with Path("1.csv").open("a") as file:
        file.write("ACG*,0\n")
    with pytest.raises(DataError, match=r"^1.csv, line 8: The letter '\*' at position 4"):
        made(files="[0-9].csv")


def test_labels_that_training_has_not() -> None:
    written(Path("f/train.csv"), rows(10), "sequence,label")
    written(Path("f/test.csv"), [(bases(), "11")], "sequence,label")
    with pytest.raises(DataError, match=r"f/test.csv, line 2: the label '11' is not that of any training record."):
        made(files="f", validation_fraction=0)


def test_bad_intervals_and_headers(tmp_path: Path) -> None:
    Path("g.fa").write_text(">1\nAACCGGTTAC\n")
    written(Path("a.bed"), [("1", 0, 4, "x"), ("1", 6, 11, "y")], sign="\t")
    with pytest.raises(ConfigError, match=r"a.bed holds intervals, without bases. .*data.assembly"):
        made(files="a.bed")
    with pytest.raises(DataError, match=r"a.bed, line 2: the interval ends at 11, but '1' has 10 bases"):
        made(files="a.bed", assembly="g.fa")
    with pytest.raises(ConfigError, match=r"A BED file has no column 'scores'. Did you mean 'score'"):
        made(files="a.bed", assembly="g.fa", label="scores")
    Path("r.fa").write_text(">a|1\nACGT\n>b|2|x\nACGA\n")
    with pytest.raises(DataError, match=r"r.fa, record 'a|1': the header has no 'label='. .*field:2"):
        made(files="r.fa")
    with pytest.raises(DataError, match=r"the header 'a|1' has 2 field\(s\), so that there is no field:3"):
        made(files="r.fa", label="field:3")
    (tmp_path / "empty" / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="is taken for the folder of a class, but holds no file"):
        made(files="empty")
    Path("x.dat").write_text("")
    with pytest.raises(DataError, match=r"'x.dat': its ending does not say what it is"):
        made(files="x.dat")


def test_lengths_that_an_encoder_does_not_read_are_refused_at_the_start(tmp_path: Path) -> None:
    """Only the last record is too long, and only the second to last too short: the first step would not meet them."""
    sequences = [*rows(20), (bases(3), "0"), (bases(13), "1")]
    written(Path("a.csv"), sequences, "sequence,label")
    data = made(files="a.csv")
    assert data.extremes() == [(3, "a.csv, line 22"), (13, "a.csv, line 23")]
    spec = {"d_model": 4, "backbone": {"name": "bidirectional", "n_layers": 1}, "mixer": {"name": "mamba"}}
    spec["head"] = {"name": "classification", "n_classes": 2}

    def check(data: LabelledData, **encoder: Any) -> None:
        check_data(build_model({**spec, "encoder": encoder}), data, "'dna/labelled'", {})

    for encoder, message in (
        (
            {"name": "dna/conv", "vocab_size": 5, "positions": 12},
            r"up to 12 positions.*\(a\.csv, line 23\).*data\.length 12",
        ),
        ({"name": "dna/kmer", "k": 4}, r"reads 4 inputs at once.*of 3 \(a\.csv, line 22\).*data\.length"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(data, **encoder)
    check(made(files="a.csv", length=12), name="dna/conv", vocab_size=5, positions=12)
    check(made(files="a.csv", length=12, pad=True), name="dna/kmer", k=4)
