"""The recipe of yeast genes on made chromosomes: what it counts, and that it runs."""

from __future__ import annotations

import hashlib
import json
import lzma
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from mambaseq_dna.files.bed import read_bed
from mambaseq_dna.recipes import yeast_genes
from mambaseq_dna.recipes.tracks import write_bed
from mambaseq_dna.recipes.yeast_genes import NONE, Bases, Gene, Sizes, codon_counts, counted, gene_scores, read, scores

from mambaseq.reproduction.context import Context
from mambaseq.runs.prediction import predict


def test_gene_scores_by_hand():
    gene = Gene([(2, 5), (8, 10)], label=1)  # an intron of three bases
    told = np.array([0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0])
    assert gene_scores([gene], told).tolist() == [1, 1, 1, 3, 3, 1, 1]
    longer, intron = told.copy(), told.copy()
    longer[1], intron[6] = 1, 1
    assert gene_scores([gene], longer).tolist() == [1, 1, 0, 3, 3, 1, 1]  # it begins one base too early
    assert gene_scores([gene], intron).tolist() == [1, 1, 0, 3, 2, 1, 0]
    assert gene_scores([gene], np.where(told == 1, 2, told)).tolist() == [1, 0, 0, 3, 3, 1, 0]  # on the other strand


def test_scores_by_hand():
    labels = np.array([0, 0, 1, 1, 2, NONE])
    counts = counted(labels, np.array([0, 1, 1, 1, 0, 2]))
    assert counts.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    found = scores(counts)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert [found[f"f1_{name}"] for name in ("other", "plus", "minus")] == pytest.approx([1 / 2, 4 / 5, 0])
    assert found["macro_f1"] == pytest.approx(1.3 / 3)


def test_codon_counts_by_hand():
    ids = np.array([0, 1, 2, 3, 4, 0, 0, 0])  # A C G T N A A A
    (row,) = codon_counts(ids, np.array([4]), 8)  # the window is all of it; codons begin at 0 ... 5
    expected = np.zeros(192)
    expected[[0 * 64 + 0 * 16 + 1 * 4 + 2, 1 * 64 + 1 * 16 + 2 * 4 + 3, 2 * 64 + 0]] = 1  # ACG, CGT, AAA
    assert row.tolist() == expected.tolist()


class _Told(torch.nn.Module):
    """Says coding on + at each A, coding on - at each T, other else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(9.0))

    def forward(self, ids):
        classes = torch.tensor([1, 0, 0, 2, 0])[ids]
        return type("Output", (), {"logits": self.scale * torch.nn.functional.one_hot(classes, 3).float()})


def test_reading_gives_each_base_its_own_answer_and_both_strands_agree():
    ids = np.random.default_rng(0).integers(0, 4, 101).astype(np.uint8)
    sizes = Sizes(length=24, margin=5, batch_size=2, steps=1)
    one, both = (read(_Told(), ids, sizes, both=how) for how in (False, True))
    assert np.array_equal(one.argmax(1), np.array([1, 0, 0, 2])[ids])
    assert np.allclose(one, both)  # A on one strand is T on the other


def test_windows_turn_labels_with_the_strand():
    ids = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.tensor([1, 0, 0, 2])[ids.long()].to(torch.uint8)  # a class by the base, so it can be seen
    labels[::7] = NONE
    batch = yeast_genes.windows_of(Bases(ids, labels), Sizes(30, 0, 64, 1), seed=0)(torch.tensor(0))
    known = batch.targets != -100
    assert torch.equal(batch.targets[known], torch.tensor([1, 0, 0, 2])[batch.inputs][known])
    assert 0.8 < known.float().mean() < 0.9
    text = bytes(ids.tolist())
    there = torch.tensor([bytes(row.tolist()) in text for row in batch.inputs])
    back = torch.tensor([bytes((3 - row.flip(0)).tolist()) in text for row in batch.inputs])
    assert torch.equal(there, ~back)
    assert 20 < int(there.sum()) < 44


def test_the_recipe_runs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    fasta, gff = [], []
    for genome in ("Scer_S288C", "Spar_N44"):
        for number in ("I", "II", "IV", "V", "XIII"):
            name = f"{genome}_chr{number}"
            fasta.append(f">{name}\n{''.join(rng.choice(list('ACGT'), 300))}\n")
            for gene, (first, last, strand) in enumerate([(11, 100, "+"), (121, 150, "-"), (161, 190, "-")]):
                parent = f"{name}-{max(gene, 1) if strand == '-' else gene}"  # the last two are parts of one gene
                gff.append(
                    f"{name}\tx\tCDS\t{first}\t{last}\t.\t{strand}\t.\tID=c;Parent={parent}\n".replace("-2", "-1")
                )
    for name, lines in (("yeasts.fa.xz", fasta), ("yeasts.gff.xz", gff)):
        packed = lzma.compress("".join(lines).encode())
        (tmp_path / name).write_bytes(packed)
        monkeypatch.setitem(yeast_genes.BROUGHT, name, hashlib.sha256(packed).hexdigest())
    monkeypatch.setattr(yeast_genes, "DRAWN", ("IV", 50, 250))
    monkeypatch.setattr(yeast_genes, "GENOMES", ("Scer_S288C", "Spar_N44"))
    monkeypatch.setattr(yeast_genes, "CHROMOSOMES", ["I", "II", "IV", "V", "XIII"])
    for name, (make, _, wanted) in yeast_genes.MODELS.items():
        monkeypatch.setitem(yeast_genes.MODELS, name, (make, ["Scer_S288C"], wanted))
    _, alone, _, cnn = yeast_genes.MODELS
    names = [alone, cnn, yeast_genes.BOOSTED_FRAMES, yeast_genes.BOOSTED, yeast_genes.CONSTANT]
    context = Context(torch.device("cpu"), "tiny", [0], tmp_path / "out", names, data=tmp_path)
    (tmp_path / "out").mkdir()
    (table,) = yeast_genes.run(context)
    lines = {line.name: line.values for line in table.lines}
    assert list(lines) == names
    assert lines[yeast_genes.CONSTANT]["accuracy"] == [pytest.approx(0.5)]  # 90, 60 and 150 of 300 bases
    assert all(0 <= values["accuracy"][0] <= 1 for values in lines.values())
    (folder,) = (tmp_path / "out" / "models").iterdir()
    card = json.loads((folder / "model.json").read_text())
    assert card["class_names"] == ["other", "coding on +", "coding on -"]
    assert card["strand_classes"] == [0, 2, 1]
    assert "chromosomes II, IV, XIII" in table.about
    found = predict(folder, [tmp_path / "yeasts.fa.xz"], tmp_path / "told.bed")
    assert found.rows == 3000
    assert all(interval.stop <= 300 for interval in read_bed(tmp_path / "told.bed"))
    drawn, bed = (tmp_path / "out" / "tracks" / f"{folder.name}{ending}" for ending in (".svg", ".bed"))
    assert "annotation" in ElementTree.fromstring(drawn.read_text()).attrib["aria-label"]
    assert {interval.chrom for interval in read_bed(bed)} <= {f"Scer_S288C_chr{number}" for number in yeast_genes.TEST}


def test_stretches_of_a_class_become_bed(tmp_path):
    shares = np.array([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0, 0.9, 0.1], [0, 0, 1], [0, 0, 1], [1, 0, 0]])
    write_bed(tmp_path / "a.bed", {"chr1": shares}, ["other", "coding on +", "coding on -"])
    found = [(i.chrom, i.start, i.stop, i.name, i.score, i.strand) for i in read_bed(tmp_path / "a.bed")]
    assert found == [("chr1", 1, 3, "coding on +", 850, "+"), ("chr1", 3, 5, "coding on -", 1000, "-")]
