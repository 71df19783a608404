"""Heads: pooling by hand, the chunked loss equal to the whole one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mambaseq.encoders import SignalEncoder
from mambaseq.errors import ConfigError
from mambaseq.heads.base import Head, pool
from mambaseq.heads.classification import ClassificationHead, MultilabelHead
from mambaseq.heads.distributions import Gaussian, Quantiles
from mambaseq.heads.forecast import ForecastHead
from mambaseq.heads.lm import LMHead
from mambaseq.heads.losses import BinaryLoss, LabelLoss
from mambaseq.heads.positions import TokenClassificationHead, TokenMultilabelHead, TokenRegressionHead, bin_means
from mambaseq.heads.regression import RegressionHead
from mambaseq.heads.reverse_complement import RCLMHead
from mambaseq.models import causal_lm
from mambaseq.ops.linear_cross_entropy import chunked as chunks


@pytest.mark.parametrize("how", ["mean", "max", "last"])
def test_pooling_masked_and_packed_agree(how) -> None:
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    by_hand = {"mean": lambda t: t.mean(0), "max": lambda t: t.amax(0), "last": lambda t: t[-1]}
    expected = torch.stack([by_hand[how](t) for t in (a, b)])
    padded = torch.full((2, 5, 4), 99.0)
    padded[0, :3], padded[1] = a, b
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    torch.testing.assert_close(pool(padded, how, mask, None), expected)
    packed = torch.cat([a, b])[None]
    torch.testing.assert_close(pool(packed, how, None, torch.tensor([0, 3, 8], dtype=torch.int32)), expected)
    empty = pool(packed, how, None, torch.tensor([0, 0, 3, 8], dtype=torch.int32))
    torch.testing.assert_close(empty, torch.cat([torch.zeros(1, 4), expected]))


def test_chunked_loss_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    head = LMHead(6, 11)
    hidden = torch.randn(3, 7, 6, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :4] = -100
    whole, logits = head(hidden, labels)
    assert logits is not None
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(whole, expected)
    grads = torch.autograd.grad(whole, [hidden, head.linear.weight])
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 44)
    chunked, none = head(hidden, labels, return_logits=False)
    assert none is None
    torch.testing.assert_close(chunked, whole)
    for one, other in zip(grads, torch.autograd.grad(chunked, [hidden, head.linear.weight]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [3, 3, 3]])
def test_the_loss_of_few_labels_equals_that_of_all_positions(counts: list[int]) -> None:
    head, few = LMHead(6, 11), LMHead(6, 11, most_labels=3)
    few.load_state_dict(head.state_dict())
    hidden = torch.randn(3, 7, 6, requires_grad=True)
    labels = torch.full((3, 7), -100)
    for row, n in enumerate(counts):
        labels[row, torch.randperm(7)[:n]] = torch.randint(0, 11, (n,))
    found = []
    for one in (head, few):
        loss, _ = one(hidden, labels, return_logits=False)
        found.append((loss, *torch.autograd.grad(loss, [hidden, one.linear.weight])))
    for all_positions, labelled in zip(*found, strict=True):
        torch.testing.assert_close(all_positions, labelled)
    _, logits = few(hidden, labels)
    torch.testing.assert_close(logits, head(hidden)[1])


def test_the_loss_of_few_labels_is_computed_of_so_many_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return hidden.sum()

    monkeypatch.setattr("mambaseq.heads.lm.linear_cross_entropy", spy)
    labels = torch.full((3, 7), -100)
    labels[:, ::4] = 1
    LMHead(6, 11, most_labels=2)(torch.randn(3, 7, 6), labels, return_logits=False)
    assert seen == [6]


def test_more_labels_than_were_promised_are_refused_and_never_left_out() -> None:
    head, hidden = LMHead(6, 11, most_labels=2), torch.randn(2, 5, 6)
    labels = torch.tensor([[1, -100, -100, -100, 2], [1, 2, 3, -100, -100]])
    with pytest.raises(ConfigError, match=r"A sequence has 3 labels, but model\.head\.most_labels is 2"):
        head(hidden, labels, return_logits=False)
    assert torch.isfinite(head(hidden, labels)[0])  # where logits are asked for, all positions are computed


@pytest.mark.parametrize("adapted", [False, True])
def test_where_nobody_counts_the_labels_too_many_give_nan(adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a label that is none would end the process."""
    monkeypatch.setattr("mambaseq.heads.lm.is_eager", lambda *_: False)
    head, hidden = LMHead(6, 11, most_labels=2), torch.randn(2, 5, 6)
    if adapted:
        head.linear.register_forward_hook(lambda *_: None)
    labels = torch.tensor([[1, -100, -100, -100, 2], [1, 2, 3, -100, -100]])
    assert head(hidden, labels, return_logits=False)[0].isnan()
    assert torch.isfinite(head(hidden, labels.index_fill(1, torch.tensor([2]), -100), return_logits=False)[0])


def test_few_labels_of_an_empty_batch() -> None:
    head = LMHead(6, 11, most_labels=2)
    loss, _ = head(torch.zeros(0, 5, 6), torch.zeros(0, 5, dtype=torch.int64), return_logits=False)
    assert loss == 0


@pytest.mark.parametrize(
    ("head", "targets"),
    [
        (LMHead(6, 11), torch.full((2, 3), -100)),
        (ClassificationHead(6, 4, label_smoothing=0.1), torch.full((2,), -100)),
        (RegressionHead(6, 2), torch.full((2, 2), float("nan"))),
        (ClassificationHead(6, 4, class_weights=[1.0, 2.0, 0.0, 1.0], focal_gamma=0.5), torch.full((2,), -100)),
        (MultilabelHead(6, 4, focal_gamma=2.0), torch.full((2, 4), -100)),
        (TokenClassificationHead(6, 4, stride=2), torch.full((2, 2), -100)),
        (TokenMultilabelHead(6, 4), torch.full((2, 3, 4), -100)),
        (TokenRegressionHead(6, 4, stride=3), torch.full((2, 1, 4), float("nan"))),
        (ForecastHead(6, 2, horizon=4), torch.full((2, 3, 2), float("nan"))),
        (ForecastHead(6, 2, loss="quantile"), torch.full((2, 3, 2), float("nan"))),
    ],
)
def test_no_target_at_all_gives_zero_not_nan(head: Head, targets: torch.Tensor) -> None:
    for return_logits in (True, False):
        hidden = torch.randn(2, 3, 6, requires_grad=True)
        loss, _ = head(hidden, targets, return_logits=return_logits)
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, [hidden, *head.parameters()]):
            assert not gradient.any()


def test_what_is_not_known_is_no_part_of_the_mean() -> None:
    hidden = torch.randn(3, 5, 4)
    head = ClassificationHead(4, 3)
    loss, logits = head(hidden, torch.tensor([2, -100, 0]))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([2, 0])))
    regression = RegressionHead(4, 2)
    labels = torch.tensor([[1.0, float("nan")], [float("nan")] * 2, [0.5, -2.0]])
    loss, values = regression(hidden, labels)
    torch.testing.assert_close(loss, (values - labels).square().nanmean())
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(regression.parameters())))


LABELS, VALUES = torch.tensor([1, 0]), torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(
    ("head", "targets"),
    [
        (RegressionHead(6), LABELS),
        (RegressionHead(6, 3), torch.randn(2, 5, 3)),
        (ClassificationHead(6, 4), VALUES),
        (ClassificationHead(6, 4), torch.zeros(2, 5, dtype=torch.long)),
        (LMHead(6, 4), LABELS),
        (LMHead(6, 4), torch.randn(2, 5)),
        (LMHead(6, 4), torch.zeros(2, 4, dtype=torch.long)),
        (RCLMHead(6, 4, [3, 2, 1, 0]), LABELS),
        (MultilabelHead(6, 4), LABELS),
        (MultilabelHead(6, 4), torch.randn(2, 4)),
        (TokenClassificationHead(6, 4, stride=2), torch.zeros(2, 5, dtype=torch.long)),
        (TokenMultilabelHead(6, 4), torch.zeros(2, 3, 4, dtype=torch.long)),
        (TokenRegressionHead(6, 4), torch.randn(2, 5)),
        (ForecastHead(6, 2), torch.randn(2, 4, 2)),
        (ForecastHead(6, 2), LABELS),
    ],
)
def test_targets_of_another_kind_are_refused(head: Head, targets: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"learns (labels|values) .*the targets are (labels|values) \(2"):
        head(torch.randn(2, 5, 12 if head.strands == 2 else 6), targets)


def test_classification_and_regression_losses() -> None:
    hidden = torch.randn(2, 5, 4)
    head = ClassificationHead(4, 3)
    loss, logits = head(hidden, torch.tensor([2, 0]))
    torch.testing.assert_close(logits, head.linear(hidden.mean(1)))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0])))
    regression = RegressionHead(4, 1)
    loss, values = regression(hidden, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(loss, ((values[:, 0] - torch.tensor([1.0, 2.0])) ** 2).mean())
    regression = RegressionHead(4, 3)
    labels = torch.randn(2, 3)
    loss, values = regression(hidden, labels)
    torch.testing.assert_close(loss, ((values - labels) ** 2).mean())
    for wrong in (torch.randn(2), torch.randn(2, 2), torch.randn(3, 2)):
        with pytest.raises(ConfigError, match="n_outputs"):
            regression(hidden, wrong)


def test_options_of_label_losses_by_hand() -> None:
    """p = 1/4 for the first target, of class 0, and 1/2 for the second, of class 2; in evaluation no option counts."""
    logits = torch.tensor([[1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [1.0, 0.5, 0.1]]).log()
    labels = torch.tensor([0, 2, -100])
    four, two = math.log(4), math.log(2)
    weighted = LabelLoss(3, class_weights=[3.0, 1.0, 0.5])
    assert float(weighted(logits, labels)) == pytest.approx((3 * four + 0.5 * two) / 2)
    focal = LabelLoss(3, focal_gamma=2.0)
    assert float(focal(logits, labels)) == pytest.approx((9 / 16 * four + 1 / 4 * two) / 2)
    smooth = LabelLoss(3, label_smoothing=0.3)
    spread = (four + two + four) / 3
    assert float(smooth(logits, labels)) == pytest.approx(0.7 * (four + two) / 2 + 0.3 * spread)
    for loss in (weighted, focal, smooth):
        assert float(loss.eval()(logits, labels)) == pytest.approx((four + two) / 2)
        assert not loss.state_dict()


def test_options_of_several_labels_by_hand() -> None:
    """Probabilities 1/4 and 1/2; the third label is not known."""
    logits = torch.tensor([[math.log(1 / 3), 0.0, 5.0]])
    labels = torch.tensor([[1, 0, -100]])
    one, other = math.log(4), math.log(2)
    weighted = BinaryLoss(3, positive_weights=[3.0, 5.0, 1.0])
    assert float(weighted(logits, labels)) == pytest.approx((3 * one + other) / 2)
    focal = BinaryLoss(3, focal_gamma=1.0)
    assert float(focal(logits, labels)) == pytest.approx((3 / 4 * one + other / 2) / 2)
    smooth = BinaryLoss(3, label_smoothing=0.2)
    assert float(smooth(logits, labels)) == pytest.approx((0.9 * one + 0.1 * math.log(4 / 3) + other) / 2)
    for loss in (weighted, focal, smooth):
        assert float(loss.eval()(logits, labels)) == pytest.approx((one + other) / 2)


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (ClassificationHead, {"class_weights": [1.0]}, r"class_weights are 1, but there are 4 classes"),
        (
            TokenClassificationHead,
            {"class_weights": [1.0, -1.0, 1.0, 1.0]},
            r"finite numbers of at least 0, some above",
        ),
        (MultilabelHead, {"positive_weights": [0.0] * 4}, "finite numbers of at least 0, some above"),
        (MultilabelHead, {"focal_gamma": -1.0}, r"model\.head\.focal_gamma finite and at least 0"),
        (TokenRegressionHead, {"stride": 0}, r"model\.head\.stride must be 1"),
        (TokenMultilabelHead, {"dropout": 1.0}, "dropout from 0"),
        (ForecastHead, {"horizon": 0}, r"model\.head\.horizon must be 1"),
        (ForecastHead, {"loss": "quantile", "quantiles": [0.5, 0.5]}, r"model\.head\.quantiles must ascend"),
        (ForecastHead, {"loss": "quantile", "quantiles": []}, r"model\.head\.quantiles must ascend"),
        (ForecastHead, {"min_scale": 0.0}, "min_scale must be positive"),
        (ForecastHead, {"channel_mean": [0.0] * 4}, "one number for each of 4 channels"),
        (ForecastHead, {"channel_mean": [0.0] * 3, "channel_std": [1.0] * 3}, "one number for each of 4 channels"),
        (ForecastHead, {"channel_mean": [0.0] * 4, "channel_std": [1.0, 1.0, 0.0, 1.0]}, "channel_std above 0"),
    ],
)
def test_options_out_of_range_are_refused(head: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head(6, 4, **options)


@pytest.mark.parametrize("options", [{}, {"loss": "quantile", "quantiles": [0.2, 0.5, 0.9]}])
def test_a_forecast_weighs_every_target_alike(options: dict[str, Any]) -> None:
    """A target is told from one, two and three steps before it, as far as the sequence goes back; one is not known."""
    head = ForecastHead(4, 1, horizon=3, **options)
    labels = torch.tensor([[[0.5], [float("nan")], [-1.0], [2.0]]])
    loss, logits = head(torch.randn(1, 4, 4), labels)
    assert logits.shape == (1, 4, 3, 1, 3 if options else 2)
    targets = []
    for at in (0, 2, 3):
        value, found = labels[0, at, 0], []
        for behind in range(min(3, at + 1)):
            told = logits[0, at - behind, behind, 0]
            if not options:
                found.append(-torch.distributions.Normal(told[0], told[1]).log_prob(value))
            else:
                errors = value - told
                pinball = [max(q * e, (q - 1) * e) for q, e in zip((0.2, 0.5, 0.9), errors.tolist(), strict=True)]
                found.append(torch.tensor(2 * sum(pinball) / 3))
                assert (told.diff() > 0).all()
        targets.append(torch.stack(found).mean())
    torch.testing.assert_close(loss, torch.stack(targets).mean())


@pytest.mark.parametrize(
    ("head", "targets", "remedy"),
    [
        (TokenRegressionHead(6, 2), torch.randn(2, 5, 3), r"predicts 2, .* 3 values .*Set model\.head\.n_outputs"),
        (ForecastHead(6, 2), torch.randn(2, 5, 1), r"predicts 2, .* 1 values .*next values of all channels"),
        (MultilabelHead(6, 2), torch.zeros(2, 3, dtype=torch.long), r"predicts 2, .* 3 labels .*class_names"),
        (TokenMultilabelHead(6, 2), torch.zeros(2, 5, 3, dtype=torch.long), r"predicts 2, .* 3 labels .*class_names"),
    ],
)
def test_too_many_targets_are_told_by_what_mends_it(head: Head, targets: torch.Tensor, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        head(torch.randn(2, 5, 6), targets)


@pytest.mark.parametrize("options", [{}, {"loss": "quantile", "quantiles": [0.2, 0.5, 0.9]}])
def test_channels_of_any_size_are_told_in_their_units(options: dict[str, Any]) -> None:
    """As without units on (value - mean) / std; what is told is in units. A dtype does not round the numbers."""
    mean, std = torch.tensor([1000.0, -3.0]), torch.tensor([50.0, 0.01])
    plain = ForecastHead(4, 2, horizon=2, **options)
    scaled = ForecastHead(4, 2, horizon=2, channel_mean=mean.tolist(), channel_std=std.tolist(), **options)
    assert scaled.state_dict().keys() == plain.state_dict().keys()
    scaled.load_state_dict(plain.state_dict())
    hidden, small = torch.randn(2, 5, 4), torch.randn(2, 5, 2)
    small[0, 1, 0] = float("nan")
    loss, logits = scaled(hidden, small * std + mean)
    expected, told = plain(hidden, small)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    found, wanted = scaled.distribution(logits), plain.distribution(told)
    torch.testing.assert_close(found.point(), wanted.point() * std + mean)
    torch.testing.assert_close(found.crps(mean.expand(2, 5, 2)), wanted.crps(torch.zeros(2, 5, 2)) * std)
    numbers = scaled.bfloat16().scale.numbers
    assert numbers is not None
    assert torch.equal(numbers[1], std)
    encoder = SignalEncoder(4, 2, channel_mean=mean.tolist(), channel_std=std.tolist())
    expected = encoder.linear(torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(encoder(mean + torch.tensor([1, -2]) * std), expected, rtol=1e-3, atol=1e-3)


def test_forecasts_name_their_numbers() -> None:
    assert ForecastHead(4, 2).columns() == ["mean_1", "std_1", "mean_2", "std_2"]
    head = ForecastHead(4, 1, 2, loss="quantile", quantiles=[0.1, 0.5])
    assert head.columns() == ["q0.1_1_ahead_1", "q0.5_1_ahead_1", "q0.1_1_ahead_2", "q0.5_1_ahead_2"]


def test_distributions_by_hand() -> None:
    share = torch.tensor([[0.1], [0.5], [0.75], [0.95]], dtype=torch.float64)
    quantiles = Quantiles(torch.tensor([0.0, 2.0, 3.0]).expand(4, 1, 3), torch.tensor([0.25, 0.5, 0.75]))
    # straight lines: 8 a unit of share below, 4 above the median
    torch.testing.assert_close(quantiles.quantile(share)[:, 0], torch.tensor([-1.2, 2.0, 3.0, 3.8]).double())
    assert quantiles.point().tolist() == [[2.0]] * 4
    normal = Gaussian(torch.full((4, 1), 2.0), torch.full((4, 1), 3.0))
    expected = torch.distributions.Normal(2.0, 3.0).icdf(share.float())
    torch.testing.assert_close(normal.quantile(share).float(), expected)
    assert normal.sample(share, 0).tolist() == [[2.0]] * 4
    torch.testing.assert_close(normal.sample(share, 0.5) - 2, (expected - 2) / 2)
    assert normal.sample(torch.tensor([[0.0]] * 4).double()).isfinite().all()


def test_bins_are_means_of_real_positions() -> None:
    a, b = torch.randn(5, 4), torch.randn(2, 4)
    expected = torch.stack([a[:3].mean(0), a[3:].mean(0), b.mean(0)])
    padded = torch.full((2, 5, 4), 99.0)
    padded[0], padded[1, :2] = a, b
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    found = bin_means(padded, 3, mask, None)
    torch.testing.assert_close(torch.cat([found[0], found[1, :1]]), expected)
    assert not found[1, 1].any()
    bounds = torch.tensor([0, 0, 5, 7, 7], dtype=torch.int32)
    packed = torch.cat([a, b])[None].requires_grad_()
    means = bin_means(packed, 3, None, bounds)
    torch.testing.assert_close(means[0], expected)
    (gradient,) = torch.autograd.grad(means.sum(), packed)
    torch.testing.assert_close(gradient[0, :, 0], torch.tensor([1 / 3] * 3 + [1 / 2] * 4))


def test_a_head_of_bins_takes_no_state() -> None:
    model = causal_lm(7, 8, 1)
    model.head = TokenRegressionHead(8, stride=4)
    with pytest.raises(ConfigError, match=r"one answer for 4 positions \(model\.head\.stride\)"):
        model.step_(torch.zeros(1, dtype=torch.long), model.init_state(1))


def test_the_loss_alone_calls_what_stands_around_the_linear_map() -> None:
    head = LMHead(6, 11)
    hidden, labels = torch.randn(1, 3, 6), torch.tensor([[1, -100, 4]])
    plain, _ = head(hidden, labels, return_logits=False)
    handle = head.linear.register_forward_hook(lambda module, given, logits: logits + torch.arange(11.0))
    expected, _ = head(hidden, labels)
    hooked, none = head(hidden, labels, return_logits=False)
    handle.remove()
    assert none is None
    torch.testing.assert_close(hooked, expected)
    assert not torch.allclose(hooked, plain)


def test_loss_of_tied_weights_reaches_the_embedding() -> None:
    """One weight, two uses: both add to its gradient."""
    head, ids, labels = LMHead(6, 11), torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, -100]])
    weight = head.linear.weight
    loss, _ = head(torch.nn.functional.embedding(ids, weight), labels, return_logits=False)
    (grad,) = torch.autograd.grad(loss, weight)
    leaf = weight.detach().clone().requires_grad_()
    logits = torch.nn.functional.embedding(ids, leaf) @ leaf.t()
    torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100).backward()
    torch.testing.assert_close(grad, leaf.grad)
