"""Pathfinder's pictures and the digits: right by construction, and no shortcut to the label."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mambaseq_synthetic.digits import DigitsData
from mambaseq_synthetic.pathfinder import CLEARANCE, DASH, DOT, PathfinderData, Picture, draw, path_length
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mambaseq.errors import ConfigError


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    train = PathfinderData(size=16).train()
    return [train.picture(index) for index in range(2000)]


def spread(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Chebyshev distances of all pairs of pixels."""
    return np.abs(one[:, None] - other[None]).max(-1)


def test_connected_dots_are_the_ends_of_one_path(pictures: list[Picture]) -> None:
    for index, picture in enumerate(pictures[:300]):
        assert picture.connected == (index % 2 == 1)
        owners = []
        for dot in picture.dots:
            ends = picture.paths[:, [0, -1]]
            (owner, _), *more = np.argwhere((ends == dot).all(-1))
            assert not more
            owners.append(int(owner))
        assert (owners[0] == owners[1]) == picture.connected
        assert not (picture.dots[0] == picture.dots[1]).all()


def test_paths_are_dashed_connected_and_clear_of_each_other(pictures: list[Picture]) -> None:
    assert [path_length(size) for size in (12, 16, 32)] == [8, 11, 23]
    for picture in pictures[:300]:
        for path in picture.paths:
            assert (np.abs(np.diff(path, axis=0)).max(1) == 1).all()
            shown = picture.pixels[path[:, 0], path[:, 1]] > 0
            assert shown.tolist() == [t % 3 < 2 for t in range(11)]
            near = spread(path, path) < CLEARANCE
            assert not np.triu(near, CLEARANCE + 1).any()
        assert spread(*picture.paths).min() >= CLEARANCE
        assert ((picture.pixels == DOT).sum(), (picture.pixels == DASH).sum() >= 14) == (2, True)


def test_both_classes_are_the_same_pictures_with_other_dots() -> None:
    for seed in range(50):
        apart, connected = (draw(np.random.default_rng(seed), flag) for flag in (False, True))
        assert ((apart.pixels > 0) == (connected.pixels > 0)).all()
        offsets = [sorted(np.abs(p.dots[0] - p.dots[1]).tolist()) for p in (apart, connected)]
        assert offsets[0] == offsets[1]


def beside_dots(picture: Picture) -> list[float]:
    """Whether the dashes beside the dots point at the other dot: two cosines, the larger first, and their signs."""
    cosines = []
    for dot, other in (picture.dots, picture.dots[::-1]):
        (dash,) = (p for path in picture.paths for p in (path[1], path[-2]) if np.abs(p - dot).max() == 1)
        there, to = dash - dot, other - dot
        cosines.append(float(there @ to / np.linalg.norm(there) / np.linalg.norm(to)))
    larger, smaller = sorted(cosines, reverse=True)
    return [larger, smaller, larger > 0, smaller > 0]


def test_counts_of_pixels_and_what_is_at_the_dots_do_not_tell(pictures: list[Picture]) -> None:
    labels = np.array([picture.connected for picture in pictures])
    assert labels.mean() == 0.5
    pixels = np.array([picture.pixels.ravel() for picture in pictures])
    counts = np.stack([(pixels == DASH).sum(1), (pixels == DOT).sum(1)], 1)
    dots = np.array([np.r_[p.dots.ravel(), np.abs(p.dots[0] - p.dots[1])] for p in pictures])
    for features in (counts, dots, pixels == DASH, np.array([beside_dots(p) for p in pictures])):
        fit = LogisticRegression(max_iter=1000).fit(features[:1000], labels[:1000])
        assert fit.score(features[1000:], labels[1000:]) == pytest.approx(0.5, abs=5 * (0.25 / 1000) ** 0.5)


def test_pictures_as_tokens_and_as_a_signal() -> None:
    tokens, signal = (PathfinderData(size=12, continuous=flag) for flag in (False, True))
    assert (tokens.vocab_size, tokens.n_channels, tokens.length) == (3, None, 144)
    assert (signal.vocab_size, signal.n_channels) == (None, 1)
    one, other = tokens.train()[3], signal.train()[3]
    assert (one.inputs.shape, one.inputs.dtype) == ((1, 144), torch.int64)
    assert other.inputs.shape == (1, 144, 1)
    assert torch.equal(one.inputs / 2, other.inputs[..., 0])
    assert set(one.inputs.unique().tolist()) == {0, 1, 2}
    with pytest.raises(ConfigError, match=r"data\.size must be at least 12"):
        PathfinderData(size=11)


def parts(data: DigitsData) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data.setup()
    return [
        (torch.cat([item.inputs for item in part]), torch.cat([item.targets for item in part]))
        for part in (data.train(), data.validation(), data.test())
    ]


def test_digits_are_split_once() -> None:
    pixels, labels = load_digits(return_X_y=True)
    found = parts(DigitsData())
    assert [len(labels) for _, labels in found] == [1257, 180, 360]
    rows = sorted((*x.tolist(), int(y)) for inputs, targets in found for x, y in zip(inputs, targets, strict=True))
    assert rows == sorted((*x.astype(int).tolist(), int(y)) for x, y in zip(pixels, labels, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, parts(DigitsData()), strict=True))
    assert not torch.equal(found[2][0], parts(DigitsData(split_seed=1))[2][0])


def test_digits_permuted_and_continuous() -> None:
    plain, permuted, signal = (parts(DigitsData(**flags)) for flags in ({}, {"permuted": True}, {"continuous": True}))
    order = DigitsData(permuted=True).order()
    assert sorted(order) == list(range(64))
    for split in range(3):
        assert torch.equal(plain[split][0][:, order], permuted[split][0])
        assert torch.equal(plain[split][1], permuted[split][1])
        assert torch.equal(plain[split][0] / 16, signal[split][0][..., 0])
    assert int(plain[0][0].max()) == 16 < DigitsData().vocab_size  # type: ignore[operator]
    with pytest.raises(ConfigError, match="leave no image for training"):
        DigitsData(n_test=1700).setup()
