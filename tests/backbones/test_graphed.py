"""When training steps are captured in CUDA graphs, what their replays take for granted, and what is never captured."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from mambaseq.backbones import automatic, graphed, graphed_steps
from mambaseq.backbones.graphed import EAGER_CALLS, MOST_GRAPHS, CudaGraph, Key, inspect
from mambaseq.backbones.graphed_steps import StepGraphs
from mambaseq.errors import ConfigError
from mambaseq.models import SequenceModel, build_model, causal_lm

VOCABULARY = 29
CPU = torch.device("cpu")


def make(
    device: torch.device = CPU, *, cuda_graph: CudaGraph = True, d_model: int = 64, **options: Any
) -> SequenceModel:
    torch.manual_seed(0)
    return causal_lm(VOCABULARY, d_model, 2, cuda_graph=cuda_graph, **options).to(device).train()


def make_both(device: torch.device, **options: Any) -> tuple[SequenceModel, SequenceModel]:
    """The same model with graphs and without."""
    return make(device, **options), make(device, cuda_graph=False, **options)


def batches(device: torch.device, n: int, shape: tuple[int, int] = (2, 37)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (shape[0], shape[1] + 1), generator=generator).to(device) for _ in range(n)]


def loss_of(model: SequenceModel, tokens: Tensor) -> Tensor:
    loss = model(tokens[:, :-1], tokens[:, 1:].contiguous()).loss
    assert loss is not None
    return loss


def test_models_take_the_options() -> None:
    model = causal_lm(VOCABULARY, 8, 1, chunk_length=16, cuda_graph=True)
    assert model.backbone.cuda_graph
    assert model.backbone.chunk_length == 16
    assert model.spec is not None
    again = build_model(yaml.safe_load(yaml.safe_dump(model.spec)))
    assert again.backbone.cuda_graph
    assert again.backbone.chunk_length == 16
    plain = causal_lm(VOCABULARY, 8, 1).backbone
    assert plain.cuda_graph == "auto"
    with pytest.raises(ConfigError, match="for cuda_graph, not 'always'"):
        causal_lm(VOCABULARY, 8, 1, cuda_graph="always")
    assert plain.chunk_length is None


def test_on_a_cpu_nothing_changes() -> None:
    graphs, usual = make_both(CPU, d_model=16)
    for tokens in batches(CPU, EAGER_CALLS + 2, (2, 9)):
        for model in (graphs, usual):
            loss_of(model, tokens).backward()
        for p, q in zip(graphs.parameters(), usual.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert graphs.backbone.graphs.captured == graphs.backbone.graphs.replays == 0


def test_a_compiler_sees_the_usual_way() -> None:
    stack, x = make(d_model=16).backbone, torch.randn(1, 5, 16)
    torch.testing.assert_close(torch.compile(stack, backend="eager", fullgraph=True)(x), stack(x))


def test_copies_have_no_graphs_of_the_original() -> None:
    model = make(d_model=16)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.backbone.graphs is not model.backbone.graphs
        assert other.backbone.cuda_graph


def test_what_a_replay_takes_for_granted() -> None:
    stack = make(d_model=16, dropout=0.1).backbone
    before = inspect(stack, CPU)
    assert before is not None
    assert before == inspect(stack, CPU)
    assert [id(p) for p in before.learned] != []
    assert {id(p) for p in before.learned} == {id(p) for p in stack.parameters()}
    assert len(before.learned) == len(list(stack.parameters()))
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(1)
    assert inspect(stack, CPU) == before

    def switches() -> tuple[Any, ...]:
        found = inspect(stack, CPU)
        assert found is not None
        assert found.addresses == before.addresses
        return found.switches

    seen = [before.switches]
    stack.norm_f.weight.requires_grad_(False)
    seen.append(switches())
    stack.layers[1].eval()
    seen.append(switches())
    stack.layers[0].dropout.p = 0.5  # type: ignore[union-attr]
    seen.append(switches())
    assert len(set(seen)) == 4
    weight = stack.norm_f.weight
    stack.norm_f.weight = nn.Parameter(weight.detach().clone())
    after = inspect(stack, CPU)
    assert after is not None
    assert after.addresses != before.addresses


def test_what_is_never_captured() -> None:
    def found(change: Callable[[nn.Module], Any]) -> Any:
        stack = make(d_model=16).backbone
        change(stack)
        return inspect(stack, CPU)

    def in_place_of_a_parameter(stack: Any) -> None:
        stack.norm_f._parameters["weight"] = stack.norm_f.weight.detach() * 1

    assert found(lambda stack: stack.register_forward_hook(lambda *_: None)) is not None  # called around a replay
    assert found(lambda stack: stack.layers[0].register_forward_hook(lambda *_: None)) is None
    assert found(lambda stack: stack.layers[0].mixer.register_full_backward_hook(lambda *_: None)) is None
    assert found(lambda stack: stack.requires_grad_(False)) is None
    assert found(in_place_of_a_parameter) is None
    assert found(lambda stack: stack.norm_f.to("meta")) is None


def test_a_shape_is_captured_when_it_comes_again_and_again() -> None:
    graphs = StepGraphs()

    def key(length: int) -> Key:
        return Key(torch.Size([2, length, 8]), torch.float32, True, None, ())

    assert [graphs.is_due(key(3)) for _ in range(EAGER_CALLS + 1)] == [False] * EAGER_CALLS + [True]
    assert not graphs.is_due(key(4))
    for length in range(MOST_GRAPHS):
        graphs._pairs[key(length)] = None  # type: ignore[assignment]
    assert not any(graphs.is_due(key(9)) for _ in range(EAGER_CALLS + 1))


def test_what_is_captured_unasked_changes_no_number() -> None:
    def is_safe(change: Callable[[Any], Any], **options: Any) -> bool:
        stack = make(d_model=16, **options).backbone
        change(stack)
        return automatic.is_safe(stack)

    class Other(nn.Linear):
        pass

    def with_a_layer_of_others(stack: Any) -> None:
        stack.layers[0].mixer.out_proj = Other(4, 4)

    assert is_safe(lambda stack: None)
    assert not is_safe(lambda stack: None, dropout=0.1)
    assert is_safe(lambda stack: stack.eval(), dropout=0.1)
    assert not is_safe(with_a_layer_of_others)
    assert not is_safe(lambda stack: spoil_mixer(stack.mixers()[0], id))
    policy = automatic.Automatic()
    assert policy.is_of_use(torch.zeros(8, 2048, 1))
    assert not policy.is_of_use(torch.zeros(1, 2**15 + 1, 1))
    with automatic.capture.capturing:
        assert not policy.is_of_use(torch.zeros(8, 2048, 1))


@pytest.mark.parametrize(("free", "enough"), [(7, True), (6, False)])
def test_as_much_memory_must_be_left_as_graphs_took(monkeypatch: pytest.MonkeyPatch, free: int, enough: bool) -> None:
    reserved = iter([3, 10])  # before and after: they took 7
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: next(reserved))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 100))
    with nullcontext() if enough else pytest.raises(RuntimeError, match="too little memory"), automatic.leaving_room():
        pass


def test_a_shape_that_takes_another_s_place_must_come_more_often() -> None:
    graphs = StepGraphs(automatic=True)
    one, other = (Key(torch.Size([2, length, 8]), torch.float32, True, None, ()) for length in (3, 4))
    assert [graphs.is_due(one) for _ in range(automatic.EAGER_CALLS + 1)] == [False] * automatic.EAGER_CALLS + [True]
    graphs._pairs[one] = None  # type: ignore[assignment]
    assert [graphs.is_due(other) for _ in range(automatic.EAGER_CALLS + 1)][-1]
    assert copy.deepcopy(graphs)._policy is not None


def test_what_a_replay_cannot_give_is_made_as_usual() -> None:
    stack = make(d_model=16, backend="reference").backbone
    x, dy = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 16)
    parameters = list(stack.parameters())

    def run(x: Tensor) -> Tensor:
        return stack._run(x, None, None, False)[0]

    expected = torch.autograd.grad(run(x), [x, *parameters], dy, create_graph=True)
    with torch.no_grad():
        found = graphed_steps._as_usual(run, x, parameters, None, dy)
    torch.testing.assert_close(found, expected)
    assert not any(d.requires_grad for d in found if d is not None)
    assert graphed_steps._as_usual(run, x.detach(), parameters, None, dy)[0] is None
    again = graphed_steps._as_usual(run, x, parameters, None, dy)
    sums = [sum((d.square().sum() for d in ds if d is not None), torch.zeros(())) for ds in (again, expected)]
    for a, b in zip(*(torch.autograd.grad(s, [x, *parameters]) for s in sums), strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_that_would_be_lost_is_seen() -> None:
    inside, outside = (torch.ones(3, requires_grad=True) for _ in range(2))
    graphed.check_leaves([(inside * 2).sum()], [inside])
    with pytest.raises(RuntimeError, match="not among its parameters"):
        graphed.check_leaves([(inside * (2 * outside)).sum()], [inside])


def test_leaves_take_the_place_of_parameters() -> None:
    stack = make(d_model=16).backbone
    before = dict(stack.named_parameters())
    leaves: dict[nn.Parameter, Tensor] = {p: p.detach().requires_grad_() for p in stack.parameters()}
    with graphed.in_place_of(graphed.places_of(stack, leaves)):
        y = stack(torch.randn(1, 5, 16))
        graphed.check_leaves([y], list(leaves.values()))
    assert all(p is before[name] for name, p in stack.named_parameters())


def spoil_mixer(mixer: Any, wait: Callable[[Tensor], Any]) -> None:
    forward = mixer.forward

    def waits(x: Tensor, **options: Any) -> Tensor:
        wait(x)
        return forward(x, **options)

    mixer.forward = waits
