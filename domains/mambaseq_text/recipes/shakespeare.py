"""What the recipes on text share: tinyshakespeare byte by byte, its last tenth held out, and models of a given size."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.benchmarking.block import autocast
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.reproduction import train
from mambaseq.reproduction.batches import of_text
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_text.corpus import SHAKESPEARE
from mambaseq_text.reading import read_bytes, text_files

VOCABULARY = 256
HELD_OUT = 0.1
PRECISION = "bf16 autocast on a GPU (fp32 on a CPU)"


class Text(NamedTuple):
    """Bytes to train on and those held out, `(length,)` uint8: ASCII, so that any place is between two characters."""

    train: Tensor
    test: Tensor

    @classmethod
    def load(cls, device: torch.device) -> Text:
        (file,) = text_files(SHAKESPEARE)
        tokens = torch.from_numpy(np.array(read_bytes(file))).to(device)
        cut = int(len(tokens) * (1 - HELD_OUT))
        return cls(tokens[:cut], tokens[cut:])


class Sizes(NamedTuple):
    """Of a training run. tested: bytes of the held-out text, from its beginning."""

    length: int
    batch_size: int
    steps: int
    tested: int

    def epochs(self, text: Text) -> float:
        """How often the training text is gone through."""
        return self.steps * self.batch_size * self.length / len(text.train)


def optimizer(steps: int) -> OptimizerConfig:
    """One for all."""
    return OptimizerConfig(lr=2e-3, warmup_steps=min(100, steps // 2))


def make_model(mixer: str, d_model: int, n_layers: int, length: int, options: dict[str, Any]) -> SequenceModel:
    """A byte-level language model; length is the one that Hyena's filters are scaled to."""
    if mixer == "hyena":
        options = {"l_max": max(length, 2), **options}
    return causal_lm(VOCABULARY, d_model, n_layers, mixer, **options)


def precision(device: torch.device) -> torch.dtype | None:
    """What `train` computes matrix products in."""
    return torch.bfloat16 if device.type == "cuda" else None


def trained(
    model: SequenceModel, text: Text, sizes: Sizes, seed: int, checkpoint: Path, label: str
) -> dict[str, float]:
    """Train it in place; bits a byte on the held-out text and in the last hundred steps, and what it took."""
    device = text.train.device
    run = train(
        model,
        of_text(text.train, sizes.length, sizes.batch_size, seed),
        sizes.steps,
        optimizer(sizes.steps),
        autocast=precision(device),
        checkpoint=checkpoint,
        label=label,
    )
    return {
        "bits": bits_per_byte(model, text.test[: sizes.tested], sizes.length, sizes.batch_size),
        "train_bits": run.loss / math.log(2),
        "parameters": model.n_parameters(),
        "minutes": run.seconds / 60,
    }


def bits_per_byte(model: SequenceModel, text: Tensor, length: int, batch_size: int) -> float:
    """Of a text `(n,)`, each byte of it but the first predicted once, in pieces of `length` that know only
    themselves."""
    return nats(model, text, length, batch_size) / (len(text) - 1) / math.log(2)


@torch.no_grad()
def nats(model: SequenceModel, text: Tensor, length: int, batch_size: int) -> float:
    """Of all tokens of a text `(n,)` but the first, each predicted once, in pieces of `length` that know only
    themselves."""
    n, pieces = len(text) - 1, -(-(len(text) - 1) // length)
    inputs = torch.zeros(pieces * length, dtype=torch.int64, device=text.device)
    labels = torch.full_like(inputs, -100)
    inputs[:n], labels[:n] = text[:-1].long(), text[1:].long()
    total = torch.zeros((), device=text.device)
    together = (M.view(pieces, length).split(batch_size) for M in (inputs, labels))
    for some, targets in zip(*together, strict=True):
        with autocast(text.device):
            loss = model(some, targets).loss
        assert loss is not None
        total += loss.float() * (targets != -100).sum()
    return float(total)


@functools.cache
def width(mixer: str, n_layers: int, parameters: int, options: tuple[tuple[str, Any], ...] = ()) -> int:
    """The d_model with which a model comes to about so many parameters: a multiple of 32 if one of those is within 5 %
    of it, or else of 16, 8 or 4 (fast kernels like round widths, and heads must divide them); the nearest multiple of 4
    where none is."""

    @functools.cache
    def count(d_model: int) -> int:
        return make_model(mixer, d_model, n_layers, 1024, dict(options)).n_parameters()

    nearest = 4
    for step in (32, 16, 8, 4):
        low, high = 1, 2  # times step; count grows with the width
        while count(high * step) < parameters:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle * step) < parameters else (low, middle)
        nearest = min(low * step, high * step, key=lambda d_model: abs(count(d_model) - parameters))
        if abs(count(nearest) - parameters) <= 0.05 * parameters:
            return nearest
    return nearest
