"""The recipe of splice sites: where windows are, and that it runs."""

from __future__ import annotations

import hashlib
import lzma

import numpy as np
import torch
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.recipes import splice

from mambaseq.reproduction.context import Context

EXON = 'chr2L\tx\texon\t{}\t{}\t.\t{}\t.\ttranscript_id "{}";\n'


def test_sites_are_at_the_middle_of_their_windows_on_either_strand(tmp_path):
    rng = np.random.default_rng(0)
    letters = rng.choice(list("CA"), 200)
    letters[60:62], letters[98:100] = list("GT"), list("AG")  # an intron on +, [60, 100)
    letters[120:122], letters[148:150] = list("CT"), list("AC")  # one on -, [120, 150), read from its end
    (tmp_path / "a.fa").write_text(f">chr2L\n{''.join(letters)}\n")
    exons = EXON.format(41, 60, "+", "a") + EXON.format(101, 110, "+", "a")  # bases 41 to 60 are [40, 60)
    exons += EXON.format(151, 170, "-", "b") + EXON.format(111, 120, "-", "b")
    (tmp_path / "a.gtf").write_text(exons)
    found = splice.introns(tmp_path / "a.gtf", "chr2L")
    assert found == {(60, 100, "+"), (120, 150, "-")}
    donors, acceptors = splice.candidates(Assembly(tmp_path / "a.fa"), found, "chr2L")
    assert (donors.ids[:, 30:32] == [2, 3]).all()  # GT
    assert (acceptors.ids[:, 28:30] == [0, 2]).all()  # AG
    assert donors.true.sum() == acceptors.true.sum() == 2
    codes = np.array(["ACGT".index(base) for base in letters])
    assert donors.ids[donors.true].tolist() == [codes[30:90].tolist(), (3 - codes[120:180][::-1]).tolist()]
    assert acceptors.ids[acceptors.true].tolist() == [codes[70:130].tolist(), (3 - codes[90:150][::-1]).tolist()]


def test_the_recipe_runs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [
        f"HUM{gene}1-DONOR-{i},{','.join(rng.choice(list('ACGTD'), 60))},{splice.CLASSES[i % 3]}\n"
        for i, gene in enumerate(["HBA", "HBB", "ALB", "INS", "MYC", "FOS"] * 5)
    ]
    genome = "".join(rng.choice(list("ACGT"), 400))
    genome = genome[:100] + "GT" + genome[102:198] + "AG" + genome[200:]
    files = {
        "splice.arff": ("% a comment\n@relation splice\n@data\n" + "".join(rows)).encode(),
        "dm6_2Mb.fa.xz": lzma.compress(f">{splice.SEQUENCE}\n{genome}\n".encode()),
        "dm6_2Mb.gtf.xz": lzma.compress((EXON.format(50, 100, "+", "a") + EXON.format(201, 250, "+", "a")).encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        monkeypatch.setitem(splice.BROUGHT, name, (hashlib.sha256(content).hexdigest(), "made here"))
    windows = splice.read_windows(tmp_path / "splice.arff")
    assert windows.ids.shape == (30, 60)
    assert windows.ids.max() == 4  # D is one of three bases
    test = splice.held_out(windows, 0, by_gene=True)
    assert not set(windows.genes[test]) & set(windows.genes[~test])
    (tmp_path / "out").mkdir()
    (table,) = splice.run(Context(torch.device("cpu"), "tiny", [0], tmp_path / "out", data=tmp_path))
    assert [line.name for line in table.lines] == [splice.LOGISTIC, splice.CNN, splice.MAMBA]
    assert all(0 <= value[0] <= 1 for line in table.lines for value in line.values.values())
    assert "1 donors among" in table.about
