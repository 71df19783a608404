"""Training steps replayed from CUDA graphs are those of the usual way, on a GPU."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones.test_graphed import batches, loss_of, make, make_both, spoil_mixer
from torch import Tensor

from mambaseq.backbones import automatic
from mambaseq.backbones.graphed import EAGER_CALLS
from mambaseq.domain import catalog
from mambaseq.models import SequenceModel


def check_gradients(model: SequenceModel, expected: SequenceModel) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            error = (p.grad - q.grad).norm() / q.grad.norm().clamp(min=1e-12)
            assert error <= 1e-5, f"{name}: {error:.1e}"


def train(
    graphs: SequenceModel,
    usual: SequenceModel,
    data: list[Tensor],
    between: Callable[[SequenceModel, int], Any] = lambda model, step: None,
    loss: Callable[[SequenceModel, Tensor], Tensor] = loss_of,
    set_to_none: bool = True,
) -> None:
    """AdamW on both, all losses and gradients compared."""
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (graphs, usual)]
    for step, tokens in enumerate(data):
        losses = []
        for model, optimizer in zip((graphs, usual), optimizers, strict=True):
            between(model, step)
            optimizer.zero_grad(set_to_none=set_to_none)
            losses.append(loss(model, tokens))
            losses[-1].backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        check_gradients(graphs, usual)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"mixer": "s4d"}, {"lti": True}, {"d_state": 20}], ids=["mamba", "s4d", "lti", "wide"]
)
def test_steps_equal_the_usual(cuda: torch.device, options: dict[str, Any], set_to_none: bool) -> None:
    graphs, usual = make_both(cuda, **options)
    train(graphs, usual, batches(cuda, 6), set_to_none=set_to_none)
    assert graphs.backbone.graphs.captured == 1
    assert graphs.backbone.graphs.replays == 4
    assert usual.backbone.graphs.captured == 0


@pytest.mark.gpu
def test_long_sequences_cut_along_time(cuda: torch.device) -> None:
    graphs, usual = make_both(cuda)
    train(graphs, usual, batches(cuda, 5, (1, 5000)))
    assert graphs.backbone.graphs.replays == 3
    # what was made for other lengths drives what the graph reads out of no cache
    for length in range(300, 480):
        with torch.no_grad():
            graphs(torch.zeros(1, length, dtype=torch.long, device=cuda))
    rubbish = [torch.full((64 << i % 6,), -1, device=cuda) for i in range(600)]
    train(graphs, usual, batches(cuda, 2, (1, 5000)))
    assert graphs.backbone.graphs.replays == 5
    assert rubbish


@pytest.mark.gpu
def test_gradients_are_accumulated(cuda: torch.device) -> None:
    graphs, usual = make_both(cuda)
    for number, tokens in enumerate(batches(cuda, 8), 1):
        for model in (graphs, usual):
            (loss_of(model, tokens) / 4).backward()
        check_gradients(graphs, usual)
        if number == 4:
            for model in (graphs, usual):
                model.zero_grad(set_to_none=False)
    assert graphs.backbone.graphs.replays == 6


@pytest.mark.gpu
def test_gradients_and_outputs_are_the_caller_s(cuda: torch.device) -> None:
    stack = make(cuda).backbone
    kept = []
    for _ in range(6):
        x = torch.randn(2, 11, 64, device=cuda, requires_grad=True)
        stack.zero_grad()
        y = stack(x)
        y.square().sum().backward()
        now = [y.detach(), x.grad, *(p.grad for p in stack.parameters())]
        kept.append((now, [tensor.clone() for tensor in now]))  # type: ignore[union-attr]
    for now, then in kept:
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))  # type: ignore[arg-type]
    assert stack.graphs.replays == 4


@pytest.mark.gpu
def test_two_shapes_in_turn(cuda: torch.device) -> None:
    graphs, usual = make_both(cuda)
    data = [b for pair in zip(batches(cuda, 6), batches(cuda, 6, (3, 16)), strict=True) for b in pair]
    train(graphs, usual, data)
    assert graphs.backbone.graphs.captured == 2
    assert graphs.backbone.graphs.replays == 8


@pytest.mark.gpu
def test_two_forwards_before_a_backward(cuda: torch.device) -> None:
    graphs, usual = make_both(cuda)

    def both(model: SequenceModel, tokens: Tensor) -> Tensor:
        return loss_of(model, tokens) + 2 * loss_of(model, tokens.flip(1))

    train(graphs, usual, batches(cuda, 6), loss=both)
    assert graphs.backbone.graphs.captured == 1
    assert graphs.backbone.graphs.replays == 5  # the third of 12 calls, and then the first of each two


@pytest.mark.gpu
def test_a_forward_without_a_backward_blocks_nothing(cuda: torch.device) -> None:
    model = make(cuda)
    for tokens in batches(cuda, 6):
        loss_of(model, tokens)
    assert model.backbone.graphs.replays == 4


@pytest.mark.gpu
def test_a_second_backward_is_refused(cuda: torch.device) -> None:
    stack, x = make(cuda).backbone, torch.randn(2, 9, 64, device=cuda)
    for _ in range(EAGER_CALLS):
        stack(x).sum().backward()
    loss = stack(x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='cuda_graph="auto" or False'):
        loss.backward()


@pytest.mark.gpu
def test_parameters_that_change_before_the_backward(cuda: torch.device) -> None:
    model = make(cuda)
    tokens = batches(cuda, 1)[0]
    for _ in range(EAGER_CALLS):
        loss_of(model, tokens)
    loss = loss_of(model, tokens)
    assert model.backbone.graphs.replays == 1
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
def test_dropout_differs_from_step_to_step(cuda: torch.device) -> None:
    stack = make(cuda, dropout=0.5).backbone
    x = torch.randn(2, 33, 64, device=cuda)
    results = []
    for _ in range(6):
        y = stack(x)
        y.sum().backward()
        results.append(y.detach())
    assert stack.graphs.replays == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(stack(x).detach())
    assert torch.equal(*states)
    assert stack.graphs.replays == 6


@pytest.mark.gpu
def test_frozen_parameters(cuda: torch.device) -> None:
    graphs, usual = make_both(cuda)

    def freeze(model: SequenceModel, step: int) -> None:
        model.encoder.requires_grad_(step >= 5)  # the input of the stack has no gradient
        model.backbone.layers[0].requires_grad_(step >= 10)

    train(graphs, usual, batches(cuda, 14), freeze)
    assert graphs.backbone.graphs.captured == 3
    assert graphs.backbone.graphs.replays == 3 + 3 + 2


@pytest.mark.gpu
def test_evaluation_in_between(cuda: torch.device) -> None:
    graphs, usual = make_both(cuda, dropout=0.0)
    held_out = batches(cuda, 1)[0]

    def evaluate(model: SequenceModel, step: int) -> None:
        model.eval()
        with torch.no_grad():
            losses.append(loss_of(model, held_out))
        model.train()
        with torch.no_grad():
            losses.append(loss_of(model, held_out))

    losses: list[Tensor] = []
    train(graphs, usual, batches(cuda, 6), evaluate)
    assert graphs.backbone.graphs.replays == 4
    for a, b, c, d in zip(losses[::4], losses[1::4], losses[2::4], losses[3::4], strict=True):
        torch.testing.assert_close(torch.stack([a, b, c]), d.expand(3), rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_autocast_on_and_off(cuda: torch.device) -> None:
    graphs, usual = make_both(cuda)

    def loss(model: SequenceModel, tokens: Tensor) -> Tensor:
        calls[model] = calls.get(model, 0) + 1
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=calls[model] % 2 == 1):
            return loss_of(model, tokens)

    calls: dict[SequenceModel, int] = {}
    train(graphs, usual, batches(cuda, 12), loss=loss)
    assert graphs.backbone.graphs.captured == 2
    assert graphs.backbone.graphs.replays == 8


@pytest.mark.gpu
def test_weights_that_are_loaded_and_moved(cuda: torch.device) -> None:
    graphs, usual = make_both(cuda)
    start = {name: tensor.clone() for name, tensor in usual.state_dict().items()}

    def load(model: SequenceModel, step: int) -> None:
        if step == 4:
            model.load_state_dict(start)
        if step == 5:
            with torch.no_grad():
                for parameter in model.backbone.parameters():
                    parameter.data = parameter.data.clone()

    train(graphs, usual, batches(cuda, 9), load)
    assert graphs.backbone.graphs.captured == 1
    assert graphs.backbone.graphs.replays == 3 + 2


@pytest.mark.gpu
def test_what_is_not_a_whole_training_step_runs_as_usual(cuda: torch.device) -> None:
    stack = make(cuda, chunk_length=32).backbone
    x, bounds = torch.randn(1, 24, 64, device=cuda), torch.tensor([0, 9, 24], dtype=torch.int32, device=cuda)
    for _ in range(EAGER_CALLS + 2):
        stack(x, cu_seqlens=bounds).sum().backward()
        stack(x, state=stack.init_state(1)).sum().backward()
        stack(x, return_state=True)[0].sum().backward()
        stack(torch.cat([x, x], dim=1)).sum().backward()
    assert stack.graphs.captured == 0
    checkpointed = make(cuda, checkpoint=True).backbone
    for _ in range(EAGER_CALLS + 2):
        checkpointed(x).sum().backward()
    assert checkpointed.graphs.captured == 0


def spoil(model: SequenceModel, wait: Callable[[Tensor], Any]) -> None:
    """Make the first layer one that cannot be captured."""
    spoil_mixer(model.backbone.mixers()[0], wait)


@pytest.mark.gpu
def test_a_layer_that_waits_is_not_captured(cuda: torch.device) -> None:
    graphs, usual = make_both(cuda)
    for model in (graphs, usual):
        spoil(model, lambda x: float(x.sum()))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(graphs, usual, batches(cuda, 6))
    told = [str(warning.message) for warning in seen if issubclass(warning.category, RuntimeWarning)]
    assert told == ["Training without CUDA graphs: a layer waits for the GPU."]
    assert graphs.backbone.graphs.captured == 0


def check_a_failed_capture() -> None:
    cuda = torch.device("cuda")
    graphs, usual = make_both(cuda)
    for model in (graphs, usual):
        spoil(model, lambda x: torch.cuda.synchronize())
    with pytest.warns(RuntimeWarning, match="Training without CUDA graphs"):
        train(graphs, usual, batches(cuda, 6))
    assert graphs.backbone.graphs.captured == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(3, device=cuda)
    graphs, usual = make_both(cuda)
    train(graphs, usual, batches(cuda, 6))
    assert graphs.backbone.graphs.captured == 1


@pytest.mark.gpu
def test_after_a_failed_capture_training_goes_on(cuda: torch.device) -> None:
    """In a process of its own: PyTorch does not clean up after a failed capture."""
    code = f"import sys; sys.path = {sys.path!r}; import test_graphed_on_gpu as of; of.check_a_failed_capture()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [entry.name for entry in catalog()["mixers"]])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_unasked_graphs_change_no_bit(cuda: torch.device, mixer: str, half: bool) -> None:
    models = [make(cuda, mixer=mixer, cuda_graph=how) for how in ("auto", False)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    for tokens in batches(cuda, automatic.EAGER_CALLS + 4, (2, 64)):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
                losses.append(loss_of(model, tokens))
            losses[-1].backward()
        assert torch.equal(*losses)
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.step()
    assert models[0].backbone.graphs.replays == 4


@pytest.mark.gpu
def test_unasked_graphs_refuse_nothing(cuda: torch.device) -> None:
    graphs, usual = (make(cuda, cuda_graph=how, backend="reference").backbone for how in ("auto", False))
    x = torch.randn(2, 9, 64, device=cuda)

    def twice(stack: Any) -> list[Tensor]:
        stack.zero_grad()
        y = stack(x).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        return [p.grad for p in stack.parameters()]

    for _ in range(automatic.EAGER_CALLS + 2):
        for found, expected in zip(twice(graphs), twice(usual), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert graphs.graphs.captured == 1
    assert graphs.graphs.replays > 0


@pytest.mark.gpu
def test_unasked_graphs_are_one_at_a_time(cuda: torch.device) -> None:
    graphs, usual = make(cuda, cuda_graph="auto"), make(cuda, cuda_graph=False)
    data = [b for pair in zip(batches(cuda, 20), batches(cuda, 20, (3, 16)), strict=True) for b in pair]
    train(graphs, usual, data)
    assert graphs.backbone.graphs.captured == 1
    assert graphs.backbone.graphs.replays >= 1
