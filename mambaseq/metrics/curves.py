"""What pictures of an evaluation are drawn from, as plain values: curves of ranks, reliability, values, tracks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambaseq.metrics.answers import Answers
from mambaseq.metrics.calibration import BINS, binned
from mambaseq.metrics.ranking import one_against_rest, precision_area, roc_area

POINTS = 101  # of a curve
_DOTS = 500  # of values against values
_TRACKS, _LONGEST = 3, 20_000  # sequences with a track, and positions of each
_MOST_CLASSES = 60


def pictured(answers: Answers, class_names: Sequence[str]) -> dict[str, Any]:
    """Plain values for the pictures of a set's answers: `roc` and `precision` (name, area, xs, ys of each class),
    `reliability` (bins), `values` (predicted and true), `tracks` (truth and prediction along sequences)."""
    found: dict[str, Any] = {"classes": list(class_names), "kind": answers.kind, "sequences": answers.n_sequences}
    if answers.kind == "values":
        found["values"] = _values(answers)
    elif len(class_names) <= _MOST_CLASSES:
        found |= _ranked(answers, class_names)
    if answers.per_token:
        found["tracks"] = [_track(answers, number) for number in _telling(answers)]
    return found


def _ranked(answers: Answers, class_names: Sequence[str]) -> dict[str, Any]:
    if answers.kind == "labels":
        scores, labels = one_against_rest(answers.outputs, answers.targets)
        names = list(class_names)[-scores.shape[1] :]
        place, parts = binned(answers.outputs, answers.targets)
    else:
        scores, labels, names = answers.outputs, answers.targets.clamp(-1, 1), list(class_names)
        known = labels >= 0
        share = scores[known].double().sigmoid()
        place = (share * BINS).ceil().long().clamp(1, BINS) - 1
        parts = torch.stack([torch.ones_like(share), share, labels[known].double()], 1)
    curves: dict[str, Any] = {"roc": [], "precision": []}
    for column, name in enumerate(names):
        known = labels[:, column] >= 0
        holds = labels[known, column] > 0
        if not 0 < int(holds.sum()) < len(holds):
            continue
        hits, misses = _counts(scores[known, column], holds)
        at = [torch.diff(of, prepend=of.new_zeros(1)).flip(0)[None] for of in (hits, misses)]  # at each threshold
        for kind, points, area in (("roc", roc_points, roc_area), ("precision", precision_points, precision_area)):
            xs, ys = points(hits, misses)
            curves[kind].append({"name": name, "area": float(area(*at)), "x": xs, "y": ys})
    sums = torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, place, parts)
    full = sums[:, 0] > 0
    count, sure, right = sums[full].unbind(1)
    curves["reliability"] = {
        "confidence": _rounded(sure / count),
        "right": _rounded(right / count),
        "count": [int(n) for n in count],
    }
    return curves


def _counts(scores: Tensor, holds: Tensor) -> tuple[Tensor, Tensor]:
    """How many rows are hits, and misses, at or above each threshold, from the highest score down; float64. scores:
    `(rows,)`. holds: `(rows,)` bool."""
    order = scores.argsort(descending=True)
    score, hit = scores[order], holds[order]
    ends = torch.ones(len(order), dtype=torch.bool)
    ends[:-1] = score[1:] != score[:-1]
    return hit.cumsum(0)[ends].double(), (~hit).cumsum(0)[ends].double()


def _some(along: Tensor) -> Tensor:
    """Numbers of at most `POINTS` points, spread evenly along an ascending measure; first and last are kept."""
    if len(along) <= POINTS:
        return torch.arange(len(along))
    wanted = torch.linspace(float(along[0]), float(along[-1]), POINTS, dtype=along.dtype)
    return torch.searchsorted(along, wanted).clamp(max=len(along) - 1).unique()


def roc_points(hits: Tensor, misses: Tensor) -> tuple[list[float], list[float]]:
    """False and true positive rates from (0, 0) to (1, 1). hits, misses: how many rows of each kind are at or above
    each threshold, from the highest down; some of both in the end."""
    x = torch.cat([misses.new_zeros(1), misses / misses[-1]])
    y = torch.cat([hits.new_zeros(1), hits / hits[-1]])
    chosen = _some(x + y)
    return _rounded(x[chosen]), _rounded(y[chosen])


def precision_points(hits: Tensor, misses: Tensor) -> tuple[list[float], list[float]]:
    """Recall, ascending to 1, and precision. Arguments as of `roc_points`."""
    recall, precision = hits / hits[-1], hits / (hits + misses)
    # of equal recalls the first has the best precision
    first = torch.diff(hits, prepend=hits.new_zeros(1)) > 0
    recall, precision = recall[first], precision[first]
    chosen = _some(recall)
    return _rounded(recall[chosen]), _rounded(precision[chosen])


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def _values(answers: Answers) -> list[dict[str, Any]]:
    """Predicted and true values of some rows, evenly spread over the set; of the first outputs."""
    some = torch.linspace(0, max(len(answers) - 1, 0), min(_DOTS, len(answers))).long().unique()
    found = []
    for column in range(min(answers.outputs.shape[1], 3)):
        said, true = answers.outputs[some, column], answers.targets[some, column]
        known = ~true.isnan()
        found.append({"true": [float(v) for v in true[known]], "said": [float(v) for v in said[known]]})
    return found


def _telling(answers: Answers) -> list[int]:
    """The sequences with a track: the first ones in which most happens (labels that change; of values, any)."""
    targets = answers.targets[:, 0] if answers.targets.dim() > 1 else answers.targets
    changed = (targets[1:] != targets[:-1]) & (answers.owner[1:] == answers.owner[:-1])
    often = torch.zeros(answers.n_sequences).index_add_(0, answers.owner[1:], changed.float())
    if answers.kind == "values":
        often = often.clamp(max=1)
    return sorted(often.argsort(descending=True, stable=True)[:_TRACKS].tolist())


def _track(answers: Answers, sequence: int) -> dict[str, Any]:
    """Truth and prediction along a sequence: labels as runs `[label, length]`, -1 where unknown; values of the first
    output, None where unknown."""
    rows = (answers.owner == sequence).nonzero()[:, 0]
    places, stride = answers.places[rows], answers.stride
    rows, places = rows[places < _LONGEST], places[places < _LONGEST]
    length = int(places.max()) + 1
    found: dict[str, Any] = {"sequence": int(answers.numbers[sequence]), "stride": stride}
    if answers.kind == "values":
        for name, column in (("truth", answers.targets[rows, 0]), ("said", answers.outputs[rows, 0])):
            line = torch.full((length,), torch.nan).index_copy_(0, places, column.float())
            size = -(-length // 1000)  # values a point
            means = torch.nn.functional.pad(line, (0, -length % size), value=torch.nan).unflatten(0, (-1, size))
            found[name] = [None if value != value else value for value in means.nanmean(1).tolist()]
            found["step"] = stride * size
        return found
    several = answers.kind == "multilabels"
    truth = answers.targets[rows].clamp(min=0) if several else answers.targets[rows]
    said = (answers.outputs[rows] > 0).long() if several else answers.outputs[rows].argmax(1)
    if several:  # the first label that applies, counted from 1; 0 for none
        truth, said = (torch.where(x.any(1), x.argmax(1) + 1, 0) for x in (truth, said))
    found["step"] = stride
    for name, labels in (("truth", truth), ("said", said)):
        line = torch.full((length,), -1).index_copy_(0, places, labels)
        values, counts = line.unique_consecutive(return_counts=True)
        found[name] = [[int(value), int(count)] for value, count in zip(values, counts, strict=True)]
    return found
