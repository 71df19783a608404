"""Labelled sequences: every layout of the page is read, split and predicted on; what cannot be used is named."""

from __future__ import annotations

import gzip
import itertools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
import yaml
from labelled_files import RNG, TOKENIZER, bases, here, made, rows, text, written  # noqa: F401 - a fixture
from mambaseq_dna.files import tables
from mambaseq_dna.labelled.data import LabelledData
from mambaseq_dna.labelled.items import fitted
from mambaseq_dna.labelled.overlaps import overlapping
from mambaseq_dna.labelled.reader import read_labelled

from mambaseq.checking.datasets import check_items, check_order, check_sources
from mambaseq.cli.main import main
from mambaseq.data.loaders import SequenceDataModule
from mambaseq.errors import ConfigError, DataError
from mambaseq.models import build_model
from mambaseq.runs.parsing import parse_config

DOC = Path(__file__).parents[2] / "docs" / "dna" / "labelled.md"


def make_files() -> None:
    """The files that the page names."""
    written(Path("enhancers.csv"), [(b, "strong" if int(k) else "weak") for b, k in rows(40)], "seq,activity_class")
    splits = ["train"] * 20 + ["dev"] * 5 + ["test"] * 5
    promoters = [(split, k, b) for split, (b, k) in zip(splits, rows(30), strict=True)]
    import lzma

    with lzma.open("promoters.tsv.xz", "wt") as file:
        file.write("\n".join("\t".join(row) for row in promoters) + "\n")
    for name, count in (("train", 20), ("dev", 4), ("test", 6)):
        written(Path(f"GUE/prom_core_tata/{name}.csv"), rows(count), "sequence,label")
    for split, count in (("train", 10), ("test", 4)):
        for label in ("positive", "negative"):
            for number in range(count):
                written(Path(f"human_nontata_promoters/{split}/{label}/{number}.txt"), [(bases(),)])
    for split, count in (("train", 20), ("test", 6)):
        written(Path(f"H3K4me3/{split}.fna"), [(f">seq{n}|{k}\n{b}",) for n, (b, k) in enumerate(rows(count))])
    viral = [f">read{n} class={'viral' if int(k) else 'host'} len=12\n{b}\n" for n, (b, k) in enumerate(rows(40))]
    with gzip.open("reads.fa.gz", "wt") as file:
        file.write("".join(viral))
    genome = {"chr1": 3000, "chr8": 1000, "chr10": 1000}
    Path("genome.fa").write_text("".join(f">{name}\n{bases(size)}\n" for name, size in genome.items()))
    peaks, genes = [], []
    for name, size in genome.items():
        for number, start in enumerate(range(0, size, 100)):
            sign = "+-"[number // 2 % 2]
            peaks.append((name, start, start + 50, "ab"[number % 2], number, sign))
            attributes = f"ID=g{number};biotype={'coding' if number % 2 else 'rna'}"
            genes.append((name, "x", "gene", start + 1, start + 50, ".", sign, ".", attributes))
            genes.append((name, "x", "exon", start + 1, start + 9, ".", sign, ".", "ID=e"))
    written(Path("peaks.bed"), peaks, sign="\t")
    written(Path("genes.gff"), genes, "##gff-version 3", sign="\t")
    values = [(bases(), number / 10, "" if number % 3 else number, "x") for number in range(40)]
    written(Path("variants.csv"), values, "sequence,expression,halflife,remark")
    several = [(bases(), number % 2, "" if number % 3 == 0 else number % 3 - 1) for number in range(40)]
    written(Path("motifs.csv"), several, "sequence,promoter,enhancer")


def test_every_layout_of_the_page(tmp_path: Path) -> None:
    make_files()
    found: dict[str, tuple[Any, ...]] = {}
    for block in re.findall(r"^```yaml\n(.*?)^```", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        options = yaml.safe_load(block)["data"]
        assert options.pop("name") == "dna/labelled"
        data = made(**options)
        sizes = [len(part) if part is not None else 0 for part in (data.train(), data.validation(), data.test())]
        found[str(options["files"])] = (data.task, list(data.class_names) or data.n_outputs, *sizes)
        check_items(data)
        check_sources(lambda: made(**options))  # noqa: B023 - called here
        # what is predicted on is what a model is trained on
        known = {text(data.train()[i]) for i in range(sizes[0])}
        for part in (data.validation(), data.test()):
            known |= {text(part[i]) for i in range(len(part) if part else 0)}
        of = options["files"] if isinstance(options["files"], str) else options["files"][0]
        records = list(read_labelled(of, TOKENIZER, **data.reader_options()))
        assert {TOKENIZER.decode(record.ids) for record in records} == known
        assert len({(record.source, record.name) for record in records}) == len(records)
    assert found == {
        "enhancers.csv": ("classes", ["strong", "weak"], 32, 4, 4),
        "promoters.tsv.xz": ("classes", ["0", "1"], 20, 5, 5),
        "GUE/prom_core_tata": ("classes", ["0", "1"], 20, 4, 6),
        "human_nontata_promoters": ("classes", ["negative", "positive"], 18, 2, 8),
        "H3K4me3": ("classes", ["0", "1"], 18, 2, 6),
        "['reads.fa.gz']": ("classes", ["host", "viral"], 32, 4, 4),
        "peaks.bed": ("classes", ["a", "b"], 30, 10, 10),
        "genes.gff": ("classes", ["coding", "rna"], 40, 0, 10),
        "variants.csv": ("values", 2, 32, 4, 4),
        "motifs.csv": ("multilabels", ["promoter", "enhancer"], 32, 4, 4),
    }


def test_a_column_called_split_is_used_and_the_splits_are_told() -> None:
    """`split: null`, which dna/finetune advises for data of one's own, must not draw over what the file says."""
    splits = ["test"] * 4 + ["dev"] * 6 + ["train"] * 30
    table = [(b, k, split) for (b, k), split in zip(rows(40), splits, strict=True)]
    written(Path("own.csv"), table, "sequence,label,split")
    advised = {"--data.files": "own.csv", "--data.columns": "null", "--data.split": "null"}
    config = parse_config("dna/finetune", [part for pair in advised.items() for part in pair])
    data = config.make_data(setup=True)
    assert isinstance(data, LabelledData)
    assert [text(data.test()[i]) for i in range(4)] == [b for b, _, _ in table[:4]]  # type: ignore[index]
    assert data.splits_told() == "sequences: train 30, validation 6, test 4; chosen by 'split' of the file"
    none = made(files="own.csv", split="")
    assert none.splits_told().endswith("test 4; chosen by a draw by data.seed 0 (test 10% and validation 10%)")
    headers = [(f">s{n} label={k} split={split}\n{b}",) for n, (b, k, split) in enumerate(table)]
    written(Path("own.fa"), headers)
    assert made(files="own.fa").splits_told() == data.splits_told()
    pandas.DataFrame(table, columns=["sequence", "label", "Split"]).to_parquet("own.parquet")
    assert made(files="own.parquet").splits_told() == data.splits_told().replace("'split'", "'Split'")
    written(Path("own.csv"), [*table, (bases(), 0, "left")], "sequence,label,split")
    with pytest.raises(DataError, match=r"line 42: 'left' names no split.*data\.split; '' is none"):
        made(files="own.csv")


def test_intervals_by_hand() -> None:
    Path("g.fa").write_text(">1\nAACCGGTTAC\n>2\nTTTTTTTTTTTTTT\n")
    lines = [("chr1", 2, 4, "x", 0, "+"), ("1", 2, 4, "y", 0, "-"), ("2", 0, 3, "x"), ("2", 6, 9, "y")]
    written(Path("a.bed"), lines, sign="\t")
    options = {"files": "a.bed", "assembly": "g.fa", "width": 8, "test_groups": [2], "validation_fraction": 0}
    data = made(**options)
    train = data.train()
    # the middle of 2 to 4 is 3, so that the window is -1 to 7: N, then AACCGGT; the other strand is ACCGGTT, then N
    assert {text(train[i]): int(train[i].targets) for i in range(2)} == {"NAACCGGT": 0, "ACCGGTTN": 1}
    assert text(data.test()[0]) == "NNNTTTTT"
    forward = made(**options, stranded=False, duplicates="drop")
    assert {text(forward.train()[i]) for i in range(2)} == {"NAACCGGT"}


def test_cut_and_padded() -> None:
    place = np.array([[0, 0, 0, 10, 0], [0, 0, 0, 10, 1], [0, 0, 0, 3, 0]])
    assert fitted(place, 4, "centre", False)[:, 2:4].tolist() == [[3, 7], [3, 7], [0, 3]]
    assert fitted(place, 4, "start", False)[:, 2:4].tolist() == [[0, 4], [6, 10], [0, 3]]
    assert fitted(place, 4, "end", True)[:, 2:4].tolist() == [[6, 10], [0, 4], [-1, 3]]


def test_cutting_is_said_and_copies_are_what_the_model_sees(caplog: pytest.LogCaptureFixture) -> None:
    table = [("train", "AAACGTAAA", 0), ("train", "CCCCCCCCC", 1), ("dev", "GGG", 0), ("test", "TTAATTTT", 1)]
    written(Path("t.csv"), table, "split,sequence,label")
    options = {"files": "t.csv", "split": "split", "length": 3, "pad": True}
    with pytest.raises(DataError, match=r"t.csv, line 3 \(train\) holds the same sequence .* as t.csv, line 4 \(val"):
        made(**options)  # CCC is the other strand of GGG
    with pytest.raises(DataError, match=r"t.csv, line 5: the label '1' is not that of any training"):
        made(**options, duplicates="drop")
    made(**options | {"align": "end", "length": 5, "duplicates": "drop"})
    assert "3 of 4 sequences are longer than 5 bases and are cut (data.align is end); the longest has 9" in caplog.text


def test_copies_are_dropped_from_what_is_less_protected(caplog: pytest.LogCaptureFixture) -> None:
    table = [("train", "AACC", 0), ("train", "GGTT", 1), ("train", "ACAC", 1), ("train", "TTTC", 0)]
    table += [("dev", "AACC", 1), ("dev", "CCCC", 1), ("test", "CCCC", 0), ("test", "ACCC", 0)]
    written(Path("t.csv"), table, "split,sequence,label")
    data = made(files="t.csv", split="split", duplicates="drop")
    assert [len(part) for part in (data.train(), data.validation(), data.test())] == [2, 1, 2]
    assert "3 record(s) are left out, because of records in a more protected split" in caplog.text
    assert ": 3 holds the same sequence (or its other strand) as another, 2 of them with another label" in caplog.text
    assert {name: len(part) for name, part in data.audited().splits.items()} == {"train": 2, "validation": 1, "test": 2}
    audited = LabelledData(files="t.csv", split="split").audited()  # which a run refuses
    assert {name: len(part) for name, part in audited.splits.items()} == {"train": 4, "validation": 2, "test": 2}
    first = audited.splits["train"][1]
    assert (TOKENIZER.decode(first.ids), first.label, first.source, first.record) == ("GGTT", "1", "t.csv", "line 3")


def test_sequences_of_n_alone_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    table = [
        ("train", "ACGT", 0),
        ("train", "CCCN", 1),
        ("train", "NNNNNN", 1),
        ("test", "nnRNNN", 0),
        ("test", "AC", 1),
    ]
    written(Path("t.csv"), table, "split,sequence,label")
    data = made(files="t.csv", split="split", validation_fraction=0)
    assert [len(data.train()), len(data.test())] == [2, 1]
    assert "2 record(s) hold no base but N, and are left out" in caplog.text
    Path("g.fa").write_text(">1\nNNNNNNNNNNACGTCCCA\n")
    written(Path("a.bed"), [("1", 0, 8, "x"), ("1", 10, 13, "x"), ("1", 13, 17, "y")], sign="\t")
    assert len(made(files="a.bed", assembly="g.fa", test_fraction=0, validation_fraction=0).train()) == 2


def test_intervals_that_overlap_over_splits() -> None:
    places = np.array([[0, 0, 0, 10, 0], [0, 0, 5, 15, 1], [0, 0, 15, 20, 0], [0, 1, 0, 10, 0], [0, 0, 2, 4, 0]])
    splits = np.array([0, 2, 0, 2, 1])
    intervals = np.ones(5, dtype=bool)
    assert overlapping(places, splits, intervals).tolist() == [1, -1, -1, -1, -1]
    splits[1] = 1
    assert overlapping(places, splits, intervals).tolist() == [1, -1, -1, -1, -1]
    assert overlapping(places, splits, ~intervals).tolist() == [-1] * 5
    Path("g.fa").write_text(">1\n" + bases(60) + "\n")
    written(Path("a.bed"), [("1", 0, 20, "x"), ("1", 20, 40, "y")], sign="\t")
    written(Path("b.bed"), [("1", 39, 50, "y")], sign="\t")
    options = {"files": "a.bed", "test_files": "b.bed", "assembly": "g.fa", "validation_fraction": 0}
    with pytest.raises(DataError, match=r"a.bed, line 2 \(train\) shares bases with b.bed, line 1 \(test\)"):
        made(**options)


def test_shares_are_of_each_class_and_equal_sequences_stay_together() -> None:
    table = rows(100, lambda number: int(number < 20))
    table += [(TOKENIZER.decode(TOKENIZER.reverse_complement(TOKENIZER.encode(b))), k) for b, k in table]
    written(Path("t.csv"), table, "sequence,label")
    data = made(files="t.csv", test_fraction=0.2)
    labels = [part.targets.bincount().tolist() for part in (data.train(), data.validation(), data.test())]
    assert labels == [[112, 28], [16, 4], [32, 8]]
    assert data.class_counts == [(112, 28), (28, 112)]
    assert made(files="t.csv", test_fraction=0.2, seed=1).test()[0].inputs.tolist() != data.test()[0].inputs.tolist()


def test_groups_stay_on_one_side() -> None:
    table = [(b, k, f"gene{number // 10}") for number, (b, k) in enumerate(rows(100))]
    written(Path("t.csv"), table, "sequence,label,gene")
    group = {b: gene for b, _, gene in table}
    data = made(files="t.csv", group="gene", test_fraction=0.2, validation_groups=["gene3"])
    of = [{group[text(part[i])] for i in range(len(part))} for part in (data.train(), data.validation(), data.test())]
    assert [len(one) for one in of] == [7, 1, 2]
    assert of[1] == {"gene3"}
    test = data.test()
    assert [group[text(test[i])] for i in range(len(test))] == list(test.groups)
    assert not of[0] & of[2]
    with pytest.raises(
        DataError, match=r"The pattern 'gine3' of data.test_groups matches no group. Did you mean 'gene3'"
    ):
        made(files="t.csv", group="gene", test_groups=["gine3"])
    with pytest.raises(DataError, match=r"The group 'gene3' matches both data.test_groups and data.validation_groups"):
        made(files="t.csv", group="gene", test_groups=["gene3"], validation_groups=["gene*"])
    with pytest.raises(DataError, match=r"The test set gets no record: data.test_fraction is 0.01 of the groups.* 10"):
        made(files="t.csv", group="gene", test_fraction=0.01)
    with pytest.raises(ConfigError, match=r"name groups, but the records have none. .*data.group"):
        made(files="t.csv", test_groups=["gene3"])
    written(Path("more.csv"), [(bases(), 1, "gene9"), (bases(), 0, "gene10")], "sequence,label,gene")
    given = {"files": "t.csv", "test_files": "more.csv", "group": "gene", "validation_groups": ["gene3"]}
    with pytest.raises(DataError, match=r"t.csv, line 92 \(train\) is of the same group as more.csv, line 2 \(test\)"):
        made(**given)
    data = made(**given, duplicates="drop")
    assert [len(part) for part in (data.train(), data.validation(), data.test())] == [80, 10, 2]


def test_values_and_labels() -> None:
    make_files()
    data = made(files="variants.csv", task="values", label=["expression", "halflife"], test_fraction=0)
    batch = next(iter(SequenceDataModule(data, batch_size=36).train_dataloader()))
    assert batch.targets.shape == (36, 2)
    assert batch.targets.dtype == torch.float32
    assert not batch.per_token
    assert int(batch.n_targets) == 36 + int((~batch.targets[:, 1].isnan()).sum()) < 72
    assert "k-mer ridge regression" in data.baselines()
    one = made(files="variants.csv", task="values", label="halflife")  # two thirds have none
    assert sum(len(part) for part in (one.train(), one.validation() or [], one.test() or [])) == 14
    assert one.n_outputs == 1
    several = [(bases(), ("a;b", "b", "", "c; a")[number % 4]) for number in range(40)]
    written(Path("s.csv"), several, "sequence,label")
    data = made(files="s.csv", task="multilabels", separator=";", test_fraction=0, validation_fraction=0)
    item = {text(data.train()[i]): data.train()[i].targets[0].tolist() for i in range(40)}
    assert [item[b] for b, _ in several[:4]] == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert data.class_counts == [(20, 20), (20, 20), (10, 30)]


def test_order_strands_and_balanced_draws() -> None:
    table = rows(60, lambda number: int(number < 6))
    written(Path("t.csv"), table, "sequence,label")
    options = {"files": "t.csv", "test_fraction": 0, "validation_fraction": 0, "reverse_complement": True}
    check_order(lambda: made(**options))
    check_order(lambda: made(**options, balanced=True))
    train = made(**options).train()
    known = {b for b, _ in table}
    turned = {TOKENIZER.decode(TOKENIZER.reverse_complement(TOKENIZER.encode(b))) for b in known}
    epochs = [[text(train[60 * epoch + i]) for i in range(60)] for epoch in range(2)]
    for epoch in epochs:
        assert 10 < len(set(epoch) & known) < 50
        assert set(epoch) <= known | turned
    assert epochs[0] != epochs[1]
    drawn = made(**options, balanced=True, samples_per_epoch=400).train()
    (batch,) = drawn.__getitems__(range(400))
    assert 150 < int(batch.targets.sum()) < 250


def test_padded_and_packed_batches() -> None:
    table = [(bases(number % 7 + 3), number % 2) for number in range(24)]
    written(Path("t.tsv"), table, "sequence\tlabel", "\t")
    data = made(files="t.tsv", test_fraction=0, validation_fraction=0)
    assert data.length == 9
    padded = next(iter(SequenceDataModule(data, batch_size=8).train_dataloader()))
    packed = next(iter(SequenceDataModule(data, batch_size=8, pack=True).train_dataloader()))
    alone = [data.train()[i] for i in range(8)]
    assert packed.cu_seqlens.tolist() == np.cumsum([0, *(item.inputs.shape[1] for item in alone)]).tolist()
    assert torch.equal(packed.inputs, torch.cat([item.inputs for item in alone], 1))
    assert torch.equal(padded.inputs[padded.mask], packed.inputs[0])
    assert not padded.inputs[~padded.mask].any()
    assert torch.equal(padded.targets, packed.targets)


def test_parquet_and_numbers_as_labels() -> None:
    frame = pandas.DataFrame({"name": [f"s{n}" for n in range(30)], "sequence": [bases() for _ in range(30)]})
    frame["label"] = [float(number % 11) for number in range(30)]
    frame.to_parquet("t.parquet")
    data = made(files="t.parquet", test_fraction=0, validation_fraction=0)
    assert list(data.class_names) == [str(number) for number in range(11)]
    records = list(read_labelled("t.parquet", TOKENIZER, fields=["label"]))
    assert (records[10].name, records[10].fields) == ("s10", {"label": "10"})
    with pytest.raises(
        DataError, match=r"t.parquet has no column 'sequences' \(data\.sequence\)\. Did you mean 'sequence'"
    ):
        made(files="t.parquet", sequence="sequences")
    twice = pyarrow.table([["ACGT"], ["ACGG"], [1]], names=["sequence", "sequence", "label"])
    pyarrow.parquet.write_table(twice, "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet has 2 columns 'sequence'"):
        made(files="t.parquet")


def test_long_rows_are_not_read_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_LETTERS", 100)
    found = [bases(60) for _ in range(9)]
    written(Path("t.csv"), [(one,) for one in found], "sequence")
    read, encoded = [], tables._encoded

    def counted(path: Path, unit: str, sequences: list[str], *more: Any) -> Any:
        read.append(len(sequences))
        return encoded(path, unit, sequences, *more)

    monkeypatch.setattr(tables, "_encoded", counted)
    letters = [TOKENIZER.decode(row.ids) for row in tables.table_rows(Path("t.csv"))]
    assert letters == found
    assert max(read) == 2


def test_a_folder_elsewhere_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives give files of different contents the same size and time."""
    contents = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        for label, number in itertools.product(("a", "b"), range(4)):
            file = Path(f"set/{label}/{number}.txt")
            written(file, [(bases(),)])
            os.utime(file, (0, 0))
        data = made(files="set", test_fraction=0, validation_fraction=0)
        contents.append(data._of(0)[0].matrix(np.arange(8))[0])
    assert not np.array_equal(*contents)


def test_the_shipped_task() -> None:
    """Its sizes are the published ones; 26 training and dev sequences are also in a more protected split."""
    data = made(duplicates="drop")
    assert [len(part) for part in (data.train(), data.validation(), data.test())] == [4880, 611, 613]
    assert (data.length, list(data.class_names)) == (70, ["0", "1"])
    with pytest.raises(DataError, match=r"26 such record\(s\) are in two splits"):
        made()


def test_balanced_weights_of_a_run() -> None:
    table = rows(60, lambda number: int(number < 15))
    written(Path("t.csv"), table, "sequence,label")
    options = ["--data.files=t.csv", "--data.test_fraction=0", "--data.validation_fraction=0", "--model.d_model=8"]
    settings = parse_config("dna/labelled", [*options, "--model.head.class_weights=balanced"])
    data = settings.make_data(setup=True)
    spec = settings.model_spec(data)
    assert spec["head"]["class_weights"] == pytest.approx([60 / 90, 60 / 30])
    assert build_model(spec).head.loss.weights.tolist() == pytest.approx([2 / 3, 2])
    data.class_counts = None
    with pytest.raises(ConfigError, match="the dataset 'dna/labelled' does not count its classes"):
        settings.model_spec(data)


def test_baselines_are_fitted_to_the_training_sequences() -> None:
    """Words tell classes of different words, on every test sequence in its order."""
    table = [("".join(RNG.choice(list("AC" if number % 2 else "GT"), 30)), number % 2) for number in range(60)]
    written(Path("t.csv"), table, "sequence,label")
    data = made(files="t.csv", duplicates="drop", test_fraction=0.3)
    test = data.test()
    told = data.baselines()["k-mer logistic regression"]([test[number] for number in range(len(test))])
    assert np.asarray(told.outputs).argmax(1).tolist() == test.targets.tolist()


def test_a_pretrained_run_is_tuned_and_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    """Files of other layouts are predicted on too; of several files the bad one is left out, with its line."""
    make_files()
    small = ["--model.d_model=8", "--model.encoder.name=tokens", "--model.backbone.n_layers=1", "--trainer.max_steps=1"]
    small += ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    small += ["--trainer.precision=32-true", "--loader.num_workers=0", "--trainer.val_check_interval=1"]
    small += ["--model.backbone.name=residual", "--data.length=16", "--loader.batch_size=4", "--metrics=[]"]
    small += ["--checkpoint.monitor=", "--length_warmup.start=0"]
    assert main(["fit", "--config", "dna/genome", "--out", "lm", *small, "--data.fasta=[genome.fa]"]) == 0
    data = ["--data.files=enhancers.csv", "--data.sequence=seq", "--data.label=activity_class", "--data.length=10"]
    assert main(["fit", "--config", "dna/labelled", "--out", "run", "--init-from", "lm", *small, *data]) == 0
    taken = re.search(r"(\d+) of (\d+) tensors come from .*lm", capsys.readouterr().err)
    assert taken is not None
    assert int(taken[2]) - int(taken[1]) == 2  # the classifier's weight and bias
    written(Path("bad.csv"), [*rows(3), ("ACG-", 0)], "seq,label")
    inputs = ["enhancers.csv", "bad.csv", "reads.fa.gz", "human_nontata_promoters"]
    assert main(["predict", "--checkpoint", "run", *inputs, "--out", "all.csv", "--skip-bad"]) == 0
    assert "bad.csv, line 5: The letter '-' at position 4 is not a base" in capsys.readouterr().err
    found = pandas.read_csv("all.csv")
    assert found["file"].str.split("/").str[0].value_counts().to_dict() == {
        "enhancers.csv": 40,
        "bad.csv": 3,
        "reads.fa.gz": 40,
        "human_nontata_promoters": 28,
    }
    assert (found["stop"] - found["start"] == 10).all()
    assert found.loc[0, "record"] == "enhancers.csv:2"
    # of nothing but N there is no answer, and a file that does not say what it is can only be renamed here
    Path("gaps.fa").write_text(f">read\nACGTACGTAC\n>gap\n{'n' * 10}\n>half\nNNNNNRACGT\n")
    assert main(["predict", "--checkpoint", "run", "gaps.fa", "--out", "gaps.csv"]) == 0
    assert "1 of 3 rows has no prediction: no token that is scored." in capsys.readouterr().err
    found = pandas.read_csv("gaps.csv")
    assert found["predicted"].isna().tolist() == [False, True, False]
    assert found["strong"].isna().tolist() == [False, True, False]
    assert found["note"].fillna("").tolist() == ["", "no token that is scored", ""]
    Path("gaps.fa").rename("gaps.seq")
    assert main(["predict", "--checkpoint", "run", "gaps.seq", "--out", "gaps.csv"]) == 2
    err = capsys.readouterr().err
    assert "Rename it, so that it ends in one of these." in err
    assert "data.format" not in err
