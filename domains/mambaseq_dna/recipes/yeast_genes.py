"""Genes of baker's yeast: every base of three held-out chromosomes as coding on either strand, or other.

Genomes and annotation: Yue et al., "Contrasting evolutionary genome dynamics between domesticated and wild yeasts",
Nature Genetics 49, 2017. There is no published result with this split; what the model has to beat is measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.atomic import atomic_file
from mambaseq.batch import Batch
from mambaseq.benchmarking.block import autocast
from mambaseq.checkpoints.card import ModelCard
from mambaseq.checkpoints.export import save_model
from mambaseq.data.drawing import below, words
from mambaseq.models import SequenceModel, build_model
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import BatchOf, numbers
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_dna.files.assembly import Assembly
from mambaseq_dna.files.gff import read_gff
from mambaseq_dna.frames import FrameEncoder, frame_features
from mambaseq_dna.labels import Classes, Runs, paint
from mambaseq_dna.recipes.common import other_strand, turned
from mambaseq_dna.recipes.dilated import dilated_cnn
from mambaseq_dna.recipes.tracks import picture, write_bed
from mambaseq_dna.tokenizer import BaseTokenizer, N, fold_case

SOURCE = (
    "the genomes (or annotations) of github.com/yjx1217/Yeast_PacBio_2016 at fabfe0f, data/Nuclear_Genome, "
    "data/Nuclear_GFF and data/Sarb_ReAnnotation, in one file, names as >Scer_S288C_chrI, packed by xz"
)
BROUGHT = {
    "yeasts.fa.xz": "5d4876c3cc99778b2856ff6d32d7e22f0966a87119e2d005d403e775a14a2d1a",
    "yeasts.gff.xz": "a8bfd611eb0af09805d7edf02263d17742d76491dc60e45bf8546370927541f3",
}
CEREVISIAE = ("S288C", "DBVPG6044", "DBVPG6765", "SK1", "Y12", "YPS128")
PARADOXUS = ("CBS432", "N44", "YPS138")
REFERENCE = "Scer_S288C"
# Without UWOPS034614, UFRJ50816 and UWOPS919171, whose chromosomes are rearranged: words of 24 bases show that parts of
# what is held out are on their other chromosomes (of UWOPS919171 chromosome XIII from 440 kb on).
GENOMES = (*(f"Scer_{one}" for one in CEREVISIAE), *(f"Spar_{one}" for one in PARADOXUS), "Sarb_Sarb")
CHROMOSOMES = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV", "XV", "XVI"]
TEST = ("II", "IV", "XIII")
VALIDATION = ("V",)
DRAWN = ("IV", 460_000, 500_000)

CLASSES = Classes({"coding": ["CDS"]}, stranded=True)
NONE = len(CLASSES.names)  # among labels in one byte: a base without one
READ_TOGETHER = 2**18  # bases
BOOSTED_WINDOW, BOOSTED_TRAIN, BOOSTED_TEST = 300, 60_000, 20_000


class Bases(NamedTuple):
    """Bases `(n,)` uint8 and the class of each, `(n,)` uint8; NONE for N and between chromosomes."""

    ids: Tensor
    labels: Tensor


class Gene(NamedTuple):
    """The coding parts of a gene, `[start, stop)`, in the order of the chromosome. label: its class."""

    parts: list[tuple[int, int]]
    label: int


class Yeasts:
    """The genomes and their labels."""

    def __init__(self, context: Context) -> None:
        paths = {name: context.brought(name, sha256, SOURCE) for name, sha256 in BROUGHT.items()}
        self.assembly = Assembly(paths["yeasts.fa.xz"])
        self.annotation = paths["yeasts.gff.xz"]
        self.runs: dict[str, Runs] = paint(self.assembly, [self.annotation], CLASSES)
        self._genes: dict[str, dict[str, Gene]] = {}

    def chromosome(self, name: str, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Bases, upper case, and classes of a chromosome, with `pad` N before and behind it; uint8 both."""
        length = self.assembly.lengths[name]
        ids = fold_case(self.assembly.read(name, -pad, length + pad))
        labels = self.runs[name].read(-pad, length + pad)
        return ids, np.where((labels < 0) | (ids == N), NONE, labels).astype(np.uint8)

    def training(self, genomes: Sequence[str], pad: int, device: torch.device) -> Bases:
        """All chromosomes of some genomes that are for training, one behind the other, with N between them."""
        kept = [number for number in CHROMOSOMES if number not in (*TEST, *VALIDATION)]
        both = [self.chromosome(f"{genome}_chr{number}", pad) for genome in genomes for number in kept]
        return Bases(*(torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*both, strict=True)))

    def genes(self, name: str) -> list[Gene]:
        """The genes of a chromosome with their coding parts."""
        if not self._genes:
            for feature in read_gff(self.annotation, {"CDS"}):
                (parent,) = feature.attributes["Parent"]
                genes = self._genes.setdefault(feature.chrom, {})
                gene = genes.setdefault(parent, Gene([], 1 if feature.strand == "+" else 2))
                gene.parts.append((feature.start, feature.stop))
        return [Gene(sorted(gene.parts), gene.label) for gene in self._genes.get(name, {}).values()]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """length: bases of a window. margin: at either end of a tested window, read but not scored."""

    length: int
    margin: int
    batch_size: int
    steps: int


def windows_of(bases: Bases, sizes: Sizes, seed: int) -> BatchOf:
    """Windows at random places, one half of them as the other strand, where the coding strands are exchanged."""
    device = bases.ids.device
    within = torch.arange(sizes.length, device=device)
    partners = torch.tensor([*CLASSES.partners, NONE], device=device)
    known = torch.tensor([*range(NONE), -100], device=device)

    def batch_of(step: Tensor) -> Batch:
        random = words(seed, numbers(step, sizes.batch_size), 2)
        place = below(random[:, :1], len(bases.ids) - sizes.length + 1) + within
        ids, labels = bases.ids[place].long(), bases.labels[place].long()
        ids = turned(ids, random[:, 1])
        labels = torch.where(below(random[:, 1:], 2) == 0, partners[labels].flip(1), labels)
        return Batch(inputs=ids, targets=known[labels])

    return batch_of


@torch.no_grad()
def read(model: SequenceModel, ids: np.ndarray, sizes: Sizes, both: bool = True) -> np.ndarray:
    """Probabilities of the classes, `(length, classes)` float32, of a chromosome of ids `(length,)`.

    Windows overlap by their margins, so that each base is scored once, with bases (or N, beyond the ends) around it.
    both: the mean of both strands' answers.
    """
    device = next(model.parameters()).device
    step, margin = sizes.length - 2 * sizes.margin, sizes.margin
    count = -(-len(ids) // step)
    padded = np.full(count * step + 2 * margin, N, np.uint8)
    padded[margin : margin + len(ids)] = ids
    windows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(padded, sizes.length)[::step].copy())
    found = []
    for some in windows.to(device).long().split(max(READ_TOGETHER // sizes.length, 1)):
        with autocast(device):
            this = model(some).logits
            other = model(other_strand(some)).logits if both else None
        assert this is not None
        shares = this.float().softmax(-1)
        if other is not None:
            shares = (shares + other.float().softmax(-1).flip(1)[..., CLASSES.partners]) / 2
        found.append(shares[:, margin : margin + step].cpu())
    return torch.cat(found).flatten(0, 1)[: len(ids)].numpy()


def scores(counts: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1 of each class and their mean, of counts `(true, told)`."""
    right = counts.diagonal().astype(float)
    f1 = 2 * right / np.maximum(counts.sum(0) + counts.sum(1), 1)
    named = dict(zip(("f1_other", "f1_plus", "f1_minus"), f1.tolist(), strict=True))
    return {"accuracy": float(right.sum() / counts.sum()), "macro_f1": float(f1.mean()), **named}


def counted(labels: np.ndarray, told: np.ndarray) -> np.ndarray:
    """`(classes, classes)` how often a base of the first class is told to be of the second."""
    known = labels != NONE
    flat = labels[known].astype(np.int64) * NONE + told[known]
    return np.bincount(flat, minlength=NONE * NONE).reshape(NONE, NONE)


def gene_scores(genes: Sequence[Gene], told: np.ndarray) -> np.ndarray:
    """Genes; those of which nine tenths of the coding bases are told right; those that are told exactly, with both ends
    and all introns; bases of introns; those of them that are not told coding on the gene's strand; introns; those of
    which both splice sites are told exactly, and no base between them is told coding."""
    totals = np.zeros(7, np.int64)
    for gene in genes:
        first, last = gene.parts[0][0], gene.parts[-1][1]
        coding = np.zeros(last - first, bool)
        for start, stop in gene.parts:
            coding[start - first : stop - first] = True
        here = told[first:last] == gene.label
        ends = told[max(first - 1, 0) : first].tolist() + told[last : last + 1].tolist()
        exact = bool((here == coding).all()) and gene.label not in ends
        totals[:5] += 1, here[coding].mean() >= 0.9, exact, (~coding).sum(), (~here[~coding]).sum()
        for (_, start), (stop, _) in itertools.pairwise(gene.parts):
            if start < stop:
                around = here[start - first - 1 : stop - first + 1]
                totals[5:] += 1, around[0] and around[-1] and not around[1:-1].any()
    return totals


def _of_reference(numbers: Sequence[str]) -> list[str]:
    return [f"{REFERENCE}_chr{number}" for number in numbers]


def measured(yeasts: Yeasts, numbers: Sequence[str], tell: Callable[[str], np.ndarray]) -> dict[str, float]:
    """What a function from the name of a chromosome to the classes of its bases is right on, over some of S288C."""
    counts, genes = np.zeros((NONE, NONE), np.int64), np.zeros(7, np.int64)
    for name in _of_reference(numbers):
        labels = yeasts.chromosome(name)[1]
        told = tell(name)
        counts += counted(labels, told)
        genes += gene_scores(yeasts.genes(name), told)
    total, found, exact, intron_bases, passed_over, introns, spliced = genes.tolist()
    return {
        **scores(counts),
        "genes_found": found / max(total, 1),
        "genes_exact": exact / max(total, 1),
        "introns": passed_over / intron_bases if intron_bases else float("nan"),
        "spliced": spliced / introns if introns else float("nan"),
    }


def constant(yeasts: Yeasts) -> dict[str, float]:
    """The same class for every base: the one that does best on the test chromosomes."""

    def scored(label: int) -> dict[str, float]:
        return measured(yeasts, TEST, lambda name: np.full(len(yeasts.runs[name]), label, np.uint8))

    return max(map(scored, range(NONE)), key=lambda one: one["accuracy"])


def codon_counts(ids: np.ndarray, places: np.ndarray, window: int) -> np.ndarray:
    """How often each of the 64 codons begins at a first, second and third place of the windows around some bases:
    `(places, 192)` float32. ids: with at least half a window on either side."""
    starts = places[:, None] - window // 2 + np.arange(window - 2)
    first, second, third = (ids[starts + k].astype(np.int64) for k in range(3))
    code = (np.arange(window - 2) % 3) * 64 + first * 16 + second * 4 + third
    code[(first == N) | (second == N) | (third == N)] = 192
    rows = np.arange(len(places))[:, None] * 193
    return np.bincount((rows + code).ravel(), minlength=len(places) * 193).reshape(-1, 193)[:, :192].astype(np.float32)


def boosted(
    yeasts: Yeasts, seed: int, n_train: int, n_test: int, rounds: int, sizes: Sizes | None = None
) -> dict[str, float]:
    """Gradient boosting on codon counts of the 300 bases around a base, on bases drawn from all of S288C's.

    sizes: also on the open reading frames around a base, in such windows.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    rng = np.random.default_rng(seed)
    half = BOOSTED_WINDOW // 2

    def drawn(numbers: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
        pad = half if sizes is None else max(half, sizes.length)
        parts = [yeasts.chromosome(name, pad) for name in _of_reference(numbers)]
        ids, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        places = np.sort(rng.choice(np.flatnonzero(labels != NONE), n, replace=False))
        counts = codon_counts(ids, places, BOOSTED_WINDOW)
        return (counts if sizes is None else np.hstack((counts, frames_at(ids, places, sizes)))), labels[places]

    for_training = [number for number in CHROMOSOMES if number not in (*TEST, *VALIDATION)]
    classifier = HistGradientBoostingClassifier(random_state=seed, max_iter=rounds)
    classifier.fit(*drawn(for_training, n_train))
    features, labels = drawn(TEST, n_test)
    return scores(counted(labels, classifier.predict(features)))


def frames_at(ids: np.ndarray, places: np.ndarray, sizes: Sizes) -> np.ndarray:
    """What the reading frames around some bases say, `(places, features)` float32, in windows as those of a model: with
    at least `margin` bases on either side."""
    step = sizes.length - 2 * sizes.margin
    found = []
    for start in range(0, len(ids) - sizes.length + 1, step):
        first = start + sizes.margin
        here = places[(places >= first) & (places < first + step)]
        if len(here):
            window = torch.from_numpy(ids[start : start + sizes.length].astype(np.int64))
            found.append(frame_features(window[None])[0].numpy()[here - start])
    return np.concatenate(found)


def mamba(context: Context, frames: bool = True) -> SequenceModel:
    """Words of six bases at each base, and its open reading frames if wanted; layers that read codons both ways."""
    k = context.at(full=6, small=6, tiny=2)
    spec: dict[str, Any] = {
        "d_model": context.at(full=192, small=64, tiny=16),
        "encoder": {"name": "dna/frames", "k": k} if frames else {"name": "dna/kmer", "k": k, "stride": 1},
        "backbone": {
            "name": "dna/codons",
            "n_layers": context.at(full=8, small=4, tiny=1),
            "dropout": 0.1,
            "cuda_graph": False,
        },
        "mixer": {"name": "mamba"},
        "head": {"name": "token_classification", "n_classes": len(CLASSES.names), "dropout": 0.1},
    }
    return build_model(spec)


def cnn(context: Context) -> SequenceModel:
    """The same words and frames; a residual stack of dilated convolutions, which sees 4,094 bases to either side."""
    dilations = [2**i for i in range(context.at(full=11, small=8, tiny=2))]
    d_model = context.at(full=96, small=32, tiny=8)
    encoder = FrameEncoder(d_model, context.at(full=6, small=6, tiny=2))
    return dilated_cnn(encoder, len(CLASSES.names), d_model, dilations)


ALL, ALONE = f"{len(GENOMES)} genomes", "S288C alone"
# what is trained, on which genomes, and what is wanted
MODELS: dict[str, tuple[Callable[[Context], SequenceModel], Sequence[str], tuple[Bound, ...]]] = {
    f"Mamba over codons, {ALL}": (mamba, GENOMES, (Bound("accuracy", ">=", 0.97),)),
    f"Mamba over codons, {ALONE}": (mamba, [REFERENCE], ()),
    f"Mamba over codons without frames, {ALL}": (functools.partial(mamba, frames=False), GENOMES, ()),
    f"dilated CNN, {ALL}": (cnn, GENOMES, ()),
}
BOOSTED, BOOSTED_FRAMES = "gradient boosting, codon counts of 300 bases", "gradient boosting, codon counts and frames"
CONSTANT = "one class for all bases"


def trained(context: Context, yeasts: Yeasts, name: str, sizes: Sizes, seed: int, checkpoint: Path) -> dict[str, float]:
    """Train a model, export it to the run's folder, and measure it."""
    make, genomes, _ = MODELS[name]
    torch.manual_seed(seed)
    model = make(context).to(context.device)
    run = train(
        model,
        windows_of(yeasts.training(genomes, sizes.margin, context.device), sizes, seed),
        sizes.steps,
        OptimizerConfig(lr=1.5e-3, warmup_steps=min(200, sizes.steps // 2)),
        autocast=torch.bfloat16 if context.device.type == "cuda" else None,
        checkpoint=checkpoint,
        label=f"{name}, seed {seed}",
    )
    stem = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    if model.spec is not None:
        export(context.folder / "models" / stem, model, sizes)
    shares = {chromosome: read(model, yeasts.chromosome(chromosome)[0], sizes) for chromosome in _of_reference(TEST)}
    keep(context.folder / "tracks" / stem, yeasts, shares)
    found = measured(yeasts, TEST, {chromosome: of.argmax(1) for chromosome, of in shares.items()}.__getitem__)

    def told(chromosome: str, both: bool) -> np.ndarray:
        return read(model, yeasts.chromosome(chromosome)[0], sizes, both).argmax(1)

    one_way = measured(yeasts, TEST, lambda chromosome: told(chromosome, both=False))
    held_out = measured(yeasts, VALIDATION, lambda chromosome: told(chromosome, both=True))
    return {
        **found,
        "one_reading": one_way["accuracy"],
        "validation": held_out["accuracy"],
        "loss": run.loss,
        "parameters": model.n_parameters(),
        "steps_per_second": run.steps_per_second,
        "minutes": run.seconds / 60,
    }


def keep(stem: Path, yeasts: Yeasts, shares: Mapping[str, np.ndarray]) -> None:
    """Write what a model says of the test chromosomes as BED, and draw a part of the first."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_bed(stem.with_name(f"{stem.name}.bed"), shares, CLASSES.names)
    name = f"{REFERENCE}_chr{DRAWN[0]}"
    first, last = DRAWN[1], min(DRAWN[2], len(shares[name]))
    if first < last:
        labels, told = yeasts.chromosome(name)[1][first:last], shares[name][first:last].argmax(1)
        drawn = picture(labels, told, CLASSES.names, first, f"base of chromosome {DRAWN[0]}, S. cerevisiae S288C")
        with atomic_file(stem.with_name(f"{stem.name}.svg"), "w", encoding="utf-8") as file:
            file.write(drawn)


def export(folder: Path, model: SequenceModel, sizes: Sizes) -> None:
    """Write the model for `mambaseq predict`."""
    assert model.spec is not None
    card = ModelCard(
        spec=model.spec,
        tokenizer={"name": "dna/base", "options": {}},
        class_names=CLASSES.names,
        strand_classes=CLASSES.partners,
        length=sizes.length,
        reader="dna/fasta",
        task="labels",
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, card, BaseTokenizer())


def run(context: Context) -> list[Table]:
    sizes = context.at(full=Sizes(12_288, 2_048, 8, 4_000), small=Sizes(3_072, 512, 4, 300), tiny=Sizes(96, 24, 2, 2))
    n_train, n_test, rounds = context.at(
        full=(BOOSTED_TRAIN, BOOSTED_TEST, 300), small=(20_000, 5_000, 100), tiny=(100, 50, 2)
    )
    wanted = context.wanted([*MODELS, BOOSTED_FRAMES, BOOSTED, CONSTANT])
    yeasts = Yeasts(context)
    lines = []
    for name in wanted:
        if name == CONSTANT:
            lines.append(Line(name, {key: [value] for key, value in constant(yeasts).items()}))
        elif name in (BOOSTED, BOOSTED_FRAMES):
            frames = sizes if name == BOOSTED_FRAMES else None
            found = context.over_seeds(
                f"{name} n={n_train}",
                lambda seed, _, frames=frames: boosted(yeasts, seed, n_train, n_test, rounds, frames),  # type: ignore[misc]
            )
            lines.append(Line(name, found, note=f"{n_train:,} training bases, {n_test:,} test bases"))
        else:
            found = context.over_seeds(
                f"{name} steps={sizes.steps}",
                lambda seed, checkpoint, name=name: trained(context, yeasts, name, sizes, seed, checkpoint),  # type: ignore[misc]
            )
            lines.append(Line(name, found, wanted=MODELS[name][2]))
    columns = [
        Column("accuracy", "accuracy", 4),
        Column("macro_f1", "macro F1", 4),
        Column("f1_other", "F1 other", 3),
        Column("f1_plus", "F1 coding on +", 3),
        Column("f1_minus", "F1 coding on -", 3),
        Column("one_reading", "accuracy, one strand read", 4),
        Column("validation", "accuracy, chromosome V", 4),
        Column("genes_found", "genes, 9/10 of the bases", 1, percent=True),
        Column("genes_exact", "genes, exact", 1, percent=True),
        Column("introns", "intron bases not coding", 1, percent=True),
        Column("spliced", "introns, both splice sites exact", 1, percent=True),
        Column("parameters", "parameters", 0),
        Column("minutes", "minutes", 1),
    ]
    return [Table("Genes of S. cerevisiae, base by base", _about(sizes), columns, lines)]


def _about(sizes: Sizes) -> str:
    return (
        f"Every base of the chromosomes {', '.join(TEST)} of S. cerevisiae S288C: {', '.join(CLASSES.names)} (CDS of "
        "the annotation; introns and all else are other, and no base is coding on both strands). Training on the other "
        f"chromosomes but {', '.join(VALIDATION)}, of S288C alone or of {len(GENOMES)} genomes (six strains of "
        "S. cerevisiae, three of S. paradoxus, S. arboricola), in which the same chromosomes are held out; "
        "UWOPS034614, UFRJ50816 and UWOPS919171 are left out, because they have parts of the held-out chromosomes on "
        f"others. Models read words of six bases and how far the open reading frames around each base reach; the line "
        f"without frames has the words alone. Windows of {sizes.length:,} bases, "
        f"{sizes.steps:,} steps of {sizes.batch_size}, one half as the other strand; bf16 on a GPU. Tested in windows "
        f"that overlap by {2 * sizes.margin:,} bases, answers of both strands averaged. A gene is exact if every base "
        "from before its start to behind its end is told right for its strand; there are 1,534 genes with 71 introns. "
        "Settings were chosen by chromosome "
        f"{', '.join(VALIDATION)}. No result with this split is published."
    )


recipe = Recipe(run, seeds=3, brings=True)
