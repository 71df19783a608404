"""A small convolutional network, trained for a minute."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq_dna.baselines.examples import Examples
from mambaseq_dna.baselines.linear import as_values, goodness
from mambaseq_dna.cnn import SmallCNN
from mambaseq_dna.tokenizer import BASES, complement

_PAD = len(BASES)  # an id without a channel of its own
_EPOCHS, _STEPS = 20, 500  # epochs, and more where a training set is so small that they are fewer steps; at most 100
_BASES = 2**15  # of a batch, of 8 to 128 sequences
_PIECE = 2048  # bases: of longer sequences such pieces are read, and their answers averaged
_PLACES = 1024  # of sequences that are not longer, and all of one length, the place of a word counts


def trained(
    train: Examples,
    validation: Examples,
    n_outputs: int,
    *,
    seconds: float = 60.0,
    turn: bool = False,
    seed: int = 0,
    width: int | None = None,
    epochs: int | None = None,
) -> tuple[nn.Module, str]:
    """The network of the epoch that is best on the validation sequences, and a note on its training. Sequences of more
    than 4,096 bases are read in pieces.

    turn: give either strand of a sequence in training. seconds: of training; a slow machine does fewer epochs. width:
        of the network; what the device can do in the time if not given. epochs: at most; 20, or more of few sequences.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = train.pieces(train.n_bases, _PIECE)
    alike = len(np.unique(train.lengths)) == 1 and int(train.lengths[0]) <= _PLACES
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        width = width or (64 if device.type == "cpu" else 128)
        positions = int(train.lengths[0]) if alike else 0
        model = SmallCNN(n_outputs, width, vocab_size=len(BASES), positions=positions).to(device)
        rng = np.random.default_rng(seed)
        size = int(np.clip(_BASES // max(np.median(train.lengths), 1), 8, 128))
        parts = -(-len(train) // size)
        epochs = epochs or int(np.clip(-(-_STEPS // parts), _EPOCHS, 100))
        steps = epochs * parts
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        best, kept, done, start = -np.inf, _copied(model), 0, time.monotonic()
        checked = start
        at_best, over = 0, False
        for epoch in range(epochs):
            for some in np.array_split(rng.permutation(len(train)), parts):
                spent = (time.monotonic() - start) / seconds
                rate = 1 - max(done / steps, min(spent, 1.0))
                for group in optimizer.param_groups:
                    group["lr"] = 2e-3 * min((done + 1) / 50, 0.5 - 0.5 * np.cos(np.pi * rate))
                loss = _loss(model(_ids(train, some, device, rng if turn else None)).logits, train, some)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if spent >= 1:
                    break
            over = epoch < epochs - 1 and time.monotonic() - start >= seconds
            if over or epoch == epochs - 1 or time.monotonic() - checked > seconds / 10:
                value = goodness(answered(model, validation), validation.targets, validation.kind)
                checked = time.monotonic()
                if value > best:
                    best, kept, at_best = value, _copied(model), done
            if over:
                break
        model.load_state_dict(kept)
    ended = f"stopped after {seconds:.0f} s, in epoch {epoch + 1} of {epochs}" if over else f"{epochs} epochs"
    return model, f"{model.n_parameters():,} parameters, {ended}, step {at_best:,} of {done:,} taken"


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _ids(examples: Examples, some: np.ndarray, device: torch.device, rng: np.random.Generator | None) -> Tensor:
    """`(sequences, longest)` int64, filled up with `_PAD`. rng: turns half of them to the other strand."""
    rows = [examples.ids[examples.bounds[i] : examples.bounds[i + 1]] for i in some]
    if rng is not None:
        rows = [complement(row)[::-1] if rng.random() < 0.5 else row for row in rows]
    longest = max([24, *map(len, rows)])  # shorter ones do not fill 8 parts
    ids = np.full((len(rows), longest), _PAD, np.uint8)
    for row, line in zip(rows, ids, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(ids).to(device).long()


def _loss(outputs: Tensor, examples: Examples, some: np.ndarray) -> Tensor:
    targets = torch.from_numpy(examples.targets[some]).to(outputs.device)
    if examples.kind == "labels":
        return F.cross_entropy(outputs, targets)
    if examples.kind == "multilabels":
        known = targets >= 0
        return F.binary_cross_entropy_with_logits(outputs[known], targets[known].float())
    known = ~targets.isnan()
    return (outputs[known] - targets[known].float()).square().mean()


@torch.no_grad()
def answered(model: nn.Module, examples: Examples) -> np.ndarray:
    """`(sequences, outputs)` float32."""
    device, found = next(model.parameters()).device, []
    pieces = examples.pieces(examples.n_bases, _PIECE)
    size = int(np.clip(4 * _BASES // max(pieces.lengths.max(initial=1), 1), 1, 512))
    model.eval()
    for some in np.array_split(np.arange(len(pieces)), -(-len(pieces) // size)):
        found.append(model(_ids(pieces, some, device, None)).logits.float().cpu())
    model.train()
    outputs = torch.cat(found).numpy()
    first = np.searchsorted(pieces.bounds[:-1], examples.bounds[:-1])
    return np.add.reduceat(outputs, first) / np.diff(np.append(first, len(pieces)))[:, None]


def scaled_values(train: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each value, `(values,)` each, over the known ones; 1 in place of a 0."""
    values = as_values(train.targets, train.kind)
    deviation = np.nanstd(values, axis=0)
    return np.nanmean(values, axis=0), np.where(deviation > 0, deviation, 1.0)
