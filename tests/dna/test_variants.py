"""Scores of variants are what whole windows say, read one by one; tables, VCFs and pictures hold them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pysam
import pytest
import torch
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.vcf import Variant
from mambaseq_dna.tokenizer import BaseTokenizer
from mambaseq_dna.variants import scorers as scorers_module
from mambaseq_dna.variants import scoring as scoring_module
from mambaseq_dna.variants.commands import _told
from mambaseq_dna.variants.mutagenesis import mutagenesis
from mambaseq_dna.variants.scorers import INDEL_FLANK, Distance, scorer_of
from mambaseq_dna.variants.scoring import check_assembly, score_variants
from mambaseq_dna.variants.sites import Places, Site
from pages import blocks, run_cell

from mambaseq.checkpoints import LoadedModel, ModelCard, load_model, save_model
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, DataError
from mambaseq.models import build_model

LETTERS = "".join(np.random.default_rng(1).choice(list("ACGT"), 300)) + "NNNN" + "acgtgcta" * 12
WINDOW = 90
HEADER = "##fileformat=VCFv4.2\n##contig=<ID=1,length=400>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def model_at(folder: Path, task: str, head: dict[str, Any], backbone: str = "residual", **more: Any) -> Path:
    strands = backbone == "reverse_complement"
    vocabulary = 8 if task == "masked" else 5  # as of imported models, whose mask token is the last
    both = {"complement": [3, 2, 1, 0, 4, 5, 6, 7][:vocabulary]} if strands else {}
    encoder = {"name": "rc_tokens" if strands else "tokens", "vocab_size": vocabulary, **both}
    if head["name"] in ("lm", "rc_lm"):
        head = {**head, "vocab_size": vocabulary, **both}
    spec = {
        "d_model": 8,
        "encoder": encoder,
        "backbone": {"name": backbone, "n_layers": 2, **more},
        "mixer": {"name": "mamba", "d_state": 4},
        "head": head,
    }
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():  # answers that differ
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = ["no", "yes"] if task == "classes" else []
    card = ModelCard(spec, {"name": "dna/base", "options": {}}, names, length=WINDOW, task=task)
    save_model(folder, model, card, BaseTokenizer())
    return folder


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("assembly") / "a.fa"
    path.write_text(f">chr1\n{LETTERS}\n")
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def ref(pos: int, length: int = 1) -> str:
    return LETTERS[pos - 1 : pos - 1 + length].upper()


def other(pos: int) -> list[str]:
    return [base for base in "ACGT" if base != ref(pos)]


def sites_of(fasta: Path, window: int = WINDOW) -> list[Site]:
    """An SNV with three alternatives, a deletion, an insertion beside an SNV, an MNV, and both ends of the sequence."""
    places = Places(Assembly(fasta), BaseTokenizer(), window)
    lines = [
        (100, ref(100), other(100)),
        (120, ref(120, 4), [ref(120)]),
        (150, ref(150), [ref(150) + "GAT", other(150)[0]]),
        (160, ref(160, 3), [other(160)[1] + ref(161) + other(162)[0]]),
        (1, ref(1), other(1)[:1]),
        (2, ref(2), [ref(2) + "A"]),
        (310, ref(310), other(310)[:1]),
        (len(LETTERS), ref(len(LETTERS)), other(len(LETTERS))[:2]),
    ]
    return [places.site([Variant("1", pos, one, alt) for alt in alts]) for pos, one, alts in lines]


def log_p(loaded: LoadedModel, ids: np.ndarray) -> float:
    """Of a whole window, whose first base and N do not count, read at once."""
    row = torch.from_numpy(ids.astype(np.int64))
    shares = loaded.model(row[None]).logits[0].double().log_softmax(-1)
    return sum(float(shares[place - 1, base]) for place, base in enumerate(ids.tolist()) if place and base != 4)


@pytest.mark.parametrize("pattern", [None, ["mamba", "attention"]])
@torch.no_grad()
def test_causal_ratios_are_those_of_whole_windows(
    pattern: list[str] | None, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in parts, a few rows at once, from forked states, on both strands."""
    monkeypatch.setattr(scorers_module, "CHUNK", 16)
    loaded = load_model(model_at(tmp_path / "m", "next_token", {"name": "lm"}, pattern=pattern))
    sites = sites_of(fasta)
    for one, two in zip(scorer_of(loaded, 200).effects(sites), scorer_of(loaded, 10**6).effects(sites), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    for site, found in zip(sites, scorer_of(loaded, 200).effects(sites), strict=True):
        both = [site, site.turned(BaseTokenizer())]
        expected = [
            np.mean([log_p(loaded, one.whole(one.alts[n])) - log_p(loaded, one.whole(one.ref)) for one in both])
            for n in range(len(site.alts))
        ]
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4, atol=2e-4)
        assert np.abs(found).min() > 1e-3  # it is not all the same


@torch.no_grad()
def test_masked_ratios_are_those_of_hidden_bases(fasta: Path, tmp_path: Path) -> None:
    loaded = load_model(model_at(tmp_path / "m", "masked", {"name": "lm"}, "bidirectional"))
    sites = sites_of(fasta)
    found = scorer_of(loaded, 400).effects(sites, both_strands=False)

    def hidden(ids: np.ndarray, places: list[int]) -> np.ndarray:
        row = torch.from_numpy(ids.astype(np.int64))
        row[places] = 7
        return loaded.model(row[None]).logits[0].double().log_softmax(-1).numpy()

    for site, one in zip(sites, found, strict=True):
        first = len(site.before)
        for alt, value in zip(site.alts, one[:, 0], strict=True):
            if len(alt) == len(site.ref):
                differ = [place for place in range(len(alt)) if alt[place] != site.ref[place]]
                shares = hidden(site.whole(site.ref), [first + place for place in differ])
                expected = sum(shares[first + p, alt[p]] - shares[first + p, site.ref[p]] for p in differ)
            else:
                totals = []
                for allele in (alt, site.ref):
                    whole, start = site.whole(allele), max(first - INDEL_FLANK, 0)
                    region = list(range(start, min(first + len(allele) + INDEL_FLANK, len(whole))))
                    parts = [[p for p in region[k::7] if whole[p] != 4] for k in range(7)]
                    shares = [hidden(whole, part) for part in parts]
                    totals.append(sum(of[part, whole[part]].sum() for of, part in zip(shares, parts, strict=True)))
                expected = totals[0] - totals[1]
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_both_strands_of_an_equivariant_model_are_one(fasta: Path, tmp_path: Path) -> None:
    loaded = load_model(model_at(tmp_path / "m", "masked", {"name": "rc_lm"}, "reverse_complement"))
    sites = sites_of(fasta)
    scorer = scorer_of(loaded, 10**6)
    turned = [
        site.turned(BaseTokenizer()) for site in sites[:1] + sites[3:5]
    ]  # regions of indels are read from the left
    for one, two in zip(scorer.effects(sites[:1] + sites[3:5]), scorer.effects(turned), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_answers_and_distances(fasta: Path, tmp_path: Path) -> None:
    loaded = load_model(
        model_at(tmp_path / "m", "classes", {"name": "classification", "n_classes": 2}, "bidirectional")
    )
    sites, text = sites_of(fasta), BaseTokenizer()

    def share(site: Site, allele: np.ndarray) -> float:
        row = torch.from_numpy(site.whole(allele).astype(np.int64))[None]
        return float(loaded.model(row).logits[0].softmax(-1)[1])

    scorer, apart = scorer_of(loaded, 300), Distance(loaded, 300)
    assert scorer.columns == ["delta_no", "delta_yes"]
    for both in (None, True):
        found = scorer.effects(sites, both_strands=both)
        for site, one in zip(sites, found, strict=True):
            seen = [site, site.turned(text)] if both else [site]
            expected = [np.mean([share(s, s.alts[n]) - share(s, s.ref) for s in seen]) for n in range(len(site.alts))]
            np.testing.assert_allclose(one[:, 1], expected, atol=1e-5)
            np.testing.assert_allclose(one[:, 0], -one[:, 1], atol=1e-5)
    for site, one in zip(sites, apart.effects(sites, both_strands=False), strict=True):
        rows = [torch.from_numpy(site.whole(allele).astype(np.int64))[None] for allele in site.alleles]
        vectors = [loaded.model.backbone(loaded.model.encoder(row)).mean(1)[0] for row in rows]
        for vector, numbers in zip(vectors[1:], one, strict=True):
            cosine = torch.cosine_similarity(vector, vectors[0], dim=0)
            np.testing.assert_allclose(numbers, [float((vector - vectors[0]).norm()), 1 - float(cosine)], atol=1e-5)
    values = load_model(model_at(tmp_path / "v", "values", {"name": "regression", "n_outputs": 2}))
    scorer = scorer_of(values, 300)
    assert scorer.columns == ["delta_value_1", "delta_value_2"]
    for site, one in zip(sites, scorer.effects(sites), strict=True):
        rows = [torch.from_numpy(site.whole(allele).astype(np.int64))[None] for allele in site.alleles]
        told = torch.cat([values.model(row).logits for row in rows])
        np.testing.assert_allclose(one, told[1:] - told[:1], atol=1e-5)
    labels = load_model(model_at(tmp_path / "t", "labels", {"name": "token_classification", "n_classes": 2}))
    with pytest.raises(ConfigError, match="answers for each position"):
        scorer_of(labels, 300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return model_at(tmp_path_factory.mktemp("run") / "m", "next_token", {"name": "lm"})


def write_calls(path: Path) -> None:
    lines = [
        f"1\t100\trs1\t{ref(100)}\t{','.join(other(100))}\t9\tPASS\tDP=3",
        f"1\t101\t.\t{other(101)[0]}\t{ref(101)}\t.\t.\t.",  # a wrong REF
        f"1\t120\t.\t{ref(120, 3)}\t{ref(120)},*,<DEL>\t.\t.\t.",
        f"chr1\t100\t.\t{ref(100)}\t{other(100)[1]}\t.\t.\t.",  # by the other name
        f"1\t100\t.\t{ref(100)}\t{other(100)[1]}\t.\t.\t.",  # for the second time
        "1\t4000\t.\tA\tC\t.\t.\t.",
        "2\t7\t.\tA\tC\t.\t.\t.",
        f"1\t320\t.\t{ref(320)}\t{other(320)[0]}\t.\t.\t.",
    ]
    path.write_text(HEADER + "\n".join(lines) + "\n")


def test_a_file_of_variants(run: Path, fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_calls(calls := tmp_path / "calls.vcf")
    given = ["--checkpoint", str(run), "--reference", str(fasta), str(calls), "--window", "64", "--device", "cpu"]
    assert main(["dna", "variants", *given, "--what", "both", "--out", str(tmp_path / "s.tsv")]) == 0
    told = capsys.readouterr()
    assert "12 rows in" in told.out
    assert "5 of 12 have no score: 1 REF is" in told.err
    table = pandas.read_csv(tmp_path / "s.tsv", sep="\t", dtype={"chrom": str}, keep_default_na=False, na_values=[""])
    assert list(table.columns) == [
        *("chrom", "pos", "id", "ref", "alt", "line", "llr", "distance_l2", "distance_cosine", "n", "note")
    ]
    assert table.line.tolist() == [4, 4, 4, 5, 6, 6, 6, 7, 8, 9, 10, 11]
    scored = table.llr.notna()
    assert scored.tolist() == [True] * 3 + [False, True, False, False, True, True, False, False, True]
    assert table.note[8] == "the same as in line 4"
    assert table.note[3] == f"REF is {other(101)[0]}, but the reference has {ref(101)}"
    assert table.n.dropna().tolist() == [0] * 6 + [4]
    assert table.llr[7] == table.llr[8] == pytest.approx(table.llr[1], rel=1e-4)  # wherever it stands
    assert main(["dna/variants", *given, "--out", str(tmp_path / "s.vcf")]) == 0
    with pysam.VariantFile(str(tmp_path / "s.vcf")) as file:
        records = list(file)
    assert records[0].info["MS_llr"] == pytest.approx(table.llr[:3].tolist(), rel=1e-4)
    assert records[1].info["MS_note"] == (f"REF_is_{other(101)[0]}_but_the_reference_has_{ref(101)}",)
    assert records[2].info["MS_llr"][1:] == (None, None)


def test_files_are_scored_in_parts(run: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written does not depend on them, and no more than a part, with whole lines, is in memory."""
    write_calls(calls := tmp_path / "calls.vcf")
    text = calls.read_text()
    (tmp_path / "late.vcf").write_text(text + text.splitlines()[3] + "\n")  # repeated out of order
    endings, sizes = ("tsv", "parquet", "vcf"), []
    made = scoring_module._Block.__init__
    for at_once in (2, 1 << 15):
        monkeypatch.setattr(scoring_module, "_BLOCK", at_once)
        monkeypatch.setattr(
            scoring_module._Block,
            "__init__",
            lambda self, some, *more: (sizes.append(len(some)), made(self, some, *more))[1],
        )
        for source, wanted in ((calls, endings), (tmp_path / "late.vcf", endings[:1])):
            for ending in wanted:
                out = tmp_path / f"{source.stem}.{at_once}.{ending}"
                found = score_variants(run, fasta, source, out, window=64, progress=False, table=False)
                assert found.table is None
                assert found.rows == (12 if source == calls else 15)
        if at_once == 2:
            assert max(sizes) <= 4
    for ending in endings:
        one, other = (tmp_path / f"calls.{at_once}.{ending}" for at_once in (2, 1 << 15))
        if ending == "parquet":
            pandas.testing.assert_frame_equal(pandas.read_parquet(one), pandas.read_parquet(other), rtol=1e-4)
        else:
            numbers = re.compile(r"-?\d+\.\d+(e-\d+)?")
            assert numbers.sub("#", one.read_text()) == numbers.sub("#", other.read_text())
    late = pandas.read_csv(tmp_path / "late.2.tsv", sep="\t", keep_default_na=False)
    assert late.note.tolist()[-3:] == ["the same as in line 4"] * 3


def test_what_was_finished_is_kept(run: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_calls(calls := tmp_path / "calls.vcf")
    monkeypatch.setattr(scoring_module, "_GATHERED", 1)
    effects, count = scorers_module.Scorer.effects, iter(range(9))

    def interrupted(*options: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return effects(*options)

    monkeypatch.setattr(scorers_module.Scorer, "effects", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_variants(run, fasta, calls, tmp_path / "s.vcf", window=64, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.vcf", "s.partial.tsv"]
    kept = pandas.read_csv(tmp_path / "s.partial.tsv", sep="\t")
    assert kept.line.tolist() == [4, 4, 4, 5, 6]
    assert kept.llr.notna().tolist() == [True, True, True, False, True]


def test_what_is_refused(run: Path, fasta: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.vcf"
    wrong.write_text(HEADER + f"1\t100\t.\t{other(100)[0]}\t{ref(100)}\t.\t.\t.\n2\t5\t.\tA\tC\t.\t.\t.\n")
    with pytest.raises(DataError, match=r"None of the 2 variants in .*wrong.vcf can be scored \(1 REF is"):
        score_variants(run, fasta, wrong, tmp_path / "no.tsv", progress=False)
    assert not (tmp_path / "no.tsv").exists()
    for options, message in (
        ({"out": tmp_path / "s.xls"}, "must end in"),
        ({"out": wrong}, "is the input"),
        ({"window": 4}, "--window must be at least 8"),
        ({"pool": "last"}, "--pool and --layer are for"),
        ({"what": "all"}, "answers, embeddings or both, not 'all'"),
    ):
        with pytest.raises(ConfigError, match=message):
            score_variants(run, fasta, wrong, **options)  # type: ignore[arg-type]
    (tmp_path / "t.tsv").write_text(f"CHROM\tPOS\tREF\tALT\n1\t100\t{ref(100)}\t{other(100)[0]}\n")
    with pytest.raises(ConfigError, match="is a table, which has no VCF lines"):
        score_variants(run, fasta, tmp_path / "t.tsv", tmp_path / "s.vcf")
    assert main(["dna/variants", "--reference", str(fasta), "x.vcf"]) == 2


def test_misspelt_options_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dna/variants", "--ref", "x.fa", "x.vcf"]) == 2
    assert "Did you mean '--reference'? `" in capsys.readouterr().err


def test_mutagenesis_is_the_variants_of_a_region(run: Path, fasta: Path, tmp_path: Path) -> None:
    table = tmp_path / "ism.tsv"
    for picture in ("ism.svg", "ism.png"):
        command = ["dna", "mutagenesis", "--checkpoint", str(run), "--reference", str(fasta), "--region", "1:295-306"]
        command += ["--window", "64", "--device", "cpu", "--out", str(table), "--picture", str(tmp_path / picture)]
        assert main(command) == 0
    found = pandas.read_csv(table, sep="\t", keep_default_na=False, na_values=[""])
    assert found.position.tolist() == sorted([*range(295, 301), 305, 306] * 3 + [*range(301, 305)] * 4)
    assert (found.effect.isna() == found.note.notna()).all()
    assert found.note.dropna().unique().tolist() == ["the reference has N here"]
    known = found.dropna(subset=["effect"])
    lines = [f"chr1\t{row.position}\t{row.ref}\t{row.alt}" for row in known.itertuples()]
    (tmp_path / "t.tsv").write_text("CHROM\tPOS\tREF\tALT\n" + "\n".join(lines))
    scores = score_variants(run, fasta, tmp_path / "t.tsv", window=64, progress=False).table
    np.testing.assert_allclose(known.effect, scores.llr, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "ism.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "ism.svg").read_bytes()
    for region, message in (
        ("1:0-5", "not within chr1"),
        ("1:390-500", "not within chr1"),
        ("1:9-5", "not within chr1"),
        ("chr1", "not written like"),
        ("chr3:1-5", "no sequence 'chr3'"),
        ("1:301-304", "only N"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            mutagenesis(run, fasta, region, progress=False)


def test_an_answer_is_chosen(fasta: Path, tmp_path: Path) -> None:
    model = model_at(tmp_path / "m", "classes", {"name": "classification", "n_classes": 2}, "bidirectional")
    options: dict[str, Any] = {"window": 64, "progress": False}
    yes, no = (mutagenesis(model, fasta, "1:20-24", answer=answer, **options) for answer in (None, "no"))
    np.testing.assert_allclose(yes.effect, -no.effect, atol=1e-6)
    assert yes.effect.abs().min() > 1e-6
    with pytest.raises(ConfigError, match=r"--answer 'nay' is not one of this model's.*delta_no, delta_yes"):
        mutagenesis(model, fasta, "1:20-24", answer="nay", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["next_token", "masked"])
def test_on_a_gpu(task: str, cuda: torch.device, full_precision: None, fasta: Path, tmp_path: Path) -> None:
    folder = model_at(tmp_path / "m", task, {"name": "lm"}, "residual" if task == "next_token" else "bidirectional")
    sites = sites_of(fasta)
    there, here = (scorer_of(load_model(folder, place), 400).effects(sites) for place in (cuda, "cpu"))
    for one, two in zip(there, here, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3)


def test_the_page_runs(run: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "runs" / "genome")
    shutil.copy(fasta, tmp_path / "genome.fa")
    write_calls(tmp_path / "calls.vcf")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "dna" / "variants.md"
    commands = [line.split()[1:] for line in page.read_text().splitlines() if line.startswith("    mambaseq ")]
    assert [main(command) for command in commands] == [0] * 4
    ((text, line),) = [(text, line) for language, text, line in blocks(page) if language == "python"]
    names: dict[str, Any] = {}
    run_cell(text, page, line, names)
    assert len(names["found"].table) == 12
    assert len(names["effects"]) == 60


def test_another_assembly_is_noticed() -> None:
    """A quarter of the bases of another assembly agree by chance: most REFs differ, and the rest is no answer."""
    differ = ["REF is A, but the reference has C"] * 30
    with pytest.raises(DataError, match=r"The REF of 30 of the 40 variants in calls.vcf .* agree by chance"):
        check_assembly(Path("calls.vcf"), [*differ, *[""] * 10, "not within chr1, which has 9 bases"])
    check_assembly(Path("calls.vcf"), [*differ, *[""] * 40])
    told = _told({differ[0]: 3, "REF is G, but the reference has T": 1, "ALT is the same as REF": 9}, 40)
    assert told.startswith("13 of 40 have no score: 9 ALT is the same as REF; 4 REF is A, but the reference has C (and")
    assert told.endswith("Is the reference the assembly that they were called on?")
    unknown = {f"the reference has no sequence chr{number}": 2 for number in range(30)}
    told = _told({**unknown, "ALT is the same as REF": 9}, 99)
    assert told == (
        "69 of 99 have no score: 60 the reference has no sequence chr0, chr1, chr2, chr3, chr4 and 25 more; 9 ALT is "
        "the same as REF."
    )
