"""Which class a window of DNA comes from, by the window's length: a model goes up a ladder of lengths, fine-tuned at
each from the one before, and is tested there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.models import SequenceModel, build_model
from mambaseq.reproduction import Column, Context, Line, train
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_dna.baselines import kmer_frequencies
from mambaseq_dna.recipes.common import (
    VOCABULARY,
    Stretches,
    linear_score,
    naive_bayes,
    probabilities,
    tiles,
    wilson,
    windows,
)
from mambaseq_dna.recipes.mammals import Genomes


class Rung(NamedTuple):
    """steps of training with windows of `length`."""

    length: int
    steps: int


class Contender(NamedTuple):
    """A model: its parts, the longest window that it is trained on, and the share of the ladder's steps."""

    mixer: dict[str, Any]
    encoder: dict[str, Any]
    backbone: dict[str, Any]
    d_model: int
    longest: int = 2**30
    share: float = 1.0
    pretrained: bool = False

    def build(self, context: Context, head: dict[str, Any]) -> SequenceModel:
        """The model on the context's device, smaller at smaller scales."""
        layers = context.at(full=self.backbone["n_layers"], small=2, tiny=1)
        spec = {
            "d_model": context.at(full=self.d_model, small=64, tiny=16),
            "encoder": self.encoder,
            "backbone": {**self.backbone, "n_layers": layers},
            "mixer": self.mixer,
            "head": head,
        }
        return build_model(spec).to(context.device)


WORDS = {"name": "dna/kmer", "k": 6, "stride": 3}
CONV = {"name": "dna/conv", "vocab_size": VOCABULARY, "width": 11}
AHEAD = {"name": "residual", "n_layers": 4, "dropout": 0.1}
BOTH_WAYS = {"name": "bidirectional", "n_layers": 2, "dropout": 0.1}


def precision(context: Context) -> torch.dtype | None:
    """What `train` computes matrix products in."""
    return torch.bfloat16 if context.device.type == "cuda" else None


def climb(
    context: Context,
    genomes: Genomes,
    contender: Contender,
    rungs: list[Rung],
    seed: int,
    checkpoint: Path,
    *,
    weights: dict[str, Tensor] | None = None,
    beyond: int | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Train a contender up the ladder and test it on both strands of disjoint windows at each length.

    weights: of its encoder and backbone to begin with. beyond: a length to test at behind the last rung, untrained.
    Returns accuracies and window counts by length, and with `beyond` the log-odds of the classes of each window.
    """
    torch.manual_seed(seed)
    head = {"name": "classification", "n_classes": len(genomes.names), "dropout": 0.2, "label_smoothing": 0.05}
    model = contender.build(context, head)
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    found: dict[str, float] = {"parameters": model.n_parameters()}
    together = context.at(full=2**17, small=2**13, tiny=2**9)  # bases a step
    minutes = 0.0
    for number, (length, full_steps) in enumerate(rungs):
        if length > contender.longest:
            break
        steps = context.at(full=max(int(full_steps * contender.share), 1), small=full_steps // 20, tiny=2)
        model.head.scale = length**0.5 / 4
        run = train(
            model,
            Stretches(genomes.tokens, genomes.train, length).labelled(max(together // length, 1), seed + 1000 * number),
            steps,
            OptimizerConfig(lr=2e-3 / 2**number, weight_decay=0.1, warmup_steps=steps // 10),
            autocast=precision(context),
            checkpoint=checkpoint.with_suffix(f".{length}.pt"),
            label=f"{length} bases",
        )
        minutes += run.seconds / 60
        found |= _tested(context, model, genomes, length)
    odds: dict[str, np.ndarray] = {}
    if beyond is not None:
        model.head.scale = beyond**0.5 / 4
        starts, labels = tested(context, genomes, beyond)
        if len(starts):
            answer = probabilities(model, windows(genomes.tokens, starts, beyond), 2**20, both_strands=True)
            odds = {"odds": np.log(answer[:, 1] / answer[:, 0]), "labels": labels}
    return {**found, "minutes": minutes}, odds


def tested(context: Context, genomes: Genomes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and classes of the disjoint test windows, fewer at smaller scales."""
    return tiles(genomes.test, length, context.at(full=None, small=200, tiny=4))


def _tested(context: Context, model: SequenceModel, genomes: Genomes, length: int) -> dict[str, float]:
    starts, labels = tested(context, genomes, length)
    answer = probabilities(model, windows(genomes.tokens, starts, length), 2**18, both_strands=True)
    return {f"accuracy {length}": float((answer.argmax(1) == labels).mean()), f"windows {length}": len(labels)}


def baselines(context: Context, genomes: Genomes, lengths: list[int], what: str) -> dict[str, float]:
    """Accuracy and window counts by length of what a model must beat, on the same windows.

    what: "6-mer logistic regression, both strands", the same on "one strand", or "10-mer naive Bayes".
    """
    found: dict[str, float] = {}
    most = context.at(full=4_000, small=400, tiny=8)
    for length in lengths:
        starts, labels = tested(context, genomes, length)
        inputs = windows(genomes.tokens, starts, length).cpu().numpy()
        if what == "10-mer naive Bayes":
            right = naive_bayes(genomes.tokens, genomes.train, inputs, 10).argmax(1) == labels
            accuracy = float(right.mean())
        else:
            features, of = {}, {}
            for split, places in (("test", genomes.test), ("train", genomes.train), ("dev", genomes.validation)):
                if split == "test":
                    of[split] = labels
                else:
                    stride = min(length, max(length // 4, 1024))
                    starts, of[split] = tiles(places, length, most, stride)
                    if not len(starts):  # validation parts are shorter than such windows
                        starts, of[split] = tiles(genomes.train, length, most, stride)
                ids = windows(genomes.tokens, starts, length).cpu().numpy()
                features[split] = kmer_frequencies(ids, 6, both_strands="both" in what)
            accuracy = linear_score(features, of, (1e-5, 1e-4, 1e-3, 1e-2)).accuracy
        found |= {f"accuracy {length}": accuracy, f"windows {length}": len(labels)}
    return found


LINEAR = ("6-mer logistic regression, both strands", "6-mer logistic regression, one strand")
BASELINES = (*LINEAR, "10-mer naive Bayes")


def kilobases(length: int) -> str:
    """A length for people."""
    return f"{length // 1024} k" if length >= 1024 else str(length)


def columns(lengths: list[int]) -> list[Column]:
    """Accuracies by length."""
    return [
        *(Column(f"accuracy {length}", kilobases(length), 3) for length in lengths),
        Column("parameters", "parameters", 0),
        Column("minutes", "minutes", 1),
    ]


def line(name: str, values: Mapping[str, list[float]], lengths: list[int], paper: str = "") -> Line:
    """A line of a table, with Wilson's 95 % interval of the mean accuracy at each length as its note."""
    said = []
    for length in lengths:
        if of := values.get(f"accuracy {length}"):
            low, high = wilson(float(np.mean(of)), int(values[f"windows {length}"][0]))
            said.append(f"{kilobases(length)} {low:.3f} to {high:.3f}")
    return Line(name, dict(values), paper, note="; ".join(said))


def counted(context: Context, genomes: Genomes, lengths: list[int]) -> str:
    """How many disjoint test windows there are at each length, for a table's text."""
    return ", ".join(f"{len(tested(context, genomes, length)[0]):,} at {kilobases(length)}" for length in lengths)
