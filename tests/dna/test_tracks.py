"""Targets of bases: what is painted from annotations, what is read from signals, and what windows make of them."""

from __future__ import annotations

import gzip
import pickle
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from mambaseq_dna import labels
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.bigwig import BigWig, pybigwig
from mambaseq_dna.labels import Classes, paint
from mambaseq_dna.signals import read_signal
from mambaseq_dna.tracks import AnnotatedData, SignalData

from mambaseq.errors import ConfigError, DataError, UserError
from mambaseq.models import build_model
from mambaseq.runs.parsing import parse_config
from mambaseq.tasks.fitting import check_data

GFF = "chr1\tx\t{}\t{}\t{}\t.\t{}\t.\tID=a\n"


@pytest.fixture
def fasta(tmp_path):
    (tmp_path / "a.fa").write_text(">chr1\nACGTNNACGTAC\n>chr2\nGGGGCCCC\n")
    return tmp_path / "a.fa"


def painted(fasta, text, features, name="a.gff3", **options):
    path = fasta.with_name(name)
    path.write_text(text)
    stranded = options.pop("stranded", False)
    classes = Classes(features, stranded)
    return classes, paint(Assembly(fasta), [path], classes, **options)


def test_gff_counts_from_1_and_bed_from_0(fasta):
    gff = GFF.format("CDS", 3, 5, "+") + GFF.format("CDS", 5, 6, "-") + GFF.format("gene", 1, 12, "+")
    classes, runs = painted(fasta, gff, {"coding": "CDS"}, stranded=True)
    assert classes.names == ["other", "coding on +", "coding on -"]
    assert classes.partners == [0, 2, 1]
    # bases 3 to 5 are places 2 to 4; base 5 is on both strands, and the one on + comes first
    assert runs["chr1"].read(0, 12).tolist() == [0, 0, 1, 1, 1, 2, 0, 0, 0, 0, 0, 0]
    assert runs["chr1"].read(-1, 4).tolist() == [-100, 0, 0, 1, 1]
    assert runs["chr2"].read(6, 10).tolist() == [0, 0, -100, -100]
    _, runs = painted(
        fasta, "chr1\t2\t5\tCDS\t0\t+\nchr1\t4\t6\tCDS\t0\t-\n", {"coding": "CDS"}, "a.bed", stranded=True
    )
    assert runs["chr1"].read(0, 12).tolist() == [0, 0, 1, 1, 1, 2, 0, 0, 0, 0, 0, 0]


def test_overlaps_by_priority_left_out_or_kept(fasta):
    bed = "1\t0\t6\texon\n1\t4\t8\trepeat_1\n1\t5\t9\texon\n"  # chr1 and 1 are the same
    features = {"repeat": ["repeat_*"], "exon": ["exon"]}
    _, runs = painted(fasta, bed, features, "a.bed")
    assert runs["chr1"].read(0, 12).tolist() == [2, 2, 2, 2, 1, 1, 1, 1, 2, 0, 0, 0]
    _, runs = painted(fasta, bed, features, "a.bed", overlap="ignore")
    assert runs["chr1"].read(0, 12).tolist() == [2, 2, 2, 2, -100, -100, -100, -100, 2, 0, 0, 0]
    _, runs = painted(fasta, bed, features, "a.bed", several=True)
    assert runs["chr1"].read(3, 10).tolist() == [[0, 1], [1, 1], [1, 1], [1, 1], [1, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.bed",
            "chr1\t2\t5\tCDS\t0\t+\nchr1\t8\t13\tCDS\t0\t-\n",
            ["a.bed, line 2", "8 to 13", "beyond its end", "12"],
        ),
        (
            "a.bed",
            "chr1\t2\t5\tCDS\t0\t+\nchr3\t1\t2\tCDS\t0\t+\n",
            ["a.bed, line 2", "no sequence 'chr3'", "chr1, chr2"],
        ),
        ("a.gff", GFF.format("CDS", 3, 5, "."), ["a.gff, line 1", "has a strand", "data.stranded"]),
        ("a.gff", GFF.format("cds", 3, 5, "+"), ["a.gff", "'CDS'", "Did you mean 'cds'"]),
        ("a.gtf", "chr1\tx\tCDS\t3\n", ["a.gtf, line 1", "4 columns"]),
        ("a.txt", "chr1\t2\t5\tCDS\n", ["a.txt", ".gff3", "ending"]),
    ],
)
def test_bad_annotations_are_named(fasta, name, text, words):
    with pytest.raises(UserError) as error:
        painted(fasta, text, {"coding": ["CDS"]}, name, stranded=True)
    assert all(word in str(error.value) for word in words)
    assert len(str(error.value)) < 1000


def test_sequences_that_the_assembly_has_not_are_left_out_on_request(fasta, caplog):
    _, runs = painted(fasta, "chr3\t1\t2\tCDS\nchr1\t1\t2\tCDS\n", {"coding": "CDS"}, "a.bed", unplaced="drop")
    assert runs["chr1"].read(0, 3).tolist() == [0, 1, 0]
    assert "1 intervals are left out: they are on chr3" in caplog.text


@pytest.fixture
def signals(tmp_path):
    """The same values as bedGraph and as bigWig."""
    rows = [("chr1", 1, 3, 0.5), ("chr1", 3, 4, -2.0), ("chr1", 8, 12, 7.25), ("chr2", 0, 8, 1.0)]
    text = "track type=bedGraph\n" + "".join(f"{name}\t{start}\t{stop}\t{value}\n" for name, start, stop, value in rows)
    (tmp_path / "a.bedGraph.gz").write_bytes(gzip.compress(text.encode()))
    file = pybigwig().open(str(tmp_path / "a.bw"), "w")
    file.addHeader([("chr1", 12), ("chr2", 8)])
    names, starts, stops, values = (list(column) for column in zip(*rows, strict=True))
    file.addEntries(names, starts, ends=stops, values=values)
    file.close()
    return tmp_path


def test_bigwig_and_bedgraph_are_the_same(fasta, signals):
    nan = float("nan")
    expected = np.array([nan, 0.5, 0.5, -2, nan, nan, nan, nan, 7.25, 7.25, 7.25, 7.25], np.float32)
    for name in ("a.bedGraph.gz", "a.bw"):
        signal = pickle.loads(pickle.dumps(read_signal(Assembly(fasta), signals / name)))
        np.testing.assert_array_equal(signal.read("chr1", 0, 12), expected)
        np.testing.assert_array_equal(signal.read("chr1", -2, 14), np.pad(expected, 2, constant_values=nan))
        np.testing.assert_array_equal(signal.read("chr2", 6, 9), np.array([1, 1, nan], np.float32))
        data = SignalData(
            str(fasta),
            {"x": str(signals / name)},
            length=4,
            stride=4,
            test_records="chr1",
            validation_fraction=0.0,
            cache=str(signals),
        )
        assert data.n_outputs == 1
        (one, two, three) = (data.test()[i] for i in range(3))
        # the mean of 0.5, 0.5 and -2; no value; a base without one (place 8 to 11 have 7.25)
        np.testing.assert_allclose(torch.cat([b.targets for b in (one, two, three)])[:, 0, 0], [-1 / 3, nan, 7.25])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.bedGraph", "chr1\t1\t3\t1\nchr1\t2\t4\t2\n", ["line 2", "overlaps that of line 1"]),
        ("a.bedGraph", "chr1\t1\t3\tx\n", ["line 1", "'chr1\\t1\\t3\\tx'"]),
        ("a.bedGraph", "chr1\t1\t3\tnan\n", ["line 1", "'nan'"]),
        ("a.bedGraph", "chr1\t1\t3\t1\nchr1\t3\t4\t-1e300\n", ["a.bedGraph, line 2", "'-1e300' is beyond 1e+09"]),
        ("a.bedGraph", "chr1\t1\t13\t1\n", ["line 1", "beyond its end"]),
        ("a.bdg", "chr9\t1\t3\t1\n", ["a.bdg, line 1", "no sequence 'chr9'"]),
        ("a.bw", "chr1\t1\t3\t1\n", ["a.bw", "cannot be read as bigWig"]),
        ("a.wig", "", ["a.wig", ".bedGraph"]),
    ],
)
def test_bad_signals_are_named(fasta, name, text, words):
    path = fasta.with_name(name)
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_signal(Assembly(fasta), path)
    assert all(word in str(error.value) for word in words)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("value", [-2e9, float("inf")])
def test_a_bigwig_with_too_large_a_value_is_refused(tmp_path, value):
    file = pybigwig().open(str(tmp_path / "a.bw"), "w")
    file.addHeader([("chr1", 12)])
    file.addEntries(["chr1"] * 2, [0, 4], ends=[4, 8], values=[1e9, value])
    file.close()
    big = BigWig(tmp_path / "a.bw")
    assert big.read("chr1", 0, 4).tolist() == [1e9] * 4
    with pytest.raises(DataError, match=r"a\.bw: 'chr1' has the value (-2e\+09|inf) at 4 .* beyond 1e\+09"):
        big.read("chr1", 2, 12)


def test_a_bigwig_of_another_assembly_is_refused(tmp_path, signals):
    (tmp_path / "b.fa").write_text(">chr1\nACGTACGTACGTAC\n>chr2\nGGGGCCCC\n")
    with pytest.raises(DataError, match=r"'chr1' has 12 bases, but the assembly's 'chr1' has 14"):
        read_signal(Assembly(tmp_path / "b.fa"), signals / "a.bw")


def test_without_pybigwig_the_extra_is_named(fasta, signals, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyBigWig", None)
    with pytest.raises(UserError, match=r"pip install 'mambaseq\[dna\]'"):
        BigWig(signals / "a.bw")


def long_genome(tmp_path):
    """A genome whose bases say their class: A coding on +, T coding on -, C and G other, with some N."""
    rng = np.random.default_rng(0)
    letters = {name: rng.choice(list("ACGT"), 400) for name in ("chr1", "chr2", "chr3")}
    rows = {"bed": [], "plus": [], "minus": []}
    for name, sequence in letters.items():
        for place, base in enumerate(sequence):
            if base in "AT":
                strand = "+" if base == "A" else "-"
                rows["bed"].append(f"{name}\t{place}\t{place + 1}\tgene\t0\t{strand}\n")
                rows["plus" if base == "A" else "minus"].append(f"{name}\t{place}\t{place + 1}\t{place % 5}\n")
        sequence[100:130] = "N"
    (tmp_path / "g.fa").write_text("".join(f">{name}\n{''.join(of)}\n" for name, of in letters.items()))
    (tmp_path / "g.bed").write_text("".join(rows["bed"]))
    for strand in ("plus", "minus"):
        (tmp_path / f"{strand}.bedGraph").write_text("".join(rows[strand]))
    return {name: "".join(of) for name, of in letters.items()}


def annotated(tmp_path, **options):
    options = {"length": 64, "test_records": ["chr2"], "validation_fraction": 0.25, "stranded": True} | options
    return AnnotatedData(
        str(tmp_path / "g.fa"), str(tmp_path / "g.bed"), {"gene": "gene"}, cache=str(tmp_path), **options
    )


def test_windows_of_either_strand_have_their_labels(tmp_path):
    letters = long_genome(tmp_path)
    data = annotated(tmp_path)
    train = pickle.loads(pickle.dumps(data.train()))  # as loader workers get it
    of_base = torch.tensor([1, 0, 0, 2, -100])
    turned = 0
    texts = [letters["chr1"][:300], letters["chr3"][:300]]
    for i in range(60):
        batch = train[i]
        assert torch.equal(batch.targets, of_base[batch.inputs])
        window = data.tokenizer.decode(batch.inputs[0].numpy())
        turned += not any(window in text for text in texts)
    assert 15 < turned < 45
    assert data.class_names == ["other", "gene on +", "gene on -"]
    assert data.strand_classes == [0, 2, 1]
    seen = "".join(texts)
    plus, minus, n = (seen.count(base) for base in "ATN")
    assert data.class_counts == [
        (600 - n - plus - minus, plus + minus),
        (plus, 600 - n - plus),
        (minus, 600 - n - minus),
    ]


def test_several_labels_and_values_turn_with_the_strand(tmp_path):
    long_genome(tmp_path)
    several = annotated(tmp_path, several=True, stride=4)
    assert several.class_names == ["gene on +", "gene on -"]
    files = {name: str(tmp_path / f"{name}.bedGraph") for name in ("plus", "minus")}
    values = SignalData(
        str(tmp_path / "g.fa"),
        files,
        [["minus", "plus"]],
        length=64,
        stride=4,
        test_records="chr2",
        cache=str(tmp_path),
    )
    labels, numbers = several.train(), values.train()
    for i in range(30):
        bins = labels[i].inputs.view(-1, 4)
        expected = torch.stack([(bins == base).any(1) for base in (0, 3)], 1).long()
        expected[(bins == 4).all(1)] = -100
        assert torch.equal(labels[i].targets[0], expected)
        assert labels[i].stride == 4
        bins = numbers[i].inputs.view(-1, 4)
        known = torch.stack([(bins == base).any(1) for base in (0, 3)], 1)
        assert torch.equal(~numbers[i].targets[0].isnan(), known)
    assert values.strand_classes == [1, 0]


def test_held_out_windows_score_every_base_once(tmp_path):
    letters = long_genome(tmp_path)
    data = annotated(tmp_path, margin=12)
    test = data.test()
    assert len(test) == 10  # 400 bases in middles of 40
    found = torch.cat([test[i].targets[0, 12:52] for i in range(len(test))])
    codes = data.tokenizer.encode(letters["chr2"]).astype(np.int64)
    assert torch.equal(found, torch.tensor([1, 0, 0, 2, -100])[torch.from_numpy(codes)])
    assert all((test[i].targets[0, :12] == -100).all() and (test[i].targets[0, 52:] == -100).all() for i in range(10))
    first, last = test[0].inputs[0], test[9].inputs[0]
    assert first[:12].tolist() == [4] * 12  # N before the first base
    assert torch.equal(first[12:], torch.from_numpy(codes[:52]))
    assert last[-12:].tolist() == [4] * 12
    # the validation part is the last quarter of each training record, and nothing before it is read
    validation = data.validation()
    assert len(validation) == 6
    assert validation[0].inputs[0, :12].tolist() == [4] * 12
    assert len(annotated(tmp_path, margin=12, n_test=3).test()) == 3


def test_bins_have_the_class_of_most_bases(tmp_path):
    long_genome(tmp_path)
    targets = annotated(tmp_path, stride=4).targets
    found = targets.binned(np.array([0, 0, 1, 1, 0, 0, 0, 1, -100, -100, -100, 2, -100, -100, -100, -100, 1, 2, 2, 1]))
    assert found.tolist() == [1, 0, 2, -100, 1]  # at equal counts the first class, and other last


def test_settings_that_do_not_fit_are_named(tmp_path):
    long_genome(tmp_path)
    for options, words in [
        ({"stride": 5}, "multiples of data.stride"),
        ({"margin": 32}, "less than half"),
        ({"stranded": ["genes"]}, "data.stranded names 'genes'.*Did you mean 'gene'"),
        ({"overlap": "last"}, "data.overlap"),
    ]:
        with pytest.raises(ConfigError, match=words):
            annotated(tmp_path, **options).setup()
    with pytest.raises(ConfigError, match=r"data.strand_pairs names 'left'"):
        SignalData(str(tmp_path / "g.fa"), {"x": "x.bw"}, [["x", "left"]])


def test_the_examples_of_the_page_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    genome = "".join(f">{name}\n{''.join(rng.choice(list('ACGT'), 13_000))}\n" for name in ("chrI", "chrIV", "chrV"))
    (tmp_path / "genome.fa.gz").write_bytes(gzip.compress(genome.encode()))
    genes = GFF.format("CDS", 99, 1400, "+") + GFF.format("CDS", 2001, 3000, "-")
    (tmp_path / "genes.gff3").write_text(genes.replace("chr1", "chrI"))
    (tmp_path / "genes.bed").write_text("I\t10\t500\tgene\nIV\t0\t13000\tgene\n")
    (tmp_path / "repeats.bed.gz").write_bytes(gzip.compress(b"chrI\t0\t100\tTY1\nchrI\t300\t400\tLTR_solo\n"))
    file = pybigwig().open("plus.bw", "w")
    file.addHeader([("chrIV", 13_000)])
    file.addEntries(["chrIV"], [0], ends=[13_000], values=[2.0])
    file.close()
    (tmp_path / "minus.bedGraph").write_text("IV\t64\t128\t3\n")
    page = Path(__file__).parents[2] / "docs" / "dna" / "tracks.md"
    found = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    small = ["--model.d_model", "8", "--model.backbone.n_layers", "1"]
    configs = []
    for text, options in zip(found, ([*small, "--model.head.class_weights", "balanced"], [], small), strict=True):
        (tmp_path / "page.yaml").write_text(text)
        configs.append(parse_config("page.yaml", options))
    genes, repeats, values = configs
    for config in (genes, values):
        data = config.make_data(setup=True)
        check_data(build_model(config.model_spec(data)), data, "of the page", config.make_metrics(data))
    data = genes.make_data(setup=True)
    assert genes.model_spec(data)["head"]["n_classes"] == 3
    balanced = genes.model_spec(data)["head"]["class_weights"]
    assert balanced == pytest.approx([13_000 / (3 * count) for count in (10_698, 1302, 1000)])
    assert data.test()[0].targets.shape == (1, 12_288)
    data = repeats.make_data(setup=True)
    assert data.class_names == ["other", "transposon", "gene"]
    # 10 to 100 and 300 to 400 are both, and left out
    runs = [(1, 10), (-100, 90), (2, 200), (-100, 100), (2, 100), (0, 100)]
    expected = [label for label, length in runs for _ in range(length)]
    assert data.targets.read("chrI", 0, 600).tolist() == expected
    data = values.make_data(setup=True)
    first = data.test()[0].targets[0]
    assert first[0].tolist() == [2, 3]  # of the bases that have a value
    assert first[1, 0] == 2
    assert first[1, 1].isnan()
    assert values.model_spec(data)["head"]["n_outputs"] == 2


@pytest.mark.parametrize("runs_at_once", [3, 1 << 16])
def test_classes_of_random_intervals_base_by_base(monkeypatch: pytest.MonkeyPatch, runs_at_once: int) -> None:
    monkeypatch.setattr(labels, "_RUNS", runs_at_once)
    rng = np.random.default_rng(0)
    for _ in range(20):
        starts = rng.integers(0, 55, 25)
        rows = np.stack([starts, np.minimum(starts + rng.integers(1, 9, 25), 60), rng.integers(1, 4, 25)], 1)
        covers = np.zeros((60, 4), bool)
        for start, stop, number in rows.tolist():
            covers[start:stop, number] = True
        first = covers.argmax(1)
        several = labels._painted(rows, 60, 4, "priority", True).read(0, 60)
        assert several.tolist() == covers[:, 1:].astype(int).tolist()
        assert labels._painted(rows, 60, 4, "priority", False).read(0, 60).tolist() == first.tolist()
        ignored = np.where(covers.sum(1) > 1, -100, first)
        assert labels._painted(rows, 60, 4, "ignore", False).read(0, 60).tolist() == ignored.tolist()


@pytest.mark.parametrize("kind", ["bedgraph", "bed"])
def test_large_files_take_few_bytes_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    count = 4000
    (tmp_path / "a.fa").write_text(f">chr1\n{'A' * 2 * count}\n")
    path = tmp_path / f"a.{kind}"
    told = "0.5" if kind == "bedgraph" else "exon"
    path.write_text("".join(f"chr1\t{2 * number}\t{2 * number + 1}\t{told}\n" for number in range(count)))
    for name in ("PIECE", "_PACKED_PIECE"):
        monkeypatch.setattr(f"mambaseq.data.unpacking.{name}", 4096)
    monkeypatch.setattr(labels, "_RUNS", 1024)
    assembly, classes = Assembly(tmp_path / "a.fa"), Classes({"exon": "exon"})
    tracemalloc.start()
    try:
        found = read_signal(assembly, path) if kind == "bedgraph" else paint(assembly, [path], classes)["chr1"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found is not None
    assert peak < 170 * count  # a tuple of numbers for each line takes more than twice as much
