"""What is kept of a model's answers: metrics of ranks, intervals by drawing again, and groups that are drawn whole."""

from __future__ import annotations

import itertools
import unittest.mock

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from mambaseq.batch import Batch
from mambaseq.domain import catalog
from mambaseq.errors import DataError
from mambaseq.heads.distributions import Gaussian
from mambaseq.metrics import classification, ranking, values
from mambaseq.metrics.answers import Answers, AnswerSheet
from mambaseq.metrics.base import Metric
from mambaseq.metrics.bootstrap import Bootstrap, intervals
from mambaseq.metrics.calibration import BINS
from mambaseq.metrics.curves import pictured
from mambaseq.metrics.likelihood import BitsPerToken
from mambaseq.models import ModelOutput

NAMES = ("a", "b", "c")
RNG = np.random.default_rng(0)
LOGITS = torch.from_numpy(RNG.normal(size=(60, 3)).round(1)).float()  # with ties
CLASSES = torch.from_numpy(RNG.integers(0, 3, 60))
LABELS = torch.from_numpy(np.where(RNG.random((60, 3)) < 0.8, RNG.integers(0, 2, (60, 3)), -100))
VALUES = torch.from_numpy(np.where(RNG.random((60, 3)) < 0.8, RNG.integers(-4, 4, (60, 3)), np.nan)).float()


def made(name: str, names: tuple[str, ...] = NAMES) -> Metric:
    return catalog()["metrics"].get(name)(names)


def in_parts(metric: Metric, logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Of two processes, the second with two batches, gathered as torchmetrics does."""
    parts = []
    for part in (slice(0, 7), slice(7, 11), slice(11, None)):
        batch = Batch(torch.zeros(len(targets[part]), 1), targets[part], target_of="sequence")
        one = metric.clone() if len(parts) < 2 else parts[1]
        one.update(ModelOutput(logits=logits[part]), batch)
        parts += [one] if len(parts) < 2 else []
    whole = metric.clone()
    for name, reduction in metric._reductions.items():
        states = [getattr(part, name) for part in parts]
        if isinstance(states[0], list):
            setattr(whole, name, [tensor for state in states for tensor in state])
        else:
            setattr(whole, name, torch.stack(states).sum(0) if reduction else torch.cat(states))
    whole._update_count = 1
    return float(whole.compute())


def one_column(logits: torch.Tensor, kind: int) -> np.ndarray:
    others = [k for k in range(3) if k != kind]
    return (logits[:, kind].double() - logits[:, others].double().logsumexp(1)).numpy()


def by_column(function) -> float:
    known = [LABELS[:, k] >= 0 for k in range(3)]
    return np.mean([function(LABELS[known[k], k].numpy(), LOGITS[known[k], k].numpy()) for k in range(3)])


def calibration_by_hand(logits: torch.Tensor, targets: torch.Tensor) -> float:
    shares = logits.double().softmax(1).numpy()
    sure, right = shares.max(1), shares.argmax(1) == targets.numpy()
    edges = np.arange(BINS + 1) / BINS
    inside = [(sure > low) & (sure <= high) for low, high in itertools.pairwise(edges)]
    return sum(abs(sure[part].sum() - right[part].sum()) for part in inside) / len(sure)


@pytest.mark.parametrize(
    ("name", "targets", "second"),
    [
        ("balanced_accuracy", CLASSES, lambda: sklearn.metrics.balanced_accuracy_score(CLASSES, LOGITS.argmax(1))),
        (
            "auroc",
            CLASSES,
            lambda: sklearn.metrics.roc_auc_score(CLASSES, LOGITS.double().softmax(1), multi_class="ovr"),
        ),
        (
            "auprc",
            CLASSES,
            lambda: np.mean(
                [
                    sklearn.metrics.average_precision_score(CLASSES.eq(k).numpy(), one_column(LOGITS, k))
                    for k in range(3)
                ]
            ),
        ),
        ("ece", CLASSES, lambda: calibration_by_hand(LOGITS, CLASSES)),
        ("multilabel_auroc", LABELS, lambda: by_column(sklearn.metrics.roc_auc_score)),
        ("multilabel_auprc", LABELS, lambda: by_column(sklearn.metrics.average_precision_score)),
        (
            "spearman",
            VALUES,
            lambda: np.mean(
                [
                    scipy.stats.spearmanr(LOGITS[~VALUES[:, k].isnan(), k], VALUES[~VALUES[:, k].isnan(), k])[0]
                    for k in range(3)
                ]
            ),
        ),
    ],
)
def test_metrics_over_batches_and_processes_against_a_second_library(name, targets, second) -> None:
    assert in_parts(made(name), LOGITS, targets) == pytest.approx(second(), abs=1e-9)


def test_of_two_classes_the_second_is_ranked() -> None:
    logits, truth = LOGITS[:, :2] + 40, (CLASSES > 0).long()  # probabilities of all rows round to the same
    score = (logits[:, 1].double() - logits[:, 0].double()).numpy()
    two = ("no", "yes")
    assert in_parts(made("auroc", two), logits, truth) == pytest.approx(sklearn.metrics.roc_auc_score(truth, score))
    expected = sklearn.metrics.average_precision_score(truth, score)
    assert in_parts(made("auprc", two), logits, truth) == pytest.approx(expected)
    assert np.isnan(in_parts(made("auroc", two), logits, truth * 0))


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (CLASSES, ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "auroc", "auprc", "ece")),
        (LABELS, ("multilabel_auroc", "multilabel_auprc", "multilabel_f1")),
        (VALUES, ("mae", "rmse", "crps", "correlation", "spearman")),
    ],
)
def test_the_fast_way_to_draw_is_the_slow_way(targets, names, positions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each metric of draws equals its `compute` of the rows, repeated. Sequences of 4 positions are drawn whole."""
    answers = Answers.of(LOGITS, targets)
    if positions:
        answers.owner, answers.per_token = torch.arange(len(answers)) // 4, True
        answers.numbers = answers.owner.unique()
    for draws in Bootstrap(answers.n_sequences, draws=5):
        for name in names:
            metric = made(name)
            slow = Metric.drawn(metric, answers, draws)
            assert metric.drawn(answers, draws).tolist() == pytest.approx(slow.tolist(), abs=1e-6), name
            for module in (classification, values):  # a draw after the other, where rows are many
                monkeypatch.setattr(module, "_AT_ONCE", 1)
            assert metric.drawn(answers, draws).tolist() == pytest.approx(slow.tolist(), abs=1e-6), name
            monkeypatch.undo()
    assert BitsPerToken().drawn(answers, draws) is None  # the loss of a batch is not the rows'
    answers.point = False
    assert made("crps").drawn(answers, draws) is None


def test_areas_of_many_positions_are_told_from_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within two ten-thousandths of the exact ones; with few different scores, the same."""
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(rng.integers(0, 3, 20_000))
    clear = torch.nn.functional.one_hot(targets, 3) + torch.from_numpy(rng.normal(size=(20_000, 3))).float()
    for logits, within in ((clear, 2e-4), ((clear > 0.5).float(), 1e-9)):
        answers = Answers.of(logits, targets)
        answers.owner, answers.per_token = torch.arange(20_000) // 500, True
        answers.numbers = answers.owner.unique()
        draws = next(iter(Bootstrap(40, draws=4)))
        for name in ("auroc", "auprc"):
            metric = made(name)
            exact = metric.drawn(answers, draws)
            monkeypatch.setattr(ranking, "_MANY", 1000)
            assert metric.drawn(answers, draws).tolist() == pytest.approx(exact.tolist(), abs=within)
            assert (metric.drawn(answers, draws) != exact).any() or within < 1e-6
            monkeypatch.undo()


def test_a_million_sequences_have_no_table_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the product with a table `(sequences, cells)` gives it, without one: it would take gigabytes."""
    rng, n, cells = np.random.default_rng(0), 300, 256
    owner, cell = (torch.from_numpy(rng.integers(0, most, 2000)) for most in (n, cells))
    values, draws = torch.from_numpy(rng.integers(0, 2, 2000)).double(), torch.from_numpy(rng.integers(0, 4, (3, n)))
    table = ranking._in_cells(values, owner, cell, n, cells, draws)
    monkeypatch.setattr(ranking, "_AT_ONCE", 8)
    with unittest.mock.patch.object(torch, "zeros", side_effect=torch.zeros) as zeros:
        assert ranking._in_cells(values, owner, cell, n, cells, draws).equal(table)
    assert [call.args for call in zeros.call_args_list] == [(3, cells)]


def test_an_interval_covers_what_it_should() -> None:
    """Of 300 sets with an accuracy of 0.7, the intervals of about 95% hold it; groups of equal rows widen them."""
    rng, covered = np.random.default_rng(1), 0
    metrics = {"accuracy": made("accuracy")}
    for trial in range(300):
        right = torch.from_numpy(rng.random(120) < 0.7).long()
        logits = torch.nn.functional.one_hot(right, 3).float()
        answers = Answers.of(logits, torch.ones(120, dtype=torch.long))
        found = intervals(metrics, answers, Bootstrap(120, draws=200, seed=trial))["accuracy"]
        covered += found.low <= 0.7 <= found.high
    assert 0.90 <= covered / 300 <= 0.98
    eightfold = Answers.of(logits.repeat_interleave(8, 0), torch.ones(960, dtype=torch.long))
    groups = [f"record {i // 8}" for i in range(960)]
    one, alone = (intervals(metrics, eightfold, Bootstrap.of(eightfold, by))["accuracy"] for by in (groups, None))
    assert (one.high - one.low) / (alone.high - alone.low) == pytest.approx(8**0.5, rel=0.15)
    again = intervals(metrics, eightfold, Bootstrap.of(eightfold, groups))["accuracy"]
    assert one == again
    few = Bootstrap.of(eightfold, [i // 240 for i in range(960)])
    assert (few.n_units, few.few_groups) == (960, 4)  # four groups say little of others
    with pytest.raises(DataError, match="groups for 3"):
        Bootstrap.of(eightfold, ["a", "b", "c"])


def test_answers_are_kept_by_sequence_of_padded_and_packed_batches_and_of_processes() -> None:
    targets = torch.tensor([[0, 1, -100], [2, -100, -100]])
    logits = torch.arange(18.0).reshape(2, 3, 3)
    padded, packed = AnswerSheet(), AnswerSheet()
    padded.update(ModelOutput(logits=logits), Batch(torch.zeros(2, 3), targets))
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    flat = Batch(torch.zeros(1, 6), targets.reshape(1, 6), cu_seqlens=bounds)
    packed.update(ModelOutput(logits=logits.reshape(1, 6, 3)), flat)
    for sheet in (padded, packed):
        sheet.update(ModelOutput(logits=logits[:1]), Batch(torch.zeros(1, 3), torch.tensor([[1, -100, 2]])))
        found = sheet.answers()
        assert found is not None
        assert found.owner.tolist() == [0, 0, 1, 2, 2]
        assert found.targets.tolist() == [0, 1, 2, 1, 2]
        assert found.outputs[:, 0].tolist() == [0, 3, 9, 0, 6]
    shared = [AnswerSheet(rank, 2) for rank in range(2)]
    for sheet in shared:
        sheet.update(ModelOutput(logits=logits[:, 0] + sheet.rank), Batch(torch.zeros(2, 1), torch.tensor([0, 1])))
    whole = shared[0]
    for name in AnswerSheet._STATES:  # as torchmetrics gathers them
        setattr(whole, name, getattr(shared[0], name) + getattr(shared[1], name))
    found = whole.answers()
    assert found.numbers.tolist() == [0, 1, 2, 3]
    assert found.outputs[:, 0].tolist() == [0, 1, 9, 10]
    few = AnswerSheet(most=8)
    for _ in range(2):
        few.update(ModelOutput(logits=logits[:, 0]), Batch(torch.zeros(2, 1), torch.tensor([0, 1])))
    assert few.answers() is None
    spread = Gaussian(logits[:, 0, :1], logits[:, 0, :1] + 1)
    told = AnswerSheet()
    told.update(ModelOutput(logits=logits[:, 0], distribution=spread), Batch(torch.zeros(2, 1), torch.zeros(2)))
    assert not told.answers().point


def test_curves_are_those_of_scikit_learn() -> None:
    """All thresholds of a small set; of a large one some, on the same curve."""
    for n in (60, 3000):
        rng = np.random.default_rng(n)
        truth, score = rng.integers(0, 2, n), rng.normal(size=n).round(1 if n == 60 else 5)
        logits = torch.from_numpy(np.stack([np.zeros(n), score], 1)).float()
        drawn = pictured(Answers.of(logits, torch.from_numpy(truth)), ("no", "yes"))
        (roc,), (precision,) = drawn["roc"], drawn["precision"]
        score = logits[:, 1].numpy()
        x, y, _ = sklearn.metrics.roc_curve(truth, score, drop_intermediate=False)
        rows = np.stack([x, y], 1).round(5)
        assert roc["area"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, score))
        assert precision["area"] == pytest.approx(sklearn.metrics.average_precision_score(truth, score))
        told = list(zip(roc["x"], roc["y"], strict=True))
        assert {tuple(row) for row in told} <= {tuple(row) for row in rows.tolist()}
        assert (told[0], told[-1]) == ((0, 0), (1, 1))
        y, x, _ = sklearn.metrics.precision_recall_curve(truth, score)
        points = {tuple(row) for row in np.stack([x, y], 1).round(5).tolist()}
        told = list(zip(precision["x"], precision["y"], strict=True))
        assert set(told) <= points
        assert len(told) > 20
        bins = drawn["reliability"]
        assert sum(bins["count"]) == n
        sure = logits.double().softmax(1).max(1).values.numpy()
        held = np.average(bins["confidence"], weights=bins["count"])
        assert held == pytest.approx(sure.mean(), abs=1e-4)
