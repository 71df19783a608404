"""What the recipes share: the models and trainings of Mamba's paper (arXiv:2312.00752), which are configurations; sound
files in the 8-bit codes of SaShiMi's published code (arXiv:2202.09729), windows of them, and bits a sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq.batch import Batch
from mambaseq.benchmarking.block import autocast
from mambaseq.data.drawing import below, words
from mambaseq.errors import DataError
from mambaseq.models import SequenceModel, build_model
from mambaseq.reproduction import Column, Context, train
from mambaseq.reproduction.batches import numbers
from mambaseq.reproduction.training import BatchOf
from mambaseq.runs.naming import resolve_config
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.settings import read_settings
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq_audio.io import read_signal
from mambaseq_audio.mulaw import MuLaw

SAMPLE_RATE = 16_000

COLUMNS = [
    Column("bits", "bits a sample, test", 3),
    Column("nats", "nats a sample, test", 3),
    Column("train_bits", "bits, last training steps", 3),
    Column("parameters", "parameters", 0),
]


class Variant(NamedTuple):
    """A line of the paper.

    config: the configuration that `mambaseq fit` takes, which has its model and how it is trained. paper: what the
    paper says of it. published: its parameters there, in millions, None where it says none.
    """

    name: str
    config: str
    paper: str = ""
    published: float | None = None


def spec(config: str) -> dict[str, Any]:
    """The description of a configuration's model, for 8-bit codes."""
    model = read_settings(resolve_config(config))["model"]
    model["encoder"] = {"name": "tokens", **model.get("encoder", {}), "vocab_size": MuLaw.vocab_size}
    model["head"] = {**model["head"], "vocab_size": MuLaw.vocab_size}
    return model


def make_model(context: Context, config: str, seed: int) -> SequenceModel:
    """A configuration's model, or at smaller scales one of the same kinds of layers that is narrower and has fewer."""
    made = spec(config)
    width, layers = context.at(full=(None, None), small=(32, 2), tiny=(8, 1))
    if width is not None:
        made["d_model"], made["backbone"]["n_layers"] = width, layers
    torch.manual_seed(seed)
    return build_model(made).to(context.device)


def codes(signal: np.ndarray) -> np.ndarray:
    """8-bit mu-law codes of a recording: `(length,)` float to uint8, as SaShiMi's published code makes them. The
    recording's least value becomes -1 and its largest 1, and the 256 codes share what mu-law makes of them evenly.

    (The framework's own codes have a fixed scale, so that they do not depend on where a recording is cut.)
    """
    low, high = float(signal.min()), float(signal.max())
    scaled = -1 + 2 * (signal.astype(np.float64) - low) / (high - low + 1e-6)
    companded = np.sign(scaled) * np.log1p(255 * np.abs(scaled + 1e-8)) / np.log(256)
    return ((companded + 1) / 2 * (256 - 0.01) + 0.005).astype(np.uint8)


class Sounds(NamedTuple):
    """Recordings in one row on a device. levels `(samples,)` uint8, bounds `(recordings + 1,)` where each begins."""

    levels: Tensor
    bounds: np.ndarray

    @classmethod
    def read(cls, paths: Sequence[Path], device: torch.device, label: str) -> Sounds:
        """Raises DataError for what is no sound file, or has another rate."""
        read = [codes(read_signal(path, SAMPLE_RATE, resample=False)) for path in tqdm(paths, desc=label, disable=None)]
        return cls._of(read, device)

    @classmethod
    def _of(cls, levels: Sequence[np.ndarray], device: torch.device) -> Sounds:
        return cls(torch.from_numpy(np.concatenate(levels)).to(device), np.cumsum([0, *map(len, levels)]))

    def windows(self, length: int, drop_last: bool) -> Tensor:
        """The recordings cut one after the other into windows of this length: `(windows, 2)` int64, where each begins
        and how long it is. drop_last: leave out what is shorter at a recording's end.

        Raises DataError if there is none.
        """
        found = [
            (start, min(length, int(end) - start))
            for begin, end in zip(self.bounds[:-1], self.bounds[1:], strict=True)
            for start in range(int(begin), int(end), length)
            if not drop_last or start + length <= end
        ]
        if not found:
            raise DataError(f"No recording has {length:,} samples, the length of a window. Bring longer ones.")
        return torch.tensor(found, device=self.levels.device)

    def batch(self, windows: Tensor, length: int) -> Batch:
        """Windows `(batch, 2)` of at most `length` samples, each a sequence that begins after silence, as published.
        What is shorter has no targets behind its end."""
        within = torch.arange(length, device=self.levels.device)
        known = within < windows[:, 1:]  # (batch, length)
        levels = self.levels[(windows[:, :1] + within).clamp(max=len(self.levels) - 1)].long()
        inputs = torch.cat([torch.full_like(levels[:, :1], MuLaw.start_id), levels[:, :-1]], 1)
        return Batch(inputs=inputs, targets=torch.where(known, levels, -100))

    def drawn(self, windows: Tensor, length: int, batch_size: int, seed: int) -> BatchOf:
        """Batches of random ones of these windows, `length` long."""

        def batch_of(step: Tensor) -> Batch:
            chosen = below(words(seed, numbers(step, batch_size), 1)[:, 0], len(windows))
            return self.batch(windows[chosen], length)

        return batch_of


class Sizes(NamedTuple):
    """Of a training. tested: the most windows of the test set, from the first on. clip: the largest norm of
    gradients."""

    length: int
    batch_size: int
    steps: int
    optimizer: OptimizerConfig
    clip: float
    tested: int = 2**31

    def shorter(self, steps: int) -> Sizes:
        """The same in so many steps, of which as large a share is warm-up."""
        share = self.optimizer.warmup_steps * steps // self.steps
        return self._replace(steps=steps, optimizer=dataclasses.replace(self.optimizer, warmup_steps=share))


def sizes_of(config: str) -> Sizes:
    """A configuration's training."""
    run = parse_config(config, [])
    return Sizes(
        run.settings["data"]["length"],
        run.settings["loader"]["batch_size"],
        run.trainer["max_steps"],
        OptimizerConfig(**run.settings["optimizer"]),
        run.trainer["gradient_clip_val"],
    )


def trained(
    context: Context,
    model: SequenceModel,
    train_on: tuple[Sounds, Tensor],
    test_on: tuple[Sounds, Tensor],
    sizes: Sizes,
    seed: int,
    checkpoint: Path,
    label: str,
) -> dict[str, float]:
    """Train a model in place on windows of recordings, and test it on others: bits and nats a sample, and what it
    took."""
    run = train(
        model,
        train_on[0].drawn(train_on[1], sizes.length, sizes.batch_size, seed),
        sizes.steps,
        sizes.optimizer,
        clip=sizes.clip,
        autocast=torch.bfloat16 if context.device.type == "cuda" else None,
        checkpoint=checkpoint,
        label=label,
    )
    nats = nats_a_sample(model, test_on[0], test_on[1][: sizes.tested], sizes.batch_size)
    return {
        "bits": nats / math.log(2),
        "nats": nats,
        "train_bits": run.loss / math.log(2),
        "parameters": model.n_parameters(),
        "minutes": run.seconds / 60,
    }


@torch.no_grad()
def nats_a_sample(model: SequenceModel, sounds: Sounds, windows: Tensor, batch_size: int) -> float:
    """The mean negative log-likelihood of all samples of some windows `(windows, 2)`."""
    total, count = 0.0, 0
    for some in windows.split(batch_size):
        batch = sounds.batch(some, int(some[:, 1].max()))
        assert batch.targets is not None
        known = int((batch.targets != -100).sum())
        with autocast(sounds.levels.device):
            loss = model(batch.inputs, batch.targets).loss
        total += float(loss) * known
        count += known
    return total / count
