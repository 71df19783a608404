"""What an evaluation says beside its figures: intervals, pictures, and how simple baselines do on the same records."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor

from mambaseq.data.baselines import Baseline, Records, Told, constant
from mambaseq.data.module import SequenceData
from mambaseq.errors import DataError, UserError, cut_list, paragraph, shown
from mambaseq.metrics.answers import Answers
from mambaseq.metrics.base import Metric
from mambaseq.metrics.bootstrap import Bootstrap, Interval, interval
from mambaseq.metrics.curves import pictured
from mambaseq.models import SequenceModel


def keeps_answers(model: SequenceModel) -> bool:
    """Whether a model's answers are kept: of heads that label or value. Those that continue a sequence answer with a
    number for every token of a vocabulary, at every position."""
    return not model.head.per_token or getattr(model.head, "continues", None) == ""


def groups_of(items: Any) -> Sequence[object] | None:
    """The group of each item of a set, where it names any: see `ItemDataset`."""
    groups = getattr(items, "groups", None)
    return None if groups is None else list(groups)


@dataclasses.dataclass
class Judge:
    """Judges answers on one set.

    metrics: by name. figures: what the evaluation found of each. main: the metric that baselines are compared by.
        answers: the model's. groups: see `groups_of`.
    """

    metrics: Mapping[str, Metric]
    figures: Mapping[str, float]
    main: str
    answers: Answers
    groups: Sequence[object] | None = None

    def __post_init__(self) -> None:
        self.bootstrap = Bootstrap.of(self.answers, self.groups)
        alone = {name: _alone(metric) for name, metric in self.metrics.items()}
        self.metrics = {name: metric for name, metric in alone.items() if self._measures(name, metric)}
        self.own = self.bootstrap.measure(self.metrics, self.answers)

    def _measures(self, name: str, metric: Metric) -> bool:
        """Whether a metric is a function of what was answered: a plugin's may ask for inputs as well, or for more than
        rows hold."""
        if not (metric.scalar and metric.needs_logits) or name not in self.figures or not len(self.answers):
            return False
        try:
            again = _computed(metric, self.answers)
        except Exception:  # a third party's metric may raise anything
            return False
        return bool(np.isclose(again, self.figures[name], rtol=1e-4, atol=1e-6, equal_nan=True))

    def intervals(self) -> dict[str, Any]:
        """What stands in results.json: how often what was drawn, and the interval of each metric."""
        found = _intervals(self.own)
        if not found:
            return {}
        drawn = self.bootstrap
        of = "sequences" if drawn.groups is None else "groups"
        few = {"too_few_groups": drawn.few_groups} if drawn.few_groups else {}
        return {"of": of, "count": drawn.n_units, **few, "draws": drawn.draws, "metrics": found}

    def one_answer(self, class_names: Sequence[str]) -> str:
        """A sentence on a model that answers all alike, which no figure says by itself; "" of another."""
        answers = self.answers
        if not answers.alike():
            return ""
        first, said, what = answers.outputs[0], "the same value", "its figures say"
        if answers.kind != "values":
            single = answers.kind == "labels"
            held = [int(first.argmax())] if single else (first > 0).nonzero()[:, 0].tolist()
            names = [shown(class_names[place]) if place < len(class_names) else str(place) for place in held]
            said = f"{'one class only' if single else 'the same labels'}, {cut_list(names, 5) or 'none'},"
            what = "what counts them (accuracy, F1, MCC) says"
        of = ("bins" if answers.stride > 1 else "positions") if answers.per_token else "sequences"
        return (
            f"The model answers {said} for all {len(answers):,} {of}: {what} no more than a constant would, however "
            "narrow an interval is."
        )

    def pictures(self, class_names: Sequence[str]) -> dict[str, Any]:
        return pictured(self.answers, class_names)

    def beside(self, data: SequenceData, items: Any, progress: bool) -> dict[str, Any]:
        """The baselines of a dataset on the sequences that the model answered: a row for each, with metrics, intervals,
        and the difference of the model to it in the main metric; and what comes of it, in words. items: the set.
        """
        records = Records(items, self.answers.numbers.tolist())
        always = lambda of: constant(data.train(), of, self.answers.outputs.shape[1])  # noqa: E731
        named: dict[str, Baseline] = {"constant": always, **data.baselines()}
        rows = []
        for name, baseline in named.items():
            if progress:
                print(f"baseline {name} ...", file=sys.stderr, flush=True)
            rows.append(self._row(name, baseline, records))
        return {"metric": self.main, "rows": rows, "verdict": self._verdict(rows)}

    def _row(self, name: str, baseline: Baseline, records: Records) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            told = baseline(records)
            answers = self._answers(told, name)
            values = {key: float(_computed(metric, answers)) for key, metric in self.metrics.items()}
            drawn = self.bootstrap.measure(self.metrics, answers)
        except Exception as error:  # a third party's function may raise anything; the others must be seen
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return {"name": name, "metrics": {}, "note": paragraph(f"failed: {reason}", 300)}
        difference = None
        if self.main in drawn and self.main in self.own:
            difference = interval(self.own[self.main] - drawn[self.main])
        return {
            "name": name,
            "metrics": values,
            "intervals": _intervals(drawn),
            "difference": difference,
            "seconds": round(time.perf_counter() - start, 1),
            "note": told.note,
        }

    def _answers(self, told: Told, name: str) -> Answers:
        """A baseline's answers to the model's rows. Raises DataError for answers of another shape."""
        outputs = told.outputs
        own, sequences = self.answers, self.answers.n_sequences
        if len(outputs) != sequences:
            raise DataError(f"The baseline {name} answers for {len(outputs):,} sequences; there are {sequences:,}.")
        if own.per_token:
            bounds = torch.bincount(own.owner, minlength=sequences).cumsum(0)[:-1]
            parts = own.places.tensor_split(bounds)
            rows = torch.cat([_rows(one)[places] for one, places in zip(outputs, parts, strict=True)])
        else:
            rows = _rows(outputs)
        if rows.shape != own.outputs.shape:
            raise DataError(
                f"The baseline {name} answers {tuple(rows.shape)}, but {tuple(own.outputs.shape)} is asked."
            )
        return dataclasses.replace(own, outputs=rows, point=True)

    def _verdict(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Which is ahead, and whether that is more than chance."""
        metric = self.metrics[self.main]
        own, sign = _computed(metric, self.answers), 1 if metric.higher_is_better else -1
        scored = [row for row in rows if np.isfinite(row["metrics"].get(self.main, np.nan))]
        if not scored:
            return "No baseline could be measured."
        best = max(scored, key=lambda row: sign * row["metrics"][self.main])
        value = best["metrics"][self.main]
        ahead = [row["name"] for row in scored if sign * row["metrics"][self.main] > sign * own]
        between, level = "", False
        if best["difference"] is not None:
            low, high = best["difference"]
            between = f" (difference {own - value:+.3f}, 95% interval {low:+.3f} to {high:+.3f})"
            level = low <= 0 <= high
        chance = ", which chance alone may make" if level else ""
        if ahead:
            others = [one for one in ahead if one != best["name"]]
            several = f" So {'is' if len(others) == 1 else 'are'} {cut_list(others)}." if others else ""
            return (
                f"A baseline is ahead of this run: {best['name']}, {self.main} {value:.3f} against {own:.3f}{between}"
                f"{chance}.{several}"
            )
        whole = f"all {len(scored)} baselines; the best is" if len(scored) > 1 else "the one baseline,"
        return (
            f"This run is ahead of {whole} {best['name']}: {self.main} {own:.3f} against {value:.3f}{between}{chance}."
        )


def _rows(outputs: Any) -> Tensor:
    found = torch.as_tensor(np.asarray(outputs)).float()
    return found[:, None] if found.dim() == 1 else found


def _no_others() -> bool:
    return False


def _alone(metric: Metric) -> Metric:
    """A copy that does not ask other processes: the answers are those of all, and only the first process judges. Nor do
    the metrics ask that it holds."""
    one = copy.deepcopy(metric)
    for held in one.modules():
        if isinstance(held, torchmetrics.Metric):
            held.distributed_available_fn = _no_others
    return one


def _computed(metric: Metric, answers: Answers) -> float:
    fresh = metric.clone()
    fresh.reset()
    fresh.update(*answers.rows())
    return float(fresh.compute())


def _intervals(drawn: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    found = {name: interval(values) for name, values in drawn.items()}
    return {name: one for name, one in found.items() if one is not None}
