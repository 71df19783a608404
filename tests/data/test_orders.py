"""Orders of labelled sets: every record once an epoch, or every class equally often; a function of (seed, item)."""

from __future__ import annotations

import numpy as np
import pytest

from mambaseq.data.module import classes_told
from mambaseq.data.orders import Balanced, Shuffled
from mambaseq.errors import ConfigError, DataError
from mambaseq.heads.losses import LabelLoss, balanced_weights


def test_shuffled() -> None:
    order = Shuffled(7, seed=3)
    items = np.arange(21)
    found = order.records(items)
    for epoch in range(3):
        assert sorted(found[7 * epoch : 7 * epoch + 7].tolist()) == list(range(7))
    assert found[:7].tolist() != found[7:14].tolist()
    again = Shuffled(7, seed=3)
    assert [int(again.records(np.array([i]))[0]) for i in reversed(items)] == found[::-1].tolist()
    assert Shuffled(7, seed=4).records(items).tolist() != found.tolist()


def test_balanced() -> None:
    labels = np.array([0] * 1000 + [-1] * 50 + [2] * 10 + [5])
    order = Balanced(labels, seed=1, size=6000)
    found = order.records(np.arange(6000))
    counts = np.bincount(labels[found], minlength=6)
    assert counts[[1, 3, 4]].tolist() == [0, 0, 0]
    assert (abs(counts[[0, 2, 5]] - 2000) < 200).all()
    of_two = np.bincount(found[labels[found] == 2] - 1050, minlength=10)
    assert (abs(of_two - counts[2] / 10) < 60).all()
    assert len(order) == 6000
    assert len(Balanced(labels)) == 1061
    with pytest.raises(DataError, match="No training record has a class"):
        Balanced(np.array([-1, -1]))


def test_balanced_weights() -> None:
    """By hand, and as scikit-learn's `compute_class_weight("balanced")`."""
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0] * 6 + [1] * 2)
    counts = [(6, 2), (2, 6)]
    assert balanced_weights("class_weights", counts) == pytest.approx([8 / 12, 2])
    assert balanced_weights("class_weights", counts) == pytest.approx(
        compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    )
    assert balanced_weights("positive_weights", counts) == pytest.approx([1 / 3, 3])
    with pytest.raises(ConfigError, match="class number 2 of 2 has no training target"):
        balanced_weights("class_weights", [(6, 0), (0, 6)])
    with pytest.raises(ConfigError, match="is 'balanced', which a run replaces by numbers"):
        LabelLoss(2, "balanced")


def test_classes_are_told_with_those_that_may_be_misspelt() -> None:
    class Sounds:
        task = "classes"
        class_names = ("bound", "unbound", "bund", "Bound")
        class_counts = ((119, 2), (120, 2), (1, 2), (1, 2))

    told = classes_told(Sounds())  # type: ignore[arg-type]
    assert told == (
        "classes of the training set: bound 119, unbound 120, bund 1, Bound 1; rare: 'bund', 'Bound'. Are they "
        "misspelt?; alike but for case: 'bound', 'Bound'. Are they misspelt?"
    )


def test_classes_of_positions_are_not_counted_at_the_start() -> None:
    class Genes:
        task = "labels"
        class_names = ("coding", "other")

        @property
        def class_counts(self) -> None:
            raise AssertionError("all labels of a genome would be read")

    assert classes_told(Genes()) == ""  # type: ignore[arg-type]
