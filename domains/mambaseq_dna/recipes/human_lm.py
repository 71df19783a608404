"""Language models of human chromosome 22 by context, beside the best Markov model; recall of the chimpanzee's sequence
from a context that holds the human one; and the four apes as species, where no signal is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.benchmarking.block import autocast
from mambaseq.data.drawing import below, words
from mambaseq.models import SequenceModel, build_model
from mambaseq.reproduction import Bound, Column, Context, Line, Recipe, Table, train
from mambaseq.reproduction.batches import numbers
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_dna.baselines.examples import Examples
from mambaseq_dna.baselines.kmers import summed, tallied
from mambaseq_dna.recipes import human, ladder
from mambaseq_dna.recipes.common import VOCABULARY, Stretches, naive_bayes, pieces, tiles, turned, windows
from mambaseq_dna.recipes.ladder import BOTH_WAYS, CONV, Contender, Rung
from mambaseq_dna.recipes.mammals import Genomes
from mambaseq_dna.tokenizer import N

PUBLISHED = 1.879  # bits a base of the interpolated Markov model of order 9, measured when the data were collected
ORDERS = range(6, 13)
MODEL = "Mamba"
MARKOV = "interpolated Markov model"
RECALL = "recall"
CONTROL = "four apes"


class Sizes(NamedTuple):
    """steps at each context. tested: the most windows a context."""

    contexts: dict[int, int]
    tokens_a_step: int
    tested: int


def sizes(context: Context) -> Sizes:
    return context.at(
        full=Sizes({2**10: 4000, 2**13: 600, 2**15: 300}, 2**16, 512),
        small=Sizes({2**10: 200}, 2**13, 64),
        tiny=Sizes({64: 2, 128: 2}, 2**8, 4),
    )


def make_model(context: Context) -> SequenceModel:
    spec = {
        "d_model": context.at(full=192, small=64, tiny=16),
        "encoder": {"name": "tokens", "vocab_size": VOCABULARY},
        "backbone": {"name": "residual", "n_layers": context.at(full=6, small=3, tiny=1)},
        "mixer": {"name": "mamba", "d_state": 16},
        "head": {"name": "lm", "vocab_size": VOCABULARY},
    }
    return build_model(spec).to(context.device)


@torch.no_grad()
def bits(model: SequenceModel, inputs: Tensor, first: int = 1) -> float:
    """Mean bits of the bases of windows `(windows, length)` uint8 from position `first` on, given those before."""
    total, count = 0.0, 0
    for some in inputs.split(max(2**18 // inputs.shape[1], 1)):
        ids = some.long()
        targets = ids[:, 1:].clone()
        targets[:, : first - 1] = -100
        with autocast(ids.device):
            loss = model(ids[:, :-1], targets).loss
        known = int((targets != -100).sum())
        total += float(loss) * known
        count += known
    return total / max(count, 1) / math.log(2)


def _places(blocks: human.Blocks, split: int, length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Stretches of single blocks that hold a window, and of blocks joined."""
    found = blocks.places(split)
    return [found[found[:, 1] - found[:, 0] > length]], [blocks.places(split, joined=True)]


def _language_model(context: Context, blocks: human.Blocks, seed: int, checkpoint: Path) -> dict[str, float]:
    torch.manual_seed(seed)
    model, of = make_model(context), sizes(context)
    found: dict[str, float] = {"parameters": model.n_parameters()}
    minutes = 0.0
    for number, (length, steps) in enumerate(of.contexts.items()):
        alone, joined = _places(blocks, 0, length)
        source = Stretches(blocks.tokens, alone if number == 0 else joined, length + 1)
        run = train(
            model,
            source.causal(max(of.tokens_a_step // length, 1), seed + number),
            steps,
            OptimizerConfig(lr=3e-3 / 2**number, weight_decay=0.1, warmup_steps=steps // 10),
            autocast=ladder.precision(context),
            checkpoint=checkpoint.with_suffix(f".{length}.pt"),
            label=f"{MODEL}, {length} bases",
        )
        minutes += run.seconds / 60
        for name, places in zip(("blocks", "joined"), _places(blocks, 2, length), strict=True):
            if not len(places[0]):
                continue
            starts, _ = tiles(places, length + 1, of.tested)
            if len(starts):
                found[f"{name} {length}"] = bits(model, windows(blocks.tokens, starts, length + 1))
            found[f"n {name} {length}"] = len(starts)
    return {**found, "minutes": minutes}


def _markov(blocks: human.Blocks, order: int, context: Context) -> dict[str, float]:
    """Bits a base on the test blocks of a Markov model whose probabilities are mixed with those of lower orders, by
    Witten and Bell's weights; trained on both strands of the training blocks."""
    train = pieces(blocks.tokens.cpu().numpy(), [blocks.places(0)])
    length = context.at(full=2**10, small=2**10, tiny=64)
    starts, _ = tiles(_places(blocks, 2, length)[0], length + 1, sizes(context).tested)
    test = windows(blocks.tokens, starts, length + 1).cpu().numpy()
    probability = np.full(4, 0.25)
    for k in range(1, order + 2):  # words of k bases: contexts of k - 1
        table = tallied(train, k, 1, both_strands=True).reshape(-1, 4).astype(np.float64)
        n, kinds = table.sum(1, keepdims=True), (table > 0).sum(1, keepdims=True)
        lower = probability.reshape(-1, 4)
        lower = np.tile(lower, (len(table) // len(lower), 1))  # the same context without its first base
        probability = (table + 4 * kinds * lower) / np.maximum(n + 4 * kinds, 1)
        probability = np.where(n > 0, probability, lower).ravel()
    total = summed(Examples.of(test), order + 1, -np.log2(probability)[:, None]).sum()
    return {"bits": float(total) / (len(test) * (length + 1 - order))}


def _markov_of(blocks: human.Blocks, order: int, context: Context) -> Callable[[Path], dict[str, float]]:
    return lambda _: _markov(blocks, order, context)


class Pairs(NamedTuple):
    """Aligned places of human and chimpanzee bases. first, second: their bases, `(bases,)` uint8. ours, theirs:
    `(places,)` int64, where windows of both begin at the same column of the alignment."""

    first: Tensor
    second: Tensor
    ours: Tensor
    theirs: Tensor

    @classmethod
    def of(cls, first: human.Blocks, second: human.Blocks, partners: np.ndarray, split: int, length: int) -> Pairs:
        """Of a split's blocks: all places from which both have `length` bases in the block, without N."""
        ours, theirs = [], []
        bad = [np.cumsum(np.pad(one.tokens.cpu().numpy() == N, (1, 0))) for one in (first, second)]
        for block in np.flatnonzero(first.split == split):
            p = np.arange(first.bounds[block], first.bounds[block + 1])
            q = partners[p]
            fits = (p + length <= first.bounds[block + 1]) & (q + length <= second.bounds[block + 1])
            p, q = p[fits], q[fits]
            known = (bad[0][p + length] == bad[0][p]) & (bad[1][q + length] == bad[1][q])
            ours.append(p[known])
            theirs.append(q[known])
        places = (torch.from_numpy(np.concatenate(part)).to(first.tokens.device) for part in (ours, theirs))
        return cls(first.tokens, second.tokens, *places)

    def windows(self, chosen: Tensor, length: int) -> Tensor:
        """`(batch, 2 * length)` int64 of some places: a human stretch, and behind it the chimpanzee's."""
        within = torch.arange(length, device=chosen.device)
        parts = (
            self.first[self.ours[chosen][:, None] + within],
            self.second[self.theirs[chosen][:, None] + within],
        )
        return torch.cat(parts, 1).long()


def _recall(
    context: Context,
    blocks: human.Blocks,
    chimpanzee: human.Blocks,
    partners: np.ndarray,
    length: int,
    seed: int,
    checkpoint: Path,
) -> dict[str, float]:
    """Bits a base of the chimpanzee's stretch, with the human one before it and with another human one."""
    torch.manual_seed(seed)
    model = make_model(context)
    pairs = Pairs.of(blocks, chimpanzee, partners, 0, length)
    steps, batch_size = context.at(full=4000, small=100, tiny=2), max(sizes(context).tokens_a_step // (2 * length), 1)

    def batch_of(step: Tensor) -> Batch:
        drawn = words(seed, numbers(step, batch_size), 2)
        ids = pairs.windows(below(drawn[:, 0], len(pairs.ours)), length)
        both = torch.cat([turned(part, drawn[:, 1]) for part in ids.chunk(2, 1)], 1)  # of the same strand
        return Batch(inputs=both[:, :-1], targets=both[:, 1:])

    run = train(
        model,
        batch_of,
        steps,
        OptimizerConfig(lr=3e-3, weight_decay=0.1, warmup_steps=steps // 10),
        autocast=ladder.precision(context),
        checkpoint=checkpoint,
        label=f"recall, {length} bases",
    )
    test = Pairs.of(blocks, chimpanzee, partners, 2, length)
    chosen = torch.linspace(0, len(test.ours) - 1, sizes(context).tested, device=context.device).long()
    pair = test.windows(chosen, length)
    wrong = torch.cat([pair[:, :length].roll(1, 0), pair[:, length:]], 1)
    first = length + length // 4  # the first quarter is for finding the place
    return {
        "orthologue": bits(model, pair, first),
        "other": bits(model, wrong, first),
        "loss": run.loss / math.log(2),
        "pairs": len(pair),
        "differing": float((pair[:, :length] != pair[:, length:]).float().mean()),
        "minutes": run.seconds / 60,
    }


def _apes(context: Context) -> Genomes:
    """The four apes as classes, by the same blocks."""
    every = [human.load(context, ape) for ape in human.APES]
    shift = np.cumsum([0, *(len(one.tokens) for one in every)])
    parts = [[one.places(split) + by for one, by in zip(every, shift, strict=False)] for split in range(3)]
    return Genomes(list(human.APES.values()), torch.cat([one.tokens for one in every]), *parts)


def run(context: Context) -> list[Table]:
    wanted = context.wanted([MODEL, MARKOV, RECALL, CONTROL])
    blocks = human.load(context)
    tables: list[Table] = []
    lines: list[Line] = []
    if MODEL in wanted:
        found = context.over_seeds(MODEL, lambda seed, checkpoint: _language_model(context, blocks, seed, checkpoint))
        shortest = next(iter(sizes(context).contexts))
        counts = ", ".join(f"{key[2:]} {int(of[0]):,}" for key, of in found.items() if key.startswith("n "))
        lines.append(
            Line(MODEL, found, wanted=(Bound(f"blocks {shortest}", "<=", PUBLISHED),), note=f"windows: {counts}")
        )
    if MARKOV in wanted:
        orders = context.at(full=list(ORDERS), small=[6, 8], tiny=[2, 3])
        scored = {
            order: context.trial(f"Markov, order {order}", _markov_of(blocks, order, context)) for order in orders
        }
        best = min(scored, key=lambda order: scored[order]["bits"])
        shortest = next(iter(sizes(context).contexts))
        lines.append(Line(f"{MARKOV}, order {best}", {f"blocks {shortest}": [scored[best]["bits"]]}, f"{PUBLISHED}"))
    if lines:
        tables.append(Table("Language model of human chromosome 22", _about(), _columns(context), lines))
    if RECALL in wanted:
        chimpanzee, partners = human.load(context, "Ptro"), human.partners(context, "Ptro")
        lengths = context.at(full=(256, 1024), small=(128,), tiny=(16,))
        lines = [
            Line(
                f"{length:,} bases",
                context.over_seeds(
                    f"{RECALL} {length}",
                    lambda seed, checkpoint, length=length: _recall(
                        context, blocks, chimpanzee, partners, length, seed, checkpoint
                    ),  # type: ignore[misc]
                ),
            )
            for length in lengths
        ]
        tables.append(Table("Recall of the chimpanzee's sequence", _RECALL, _RECALL_COLUMNS, lines))
    if CONTROL in wanted:
        tables.append(_control(context))
    return tables


def _columns(context: Context) -> list[Column]:
    names = {"blocks": "single blocks", "joined": "joined blocks"}
    columns = [
        Column(f"{key} {length}", f"bits a base, {ladder.kilobases(length)}, {told}", 4)
        for key, told in names.items()
        for length in sizes(context).contexts
    ]
    return [*columns, Column("parameters", "parameters", 0), Column("minutes", "minutes", 1)]


def _about() -> str:
    return (
        "Next-base models of 21.6 Mb of human chromosome 22 in the blocks of an alignment of four apes: trained on the "
        "first 80 % by position, tested on the last 10 %. The blocks are short (median 1.5 kb, the longest 33 kb), so "
        "few windows of 8 k and 32 k lie in one block; 'joined' are windows over blocks as if they followed each "
        "other, which skips sequence between them and is another task. Trained at 1 k within blocks, then on joined "
        "ones at 8 k and 32 k. Markov models mix orders by Witten and Bell's weights and know both strands; the column "
        "paper has the best one's bits, measured when the data were collected."
    )


_RECALL = (
    "A window is a stretch of a human block and, behind it, the chimpanzee's of the same block; models are trained on "
    "such pairs of training blocks. Bits a base of the chimpanzee's last three quarters on test blocks, with its own "
    "human stretch before it, and with the one of another block. The aligned bases differ at 1.4 % of the columns; "
    "windows begin at the same column, and 'at the same place' counts behind it, where a gap shifts all that follows."
)
_RECALL_COLUMNS = [
    Column("orthologue", "bits, own human stretch", 4),
    Column("other", "bits, another's", 4),
    Column("loss", "bits in training, both stretches", 4),
    Column("pairs", "pairs", 0),
    Column("differing", "bases that differ at the same place", 1, percent=True),
    Column("minutes", "minutes", 1),
]


def _control(context: Context) -> Table:
    genomes = _apes(context)
    rungs = context.at(full=[Rung(2**10, 1000)], small=[Rung(2**10, 200)], tiny=[Rung(64, 20)])
    lengths = [rung.length for rung in rungs]
    contender = Contender({"name": "mamba"}, CONV, BOTH_WAYS, 128)
    found = context.over_seeds(CONTROL, lambda seed, _: ladder.climb(context, genomes, contender, rungs, seed)[0])

    def bayes(_: Path) -> dict[str, float]:
        starts, labels = ladder.tested(context, genomes, lengths[0])
        inputs = windows(genomes.tokens, starts, lengths[0]).cpu().numpy()
        right = naive_bayes(genomes.tokens, genomes.train, inputs, 10).argmax(1) == labels
        return {f"accuracy {lengths[0]}": float(right.mean()), f"windows {lengths[0]}": len(labels)}

    one = {key: [value] for key, value in context.trial(f"{CONTROL} naive Bayes", bayes).items()}
    lines = [ladder.line(MODEL, found, lengths), ladder.line("10-mer naive Bayes", one, lengths)]
    about = (
        "The negative control: which of four apes a window of an aligned block comes from. The alignment keeps only "
        "what all four share, so composition tells nothing and a small model is expected to stay near chance, 0.25. "
        f"Test windows: {ladder.counted(context, genomes, lengths)}."
    )
    return Table("Four apes, the negative control", about, ladder.columns(lengths), lines)


recipe = Recipe(run, seeds=2, brings=True)
