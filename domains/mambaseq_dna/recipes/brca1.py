"""BRCA1 saturation genome editing (Findlay et al., Nature 562:217, 2018): 3,893 variants of 13 exons, scored without
training on them, and by classifiers that have not seen the exon; beside what a reviewer asks for."""

from __future__ import annotations

import csv
import lzma
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mambaseq.checkpoints import LoadedModel, ModelCard
from mambaseq.errors import UserError
from mambaseq.metrics.bootstrap import Bootstrap, interval
from mambaseq.metrics.ranking import areas, roc_area
from mambaseq.models import SequenceModel, build_model
from mambaseq.reproduction import Column, Context, Line, Recipe, Table, train
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_dna.baselines.examples import Examples
from mambaseq_dna.baselines.kmers import summed, tallied
from mambaseq_dna.baselines.linear import logistic
from mambaseq_dna.files.fasta import read_fasta
from mambaseq_dna.recipes import human
from mambaseq_dna.recipes.common import VOCABULARY, Stretches
from mambaseq_dna.recipes.mammals import mammals
from mambaseq_dna.tokenizer import BaseTokenizer
from mambaseq_dna.variants.scorers import Distance, Scorer, scorer_of
from mambaseq_dna.variants.sites import Site

TABLE = "brca1_sge.tsv.xz"
TABLE_SHA256 = "b2ba2900f60cd48e75f11eec03142d6acc2177baf6b6957b42d9591512ccf7fb"
TABLE_SOURCE = (
    "the supplementary table of Findlay et al., in the GitHub repository ArcInstitute/evo2, commit "
    "53f195997257c56c00e5ef8d33a54f5baad143a6, notebooks/brca1/41586_2018_461_MOESM3_ESM.xlsx, as tab-separated text "
    "with pos_hg38 and offset_in_fasta before its columns, compressed with xz"
)
REFERENCE = "brca1_chr17_42425000_43600000.fa.xz"
REFERENCE_SHA256 = "fa3902c1935ea13cd8a112a1415cd0982191b45a9e3c8bb07a421aa4fc614cbb"
REFERENCE_SOURCE = "GRCh38 chr17:42,425,000-43,600,000, the forward strand, as FASTA of one record, compressed with xz"
_CLASSIFIED = 512  # bases of the windows whose embeddings classifiers read


class Variants(NamedTuple):
    """The table, and where its variants are. offset: of each variant's base in the reference, from 0. ref, alt: ids.
    loses: whether it is LOF (against FUNC and INT). exon, consequence: names. scores: of published predictors, higher
    where a loss is likelier. reference: ids, uint8."""

    offset: np.ndarray
    ref: np.ndarray
    alt: np.ndarray
    loses: np.ndarray
    exon: np.ndarray
    consequence: np.ndarray
    scores: dict[str, np.ndarray]
    reference: np.ndarray

    def sites(self, window: int) -> tuple[list[Site], np.ndarray]:
        """A site for each changed base, and for each variant its row in the concatenated answers of the sites."""
        ids, sites, row, rows = self.reference, [], 0, np.empty(len(self.offset), dtype=np.int64)
        for place in np.unique(self.offset):
            (of,) = np.nonzero(self.offset == place)
            left, right = max(place - (window - 1) // 2, 0), min(place + 1 + window // 2, len(ids))
            alts = tuple(self.alt[number : number + 1] for number in of)
            sites.append(Site(ids[left:place], ids[place : place + 1], alts, ids[place + 1 : right]))
            rows[of] = row + np.arange(len(of))
            row += len(of)
        return sites, rows


def load(context: Context) -> Variants:
    """The variants. Raises UserError if the user has not brought both files (`Context.brought`)."""
    path = context.brought(TABLE, TABLE_SHA256, TABLE_SOURCE)
    tokenizer = BaseTokenizer()
    (record,) = read_fasta(context.brought(REFERENCE, REFERENCE_SHA256, REFERENCE_SOURCE), tokenizer)
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    predictors = {"CADD": "CADD.score", "phyloP": "phyloP (mammalian)"}
    assert record.ids is not None
    found = Variants(
        columns["offset_in_fasta"].astype(np.int64),
        tokenizer.encode("".join(columns["reference"])),
        tokenizer.encode("".join(columns["alt"])),
        columns["func.class"] == "LOF",
        columns["experiment"],
        columns["consequence"],
        {name: columns[key].astype(np.float64) for name, key in predictors.items()},
        record.ids,
    )
    assert (found.reference[found.offset] == found.ref).all(), "reference and table do not belong together"
    return found


# What is measured.


def measured(variants: Variants, score: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve for LOF, its 95% interval (positions are drawn, since three variants share each), and
    the area among missense and among other variants alone. score: higher where a loss is likelier."""
    scores = torch.from_numpy(np.asarray(score, dtype=np.float64))[:, None]
    labels = torch.from_numpy(variants.loses.astype(np.int64))[:, None]
    _, position = np.unique(variants.offset, return_inverse=True)
    draws = torch.cat(list(Bootstrap(len(score), position)))
    drawn = interval(areas(scores, labels, draws, roc_area).numpy())
    missense = variants.consequence == "Missense"
    parts = {"auroc": np.ones(len(score), bool), "missense": missense, "others": ~missense}
    found = {
        name: float(areas(scores[of], labels[of], torch.ones(1, int(of.sum())), roc_area)) for name, of in parts.items()
    }
    return found | {"low": drawn.low if drawn else math.nan, "high": drawn.high if drawn else math.nan}


def exon_left_out(features: np.ndarray, variants: Variants, strength: float) -> np.ndarray:
    """For each variant the log-odds of a loss by logistic regression on the variants of all other exons.

    features: `(variants, n)`, standardised by those of the other exons. strength: C, not tuned.
    """
    found, loses = np.zeros(len(features)), variants.loses.astype(np.int64)
    for exon in np.unique(variants.exon):
        out = variants.exon == exon
        said = logistic(features[~out], loses[~out], 2, strength)(features[out])
        found[out] = said[:, 1] - said[:, 0]
    return found


def classes_of(variants: Variants) -> np.ndarray:
    """The class of consequence as 0 and 1, `(variants, classes)`."""
    return (variants.consequence[:, None] == np.unique(variants.consequence)).astype(np.float64)


def bases_around(variants: Variants, reach: int = 20) -> np.ndarray:
    """Bases from `reach` before to `reach` after, and the alternative, as 0 and 1."""
    places = variants.offset[:, None] + np.arange(-reach, reach + 1)
    ids = np.concatenate([variants.reference[places], variants.alt[:, None]], axis=1)
    return (ids[..., None] == np.arange(4)).reshape(len(ids), -1).astype(np.float64)


def markov(variants: Variants, order: int) -> np.ndarray:
    """log P(alternative) - log P(reference) by a Markov model of the reference, counts plus one half."""
    reference = Examples.of(variants.reference[None], np.zeros(1))
    counts = tallied(reference, order + 1, 1, both_strands=False).reshape(-1, 4).astype(np.float64) + 0.5
    table = np.log(counts / counts.sum(1, keepdims=True)).reshape(-1, 1)
    around = variants.reference[variants.offset[:, None] + np.arange(-order, order + 1)]
    changed = around.copy()
    changed[:, order] = variants.alt
    total = [summed(Examples.of(some), order + 1, table)[:, 0] for some in (changed, around)]
    return total[0] - total[1]


BASELINES: dict[str, tuple[str, Callable[[Variants], np.ndarray]]] = {
    "CADD": ("0.804", lambda variants: variants.scores["CADD"]),
    "phyloP": ("0.781", lambda variants: variants.scores["phyloP"]),
    "consequence class, exon left out": ("0.700", lambda variants: exon_left_out(classes_of(variants), variants, 1.0)),
    "bases around, exon left out": ("", lambda variants: exon_left_out(bases_around(variants), variants, 1e-2)),
    "consequence class and bases around, exon left out": (
        "",
        lambda variants: (
            exon_left_out(classes_of(variants), variants, 1.0) + exon_left_out(bases_around(variants), variants, 1e-2)
        ),
    ),
    "Markov, order 6": ("0.461", lambda variants: -markov(variants, 6)),
    "Markov, order 8": ("0.460", lambda variants: -markov(variants, 8)),
}

# Our models.


class Way(NamedTuple):
    """A model, and how it is pretrained."""

    task: str
    parts: dict[str, Any]
    steps: int


_COMPLEMENT = [3, 2, 1, 0, 4, 5]
WAYS = {
    "causal": Way(
        "next_token",
        {
            "d_model": 256,
            "encoder": {"name": "tokens", "vocab_size": VOCABULARY},
            "backbone": {"name": "residual", "n_layers": 6},
            "head": {"name": "lm", "vocab_size": VOCABULARY},
        },
        2_000,
    ),
    "masked": Way(  # the same on either strand
        "masked",
        {
            "d_model": 128,
            "encoder": {"name": "rc_tokens", "vocab_size": VOCABULARY, "complement": _COMPLEMENT},
            "backbone": {"name": "reverse_complement", "n_layers": 4},
            "head": {"name": "rc_lm", "vocab_size": VOCABULARY, "complement": _COMPLEMENT},
        },
        1_200,
    ),
}


def make_model(context: Context, way: Way) -> tuple[SequenceModel, dict[str, Any]]:
    """A new model on the device, and its description."""
    spec = {**way.parts, "mixer": {"name": "mamba", "d_state": 16}}
    spec["d_model"] = context.at(full=spec["d_model"], small=64, tiny=8)
    spec["backbone"] = {**spec["backbone"], "n_layers": context.at(full=spec["backbone"]["n_layers"], small=2, tiny=1)}
    return build_model(spec).to(context.device), spec


def pretraining_data(context: Context, length: int) -> tuple[Stretches, Stretches]:
    """Human DNA to train on, chromosome 22 and the ENCODE regions, none of which is on chromosome 17; and chromosome
    22's test blocks."""
    blocks, species = human.load(context), mammals(context)
    which = species.names.index("human")
    shift = len(blocks.tokens)
    places = [blocks.places(0), *(of[which] + shift for of in (species.train, species.validation, species.test))]
    tokens = torch.cat([blocks.tokens, species.tokens])
    return Stretches(tokens, [np.concatenate(places)], length), Stretches(blocks.tokens, [blocks.places(2)], length)


Data = Callable[[Context, int], tuple[Stretches, Stretches]]


def pretrained(context: Context, name: str, seed: int, data: Data = pretraining_data) -> LoadedModel:
    """A model after its pretraining, which is done once."""
    way = WAYS[name]
    path = context.folder / f"pretrained-{name}-{seed}.safetensors"
    length, steps = context.at(full=2048, small=256, tiny=32), context.at(full=way.steps, small=300, tiny=2)
    batch_size = context.at(full=32, small=8, tiny=2)

    def run(checkpoint: Path) -> dict[str, float]:
        torch.manual_seed(seed)
        model, _ = make_model(context, way)
        source, held_out = data(context, length)
        kinds = [one.masked if way.task == "masked" else one.causal for one in (source, held_out)]
        found = train(
            model,
            kinds[0](batch_size, seed),
            steps,
            OptimizerConfig(lr=2e-3, weight_decay=0.1, warmup_steps=steps // 20),
            autocast=torch.bfloat16 if context.device.type == "cuda" else None,
            checkpoint=checkpoint,
            label=f"pretraining {name}",
        )
        save_file({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}, path)
        batch_of, losses = kinds[1](batch_size, seed), []
        with torch.no_grad():
            for number in range(context.at(full=40, small=10, tiny=1)):
                batch = batch_of(torch.tensor(number, device=context.device))
                losses.append(float(model(batch.inputs, batch.targets).loss))
        return {
            "bits": float(np.mean(losses)) / math.log(2),
            "train_bits": found.loss / math.log(2),
            "parameters": model.n_parameters(),
            "bases": float(steps * batch_size * length),
            "minutes": found.seconds / 60,
        }

    context.trial(f"pretraining {name} seed={seed}", run)
    if not path.exists():
        raise UserError(f"{path} is missing. Remove the trial 'pretraining {name} seed={seed}' of that folder, too.")
    loaded = untrained(context, name, seed)
    loaded.model.load_state_dict(load_file(path, device=str(context.device)))
    return loaded


def untrained(context: Context, name: str, seed: int) -> LoadedModel:
    """A model before its pretraining."""
    torch.manual_seed(seed)
    model, spec = make_model(context, WAYS[name])
    card = ModelCard(spec, {"name": "dna/base", "options": {}}, task=WAYS[name].task)
    return LoadedModel(model.eval(), card, BaseTokenizer(), context.folder)


def zero_shot(variants: Variants, scorer: Scorer, window: int) -> np.ndarray:
    """Minus the log-likelihood ratio of each variant, or the distance of its embedding."""
    sites, rows = variants.sites(window)
    found = np.concatenate(_effects(scorer, sites))[rows, 0]
    return -found if scorer.columns == ["llr"] else found


def _effects(scorer: Scorer, sites: Sequence[Site], together: int = 256) -> list[np.ndarray]:
    return [one for first in range(0, len(sites), together) for one in scorer.effects(sites[first : first + together])]


@torch.no_grad()
def embedded(variants: Variants, loaded: LoadedModel, tokens: int, window: int) -> np.ndarray:
    """For each variant, of both strands (a causal model sees one side on each): what the embedding of its base is, how
    far the alternative moves it, and how far it moves the window's mean."""
    sites, rows = variants.sites(window)
    base, whole = Distance(loaded, tokens, "variant"), Distance(loaded, tokens, "mean")
    parts = []
    for strand in (sites, [site.turned(BaseTokenizer()) for site in sites]) if base.one_strand else (sites,):
        vectors = base.vectors(strand)
        parts.append(np.concatenate([np.repeat(of[:1], len(of) - 1, axis=0) for of in vectors])[rows])
        parts += [np.concatenate([of[1:] - of[0] for of in some])[rows] for some in (vectors, whole.vectors(strand))]
    return np.concatenate(parts, axis=1)


# The tables.

_COLUMNS = [
    Column("auroc", "AUROC", 3),
    Column("low", "95 % from", 3),
    Column("high", "to", 3),
    Column("missense", "missense only", 3),
    Column("others", "all others only", 3),
]


def tables(context: Context, read: Callable[[], Variants], data: Data = pretraining_data) -> list[Table]:
    """All lines that are asked for. read: makes the variants, once the names of the lines are known to be right."""
    windows = context.at(full=(512, 2048, 8192, 16384), small=(128, 512), tiny=(16, 32))
    tokens = context.at(full=2**20, small=2**15, tiny=2**12)
    span = context.at(full=_CLASSIFIED, small=128, tiny=16)
    models: dict[tuple[str, int], LoadedModel] = {}
    memory: dict[tuple[str, int], np.ndarray] = {}

    def model(name: str, seed: int) -> LoadedModel:
        if (name, seed) not in models:
            models[name, seed] = pretrained(context, name, seed, data)
        return models[name, seed]

    def odds(name: str, seed: int) -> np.ndarray:
        if (name, seed) not in memory:
            memory[name, seed] = exon_left_out(embedded(variants, model(name, seed), tokens, span), variants, 1e-3)
        return memory[name, seed]

    def ratios(name: str, window: int, seed: int) -> np.ndarray:
        return zero_shot(variants, scorer_of(model(name, seed), tokens), window)

    def distances(name: str, seed: int) -> np.ndarray:
        return zero_shot(variants, Distance(model(name, seed), tokens, "variant"), span)

    def with_class(name: str, seed: int) -> np.ndarray:
        return odds(name, seed) + exon_left_out(classes_of(variants), variants, 1.0)

    def control(name: str, seed: int) -> np.ndarray:
        return exon_left_out(embedded(variants, untrained(context, name, seed), tokens, span), variants, 1e-3)

    ours: dict[str, Callable[[int], np.ndarray]] = {}
    for name in WAYS:
        ours |= {f"{name}, zero-shot, window {window:,}": partial(ratios, name, window) for window in windows}
        ours[f"{name}, zero-shot, embedding's distance"] = partial(distances, name)
        ours[f"{name}, embeddings, exon left out"] = partial(odds, name)
        ours[f"{name}, embeddings and consequence class, exon left out"] = partial(with_class, name)
        ours[f"untrained {name}, embeddings, exon left out"] = partial(control, name)
    wanted, variants = context.wanted([*ours, *BASELINES]), read()
    for name in WAYS:
        for seed in context.seeds if any(line.startswith(f"{name},") for line in wanted) else ():
            model(name, seed)

    def trial(of: Callable[[int], np.ndarray], seed: int, checkpoint: Path) -> dict[str, float]:
        return measured(variants, of(seed))

    lines = []
    for name in wanted:
        if name in ours:
            lines.append(Line(name, context.over_seeds(name, partial(trial, ours[name]))))
        else:
            paper, score = BASELINES[name]
            one = context.trial(name, partial(trial, lambda _, score=score: score(variants), 0))  # type: ignore[misc]
            lines.append(Line(name, {key: [value] for key, value in one.items()}, paper))
    lines.append(Line("Evo 2 1B base, zero-shot, window 8,192", {}, "0.73", note="published; not run here"))
    found = [Table("BRCA1 saturation editing: AUROC for loss of function", _about(context, variants), _COLUMNS, lines)]
    trained = [
        Line(f"{name} seed={seed}", {key: [value] for key, value in record["values"].items()})
        for name in WAYS
        for seed in context.seeds
        if (record := context.records.get(f"pretraining {name} seed={seed}")) is not None
    ]
    return [*found, Table("BRCA1: the pretrained models", _ABOUT_MODELS, _MODEL_COLUMNS, trained)] if trained else found


_MODEL_COLUMNS = [
    Column("bits", "bits a base, held out", 3),
    Column("train_bits", "bits a base, last training steps", 3),
    Column("parameters", "parameters", 0),
    Column("bases", "bases read", 0),
    Column("minutes", "minutes", 1),
]
_ABOUT_MODELS = (
    "Pretrained on human DNA: the training blocks of chromosome 22 and both ENCODE regions (chromosomes 7 and 5), "
    "no base of chromosome 17, windows of 2,048 bases at full scale. Held out are blocks at the end of chromosome "
    "22; an order-9 Markov model has 1.879 bits a base there. The masked model's bits are of hidden bases, which "
    "have both sides: not to be compared with the causal one's."
)


def _about(context: Context, variants: Variants) -> str:
    return (
        f"{len(variants.offset):,} single-base variants at {len(np.unique(variants.offset)):,} positions of "
        f"{len(np.unique(variants.exon))} exons, {int(variants.loses.sum()):,} of them LOF, against FUNC and INT. "
        "The interval draws positions again 1,000 times. Zero-shot: log P(reference) - log P(alternative), the "
        "mean of both strands; causal over all bases of the window from the variant on, masked at the variant's "
        "base. Small models like these learn composition, repeats and short words, not what evolution kept, so "
        "that an AUROC near 0.5 is what to expect; Evo 2 has a billion parameters for its 0.73. Exon left out: "
        "logistic regression on the variants of the other exons, C not tuned, its log-odds pooled over the exons "
        "(so that what says nothing is below 0.5, since an exon with many losses leaves few to the others): on "
        f"embeddings of both strands in windows of {_CLASSIFIED} bases (of the base, and what the alternative "
        "changes), on the class of consequence, on 41 bases around as one-hot. Embeddings of an untrained model are "
        "but another view of the bases. A class of consequence is knowledge about the gene that no model of "
        "sequence is given; where it is added, the log-odds of both are summed. "
        "CADD and phyloP come with the table, and are never inputs. The column paper has what was measured when "
        "the data were collected (Markov models with another smoothing), or is published. Evo 2's flanks are "
        "GRCh37's, these are GRCh38's."
    )


def run(context: Context) -> list[Table]:
    return tables(context, partial(load, context))


recipe = Recipe(run, seeds=1, brings=True)
