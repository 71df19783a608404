"""The base of metrics: a torchmetrics metric that is updated with a model's output and its batch."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torchmetrics
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.heads.base import Kind
from mambaseq.metrics.answers import Answers
from mambaseq.models import ModelOutput


class Metric(torchmetrics.Metric, abc.ABC):
    """Accumulates over batches, and over processes.

    needs_logits: the model must return logits for it. scalar: False for a table, which is saved instead of logged.
    higher_is_better: decides which checkpoint is the best.
    per_token: whether it needs a target for each position (True) or for each sequence (False);
        None: either.
    measures: "labels" (one of several classes), "multilabels" (any of several labels) or "values", as `Batch.kind`;
        None: any of them. These two let a run refuse a metric that does not fit before its first step.
    splits_time: whether it is a sum over positions, so that processes that share sequences may each update it with
        their part (see `mambaseq.parallel`).
    """

    full_state_update = False
    needs_logits: ClassVar[bool] = True
    scalar: ClassVar[bool] = True
    per_token: ClassVar[bool | None] = None
    measures: ClassVar[Kind | None] = None
    splits_time: ClassVar[bool] = False

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.class_names = tuple(class_names)

    @abc.abstractmethod
    def update(self, output: ModelOutput, batch: Batch) -> None: ...

    @abc.abstractmethod
    def compute(self) -> Tensor: ...

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any, **options: Any) -> Any:
        """Follow a model to a device, not to its dtype (`trainer.precision: bf16-true`): a sum of many batches would
        stand still in it. torchmetrics knows `half()` and its like, not `to(dtype)`."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(fn if self._dtype_convert else moved, *arguments, **options)

    def drawn(self, answers: Answers, draws: Tensor) -> Tensor | None:
        """The metric for each of several draws of the sequences of a set, `(draws,)` float64: what intervals are made
        of. None where `answers` do not hold what it needs.

        draws: `(draws, sequences)` int64, how often each sequence is drawn. This one repeats rows and calls `update`
        and `compute`; most of ours know a faster way.
        """
        if not self.needs_logits or not answers.point:
            return None
        fresh, found = self.clone(), []
        for weights in answers.weights(draws):
            fresh.reset()
            fresh.update(*answers.rows(torch.arange(len(answers)).repeat_interleave(weights)))
            found.append(fresh.compute().double())
        return torch.stack(found)
