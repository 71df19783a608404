"""Predictions about DNA: tracks read back by pyBigWig, both strands, regions, and tables that say the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pybigtools
import pyBigWig
import pytest
from mambaseq_dna.files.bigwig import name_sequences
from mambaseq_dna.tokenizer import BaseTokenizer
from pages import blocks, run_cell
from runs.test_prediction import DNA, saved

import mambaseq as ms
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, DataError, UserError
from mambaseq.runs import answers

CODING = ["other", "coding +", "coding -"]
BOTH = {"name": "bidirectional", "n_layers": 1}
RC = {"name": "reverse_complement", "n_layers": 1}


def labels(folder: Path, **card: Any) -> Path:
    head = {"name": "token_classification", "n_classes": 3}
    card = {"class_names": CODING, "strand_classes": [0, 2, 1], "length": 16, "task": "labels", **DNA, **card}
    return saved(folder, head, BaseTokenizer(), **{"backbone": BOTH, **card})


def values(folder: Path, stride: int) -> Path:
    head = {"name": "token_regression", "stride": stride}
    return saved(folder, head, BaseTokenizer(), backbone=BOTH, task="values", length=16, **DNA)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chromosomes, 50 and 21 bases, with N in the first."""
    letters = np.random.default_rng(5).choice(list("ACGT"), 71)
    letters[20:24] = "N"
    path = tmp_path_factory.mktemp("in") / "in.fa"
    path.write_text(f">chr2 b\n{''.join(letters[:50])}\n>chr10\n{''.join(letters[50:])}\n")
    return path


def other_strand(source: Path, path: Path) -> Path:
    records = [record.split("\n") for record in source.read_text()[1:].split("\n>")]
    turned = [(name, letters[::-1].translate(str.maketrans("ACGT", "TGCA"))) for name, letters, *_ in records]
    path.write_text("".join(f">{name}\n{letters}\n" for name, letters in turned))
    return path


def predicted(run: ms.Run, source: Path, **options: Any) -> pandas.DataFrame:
    table = run.predict(source, device="cpu", **options)
    assert table is not None
    return table


def test_tracks_say_what_the_table_says(source: Path, tmp_path: Path) -> None:
    run, options = ms.load(labels(tmp_path / "m")), {"stride": 5, "merge": "centre", "device": "cpu"}
    table = predicted(run, source, stride=5, merge="centre")
    assert table["note"].tolist() == [""] * 20 + ["not scored"] * 4 + [""] * 47
    for ending in ("bed", "bedgraph", "bw", "csv", "parquet", "npz"):
        run.predict(source, out=tmp_path / f"o.{ending}", **options)
    arrays = np.load(tmp_path / "o.npz")
    for same in (
        pandas.DataFrame({name: arrays[name] for name in arrays}),
        pandas.read_parquet(tmp_path / "o.parquet"),
        pandas.read_csv(tmp_path / "o.csv", keep_default_na=False, na_values={name: "" for name in CODING}),
    ):
        assert list(same.columns) == list(table.columns)
        np.testing.assert_allclose(same[CODING], table[CODING], rtol=1e-7)
        assert same["predicted"].fillna("").tolist() == table["predicted"].fillna("").tolist()
    for name in CODING:
        word = name.replace(" ", "_")
        with pyBigWig.open(str(tmp_path / f"o.{word}.bw")) as track:
            assert track.chroms() == {"chr2": 50, "chr10": 21}
            read = np.concatenate([track.values("chr2", 0, 50, numpy=True), track.values("chr10", 0, 21, numpy=True)])
        np.testing.assert_array_equal(read, table[name].to_numpy().astype(np.float32))
        lines = pandas.read_csv(tmp_path / f"o.{word}.bedgraph", sep="\t", header=None)
        known = table[table[name].notna()]
        assert lines[[0, 1, 2]].to_numpy().tolist() == known[["record", "start", "stop"]].to_numpy().tolist()
        np.testing.assert_allclose(lines[3], known[name], rtol=1e-7)
    runs: list[list[Any]] = []
    for row in table.itertuples():  # by the definition, a position at a time
        if isinstance(row.predicted, str):
            share = table.at[row.Index, row.predicted]
            if runs and runs[-1][:1] + runs[-1][2:4] == [row.record, row.start, row.predicted]:
                runs[-1][2] = row.stop
                runs[-1][4].append(share)
            else:
                runs.append([row.record, row.start, row.stop, row.predicted, [share]])
    written = [line.split("\t") for line in (tmp_path / "o.bed").read_text().splitlines()]
    assert [[line[0], int(line[1]), int(line[2]), line[3]] for line in written] == [run[:4] for run in runs]
    for line, one in zip(written, runs, strict=True):
        assert int(line[4]) == pytest.approx(1000 * np.mean(one[4]), abs=0.51)
        assert line[5] == {"other": ".", "coding +": "+", "coding -": "-"}[line[3]]
    one = tmp_path / "one.bigwig"
    run.predict(source, out=one, columns=["coding -"], **options)
    with pyBigWig.open(str(one)) as track:
        assert track.values("chr10", 3, 4) == [np.float32(table[table["record"] == "chr10"]["coding -"].iloc[3])]


def test_bins_and_regions(source: Path, tmp_path: Path) -> None:
    run, bed = ms.load(values(tmp_path / "m", 4)), tmp_path / "parts.bed"
    table = predicted(run, source)
    # bins of N alone are not known: bases 20 to 24
    assert table[table["note"] != ""][["record", "start", "stop"]].to_numpy().tolist() == [["chr2", 20, 24]]
    run.predict(source, out=tmp_path / "o.bw", device="cpu")
    with pyBigWig.open(str(tmp_path / "o.bw")) as track:
        read = [track.values(row.record, row.start, row.stop) for row in table.itertuples()]
    assert all(np.ptp(one) == 0 or np.isnan(one).all() for one in read)
    np.testing.assert_array_equal([one[0] for one in read], table["value"].to_numpy().astype(np.float32))
    assert [len(one) for one in read][-1] == 1  # the last bin is as long as there are bases
    # counted from 1 in a region, from 0 in a BED file and in what is written; names with or without chr
    bed.write_text("2\t24\t40\tone\t0\t-\nchr10\t0\t16\n")
    parts = predicted(run, source, regions=["chr10:1-16", "10:5-12", bed])
    chunk = parts.iloc[:4]
    np.testing.assert_allclose(chunk["value"], table[table["record"] == "chr10"]["value"].iloc[:4], rtol=1e-5)
    places = [(row.record, row.start) for row in parts.itertuples()]
    assert places[4:10] == [("chr10", 4), ("chr10", 8), ("chr2", 24), ("chr2", 28), ("chr2", 32), ("chr2", 36)]
    with pytest.raises(
        UserError, match=r"'chr10', 4 to 12 is predicted twice.* finished before it, 4 places with a value, is in"
    ):
        run.predict(source, out=tmp_path / "p.bw", regions=["chr10:1-16", "10:5-12"], device="cpu")
    with pyBigWig.open(str(tmp_path / "p.partial.bw")) as track:
        assert track.chroms() == {"chr2": 50, "chr10": 21}  # all of the reference
        assert track.values("chr10", 0, 4) == [np.float32(chunk["value"].iloc[0])] * 4
    bed.write_text("chr10\t0\t22\n")
    for region, message in (
        (str(bed), "line 1: bases 1 to 22 are not all in 'chr10', which has 21"),
        ("chrX:1-2", "no sequence 'chrX'"),
        ("nothing", "is no sequence of"),
    ):
        with pytest.raises(DataError, match=message):
            run.predict(source, regions=region, device="cpu")


def test_both_strands_are_the_mean_of_two_calls(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = other_strand(source, tmp_path / "turned.fa")
    run = ms.load(labels(tmp_path / "m", length=0))
    one, two = predicted(run, source), predicted(run, turned)
    mean = predicted(run, source, both_strands=True)
    for record in ("chr2", "chr10"):
        forward, back, both = (table[table["record"] == record][CODING].to_numpy() for table in (one, two, mean))
        np.testing.assert_allclose(both, (forward + back[::-1][:, [0, 2, 1]]) / 2, rtol=1e-5)
    assert mean["note"].tolist() == one["note"].tolist()
    # a causal model's strands are read in parts, one from either end
    head = {"name": "lm", "vocab_size": 5}
    model = ms.load(saved(tmp_path / "l", head, BaseTokenizer(), task="next_token", **DNA))
    whole = predicted(model, source, both_strands=True, what="tokens")
    bits = [predicted(model, path, what="tokens") for path in (source, turned)]
    forward, back = ([np.nan, *table[table["record"] == "chr10"]["bits"]] for table in bits)
    ends = whole[whole["record"] == "chr10"]["bits"]
    np.testing.assert_allclose(ends, np.nanmean([forward, back[::-1]], axis=0), rtol=1e-5)
    rows = [predicted(model, path) for path in (source, turned)]
    both = predicted(model, source, both_strands=True)
    for name in ("bits_per_token", "total_bits"):
        np.testing.assert_allclose(both[name], (rows[0][name] + rows[1][name]) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        rows[0]["total_bits"],
        [bits[0][bits[0]["record"] == name]["bits"].sum() for name in ("chr2", "chr10")],
        rtol=1e-5,
    )
    monkeypatch.setattr(answers, "CHUNK", 8)
    again = predicted(model, source, both_strands=True, what="tokens")
    np.testing.assert_allclose(again["bits"], whole["bits"], rtol=1e-4)
    np.testing.assert_allclose(predicted(model, source, both_strands=True)["total_bits"], both["total_bits"], rtol=1e-5)


def test_classes_that_the_other_strand_exchanges_must_be_pairs(source: Path, tmp_path: Path) -> None:
    run = ms.load(labels(tmp_path / "two", strand_classes=[1, 0]))
    with pytest.raises(ConfigError, match="gives 3 numbers, but its strand_classes are 2"):
        run.predict(source, both_strands=True, device="cpu")
    with pytest.raises(UserError, match="strand_classes must pair numbers with each other"):
        ms.load(labels(tmp_path / "odd", strand_classes=[1, 2, 0])).predict(source, device="cpu")


def test_both_strands_of_a_model_that_treats_them_alike(source: Path, tmp_path: Path) -> None:
    encoder = {"name": "rc_tokens", "vocab_size": 6, "complement": [3, 2, 1, 0, 4, 5]}
    card = {"encoder": encoder, "backbone": RC, "length": 21, **DNA}
    head = {"name": "rc_lm", "vocab_size": 6, "complement": encoder["complement"]}
    masked = ms.load(saved(tmp_path / "m", head, BaseTokenizer(), task="masked", **card))
    head = {"name": "rc_classification", "n_classes": 3}
    classes = ms.load(saved(tmp_path / "c", head, BaseTokenizer(), class_names=list("abc"), **card))
    for run, options, column in (
        (classes, {}, "a"),
        (masked, {}, "total_bits"),
        (masked, {"what": "tokens"}, "bits"),
        (masked, {"what": "embeddings"}, "embedding_3"),
        (masked, {"what": "embeddings", "pool": "none"}, "embedding_12"),
        (masked, {"what": "embeddings", "pool": "none", "layer": 1}, "embedding_12"),
    ):
        one, both = predicted(run, source, **options), predicted(run, source, both_strands=True, **options)
        np.testing.assert_allclose(both[column], one[column], rtol=1e-3, atol=1e-5)
        assert np.nanstd(one[column].to_numpy().astype(float)) > 1e-4
    each = predicted(masked, source, what="tokens")
    assert each["note"].tolist() == [""] * 20 + ["not scored"] * 4 + [""] * 47
    sums = each.groupby(each.index // 21 * (each["record"] == "chr2"))["bits"].sum()
    assert sums.sum() == pytest.approx(predicted(masked, source)["total_bits"].sum(), rel=1e-5)


def test_embeddings_in_files_are_those_of_the_table(source: Path, tmp_path: Path) -> None:
    run = ms.load(labels(tmp_path / "m"))
    for pool in ("mean", "none"):
        table = run.embed(source, pool=pool, layer=1, device="cpu")
        assert table is not None
        run.embed(source, pool=pool, layer=1, device="cpu", out=tmp_path / "o.npz")
        run.embed(source, pool=pool, layer=1, device="cpu", out=tmp_path / "o.parquet")
        vectors = table.filter(like="embedding").to_numpy()
        found = np.load(tmp_path / "o.npz")
        np.testing.assert_array_equal(found["embedding"], vectors)
        assert found["record"].tolist() == table["record"].tolist()
        assert found["start"].tolist() == table["start"].tolist()
        np.testing.assert_array_equal(pandas.read_parquet(tmp_path / "o.parquet").filter(like="embedding"), vectors)
    assert len(table) == 71


def test_what_a_track_cannot_hold(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"name": "classification", "n_classes": 2}
    run = ms.load(saved(tmp_path / "c", head, BaseTokenizer(), class_names=["a", "b"], length=10, **DNA))
    run.predict(source, out=tmp_path / "windows.bed", device="cpu", window=12, stride=6)
    lines = [line.split("\t")[:3] for line in (tmp_path / "windows.bed").read_text().splitlines()]
    assert lines[:2] == [["chr2", "0", "12"], ["chr2", "6", "18"]]  # windows stay windows
    with pytest.raises(UserError, match="6 to 18 is predicted twice"):
        run.predict(source, out=tmp_path / "windows.bw", device="cpu", window=12, stride=6)
    with pytest.raises(ConfigError, match="only labels are to be written"):
        run.predict(source, out=tmp_path / "o.bedgraph", columns=["predicted"], device="cpu")
    with pytest.raises(ConfigError, match=r"holds a label for each place, but these are numbers"):
        ms.load(values(tmp_path / "v", 1)).predict(source, out=tmp_path / "v.bed", device="cpu")
    (tmp_path / "all_n.fa").write_text(f">n\n{'N' * 12}\n")
    with pytest.raises(DataError, match=r"so nothing was written: no token that is scored\. Mend"):
        run.predict(tmp_path / "all_n.fa", out=tmp_path / "n.bed", device="cpu", window=12)
    (tmp_path / "again.fa").write_text(">chr2\nACGTACGTACGT\n")
    with pytest.raises(UserError, match=r"its record 'chr2' has 12 bases, the one of .*in.fa 50"):
        run.predict(source, tmp_path / "again.fa", out=tmp_path / "two.bw", device="cpu")
    (tmp_path / "protein.fa").write_text(">p\nMKVLAADE\n")
    run.predict(tmp_path / "protein.fa", source, out=tmp_path / "good.BW", columns=["b"], skip_bad=True, device="cpu")
    with pyBigWig.open(str(tmp_path / "good.BW")) as track:
        assert track.chroms() == {"chr2": 50, "chr10": 21}
    (tmp_path / "spaces.csv").write_text("name,sequence\nthe first\tone,ACGTACGTACGT\n")
    run.predict(tmp_path / "spaces.csv", out=tmp_path / "spaces.bed", reader="dna/labelled", device="cpu", window=12)
    assert (tmp_path / "spaces.bed").read_text().startswith("the_first_one\t0\t12\t")
    monkeypatch.setitem(sys.modules, "pybigtools", None)
    with pytest.raises(UserError, match=r"pip install 'mambaseq\[dna\]'"):
        run.predict(source, out=tmp_path / "o.bw", device="cpu")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "o.", "v.", "n."))]


def test_the_page_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["other", "coding+", "coding-"]
    labels(tmp_path / "runs" / "genes", class_names=names, length=48)
    saved(tmp_path / "runs" / "genome", {"name": "lm", "vocab_size": 5}, BaseTokenizer(), task="next_token", **DNA)
    letters = "".join(np.random.default_rng(1).choice(list("ACGT"), 200))
    (tmp_path / "genome.fa").write_text(f">chr1\n{letters}\n")
    (tmp_path / "parts.bed").write_text("chr1\t0\t100\n")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "dna" / "outputs.md"
    commands = [line.split()[1:] for line in page.read_text().splitlines() if line.startswith("    mambaseq ")]
    assert [main(command) for command in commands] == [0] * 6
    assert len(pandas.read_csv("part.csv")) == 160
    with pyBigWig.open("genes.bw") as track:
        assert track.header()["nBasesCovered"] == 200
    assert np.load("vectors.npz")["embedding"].shape == (4, 8)
    assert len(Path("bits.bedgraph").read_text().splitlines()) == 199
    ((text, line),) = [(text, line) for language, text, line in blocks(page) if language == "python"]
    found: dict[str, Any] = {}
    run_cell(text, page, line, found)
    assert len(found["table"]) == 100
    assert found["vectors"].shape == (200, 8)


@pytest.mark.parametrize("count", [3, 1000, 70_000])
def test_a_bigwig_lists_sequences_without_values(tmp_path: Path, count: int) -> None:
    lengths = {f"scaffold{number}": 10 + number for number in range(count)}
    path, last = tmp_path / "a.bw", f"scaffold{count - 1}"
    with_values = sorted(["scaffold1", last])
    pybigtools.open(str(path), "w").write(
        {name: lengths[name] for name in with_values}, iter((name, 2, 5, 0.5) for name in with_values)
    )
    name_sequences(path, lengths)
    with pyBigWig.open(str(path)) as track:
        assert track.chroms() == lengths
        for name in with_values:
            np.testing.assert_array_equal(track.values(name, 1, 6), [np.nan, 0.5, 0.5, 0.5, np.nan])
        assert np.isnan(track.values("scaffold0", 0, 10)).all()
    assert dict(pybigtools.open(str(path)).chroms()) == lengths
    whole = path.read_bytes()
    assert whole[:4] == whole[-4:]
    name_sequences(path, lengths)
    assert path.read_bytes() == whole


def test_messages_count_what_is_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels(tmp_path / "m")
    for ending, told in (
        ("bed", "intervals (67 places with a label)"),
        ("bedgraph", "67 places with a value"),
        ("csv", "71 rows"),
    ):
        out = tmp_path / f"o.{ending}"
        assert main(["predict", "--checkpoint", str(tmp_path / "m"), str(source), "--out", str(out)]) == 0
        text = capsys.readouterr()
        assert told in text.out, ending
        assert f"4 of 71 {'rows' if ending == 'csv' else 'places'} have no prediction" in text.err
        if ending == "bed":
            assert text.out.startswith(f"{len(out.read_text().splitlines())} intervals")


def test_records_that_are_too_long_for_the_encoder_have_a_note(source: Path, tmp_path: Path) -> None:
    encoder = {"name": "dna/conv", "vocab_size": 5, "positions": 30}
    head = {"name": "classification", "n_classes": 2}
    run = ms.load(
        saved(tmp_path / "m", head, BaseTokenizer(), encoder=encoder, backbone=BOTH, class_names=["a", "b"], **DNA)
    )
    table = predicted(run, source)
    assert table["note"].tolist() == ["longer than the 30 tokens that the model reads at once (see --window)", ""]
    assert (predicted(run, source, window=30)["note"] == "").all()
