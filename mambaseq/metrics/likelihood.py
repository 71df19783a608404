"""How well a model predicts, from the mean loss alone: logits are not needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.heads.base import Kind
from mambaseq.metrics.base import Metric
from mambaseq.models import ModelOutput


class _Likelihood(Metric):
    """Sums negative log likelihoods (nats) and their counts, in float64."""

    needs_logits = False
    higher_is_better = False
    measures: ClassVar[Kind | None] = "labels"
    splits_time: ClassVar[bool] = True
    nll: Tensor
    units: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("units", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        assert output.loss is not None
        n = batch.n_targets
        self.nll += output.loss.double() * n
        self.units += self._units(batch, n)

    def _units(self, batch: Batch, n_targets: Tensor) -> Tensor:
        return n_targets

    def _mean(self) -> Tensor:
        return self.nll / self.units


class MeanLoss(_Likelihood):
    """Mean loss of a target, for any head. NaN if there is no target, which `empty` distinguishes from a loss that is
    NaN.

    empty: whether the last result had no target in any process.
    """

    measures: ClassVar[Kind | None] = None
    empty = False

    def compute(self) -> Tensor:
        self.empty = not bool(self.units > 0)  # here they are sums over all processes
        return self._mean()


class BitsPerToken(_Likelihood):
    """Mean negative log2 likelihood of a target token (a base, a sample, a word piece)."""

    def compute(self) -> Tensor:
        return self._mean() / math.log(2)


class BitsPerByte(_Likelihood):
    """Negative log2 likelihood per byte of the raw data (`Batch.n_units`, or the targets if None)."""

    def _units(self, batch: Batch, n_targets: Tensor) -> Tensor:
        return n_targets if batch.n_units is None else batch.n_units.sum()

    def compute(self) -> Tensor:
        return self._mean() / math.log(2)


class Perplexity(_Likelihood):
    """exp of the mean negative log likelihood of a target token."""

    def compute(self) -> Tensor:
        return self._mean().exp()


class TokenAccuracy(Metric):
    """Share of the targets that the model ranks first."""

    higher_is_better = True
    measures: ClassVar[Kind | None] = "labels"
    splits_time: ClassVar[bool] = True
    correct: Tensor
    total: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        assert output.logits is not None
        assert batch.targets is not None
        valid = batch.targets != -100
        self.correct += ((output.logits.argmax(-1) == batch.targets) & valid).sum()
        self.total += valid.sum()

    def compute(self) -> Tensor:
        return self.correct / self.total


class BitsByLength(Metric):
    """Mean negative log2 likelihood of the targets of sequences (documents, where they are packed) of 2^k up to 2^(k+1)
    - 1 tokens: rows of 2^k, the number of targets, and bits a target; `(rows, 3)` float64."""

    scalar = False
    higher_is_better = None
    per_token: ClassVar[bool | None] = True
    measures: ClassVar[Kind | None] = "labels"
    sums: Tensor

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__(class_names)
        self.add_state("sums", torch.zeros(2, 63, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: ModelOutput, batch: Batch) -> None:
        targets, logits = batch.targets, output.logits
        assert targets is not None
        if logits is None or logits.shape[:-1] != targets.shape:
            raise ConfigError("The metric bits_by_length needs a head that gives logits for each target. Leave it out.")
        known = (targets != -100).flatten(2).sum(2) if targets.dim() > 2 else targets != -100
        nll = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view_as(targets)
        nll = nll.flatten(2).sum(2) if targets.dim() > 2 else nll
        if batch.cu_seqlens is not None:
            lengths = batch.cu_seqlens.diff().long()
            of = lengths.repeat_interleave(lengths, output_size=targets.shape[1])[None]
        elif batch.mask is not None:
            of = batch.mask.sum(1, keepdim=True).expand_as(nll)
        else:
            of = torch.full_like(nll, targets.shape[1], dtype=torch.long)
        k = torch.bucketize(of.flatten(), 2 ** torch.arange(1, 63, device=of.device), right=True)
        self.sums.index_add_(1, k, torch.stack([nll.flatten(), known.flatten()]).double())

    def compute(self) -> Tensor:
        seen = self.sums[1].nonzero()[:, 0]
        nll, count = self.sums[:, seen]
        return torch.stack([2.0 ** seen.double(), count, nll / count / math.log(2)], 1)
