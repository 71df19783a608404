"""Chunks of time with exact gradients: every result is that of the one call."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambaseq.backbones.chunks import plan, run_in_chunks
from mambaseq.backbones.residual import ResidualStack
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.mixers.base import Mixer, State

D_MODEL = 8
# relative RMS: rounding in fp32, by FFTs of other lengths too
TOLERANCE = 2e-5
MIXERS: list[tuple[str, dict[str, Any]]] = [
    ("mamba", {"d_state": 4}),
    ("mamba", {"d_state": 4, "lti": True}),
    ("s4d", {"d_state": 4}),
    ("mamba3", {"d_state": 4, "chunk_size": 4}),
    ("mamba3", {"d_state": 4, "rank": 2}),
    ("gated_delta", {"chunk_size": 4}),
    ("kda", {"chunk_size": 4}),
    ("gla", {"chunk_size": 4}),
]


@dataclasses.dataclass
class SumState(State):
    """total `(batch, d_model)`; seen `(batch,)` int64."""

    total: Tensor
    seen: Tensor


class RunningSum(Mixer):
    """A third party's: a decayed sum, and a count of positions, which has no gradient. fp64 where its input is."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.out_proj = nn.Linear(d_model, d_model)
        self.decay = nn.Parameter(torch.full((d_model,), 0.9))

    def forward(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        rows = list(x) if bounds is None else [x[0, a:b] for a, b in itertools.pairwise(bounds)]
        state = self.init_state(len(rows)) if state is None else state
        ys, totals = [], []
        for row, total, seen in zip(rows, state.total, state.seen, strict=True):
            for t, value in enumerate(row):
                total = self.decay * total + value
                ys.append(total / (seen + t + 1))
            totals.append(total)
        y = torch.stack(ys).reshape(x.shape)
        counts = torch.tensor([len(row) for row in rows])
        y = x + self.out_proj(y.tanh())
        return (y, SumState(torch.stack(totals), state.seen + counts)) if return_state else y

    def init_state(self, batch_size: int, max_length: Any = None, dtype: Any = None, device: Any = None) -> SumState:
        return SumState(torch.zeros(batch_size, self.d_model), torch.zeros(batch_size, dtype=torch.long))


class Noncausal(RunningSum):
    causal = False


class Unbounded(RunningSum):
    bounded_state = False


def stack(name: str = "mamba", options: dict[str, Any] | None = None, n_layers: int = 2, **more: Any) -> ResidualStack:
    torch.manual_seed(0)
    kind: Callable[..., Mixer] = RunningSum if name == "sum" else catalog()["mixers"].get(name)
    chosen = {"d_state": 4} if options is None and name == "mamba" else options or {}
    made = ResidualStack(lambda _: kind(D_MODEL, **chosen), n_layers, **{"mlp": False, **more})
    for parameter in made.parameters():  # every one of them counts
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return made


def some_state(of: ResidualStack, n: int, gradients: bool = True) -> list[Any]:
    def fill(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return torch.arange(1, n + 1).to(tensor)
        return (torch.randn_like(tensor) / 2).requires_grad_(gradients)

    return [state.map(fill) for state in of.init_state(n)]


def tensors(states: list[Any] | None) -> list[Tensor]:
    return [tensor for state in states or [] for tensor in state.tensors().values()]


def results(
    backbone: ResidualStack,
    x: Tensor,
    state: list[Any] | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
) -> dict[str, Tensor]:
    """Outputs, states, and the gradients of a random functional of all of them."""
    backbone.zero_grad()
    x = x.detach().clone().requires_grad_()
    given = tensors(state)
    for tensor in given:
        tensor.grad = None
    y = backbone(x, state=state, cu_seqlens=cu_seqlens, return_state=return_state)
    y, final = y if return_state else (y, [])
    generator = torch.Generator().manual_seed(1)
    loss: Any = 0
    for tensor in [y, *tensors(final)]:
        if tensor.requires_grad:
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            weights = torch.randn(wide.shape, generator=generator, dtype=wide.dtype)
            loss = loss + (weights * wide).sum().real
    loss.backward()
    found: dict[str, Tensor | None] = {"y": y, "dx": x.grad}
    found |= {f"final {i}": tensor for i, tensor in enumerate(tensors(final))}
    found |= {f"dstate {i}": tensor.grad for i, tensor in enumerate(given)}
    found |= {f"d{name}": parameter.grad for name, parameter in backbone.named_parameters()}
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def in_chunks(backbone: ResidualStack, chunk_length: int) -> ResidualStack:
    other = copy.deepcopy(backbone)
    other.chunk_length = chunk_length
    return other


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        if not (tensor.is_floating_point() or tensor.is_complex()):
            assert torch.equal(actual[name], tensor), name
            continue
        error = (actual[name] - tensor).norm() / tensor.norm().clamp(min=1e-30)
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize(("name", "options"), [*MIXERS, ("sum", {})])
@pytest.mark.parametrize("chunk_length", [1, 4, 7])
@pytest.mark.parametrize("given", [False, True])
def test_equal_to_the_one_call(name: str, options: dict[str, Any], chunk_length: int, given: bool) -> None:
    whole = stack(name, options)
    # of other numbers a head's norm divides by nearly 0, or parts of a gradient cancel: up to 5e-4 by rounding alone
    torch.manual_seed(4)
    x = torch.randn(3, 12, D_MODEL)
    state = some_state(whole, 3) if given else None
    for return_state in (True, False):
        expected = results(whole, x, state, return_state=return_state)
        assert_equal(results(in_chunks(whole, chunk_length), x, state, return_state=return_state), expected)


@pytest.mark.parametrize(("name", "options"), [*MIXERS, ("sum", {})])
@pytest.mark.parametrize("chunk_length", [1, 4])
@pytest.mark.parametrize("given", [False, True])
def test_packed_sequences_are_cut_anywhere(name: str, options: dict[str, Any], chunk_length: int, given: bool) -> None:
    whole = stack(name, options)
    x = torch.randn(1, 14, D_MODEL)
    bounds = torch.tensor([0, 0, 2, 3, 3, 7, 7, 7, 13, 14, 14], dtype=torch.int32)
    state = some_state(whole, len(bounds) - 1) if given else None
    for return_state in (True, False):
        expected = results(whole, x, state, bounds, return_state)
        assert_equal(results(in_chunks(whole, chunk_length), x, state, bounds, return_state), expected)


@pytest.mark.parametrize("bounds", [None, [0, 4, 4, 9, 12]])
def test_exact_in_float64(bounds: list[int] | None) -> None:
    mixer = RunningSum(D_MODEL).double()
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    x = torch.randn(2 if bounds is None else 1, 12, D_MODEL, dtype=torch.float64, requires_grad=True)
    rows = len(x) if bounds is None else len(bounds) - 1
    total = torch.randn(rows, D_MODEL, dtype=torch.float64, requires_grad=True)
    state = [SumState(total, torch.arange(rows))]

    def run(x: Tensor, state: Any, cu_seqlens: Any, return_state: bool) -> tuple[Tensor, list[Any]]:
        y = mixer(x, state and state[0], cu_seqlens, return_state)
        return (y[0], [y[1]]) if return_state else (y, [])

    found = []
    for chunk_length in (12, 5, 1):
        y, (final,) = run_in_chunks(mixer, run, mixer.init_state, x, state, cu_seqlens, True, chunk_length)  # type: ignore[arg-type]
        loss = y.square().sum() + final.total.pow(3).sum()
        leaves = [x, total, *mixer.parameters()]
        found.append([y, final.total, final.seen, *torch.autograd.grad(loss, leaves)])
    y, (final,) = run(x, state, cu_seqlens, True)
    loss = y.square().sum() + final.total.pow(3).sum()
    expected = [y, final.total, final.seen, *torch.autograd.grad(loss, leaves)]
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


def test_an_empty_sequence_keeps_its_state() -> None:
    whole = stack()
    state = some_state(whole, 4, gradients=False)
    bounds = torch.tensor([0, 0, 6, 6, 6], dtype=torch.int32)
    _, final = in_chunks(whole, 2)(torch.randn(1, 6, D_MODEL), state, bounds, return_state=True)
    for old, new in zip(tensors(state), tensors(final), strict=True):
        assert torch.equal(new[[0, 2, 3]], old[[0, 2, 3]])
        assert not torch.equal(new[1], old[1])


def test_every_sequence_begins_in_one_chunk_and_ends_in_one() -> None:
    for cuts in itertools.combinations_with_replacement(range(7), 4):
        bounds = [0, *cuts, 6]
        for chunk_length in (1, 2, 3, 4, 5):
            chunks = plan(6, chunk_length, 1, bounds)
            begun = [i for c in chunks for i in range(c.entering.start, c.entering.stop)]
            ended = [i for c in chunks for i in range(c.first, c.first + c.finished)]
            assert begun == ended == list(range(5))
            for chunk in chunks:
                inside = {i for i in range(5) if bounds[i] < chunk.end and bounds[i + 1] > chunk.begin}
                assert inside <= set(range(chunk.first, chunk.stop))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_dropout_draws_the_same_mask_again(checkpoint: bool) -> None:
    """The output is smooth for one seed, so the gradient must be the slope along a direction."""
    whole = stack(dropout=0.5, checkpoint=checkpoint)
    x, direction = torch.randn(2, 2, 10, D_MODEL)
    weights = torch.randn(2, 10, D_MODEL)
    backbone = in_chunks(whole, 3)

    def value(at: Tensor) -> Tensor:
        torch.manual_seed(5)
        return (backbone(at) * weights).sum()

    leaf = x.clone().requires_grad_()
    loss = value(leaf)
    torch.rand(7)  # whatever is drawn in between
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert leaf.grad is not None
    with torch.no_grad():
        slope = (value(x + 2e-3 * direction) - value(x - 2e-3 * direction)) / 4e-3
    assert (leaf.grad * direction).sum().item() == pytest.approx(slope.item(), rel=5e-3)
    with torch.no_grad():
        assert torch.equal(value(x), loss)
        assert not torch.allclose(backbone(x), backbone(x))


def test_checkpointed_layers_inside_of_chunks() -> None:
    whole = stack()
    x, state = torch.randn(2, 12, D_MODEL), some_state(whole, 2)
    other = in_chunks(whole, 5)
    other.checkpoint = True
    assert_equal(results(other, x, state), results(whole, x, state))


def test_frozen_parameters() -> None:
    whole = stack()
    for parameter in whole.layers[0].parameters():
        parameter.requires_grad_(False)
    x = torch.randn(2, 12, D_MODEL)
    expected = results(whole, x)
    assert_equal(results(in_chunks(whole, 5), x), expected)
    assert not any(name.startswith("dlayers.0") for name in expected)
    whole.requires_grad_(False)
    state = some_state(whole, 2)
    assert_equal(results(in_chunks(whole, 5), x, state), results(whole, x, state))


def test_input_without_gradient_and_only_the_state_used() -> None:
    whole = stack()
    x = torch.randn(2, 12, D_MODEL)
    gradients = []
    for backbone in (whole, in_chunks(whole, 5)):
        _, final = backbone(x, return_state=True)
        sum(tensor.square().sum() for tensor in tensors(final)[:2]).backward()  # the first layer's
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert_equal(gradients[1], gradients[0])
    assert not any(name.startswith("layers.1") for name in gradients[0])


def test_used_twice_and_accumulated() -> None:
    """Also with a shorter sequence, which is not cut."""
    whole = stack()
    other = in_chunks(whole, 5)
    for _ in range(2):
        x, short = torch.randn(2, 12, D_MODEL), torch.randn(2, 4, D_MODEL)
        for backbone in (whole, other):
            y, state = backbone(x, return_state=True)
            (backbone(y.flip(1), state=state).square().sum() + backbone(short).sum()).backward()
    assert_equal(*({name: p.grad for name, p in b.named_parameters()} for b in (other, whole)))  # type: ignore[misc]


def test_hooks_of_a_parameter_see_its_whole_gradient_once() -> None:
    whole = stack()
    other = in_chunks(whole, 2)
    x = torch.randn(2, 12, D_MODEL)
    calls: list[str] = []
    for backbone in (whole, other):
        weight = backbone.layers[0].mixer.out_proj.weight
        weight.register_hook(lambda d: calls.append("tensor") or 3 * d)
        weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    assert_equal(results(other, x), results(whole, x))
    assert calls == ["tensor", "accumulated"] * 2
    assert all(isinstance(p, nn.Parameter) for p in other.parameters())


def test_under_distributed_data_parallel() -> None:
    """One process is enough for its reducer, which waits for a hook of every parameter in every step."""
    whole = stack()
    other = in_chunks(whole, 5)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(other)
        for _ in range(2):
            x = torch.randn(2, 12, D_MODEL)
            for backbone in (whole, wrapped):
                backbone(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_equal(*({name: p.grad for name, p in b.named_parameters()} for b in (other, whole)))  # type: ignore[misc]


def test_parameters_handed_in_for_one_call() -> None:
    """As `torch.func.functional_call` does: in the backward pass the module has its own again."""
    whole = stack()
    x = torch.randn(2, 12, D_MODEL)
    found = []
    for backbone in (whole, in_chunks(whole, 5)):
        values = {name: (p.detach() * 1.1).requires_grad_() for name, p in backbone.named_parameters()}
        torch.func.functional_call(backbone, values, (x,)).square().sum().backward()
        assert all(p.grad is None for p in backbone.parameters())
        found.append({name: value.grad for name, value in values.items()})
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """Outputs are those of the one call bit for bit; the backward pass casts alike, in or out of the context. A use
    without chunks under the same context gets its gradients, too."""
    whole = stack()
    x = torch.randn(2, 12, D_MODEL)
    found = []
    for backbone in (whole, in_chunks(whole, 4)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = backbone(x)
            loss = y.float().square().sum() + backbone(x[:, :3]).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append({"y": y.detach()} | {name: p.grad for name, p in backbone.named_parameters()})
    assert_equal(found[1], found[0], tolerance=1e-2)
    plain = results(whole, x)["y"]
    assert not torch.allclose(found[1]["y"].float(), plain, atol=1e-5, rtol=0)


def test_gradients_of_chunks_are_added_in_fp32() -> None:
    """Under autocast as many gradients are added as there are chunks; in bf16 small ones would be lost."""
    whole = stack(n_layers=1)
    x = torch.randn(1, 512, D_MODEL)
    exact = results(whole, x, return_state=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(in_chunks(whole, 1), x, return_state=False)
    for name in ("dlayers.0.mixer.in_proj.weight", "dlayers.0.mixer.out_proj.weight"):
        assert (found[name] - exact[name]).norm() <= 1e-2 * exact[name].norm(), name


def test_without_gradients() -> None:
    whole = stack().eval()
    x, state = torch.randn(2, 12, D_MODEL), some_state(whole, 2, gradients=False)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y, final = in_chunks(whole, 5)(x, state=state, return_state=True)
            expected, expected_final = whole(x, state=state, return_state=True)
        names = [str(i) for i in range(1 + len(tensors(final)))]
        assert_equal(
            dict(zip(names, [y, *tensors(final)], strict=True)),
            dict(zip(names, [expected, *tensors(expected_final)], strict=True)),
        )
        assert not y.requires_grad


def test_what_is_kept_does_not_grow_with_the_layers() -> None:
    def kept(n_layers: int, length: int, chunk_length: int | None) -> int:
        backbone = stack(n_layers=n_layers, chunk_length=chunk_length)
        own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        seen: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(1, length, D_MODEL, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            y = backbone(x)
        assert y.requires_grad
        return sum(seen.values())

    a_token = 4 * D_MODEL
    for n_layers in (1, 4):
        # a chunk more is a state more; a token more is its input
        states = kept(n_layers, 64, 32) - 64 * a_token
        assert kept(n_layers, 128, 64) - 128 * a_token == states
    assert kept(4, 128, None) > 10 * kept(4, 128, 64)


def test_compiled_around() -> None:
    whole = stack()
    x = torch.randn(2, 12, D_MODEL)
    other = in_chunks(whole, 5)
    expected = results(whole, x)
    assert_equal(
        results(torch.compile(other, backend="eager"), x),
        {  # type: ignore[arg-type]
            name if name[0] != "d" or name == "dx" else f"d_orig_mod.{name[1:]}": value
            for name, value in expected.items()
        },
    )


def test_what_cannot_be_cut() -> None:
    for kind in (Noncausal, Unbounded):
        with pytest.raises(ConfigError, match=kind.__name__):
            ResidualStack(lambda _, kind=kind: kind(D_MODEL), 1, chunk_length=4)
        ResidualStack(lambda _, kind=kind: kind(D_MODEL), 1)
    for length in (0, -1):
        with pytest.raises(ConfigError, match="chunk_length"):
            stack(chunk_length=length)
    backbone = stack(chunk_length=4)
    with pytest.raises(ValueError, match="3 sequences"):
        backbone(torch.randn(3, 12, D_MODEL), state=some_state(backbone, 4))
    with pytest.raises(ValueError, match="cu_seqlens"):
        backbone(torch.randn(1, 12, D_MODEL), cu_seqlens=torch.tensor([0, 5]))


class Shard(Tensor):
    """As FSDP's parameters are: no plain tensors."""


def test_layers_sharded_one_by_one_are_refused() -> None:
    backbone, x = stack(chunk_length=4), torch.randn(1, 9, D_MODEL)
    projection = backbone.mixers()[1].out_proj
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Shard))
    with pytest.raises(ConfigError, match=r"chunk_length cannot train layers that are sharded .*Shard"):
        backbone(x)
    with torch.no_grad():
        assert backbone(x).shape == x.shape
