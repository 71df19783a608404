"""The first law for the linear map with cross-entropy: every backend equals the reference, gradients included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICES, Draw, assert_equals_reference, backend_or_skip, device_or_skip, moved
from torch import Tensor

from mambaseq.ops import OPS, linear_cross_entropy
from mambaseq.ops.dispatch import outputs_and_gradients, relative_rms_error
from mambaseq.ops.gpu import portable
from mambaseq.ops.linear_cross_entropy import chunked, gpu
from mambaseq.ops.linear_cross_entropy.arguments import LossArguments

OP = OPS["linear_cross_entropy"]
BACKENDS = [backend.name for backend in OP.backends]


def place_or_skip(device: str, backend: str = "triton") -> torch.device:
    """The device, if the backend runs there."""
    place = device_or_skip(device)
    reason = portable.why_not(device) if backend == "triton" else None
    if backend == "cpu" and device != "cpu":
        reason = f"tensors are on {device}"
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return place


def loss(label: str, rows: int, d_model: int, vocab: int, ignored: float = 0.3) -> LossArguments:
    draw = Draw(label)
    labels = torch.randint(0, vocab, (rows,), generator=draw.generator)
    labels[draw.uniform(0, 1, rows) < ignored] = -100
    return LossArguments(draw.normal(rows, d_model), draw.normal(vocab, d_model) / d_model**0.5, labels)


CASES: dict[str, Callable[[], LossArguments]] = {
    "one row": lambda: loss("a", 1, 5, 7, 0),
    "odd": lambda: loss("b", 63, 33, 101),
    "two of vocabulary": lambda: loss("c", 9, 1, 2),
    "one of vocabulary": lambda: loss("d", 9, 3, 1),
    "power of two": lambda: loss("e", 32, 16, 128, 0),
    "vocabulary beyond a block": lambda: loss("f", 5, 3, 8193 + 64),
    "all ignored": lambda: loss("g", 9, 5, 11, 1.1),
    "other index": lambda: loss("h", 20, 5, 11, 0)._replace(ignore_index=3),
    "rows apart": lambda: loss("i", 20, 5, 11)._replace(hidden=Draw("j").normal(20, 10)[:, 5:]),
    "transposed": lambda: loss("k", 20, 5, 11)._replace(weight=Draw("l").normal(5, 11).t()),
    "large logits": lambda: loss("m", 20, 5, 11)._replace(hidden=30 * Draw("n").normal(20, 5)),
}


@functools.cache
def build(case: str, dtype: torch.dtype) -> Callable[[], LossArguments]:
    @functools.cache
    def arguments() -> LossArguments:
        made = CASES[case]()
        return made._replace(hidden=made.hidden.to(dtype), weight=made.weight.to(dtype))

    return arguments


@pytest.fixture(params=["in one", "in chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in chunks":
        monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 700)
        monkeypatch.setattr(gpu, "CHUNK_BYTES", 4000)
        monkeypatch.setattr(gpu, "_FEWEST", 4)
    return str(request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend: str, case: str, device: str) -> None:
    assert_equals_reference(OP, backend, build(case, torch.float32), device_or_skip(device))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_float32_is_exact_to_a_hundred_thousandth(case: str, device: str) -> None:
    arguments = moved(build(case, torch.float32)(), device_or_skip(device))
    expected = outputs_and_gradients(OP.backends[-1], arguments, double=True)
    actual = outputs_and_gradients(backend_or_skip(OP, "triton", arguments), arguments)
    assert all(relative_rms_error(a, e) < 1e-5 for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["odd", "power of two"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str, case: str, dtype: torch.dtype, device: str, chunks: str) -> None:
    """Against float64 with the logits rounded as they are: what they lose by it is the dtype's doing."""
    if chunks == "in chunks" and backend in ("cpu", "torch"):
        pytest.skip("PyTorch sums the gradients of the chunks in the weight's dtype")
    arguments = moved(build(case, dtype)(), device_or_skip(device))
    hidden, weight, labels, ignore_index = arguments
    logits = F.linear(hidden, weight).double().requires_grad_()
    expected = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    (dlogits,) = torch.autograd.grad(expected, logits)
    actual = outputs_and_gradients(backend_or_skip(OP, backend, arguments), arguments)
    cotangent = torch.randn((), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(hidden.device)
    assert [value.dtype for value in actual] == [torch.float32, dtype, dtype]
    assert relative_rms_error(actual[0], expected.detach()) < 1e-6
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert relative_rms_error(actual[1], cotangent * dlogits @ weight.double()) < tolerance
    assert relative_rms_error(actual[2], cotangent * dlogits.t() @ hidden.double()) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, device: str) -> None:
    """Its dtype for the products, the inputs' for their gradients."""
    hidden, weight, labels, _ = moved(loss("autocast", 30, 8, 21), place_or_skip(device, backend))
    tensors = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast(device, torch.bfloat16):
        total = linear_cross_entropy(hidden, weight, labels, backend=backend)
        mixed = linear_cross_entropy(hidden.bfloat16(), weight, labels, backend=backend)
    grads = torch.autograd.grad(total, tensors)
    low = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, backend=backend)
    assert total.dtype == torch.float32
    assert total == mixed == low
    for grad, expected in zip(grads, torch.autograd.grad(low, tensors), strict=True):
        assert grad.dtype == torch.float32
        assert relative_rms_error(grad, expected) < 4e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", ["hidden", "weight", "nothing"])
def test_only_the_gradients_that_are_wanted(wanted: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_or_skip(device)
    hidden, weight, labels, _ = moved(loss("wanted", 30, 8, 21), place)
    leaves = {"hidden": hidden, "weight": weight}
    expected = linear_cross_entropy(hidden, weight, labels, backend="reference")
    if wanted == "nothing":
        total = linear_cross_entropy(hidden, weight, labels, backend="triton")
        assert not total.requires_grad
    else:
        leaf = leaves[wanted].requires_grad_()
        total = linear_cross_entropy(hidden, weight, labels, backend="triton")
        (2 * total).backward()
        again = leaf.detach().clone().requires_grad_()
        (2 * linear_cross_entropy(**(leaves | {wanted: again}), labels=labels, backend="reference")).backward()
        assert relative_rms_error(leaf.grad, again.grad) < 1e-6
    assert relative_rms_error(total.detach(), expected.detach()) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_backward_twice_and_the_same_bits(device: str) -> None:
    hidden, weight, labels, _ = moved(loss("twice", 30, 8, 21), place_or_skip(device))
    tensors = [hidden.requires_grad_(), weight.requires_grad_()]
    total = linear_cross_entropy(hidden, weight, labels, backend="triton")
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(total, tensors), strict=True))
    other = linear_cross_entropy(hidden, weight, labels, backend="triton")
    assert torch.equal(total, other)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(other, tensors), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype: torch.dtype, device: str) -> None:
    place = place_or_skip(device)
    arguments = moved(loss("compiled", 30, 8, 21), place)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return linear_cross_entropy(hidden * 2, weight, arguments.labels, backend="triton") / 7

    tensors = [arguments.hidden.requires_grad_(), arguments.weight.requires_grad_()]
    torch._dynamo.reset()
    results = [
        [f(*tensors), *torch.autograd.grad(f(*tensors), tensors)]
        for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))
    ]
    for one, other in zip(*results, strict=True):
        assert relative_rms_error(one.detach(), other.detach()) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "hidden must be"),
        ({"weight": torch.zeros(5, 4)}, "weight must be"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be"),
        ({"labels": torch.zeros(2, dtype=torch.int32)}, "labels must be"),
        ({"weight": torch.zeros(5, 3).bfloat16()}, "there is no autocast"),
        (
            {"hidden": torch.zeros(2, 3).double(), "weight": torch.zeros(5, 3).double(), "backend": "triton"},
            "float64|GPU",
        ),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "labels": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(given | change))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("label", [-1, 11, 2**40])
def test_a_label_outside_the_vocabulary_makes_loss_and_gradients_not_a_number(label: int, device: str) -> None:
    """A step with finite gradients would go on in silence where nobody looks at the loss."""
    hidden, weight, labels, _ = moved(loss("outside", 9, 5, 11), place_or_skip(device))
    labels[4] = label
    total = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, backend="triton")
    assert total.isnan()
    dhidden, dweight = torch.autograd.grad(total, [hidden, weight])
    assert dhidden.isnan().all(-1).nonzero().tolist() == [[4]]
    assert dhidden.isnan().any(-1).sum() == 1
    assert dweight.isnan().all()


@pytest.mark.parametrize("rows", [1, 127, 4096, 16384, 1_000_003])
@pytest.mark.parametrize("bytes_a_row", [2, 100_608, 1 << 31])
def test_chunks_cover_all_rows_within_the_memory(rows: int, bytes_a_row: int) -> None:
    chunk = gpu._chunk_rows(rows, bytes_a_row)
    assert 1 <= chunk <= rows
    assert chunk == 1 or chunk * bytes_a_row <= gpu.CHUNK_BYTES


@pytest.mark.gpu
def test_memory_of_a_large_vocabulary(cuda: torch.device) -> None:
    rows, d_model, vocab = 16384, 768, 50277
    hidden = torch.randn(rows, d_model, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.02 * torch.randn(vocab, d_model, device=cuda)).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device=cuda)
    before = torch.cuda.memory_allocated(cuda)
    torch.cuda.reset_peak_memory_stats(cuda)
    with torch.autocast("cuda", torch.bfloat16):
        total = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert torch.cuda.max_memory_allocated(cuda) - before < 1.5 * 2**30
    grads = [hidden.grad[:256].clone(), weight.grad[:256].clone()]
    hidden.grad = weight.grad = None
    expected = F.cross_entropy(F.linear(hidden, weight.bfloat16()).float(), labels, reduction="sum")
    expected.backward()
    assert relative_rms_error(total.detach(), expected.detach()) < 1e-5
    for grad, leaf in zip(grads, (hidden, weight), strict=True):
        assert relative_rms_error(grad, leaf.grad[:256]) < 8e-3
