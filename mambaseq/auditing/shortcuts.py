"""What one property of a sequence tells about its class: the accuracy that it reaches alone, on held-out data."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np

from mambaseq.data.audited import Audited, Property

SAMPLE = 20_000
"""The most windows, or whole sequences, that are looked at in a split."""
_LETTERS = 1 << 27
_LEAVES = 8


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """What a property tells alone.

    accuracy: on held-out data, of a tree of at most 8 leaves fitted on training data; low, high: Wilson's 95%
    interval. means: of the property, a class. alike: it is the same for all, and tells nothing.
    """

    name: str
    accuracy: float
    low: float
    high: float
    means: dict[str, float]
    seen: bool
    artefact: bool
    alike: bool


@dataclasses.dataclass(frozen=True)
class Shortcuts:
    """split: held-out data on which accuracies are measured. chance: what saying always the commonest class of the
    training data reaches there. trained, tested: numbers of windows, or whole sequences. together: all that a model
    sees, in one tree; None if that is one property at most."""

    split: str
    chance: float
    trained: int
    tested: int
    rows: list[Shortcut]
    together: Shortcut | None


def shortcuts(audited: Audited, seed: int = 0) -> Shortcuts | None:
    """What each property tells. None without two classes in training, or without held-out data that have classes.

    Of windows, as many of each class are drawn, as in training; of whole sequences all, or a draw from all of them.
    """
    held_out = next((name for name in ("test", "validation") if len(audited.splits.get(name, ()))), None)
    if held_out is None:
        held_out = next((name for name in audited.splits if name != "train"), None)
    if held_out is None or "train" not in audited.splits:
        return None
    properties = [*audited.properties, Property("length", len)]
    train = _values(audited, "train", properties, seed)
    test = _values(audited, held_out, properties, seed)
    if train is None or test is None or len(set(train[1])) < 2:
        return None
    (features, labels), (of_test, truth) = train, test
    classes, counts = np.unique(labels, return_counts=True)
    chance = float(np.mean(truth == classes[counts.argmax()]))
    rows = []
    for column, one in enumerate(properties):
        alike = float(np.ptp(features[:, column])) == 0
        right = _right(features[:, [column]], labels, of_test[:, [column]], truth, _LEAVES)
        means = {str(name): float(features[labels == name, column].mean()) for name in classes}
        rows.append(Shortcut(one.name, *_interval(right, len(truth)), means, one.seen, one.artefact, alike))
    seen = [column for column, row in enumerate(rows) if row.seen and not row.alike]
    together = None
    if len(seen) > 1:
        right = _right(features[:, seen], labels, of_test[:, seen], truth, 4 * _LEAVES)
        name = " + ".join(rows[column].name for column in seen)
        together = Shortcut(name, *_interval(right, len(truth)), {}, True, False, False)
    return Shortcuts(held_out, chance, len(labels), len(truth), rows, together)


def _right(features: np.ndarray, labels: np.ndarray, of_test: np.ndarray, truth: np.ndarray, leaves: int) -> int:
    from sklearn.tree import DecisionTreeClassifier

    least = max(2, len(labels) // 200)
    tree = DecisionTreeClassifier(max_leaf_nodes=leaves, min_samples_leaf=least, random_state=0)
    with warnings.catch_warnings():  # of many classes with few sequences each
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        return int((tree.fit(features, labels).predict(of_test) == truth).sum())


def _interval(right: int, n: int) -> tuple[float, float, float]:
    """Accuracy, and Wilson's 95% interval."""
    z, share = 1.959964, right / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


def _values(
    audited: Audited, split: str, properties: Sequence[Property], seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """`(pieces, properties)` float64 and the classes of the pieces; None without classes."""
    sequences, length = audited.splits[split], audited.length
    sizes = [(number, len(one), one.label) for number, one in enumerate(sequences) if one.label is not None]
    classes = sorted({label for _, _, label in sizes if label is not None})
    if not classes:
        return None
    rng = np.random.default_rng((seed, 0))
    chosen: list[tuple[int, int, int]] = []  # sequence, start, stop
    if length is None:
        mean = max(sum(size for _, size, _ in sizes) // max(len(sizes), 1), 1)
        most = min(SAMPLE, max(_LETTERS // mean, 100))
        picked = np.arange(len(sizes)) if len(sizes) <= most else np.sort(rng.choice(len(sizes), most, replace=False))
        chosen = [(sizes[one][0], 0, sizes[one][1]) for one in picked.tolist() if sizes[one][1]]
    else:
        tiles = {name: [(number, size // length) for number, size, label in sizes if label == name] for name in classes}
        counts = {name: sum(count for _, count in found) for name, found in tiles.items()}
        each = min(SAMPLE // len(classes), max(_LETTERS // length // len(classes), 20), *filter(None, counts.values()))
        for name, found in tiles.items():
            ends = np.cumsum([count for _, count in found])
            for tile in np.sort(rng.choice(counts[name], min(each, counts[name]), replace=False)).tolist():
                which = int(np.searchsorted(ends, tile, side="right"))
                start = (tile - (int(ends[which - 1]) if which else 0)) * length
                chosen.append((found[which][0], start, start + length))
    if not chosen:
        return None
    values = np.zeros((len(chosen), len(properties)))
    labels = []
    for row, (number, start, stop) in enumerate(chosen):
        one = sequences[number]
        ids = np.asarray(one.ids[start:stop])
        values[row] = [prop.of(ids) for prop in properties]
        labels.append(one.label)
    return values, np.array(labels)
