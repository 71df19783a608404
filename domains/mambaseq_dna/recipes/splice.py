"""Splice sites: windows of primate genes (UCI, Towell, Noordewier and Shavlik 1991), and what models of these windows
find on contiguous sequence of Drosophila."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import softmax

from mambaseq.errors import DataError, shown
from mambaseq.models import build_model
from mambaseq.reproduction import Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import of_arrays
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_dna.baselines.linear import logistic
from mambaseq_dna.cnn import SmallCNN
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.bed import text_lines
from mambaseq_dna.files.gff import read_gff
from mambaseq_dna.recipes.common import probabilities
from mambaseq_dna.tokenizer import BASES, BaseTokenizer, fold_case

CLASSES = ("EI", "IE", "N")
LENGTH = 60
HALF = LENGTH // 2  # a site is between the bases HALF - 1 and HALF of its window
CHROMOSOME, SEQUENCE = "chr2L", "dm6_chr2L_1_1000000"  # in the annotation and in the FASTA file
DM6 = (
    "of github.com/lcdb/lcdb-test-data at 88d63ad, data/seq/dm6.small.fa (upper case) or data/annotation/dm6.small.gtf "
    "(exons), packed by xz"
)
BROUGHT = {
    "splice.arff": (
        "7e9b1b59c6731059f40bf16874fcac85af43fa65504b05cc6517b1a4c70fd99a",
        "classification/splice.arff of github.com/renatopp/arff-datasets at c59f172",
    ),
    "dm6_2Mb.fa.xz": ("0a7b60a5db87f8bcf34e763ad049fffea783f34e5864a7af95bf1a6290ca77ef", DM6),
    "dm6_2Mb.gtf.xz": ("1738816dacff9c255cc98fa6b595f936f2373c6bacb13ce1a1fb179df6996bbb", DM6),
}
LOGISTIC, CNN, MAMBA = "one-hot logistic regression", "CNN", "Mamba, both ways"
TEST_SHARE = 0.2

Tell = Callable[[np.ndarray], np.ndarray]
"""Ids of windows `(windows, LENGTH)` uint8 → probabilities of CLASSES, `(windows, 3)`."""


class Windows(NamedTuple):
    """ids `(windows, LENGTH)` uint8, labels `(windows,)` int64, genes `(windows,)`: three letters of a locus' name."""

    ids: np.ndarray
    labels: np.ndarray
    genes: np.ndarray


def read_windows(path: Path) -> Windows:
    """The windows of the ARFF file. Their names hold the class and are used for genes alone: HUMHBA4 and CHPHBA are
    HBA."""
    tokenizer, ids, labels, genes = BaseTokenizer(), [], [], []
    for number, line in text_lines(path):
        cells = line.split(",")
        if line.startswith(("@", "%")) or not line.strip():
            continue
        if len(cells) != LENGTH + 2 or cells[-1].strip() not in CLASSES:
            raise DataError(f"{path}, line {number:,}: {shown(line)} is not a name, {LENGTH} bases and a class.")
        ids.append(tokenizer.encode("".join(cells[1:-1])))
        labels.append(CLASSES.index(cells[-1].strip()))
        genes.append(cells[0].partition("-")[0][3:6])
    return Windows(np.stack(ids), np.array(labels), np.array(genes))


class Sites(NamedTuple):
    """The places of one strand where a donor (GT behind it) or acceptor (AG before it) can be: windows `(places,
    LENGTH)`, and whether there is one, `(places,)` bool."""

    ids: np.ndarray
    true: np.ndarray


def introns(path: Path, chromosome: str) -> set[tuple[int, int, str]]:
    """Start, stop and strand of what is between the exons of a transcript, once."""
    exons: dict[str, list[tuple[int, int, str]]] = {}
    for feature in read_gff(path, {"exon"}):
        if feature.chrom == chromosome:
            exons.setdefault(feature.attributes["transcript_id"][0], []).append(
                (feature.start, feature.stop, feature.strand)
            )
    return {
        (before[1], behind[0], before[2])
        for of in exons.values()
        for before, behind in itertools.pairwise(sorted(of))
        if before[1] < behind[0]
    }


def candidates(assembly: Assembly, found: set[tuple[int, int, str]], sequence: str) -> tuple[Sites, Sites]:
    """All possible donors and acceptors of both strands, with whole windows."""
    length = assembly.lengths[sequence]
    parts: tuple[list[Sites], list[Sites]] = ([], [])
    for strand in "+-":
        ids = fold_case(assembly.read(sequence, 0, length, strand))
        own = [one for one in found if one[2] == strand]
        spans = [(start, stop) if strand == "+" else (length - stop, length - start) for start, stop, _ in own]
        pairs = ids[:-1].astype(int) * len(BASES) + ids[1:]
        views = np.lib.stride_tricks.sliding_window_view(ids, LENGTH)
        for kind, (word, shift) in enumerate((("GT", 0), ("AG", 2))):
            code = BASES.index(word[0]) * len(BASES) + BASES.index(word[1])
            places = np.flatnonzero(pairs == code) + shift
            places = places[(places >= HALF) & (places <= length - HALF)]
            true = np.isin(places, [span[kind] for span in spans])
            parts[kind].append(Sites(views[places - HALF], true))
    donors, acceptors = (Sites(*(np.concatenate(column) for column in zip(*of, strict=True))) for of in parts)
    return donors, acceptors


def one_hot(ids: np.ndarray) -> np.ndarray:
    """`(windows, LENGTH)` → `(windows, 4 * LENGTH)` float32; N is nothing."""
    return (ids[..., None] == np.arange(4)).reshape(len(ids), -1).astype(np.float32)


def fitted(context: Context, name: str, ids: np.ndarray, labels: np.ndarray, seed: int) -> Tell:
    """A model of windows, trained."""
    if name == LOGISTIC:
        regression = logistic(one_hot(ids), labels, len(CLASSES), 0.1, scaled=False)
        return lambda some: np.concatenate([softmax(regression(one_hot(x)), axis=1) for x in _pieces(some)])
    torch.manual_seed(seed)
    model: Any
    if name == CNN:
        model = SmallCNN(len(CLASSES), context.at(full=128, small=64, tiny=8), len(BASES), LENGTH)
    else:
        model = build_model(
            {
                "d_model": context.at(full=64, small=32, tiny=8),
                "encoder": {"name": "tokens", "vocab_size": len(BASES)},
                "backbone": {
                    "name": "bidirectional",
                    "n_layers": context.at(full=3, small=2, tiny=1),
                    "dropout": 0.2,
                    "cuda_graph": False,
                },
                "mixer": {"name": "mamba"},
                "head": {"name": "classification", "n_classes": len(CLASSES), "pooling": "mean", "dropout": 0.2},
            }
        )
    model = model.to(context.device)
    steps = context.at(full=1_200, small=300, tiny=2)
    inputs, targets = (torch.from_numpy(of.astype(np.int64)).to(context.device) for of in (ids, labels))
    train(
        model,
        of_arrays(inputs, targets, None, context.at(full=64, small=32, tiny=4), seed),
        steps,
        OptimizerConfig(lr=2e-3, warmup_steps=steps // 10),
        label=f"{name}, seed {seed}",
    )
    return lambda some: probabilities(model, torch.from_numpy(some.copy()).to(context.device), 2**18, False)


def _pieces(ids: np.ndarray) -> list[np.ndarray]:
    return np.array_split(ids, max(len(ids) // 2**14, 1))


def held_out(windows: Windows, seed: int, by_gene: bool) -> np.ndarray:
    """A fifth of the windows, or of the genes with all of theirs: `(windows,)` bool."""
    rng = np.random.default_rng(seed)
    if not by_gene:
        return rng.permutation(len(windows.labels)) < TEST_SHARE * len(windows.labels)
    genes = np.unique(windows.genes)
    return np.isin(windows.genes, rng.permutation(genes)[: max(int(TEST_SHARE * len(genes)), 1)])


def run(context: Context) -> list[Table]:
    wanted = context.wanted((LOGISTIC, CNN, MAMBA))
    paths = {name: context.brought(name, *told) for name, told in BROUGHT.items()}
    windows = read_windows(paths["splice.arff"])
    assembly = Assembly(paths["dm6_2Mb.fa.xz"])
    found = introns(paths["dm6_2Mb.gtf.xz"], CHROMOSOME)
    sites = dict(zip(("donor", "acceptor"), candidates(assembly, found, SEQUENCE), strict=True))

    def trial(name: str, seed: int) -> dict[str, float]:
        from sklearn.metrics import average_precision_score, roc_auc_score

        values = {}
        for key, by_gene in (("random", False), ("genes", True)):
            test = held_out(windows, seed, by_gene)
            tell = fitted(context, name, windows.ids[~test], windows.labels[~test], seed)
            values[key] = float((tell(windows.ids[test]).argmax(1) == windows.labels[test]).mean())
        tell = fitted(context, name, windows.ids, windows.labels, seed)
        for label, (kind, of) in enumerate(sites.items()):
            scores = tell(of.ids)[:, label]
            values[f"{kind}_auc"] = float(roc_auc_score(of.true, scores))
            values[f"{kind}_ap"] = float(average_precision_score(of.true, scores))
        return values

    lines = [
        Line(name, context.over_seeds(name, lambda seed, _, name=name: trial(name, seed)))  # type: ignore[misc]
        for name in wanted
    ]
    columns = [
        Column("random", "accuracy, windows held out", 3),
        Column("genes", "accuracy, genes held out", 3),
        Column("donor_auc", "fly donors, AUROC", 3),
        Column("donor_ap", "fly donors, average precision", 3),
        Column("acceptor_auc", "fly acceptors, AUROC", 3),
        Column("acceptor_ap", "fly acceptors, average precision", 3),
    ]
    told = " and ".join(f"{int(of.true.sum()):,} {kind}s among {len(of.true):,}" for kind, of in sites.items())
    about = (
        f"{len(windows.labels):,} windows of {LENGTH} bases of primate genes: exon-intron (EI), intron-exon (IE), "
        "neither (N). A fifth is held out, of the windows, or of the genes with all of theirs: genes of one family are "
        "alike, and random windows leak. Then, trained on all of them, every place of the first million bases of "
        "chromosome 2L of Drosophila (dm6) with GT behind it or AG before it, on both strands: "
        f"{told}; a place that no transcript of the annotation uses counts as none. The fly data are too few to train "
        "on. Settings were not tuned."
    )
    return [Table("Splice sites", about, columns, lines)]


recipe = Recipe(run, seeds=3, brings=True)
