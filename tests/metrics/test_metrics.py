"""Every metric has a known answer, by hand or by a second library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics
import torch

from mambaseq.batch import Batch
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.heads.distributions import Gaussian, Quantiles
from mambaseq.metrics.classification import MCC, Accuracy, Confusion, MacroF1
from mambaseq.metrics.likelihood import BitsByLength, BitsPerByte, BitsPerToken, Perplexity, TokenAccuracy
from mambaseq.metrics.multilabel import AUROC, MultilabelF1
from mambaseq.metrics.values import CRPS, MAE, RMSE, Correlation
from mambaseq.models import ModelOutput

NAN = float("nan")
NAMES = ("a", "b", "c")


def label_updates(metric, truth: np.ndarray, guess: np.ndarray):
    for part in (slice(0, 7), slice(7, None)):  # in two batches of different size
        logits = torch.nn.functional.one_hot(torch.from_numpy(guess[part]), 3).float()
        batch = Batch(inputs=torch.zeros(1), targets=torch.from_numpy(truth[part]))
        metric.update(ModelOutput(logits=logits), batch)
    return metric.compute()


@pytest.fixture
def labels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 3, 50), rng.integers(0, 3, 50)


@pytest.mark.parametrize(
    ("metric", "second_library"),
    [
        (Accuracy, sklearn.metrics.accuracy_score),
        (MacroF1, lambda t, g: sklearn.metrics.f1_score(t, g, average="macro")),
        (MCC, sklearn.metrics.matthews_corrcoef),
    ],
)
def test_labels_against_scikit_learn(metric, second_library, labels) -> None:
    truth, guess = labels
    assert float(label_updates(metric(NAMES), truth, guess)) == pytest.approx(second_library(truth, guess), abs=1e-7)


def test_confusion_rows_are_true_classes(labels) -> None:
    truth, guess = labels
    counts = label_updates(Confusion(NAMES), truth, guess)
    assert counts.tolist() == sklearn.metrics.confusion_matrix(truth, guess).tolist()


def test_a_constant_guess_has_mcc_zero_and_low_f1() -> None:
    truth, guess = np.array([0] * 9 + [1]), np.zeros(10, dtype=np.int64)
    assert float(label_updates(MCC(NAMES), truth, guess)) == 0
    assert float(label_updates(MacroF1(NAMES), truth, guess)) == pytest.approx(2 * 9 / 19 / 3)


def token_updates(metric):
    """Targets with probability 1/2, 1/4 (two batches), one ignored; 3 bytes behind them in all."""
    for targets, loss, units in (([[1, -100]], math.log(2), 1), ([[0, 1]], math.log(4), 2)):
        batch = Batch(inputs=torch.zeros(1, 2), targets=torch.tensor(targets), n_units=torch.tensor([units * 2]))
        logits = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
        metric.update(ModelOutput(loss=torch.tensor(loss), logits=logits), batch)
    return float(metric.compute())


def test_likelihood_known_answers() -> None:
    # nats: ln 2 over one target, ln 4 over two: (1 + 2 + 2) / 3 bits a token, 5 bits over 6 bytes
    assert token_updates(BitsPerToken()) == pytest.approx(5 / 3)
    assert token_updates(BitsPerByte()) == pytest.approx(5 / 6)
    assert token_updates(Perplexity()) == pytest.approx(2 ** (5 / 3))
    assert token_updates(TokenAccuracy()) == pytest.approx(2 / 3)


def test_bits_per_byte_without_units_counts_targets() -> None:
    metric = BitsPerByte()
    metric.update(
        ModelOutput(loss=torch.tensor(math.log(8))), Batch(inputs=torch.zeros(1), targets=torch.tensor([[1, 2, -100]]))
    )
    assert float(metric.compute()) == pytest.approx(3)


def test_class_metrics_refuse_unlabelled_data() -> None:
    with pytest.raises(ConfigError, match="no classes"):
        Accuracy(())


def in_two(metric, outputs: torch.Tensor, targets: torch.Tensor, **options) -> float:
    """Of two batches of different size."""
    for part in (slice(0, 7), slice(7, None)):
        batch = Batch(inputs=torch.zeros(targets[part].shape[:2]), targets=targets[part], **options)
        metric.update(ModelOutput(logits=outputs[part]), batch)
    return float(metric.compute())


def test_labels_of_positions_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 3, (10, 4)), rng.integers(0, 3, (10, 4))
    known = rng.random((10, 4)) < 0.7
    targets = torch.from_numpy(np.where(known, truth, -100))
    logits = torch.nn.functional.one_hot(torch.from_numpy(guess), 3).float()
    assert in_two(Accuracy(NAMES), logits, targets) == pytest.approx((truth == guess)[known].mean())
    f1 = sklearn.metrics.f1_score(truth[known], guess[known], average="macro")
    assert in_two(MacroF1(NAMES), logits, targets) == pytest.approx(f1)


@pytest.mark.parametrize("positions", [False, True])
def test_several_labels_against_scikit_learn(positions: bool) -> None:
    rng = np.random.default_rng(0)
    shape = (20, 5, 3) if positions else (40, 3)
    truth, logits = rng.integers(0, 2, shape), rng.normal(size=shape).round(1) + 30  # ties; sigmoids that are all 1
    known = rng.random(shape) < 0.8
    targets = torch.from_numpy(np.where(known, truth, -100))
    options = {} if positions else {"target_of": "sequence"}
    found = in_two(AUROC(NAMES), torch.from_numpy(logits).float(), targets, **options)
    columns = [(truth[..., k][known[..., k]], logits[..., k][known[..., k]] - 30) for k in range(3)]
    assert found == pytest.approx(np.mean([sklearn.metrics.roc_auc_score(*column) for column in columns]))
    found = in_two(MultilabelF1(NAMES), torch.from_numpy(logits - 30).float(), targets, **options)
    assert found == pytest.approx(np.mean([sklearn.metrics.f1_score(t, x > 0) for t, x in columns]))


def test_labels_that_never_hold_have_no_area() -> None:
    logits, targets = torch.tensor([[0.5, 1.0], [0.1, 2.0]]), torch.tensor([[1, 0], [0, 0]])
    metric = AUROC(("a", "b"))
    metric.update(ModelOutput(logits=logits), Batch(torch.zeros(2, 1), targets, target_of="sequence"))
    assert float(metric.compute()) == 1
    metric.reset()
    metric.update(ModelOutput(logits=logits[:, :2]), Batch(torch.zeros(2, 1), targets * 0, target_of="sequence"))
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_values_against_second_libraries(offset: float) -> None:
    """NaN is left out; a mean that is large beside the spread costs no digits."""
    rng = np.random.default_rng(0)
    truth = rng.integers(-8, 8, (40, 2)) + offset
    values = truth + rng.integers(-4, 4, (40, 2))
    known = rng.random((40, 2)) < 0.8
    targets = torch.from_numpy(np.where(known, truth, np.nan)).float()
    guess, errors = torch.from_numpy(values).float(), (values - truth)[known]
    assert in_two(MAE(), guess, targets) == pytest.approx(np.abs(errors).mean())
    assert in_two(RMSE(), guess, targets) == pytest.approx(math.sqrt(np.square(errors).mean()))
    pairs = [(values[known[:, k], k], truth[known[:, k], k]) for k in range(2)]
    expected = np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs])
    assert in_two(Correlation(), guess, targets) == pytest.approx(expected, rel=1e-9)


def test_crps_against_its_definition() -> None:
    """The integral of the squared difference of distribution functions, by the trapezoid rule."""
    grid = torch.linspace(-30, 30, 120_001, dtype=torch.float64)
    told, values = Gaussian(torch.tensor([[0.5], [-1.0]]), torch.tensor([[1.0], [3.0]])), torch.tensor([[1.2], [-4.0]])
    expected = []
    for mean, scale, value in zip(told.mean[:, 0], told.scale[:, 0], values[:, 0], strict=True):
        difference = torch.special.ndtr((grid - mean) / scale) - (grid >= value).double()
        expected.append(float(torch.trapezoid(difference.square(), grid)))
    metric = CRPS()
    output = ModelOutput(logits=torch.zeros(2, 1), distribution=told)
    metric.update(output, Batch(torch.zeros(2, 1), values))
    assert float(metric.compute()) == pytest.approx(sum(expected) / 2, rel=1e-3)
    # quantiles of the same as levels get dense; of a value alone it is the absolute error, and NaN is left out
    levels = (torch.arange(2000) + 0.5) / 2000
    dense = Quantiles(told.quantile(levels.expand(2, -1).double())[:, None].float(), levels)
    assert dense.crps(values)[:, 0].tolist() == pytest.approx(expected, rel=1e-3)
    metric.reset()
    metric.update(
        ModelOutput(logits=torch.tensor([[1.0], [5.0]])), Batch(torch.zeros(2, 1), torch.tensor([[3.0], [NAN]]))
    )
    assert float(metric.compute()) == 2


def test_a_constant_has_no_correlation() -> None:
    values, targets = torch.tensor([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1]]), torch.tensor([[3.0, 1], [2, 2], [1, 3]])
    metric = Correlation()
    metric.update(ModelOutput(logits=values), Batch(torch.zeros(3, 1), targets))
    assert float(metric.compute()) == -1
    metric.reset()
    metric.update(ModelOutput(logits=values[:, 1:]), Batch(torch.zeros(3, 1), targets[:, 0]))
    assert math.isnan(metric.compute())


def test_every_registered_metric_is_known_here() -> None:
    known = {
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "mcc",
        "auroc",
        "auprc",
        "ece",
        "confusion",
        "bits_per_token",
        "bits_per_byte",
        "bits_by_length",
        "perplexity",
        "token_accuracy",
        "multilabel_auroc",
        "multilabel_auprc",
        "multilabel_f1",
        "mae",
        "rmse",
        "crps",
        "correlation",
        "spearman",
    }
    assert {entry.name for entry in catalog()["metrics"] if "/" not in entry.name} == known


def test_bits_by_length_are_those_of_each_document() -> None:
    """Of probabilities 2^-k, documents of 1, 2 and 5 tokens, packed, padded and alone."""
    bits = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0, 1.0, 2.0, 4.0]])
    logits = torch.stack([-bits, torch.log2(1 - 2**-bits)], -1) * math.log(2)
    targets = torch.zeros(1, 8, dtype=torch.long)
    targets[0, 3] = -100
    metric = BitsByLength()
    packed = Batch(targets, targets, cu_seqlens=torch.tensor([0, 1, 3, 8], dtype=torch.int32))
    metric.update(ModelOutput(logits=logits), packed)
    expected = [[1.0, 1.0, 3.0], [2.0, 2.0, 1.5], [4.0, 4.0, 2.0]]
    assert metric.compute().tolist() == [pytest.approx(row) for row in expected]
    metric.reset()
    rows = torch.zeros(3, 5, dtype=torch.long), torch.tensor([[1], [2], [5]]) > torch.arange(5)
    padded, wide = torch.where(rows[1], 0, -100), torch.zeros(3, 5, 2)
    padded[2, 0] = -100
    wide[rows[1]] = logits[0]
    metric.update(ModelOutput(logits=wide), Batch(rows[0], padded, mask=rows[1]))
    assert metric.compute().tolist() == [pytest.approx(row) for row in expected]
    metric.update(ModelOutput(logits=logits), Batch(targets, targets))
    assert metric.compute().tolist() == [pytest.approx(row) for row in [*expected, [8.0, 7.0, 2.0]]]
    several = BitsByLength()  # codes: two targets a position
    several.update(
        ModelOutput(logits=logits.view(1, 4, 2, 2)),
        Batch(targets.view(1, 4, 2), targets.view(1, 4, 2), target_of="code"),
    )
    assert several.compute().tolist() == [pytest.approx([4.0, 7.0, 2.0])]
    with pytest.raises(ConfigError, match="logits for each target"):
        metric.update(ModelOutput(logits=logits[:, 1:]), Batch(targets, targets))
