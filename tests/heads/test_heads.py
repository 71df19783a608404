"""Heads: pooling by hand, the chunked loss equal to the whole one."""

from __future__ import annotations

import pytest
import torch

from mambaseq.errors import ConfigError
from mambaseq.heads.base import Head, pool
from mambaseq.heads.classification import ClassificationHead
from mambaseq.heads.lm import LMHead
from mambaseq.heads.regression import RegressionHead
from mambaseq.heads.reverse_complement import RCLMHead
from mambaseq.ops.linear_cross_entropy import chunked as chunks


@pytest.mark.parametrize("how", ["mean", "last"])
def test_pooling_masked_and_packed_agree(how) -> None:
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    expected = torch.stack([t.mean(0) if how == "mean" else t[-1] for t in (a, b)])
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


@pytest.mark.parametrize(
    ("head", "targets"),
    [
        (LMHead(6, 11), torch.full((2, 3), -100)),
        (ClassificationHead(6, 4, label_smoothing=0.1), torch.full((2,), -100)),
        (RegressionHead(6, 2), torch.full((2, 2), float("nan"))),
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
