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
from mambaseq.metrics.classification import MCC, Accuracy, Confusion, MacroF1
from mambaseq.metrics.likelihood import BitsPerByte, BitsPerToken, Perplexity, TokenAccuracy
from mambaseq.models import ModelOutput

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


def test_every_registered_metric_is_known_here() -> None:
    known = {
        "accuracy",
        "macro_f1",
        "mcc",
        "confusion",
        "bits_per_token",
        "bits_per_byte",
        "perplexity",
        "token_accuracy",
    }
    assert {entry.name for entry in catalog()["metrics"] if "/" not in entry.name} == known
