"""Which class a window of DNA comes from, by the window's length: a model goes up a ladder of lengths, fine-tuned at
each from the one before, and is tested there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambaseq.errors import UserError
from mambaseq.metrics.bootstrap import wilson
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


Weights = dict[str, Tensor] | None
"""Those of encoder and backbone that a training begins with."""

CONV = {"name": "dna/conv", "vocab_size": VOCABULARY, "width": 11}
BOTH_WAYS = {"name": "bidirectional", "n_layers": 2, "dropout": 0.1}

MODELS = (
    "Models are a convolution over bases and two layers that read both ways, about 0.5 M parameters; pretrained: by "
    "masked modelling of the training data alone, for 4,000 steps of 2^16 bases."
)


def precision(context: Context) -> torch.dtype | None:
    """What `train` computes matrix products in."""
    return torch.bfloat16 if context.device.type == "cuda" else None


def pretrained(context: Context, genomes: Genomes, contender: Contender, name: str) -> dict[str, Tensor]:
    """Weights of encoder and backbone after masked modelling of the training data of all classes; trained once."""
    path = context.folder / f"pretrained-{name}.safetensors"

    def run(checkpoint: Path) -> dict[str, float]:
        torch.manual_seed(0)
        model = contender.build(context, {"name": "lm", "vocab_size": VOCABULARY})
        length, steps = context.at(full=1024, small=256, tiny=64), context.at(full=4_000, small=200, tiny=2)
        found = train(
            model,
            Stretches(genomes.tokens, genomes.train, length).masked(context.at(full=64, small=8, tiny=2), 0),
            steps,
            OptimizerConfig(lr=2e-3, weight_decay=0.1, warmup_steps=steps // 20),
            autocast=precision(context),
            checkpoint=checkpoint,
            label=f"pretraining, {name}",
        )
        kept = model.state_dict()
        save_file({key: kept[key].cpu().contiguous() for key in kept if not key.startswith("head.")}, path)
        return {"loss": found.loss, "minutes": found.seconds / 60}

    context.trial(f"pretraining {name}", run)
    if not path.exists():
        raise UserError(f"{path} is missing. Remove the trial 'pretraining {name}' of that folder to train it again.")
    return load_file(path, device=str(context.device))


def climb(
    context: Context,
    genomes: Genomes,
    contender: Contender,
    rungs: list[Rung],
    seed: int,
    *,
    weights: Weights = None,
    beyond: int | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Train a contender up the ladder and test it on both strands of disjoint windows at each length.

    At each length the weights that are best on the validation parts are kept, those of the length before among them;
    where no validation part is as long as a window, nothing is trained.
    weights: of its encoder and backbone to begin with. beyond: a length to test at behind the last rung, untrained.
    Returns accuracies, window counts and the steps kept by length, and with `beyond` the log-odds of each window.
    """
    torch.manual_seed(seed)
    head = {"name": "classification", "n_classes": len(genomes.names), "dropout": 0.2, "label_smoothing": 0.05}
    model = contender.build(context, head)
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    found: dict[str, float] = {"parameters": model.n_parameters(), "minutes": 0.0}
    for number, rung in enumerate(rungs):
        if rung.length > contender.longest:
            break
        model.head.scale = rung.length**0.5 / 4
        kept, minutes = _trained(context, model, genomes, contender, rung, number, seed)
        found["minutes"] += minutes
        starts, labels = tested(context, genomes, rung.length)
        answer = probabilities(model, windows(genomes.tokens, starts, rung.length), 2**18, both_strands=True)
        found |= {
            f"accuracy {rung.length}": float((answer.argmax(1) == labels).mean()),
            f"windows {rung.length}": len(labels),
            f"steps {rung.length}": kept,
        }
    odds: dict[str, np.ndarray] = {}
    if beyond is not None:
        model.head.scale = beyond**0.5 / 4
        starts, labels = tested(context, genomes, beyond)
        if len(starts):
            answer = probabilities(model, windows(genomes.tokens, starts, beyond), 2**20, both_strands=True)
            odds = {"odds": np.log(answer[:, 1] / answer[:, 0]), "labels": labels}
    return found, odds


def _trained(
    context: Context,
    model: SequenceModel,
    genomes: Genomes,
    contender: Contender,
    rung: Rung,
    number: int,
    seed: int,
) -> tuple[int, float]:
    """Train on a rung; the model then has the weights that are best on the validation windows. Returns their step, and
    minutes."""
    length = rung.length
    starts, labels = tiles(genomes.validation, length, context.at(full=200, small=40, tiny=2), max(length // 4, 1024))
    if not len(starts):
        return 0, 0.0
    inputs = windows(genomes.tokens, starts, length)
    done, every = 0, max(int(rung.steps * contender.share) // 10, 1)
    best: tuple[float, int, dict[str, Tensor]] = (float("inf"), 0, {})

    def judged() -> bool:
        nonlocal best, done
        answer = probabilities(model, inputs, 2**18, both_strands=True)
        loss = float(-np.log(answer[np.arange(len(labels)), labels] + 1e-9).mean())
        if loss < best[0]:
            best = loss, done, {key: value.clone() for key, value in model.state_dict().items()}
        done += every
        return False

    model.eval()
    judged()
    run = train(
        model,
        Stretches(genomes.tokens, genomes.train, length).labelled(
            max(context.at(full=2**17, small=2**13, tiny=2**9) // length, 1), seed + 1000 * number
        ),
        context.at(full=every * 10, small=max(rung.steps // 20, 1), tiny=2),
        OptimizerConfig(lr=2e-3 / 2**number, weight_decay=0.1, warmup_steps=every),
        autocast=precision(context),
        finished=judged,
        check_every=context.at(full=every, small=max(rung.steps // 40, 1), tiny=1),
        label=f"{length} bases",
    )
    model.load_state_dict(best[2])
    return best[1], run.seconds / 60


def tested(context: Context, genomes: Genomes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and classes of the disjoint test windows, fewer at smaller scales."""
    return tiles(genomes.test, length, context.at(full=None, small=200, tiny=4))


def baselines(context: Context, genomes: Genomes, lengths: list[int], what: str) -> dict[str, float]:
    """Accuracy and window counts by length of what a model must beat, on the same windows.

    what: "6-mer logistic regression, both strands", the same on "one strand", or "10-mer naive Bayes".
    """
    found: dict[str, float] = {}
    for length in lengths:
        starts, labels = tested(context, genomes, length)
        inputs = windows(genomes.tokens, starts, length).cpu().numpy()
        if "naive Bayes" in what:
            k = int(what.partition("-")[0])
            right = naive_bayes(genomes.tokens, genomes.train, inputs, k).argmax(1) == labels
            accuracy = float(right.mean())
        else:
            accuracy = _linear(context, genomes, length, inputs, labels, "both" in what)
        found |= {f"accuracy {length}": accuracy, f"windows {length}": len(labels)}
    return found


def _linear(
    context: Context, genomes: Genomes, length: int, inputs: np.ndarray, labels: np.ndarray, both: bool
) -> float:
    """Logistic regression on frequencies of words of 6 bases of overlapping training windows, its C chosen on the
    validation parts, or 1e-3 where they are shorter than a window."""
    # as many windows as overlap by 15/16, up to 256 Mb of them a class, which takes a minute
    most = context.at(full=min(4_000, 2**28 // length), small=400, tiny=8)
    features, of = {"test": kmer_frequencies(inputs, 6, both_strands=both)}, {"test": labels}
    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    for split, places in (("train", genomes.train), ("dev", genomes.validation)):
        starts, of[split] = tiles(places, length, most, max(length // 16, min(length, 1024)))
        if not len(starts):
            features[split], of[split], strengths = features["train"], of["train"], (1e-3,)
            continue
        parts = np.array_split(starts, max(len(starts) * length // 2**26, 1))
        features[split] = np.concatenate(
            [
                kmer_frequencies(windows(genomes.tokens, part, length).cpu().numpy(), 6, both_strands=both)
                for part in parts
            ]
        )
    return linear_score(features, of, strengths).accuracy


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
            n = int(values[f"windows {length}"][0])
            low, high = wilson(round(float(np.mean(of)) * n), n)
            said.append(f"{kilobases(length)} {low:.3f} to {high:.3f}")
    return Line(name, dict(values), paper, note="; ".join(said))


def counted(context: Context, genomes: Genomes, lengths: list[int]) -> str:
    """How many disjoint test windows there are at each length, for a table's text."""
    return ", ".join(f"{len(tested(context, genomes, length)[0]):,} at {kilobases(length)}" for length in lengths)
