"""Classifiers of short sequences by models of half a million parameters, pretrained and from scratch, and by what a
reviewer asks for: what the recipes on published benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.data.drawing import below, words
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, build_model
from mambaseq.reproduction import Context, train
from mambaseq.reproduction.batches import numbers
from mambaseq.reproduction.training import BatchOf
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_dna.baselines import kmer_frequencies
from mambaseq_dna.cnn import SmallCNN
from mambaseq_dna.recipes import human
from mambaseq_dna.recipes.common import VOCABULARY, Stretches, linear_score, probabilities, score, turned
from mambaseq_dna.recipes.mammals import mammals
from mambaseq_dna.tokenizer import N

WORDS = "words of 5 bases"
CNN = "CNN"


class Examples(NamedTuple):
    """Of a split: inputs `(examples, length)` uint8, labels `(examples,)` int64, on the device."""

    inputs: Tensor
    labels: Tensor

    def numpy(self) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs.cpu().numpy(), self.labels.cpu().numpy()


class Way(NamedTuple):
    """A way to train a model: its parts, and the objective of its pretraining, if any."""

    encoder: dict[str, Any]
    backbone: dict[str, Any]
    objective: str = ""


_BOTH = {"name": "bidirectional", "n_layers": 2}
_CONV = {"name": "dna/conv", "vocab_size": VOCABULARY, "width": 11}
WAYS = {
    "from scratch": Way(_CONV, _BOTH),
    "pretrained, masked": Way(_CONV, _BOTH, "masked"),
    "pretrained, causal": Way(
        {"name": "tokens", "vocab_size": VOCABULARY}, {"name": "residual", "n_layers": 4}, "causal"
    ),
}


def make_model(
    context: Context, way: Way, head: dict[str, Any], positions: int = 0, dropout: float = 0.0
) -> SequenceModel:
    encoder = (
        {**way.encoder, "positions": positions} if positions and way.encoder["name"] == "dna/conv" else way.encoder
    )
    spec = {
        "d_model": context.at(full=128, small=64, tiny=16),
        "encoder": encoder,
        "backbone": {**way.backbone, "dropout": dropout},
        "mixer": {"name": "mamba", "d_state": 16},
        "head": head,
    }
    return build_model(spec).to(context.device)


def pretrained(context: Context, objective: str) -> dict[str, Tensor]:
    """Weights of encoder and backbone after masked or causal modelling of human and mammalian DNA; trained once."""
    way = next(way for way in WAYS.values() if way.objective == objective)
    path = context.folder / f"pretrained-{objective}.safetensors"

    def run(checkpoint: Path) -> dict[str, float]:
        length, steps = context.at(full=256, small=128, tiny=32), context.at(full=12_000, small=300, tiny=2)
        torch.manual_seed(0)
        model = make_model(context, way, {"name": "lm", "vocab_size": VOCABULARY})
        blocks, species = human.load(context), mammals(context)
        tokens = torch.cat([blocks.tokens, species.tokens])
        shift = len(blocks.tokens)
        everything = [places + shift for places in species.train + species.validation + species.test]
        places = np.concatenate([blocks.places(split) for split in range(3)] + everything)
        source = Stretches(tokens, [places], length)
        draw = source.masked if objective == "masked" else source.causal
        batch_size = context.at(full=256, small=32, tiny=2)
        found = train(
            model,
            draw(batch_size, 0),
            steps,
            OptimizerConfig(lr=2e-3, weight_decay=0.1, warmup_steps=steps // 20),
            autocast=torch.bfloat16 if context.device.type == "cuda" else None,
            checkpoint=checkpoint,
            label=f"pretraining, {objective}",
        )
        kept = {
            key: value.detach().cpu().contiguous()
            for key, value in model.state_dict().items()
            if not key.startswith("head.")
        }
        save_file(kept, path)
        return {"bits": found.loss / np.log(2), "minutes": found.seconds / 60, "bases": float(len(places))}

    context.trial(f"pretraining {objective}", run)
    if not path.exists():
        raise UserError(
            f"{path} is missing. Remove the trial 'pretraining {objective}' of that folder to train it again."
        )
    return load_file(path, device=str(context.device))


class Settings(NamedTuple):
    """Of a fine-tuning. flip: the other strand half of the time; reach: windows are moved by up to so many bases.
    positions: whether places count, in sequences of one length. most_steps: however many epochs."""

    lr: float
    batch_size: int
    epochs: int
    least_steps: int
    flip: bool
    reach: int
    dropout: float
    pooling: str
    positions: bool
    most_steps: int = 2**31


def examples(of: Examples, batch_size: int, seed: int, flip: bool, reach: int) -> BatchOf:
    """Random examples, moved by up to `reach` bases (N comes in), and of either strand if `flip`."""
    length = of.inputs.shape[1]
    within = torch.arange(length, device=of.inputs.device)

    def batch_of(step: Tensor) -> Batch:
        drawn = words(seed, numbers(step, batch_size), 3)
        chosen = below(drawn[:, 0], len(of.inputs))
        ids = of.inputs[chosen].long()
        if reach:
            place = within + (below(drawn[:, 1], 2 * reach + 1) - reach)[:, None]
            ids = ids.gather(1, place.clamp(0, length - 1))
            ids = torch.where((place >= 0) & (place < length), ids, N)
        return Batch(inputs=turned(ids, drawn[:, 2]) if flip else ids, targets=of.labels[chosen])

    return batch_of


def fitted(
    context: Context, model: Any, data: dict[str, Examples], chosen: Settings, seed: int, label: str
) -> dict[str, float]:
    """Train it, keep the weights that are best on dev, and score them on test once."""
    n = len(data["train"].inputs)
    steps = max(chosen.epochs * n // chosen.batch_size, chosen.least_steps)
    steps = context.at(full=min(steps, chosen.most_steps), small=200, tiny=2)
    labels = data["dev"].labels.cpu().numpy()
    best: tuple[float, dict[str, Tensor]] = (-2.0, {})

    def better() -> bool:
        nonlocal best
        found = score(probabilities(model, data["dev"].inputs, 2**18, chosen.flip), labels).mcc
        if found > best[0]:
            best = found, {key: value.clone() for key, value in model.state_dict().items()}
        return False

    run = train(
        model,
        examples(data["train"], min(chosen.batch_size, n), seed, chosen.flip, chosen.reach),
        steps,
        OptimizerConfig(lr=chosen.lr, weight_decay=0.1, warmup_steps=steps // 10),
        autocast=torch.bfloat16 if context.device.type == "cuda" else None,
        finished=better,
        check_every=max(steps // 12, 1),
        label=label,
    )
    better()
    model.load_state_dict(best[1])
    found = score(probabilities(model, data["test"].inputs, 2**18, chosen.flip), data["test"].labels.cpu().numpy())
    return {
        **found._asdict(),
        "dev_mcc": best[0],
        "parameters": model.n_parameters(),
        "steps": run.steps,
        "steps_per_s": run.steps_per_second,
        "loss": run.loss,
    }


def model_trial(
    context: Context,
    name: str,
    way: str,
    data: dict[str, Examples],
    chosen: Settings,
    seed: int,
    n_classes: int = 2,
) -> dict[str, float]:
    """Train a model of a way, from its pretrained weights if it has some, and score it on test."""
    weights = pretrained(context, WAYS[way].objective) if WAYS[way].objective else None
    torch.manual_seed(seed)
    head = {
        "name": "classification",
        "n_classes": n_classes,
        "pooling": chosen.pooling,
        "dropout": 0.3,
        "label_smoothing": 0.1,
    }
    positions = data["train"].inputs.shape[1] if chosen.positions else 0
    dropout = context.at(full=chosen.dropout, small=0.1, tiny=0.0)
    model = make_model(context, WAYS[way], head, positions, dropout)
    if weights is not None:
        wrong = model.load_state_dict(weights, strict=False)
        assert not wrong.unexpected_keys, wrong.unexpected_keys
    return fitted(context, model, data, chosen, seed, f"{name}, {way}")


def cnn_trial(
    context: Context, name: str, data: dict[str, Examples], chosen: Settings, seed: int, n_classes: int = 2
) -> dict[str, float]:
    """Train a small convolutional network, and score it on test."""
    torch.manual_seed(seed)
    positions = data["train"].inputs.shape[1] if chosen.positions else 0
    model = SmallCNN(n_classes, context.at(full=128, small=64, tiny=8), VOCABULARY, positions).to(context.device)
    return fitted(context, model, data, chosen, seed, f"{name}, {CNN}")


def linear_trial(
    data: dict[str, Examples], features: Callable[[np.ndarray], np.ndarray], strengths: Sequence[float]
) -> dict[str, float]:
    """Logistic regression on features of `(examples, length)` ids, its C chosen on dev, scored on test."""
    found, labels = {}, {}
    for split, of in data.items():
        ids, labels[split] = of.numpy()
        found[split] = features(ids)
    return linear_score(found, labels, strengths)._asdict()


def words_trial(data: dict[str, Examples], both_strands: bool = False) -> dict[str, float]:
    """Logistic regression on the frequencies of words of 5 bases. both_strands: see `kmer_frequencies`."""
    return linear_trial(data, lambda ids: kmer_frequencies(ids, 5, both_strands), (1e-4, 1e-3, 1e-2, 1e-1))
