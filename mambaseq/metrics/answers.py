"""What a model answered on a set, kept row by row: the ground of intervals, pictures and comparisons."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from mambaseq.batch import Batch
from mambaseq.heads.base import Kind
from mambaseq.models import ModelOutput

MOST_NUMBERS = 2**26
"""Outputs that a process keeps: 256 MB. A set with more of them is measured without intervals and pictures."""


@dataclasses.dataclass
class Answers:
    """Outputs and targets of the rows of a set: a row is a sequence, or a position or bin with a known target.

    outputs: `(rows, n)` float32, logits or values. targets: `(rows,)` int64 classes, `(rows, n)` int64 of several
        labels, or `(rows, n)` float32 values. owner: `(rows,)` int64, ascending: the sequence that a row belongs to,
        counted from 0. numbers: `(sequences,)` int64, the place of each in its data set. places: `(rows,)` int64, the
        position or bin of the sequence; 0 for whole sequences. kind, per_token, stride: as of a `Batch`. point: whether
        the outputs are all that the head says of a value, and no point of a distribution.
    """

    outputs: Tensor
    targets: Tensor
    owner: Tensor
    numbers: Tensor
    places: Tensor
    kind: Kind
    per_token: bool = False
    stride: int = 1
    point: bool = True

    @classmethod
    def of(cls, outputs: Tensor, targets: Tensor) -> Answers:
        """Of a row for each sequence. Rows without any known target are left out."""
        known = _known(targets)
        kind: Kind = "values" if targets.is_floating_point() else "multilabels" if targets.dim() > 1 else "labels"
        numbers = known.nonzero()[:, 0]
        owner = torch.arange(len(numbers))
        return cls(outputs[known].float(), _columns(targets[known]), owner, numbers, torch.zeros_like(owner), kind)

    @property
    def n_sequences(self) -> int:
        return len(self.numbers)

    def __len__(self) -> int:
        return len(self.owner)

    def alike(self) -> bool:
        """Whether rows, two at least, have all the same answer: the likeliest class, the labels that hold, a value."""
        if self.kind == "values":
            said = self.outputs
        else:
            said = self.outputs.argmax(-1, keepdim=True) if self.kind == "labels" else self.outputs > 0
        return len(said) > 1 and bool((said == said[:1]).all())

    def rows(self, index: Tensor | slice = slice(None)) -> tuple[ModelOutput, Batch]:
        """Rows as a metric takes them: each as a sequence of its own."""
        outputs, targets = self.outputs[index], self.targets[index]
        return ModelOutput(logits=outputs), Batch(outputs.new_zeros(len(outputs), 1), targets, target_of="sequence")

    def summed(self, parts: Tensor, draws: Tensor) -> Tensor:
        """`(draws, n)` float64: sums of parts `(rows, n)` over the rows of the sequences that are drawn."""
        own = torch.zeros(self.n_sequences, parts.shape[1], dtype=torch.float64).index_add_(
            0, self.owner, parts.double()
        )
        return draws.double() @ own

    def weights(self, draws: Tensor) -> Tensor:
        """`(draws, rows)`: how often each row is drawn. draws: `(draws, sequences)` int64."""
        return draws[:, self.owner] if self.per_token else draws


def _known(targets: Tensor) -> Tensor:
    """`(rows,)` bool: the rows with a known target."""
    known = ~targets.isnan() if targets.is_floating_point() else targets != -100
    return known if known.dim() == 1 else known.any(-1)


def _columns(targets: Tensor) -> Tensor:
    """Values as `(rows, n)`; labels as they are."""
    return targets[:, None] if targets.is_floating_point() and targets.dim() == 1 else targets


class AnswerSheet(torchmetrics.Metric):
    """Keeps what a model answers on a set, over batches and processes; `answers` gives them.

    most: outputs that a process keeps. rank, world: the process, and how many share the set, item by item.
    """

    full_state_update = False
    _STATES = ("outputs", "targets", "sequences", "places")
    outputs: list[Tensor]
    targets: list[Tensor]
    sequences: list[Tensor]
    places: list[Tensor]
    left_out: Tensor

    def __init__(self, rank: int = 0, world: int = 1, most: int = MOST_NUMBERS) -> None:
        super().__init__()
        self.rank, self.world, self.most = rank, world, most
        for state in self._STATES:
            self.add_state(state, [], dist_reduce_fx="cat")
        self.add_state("left_out", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self._seen = self._kept = 0
        self._facts: dict[str, Any] = {}

    def update(self, output: ModelOutput, batch: Batch) -> None:
        answers, targets = output.values, batch.targets
        assert answers is not None
        assert targets is not None
        owner, places, count = _owners(batch, targets)
        answers = answers.reshape(len(owner), -1)
        targets = _columns(targets.flatten(0, 1) if batch.per_token else targets)
        known = _known(targets)
        self._facts = {"kind": batch.kind, "per_token": batch.per_token, "stride": batch.stride}
        self._facts["point"] = output.distribution is None
        sequences = self.rank + self.world * (self._seen + owner[known])
        self._seen += count
        if self.outputs and self._kept + answers[known].numel() > self.most:
            self.left_out += 1
            return
        self._kept += answers[known].numel()
        self.outputs.append(answers[known].float())
        self.targets.append(targets[known])
        self.sequences.append(sequences)
        self.places.append(places[known])

    def compute(self) -> Tensor:
        return self.left_out

    def answers(self) -> Answers | None:
        """All that was answered, in the order of the sequences; None if there are too many to keep. Every process must
        call it."""
        with self.sync_context():
            if int(self.left_out) or not self._facts:
                return None
            outputs, targets, sequences, places = (dim_zero_cat(getattr(self, state)).cpu() for state in self._STATES)
        order = sequences.argsort(stable=True)
        numbers, owner = sequences[order].unique_consecutive(return_inverse=True)
        return Answers(outputs[order], targets[order], owner, numbers, places[order], **self._facts)


def _owners(batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor, int]:
    """The sequence of the batch that each row belongs to, the row's place in it, and how many sequences there are."""
    device = targets.device
    numbers = torch.arange(len(targets), device=device)
    if not batch.per_token:
        return numbers, torch.zeros_like(numbers), len(targets)
    bounds = batch.cu_seqlens
    if bounds is None:
        bins = torch.full_like(numbers, targets.shape[1])
    else:
        bins = -((bounds[:-1] - bounds[1:]) // batch.stride).long()
        numbers = torch.arange(len(bins), device=device)
    owner = numbers.repeat_interleave(bins)
    return owner, torch.arange(len(owner), device=device) - (bins.cumsum(0) - bins)[owner], len(bins)
