"""The state-space dual: every backend equals the reference, the reference its matrix, one step the whole."""

from __future__ import annotations

import functools
import itertools
import sys
import types
from collections.abc import Callable

import pytest
import torch
from agreement import (
    DEVICES,
    ROWS,
    TOLERANCE,
    Draw,
    assert_equals_reference,
    calls_of,
    device_or_skip,
    errors_by_name,
    moved,
)

from mambaseq.ops import OPS, selective_scan, ssd
from mambaseq.ops.decoding.step import ssd_update_
from mambaseq.ops.dispatch import leaves, outputs_and_gradients, relative_rms_error
from mambaseq.ops.ssd import chunked, fla, gpu
from mambaseq.ops.ssd.arguments import SsdArguments

OP = OPS["ssd"]
BACKENDS = [backend.name for backend in OP.backends if backend.name != "reference"]
TORCH = next(backend for backend in OP.backends if backend.name == "torch")
TRITON = OP.backends[0]
HALF = [torch.bfloat16, torch.float16]
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton's kernels run, interpreted or not


def drawn(
    label: str, batch: int, length: int, *, heads: int = 4, groups: int = 2, rate: float = 1.0, chunk_size: int = 32
) -> SsdArguments:
    """rate: of the decay; a step is about 0.05 to 0.5."""
    draw = Draw(label)
    return SsdArguments(
        x=draw.normal(batch, length, heads, 5),
        dt=draw.normal(batch, length, heads),
        A=-rate * draw.uniform(0.5, 2, heads),
        B=draw.normal(batch, length, groups, 6),
        C=draw.normal(batch, length, groups, 6),
        D=draw.normal(heads),
        dt_bias=draw.normal(heads) - 1.5,
        dt_softplus=True,
        initial_state=draw.normal(batch, heads, 5, 6),
        chunk_size=chunk_size,
    )


def packed(arguments: SsdArguments, *bounds: int) -> SsdArguments:
    heads, head_dim = arguments.x.shape[2:]
    state = Draw("states").normal(len(bounds) - 1, heads, head_dim, arguments.B.shape[3])
    return arguments._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32), initial_state=state)


CASES: dict[str, Callable[[], SsdArguments]] = {
    "length 0": lambda: drawn("a", 2, 0),
    "length 1": lambda: drawn("b", 3, 1),
    "length 2, reverse": lambda: drawn("c", 2, 2)._replace(reverse=True),
    "length 63": lambda: drawn("d", 2, 63),
    "length 1000": lambda: drawn("e", 1, 1000),
    "a group a head, reverse": lambda: drawn("f", 2, 130, groups=4)._replace(reverse=True),
    "chunks of 1, more than one product passes on": lambda: drawn("g", 1, 150, chunk_size=1),
    "slow decay": lambda: drawn("h", 1, 700, rate=1e-4, chunk_size=8),
    "strong decay": lambda: drawn("i", 2, 200, rate=300.0),
    "no decay": lambda: drawn("j", 2, 200, groups=1)._replace(A=torch.zeros(4)),
    "bare": lambda: drawn("k", 2, 100)._replace(
        D=None, dt_bias=None, initial_state=None, dt=Draw("dt").uniform(0, 1, 2, 100, 4), dt_softplus=False
    ),
    "packed": lambda: packed(drawn("l", 1, 200), 0, 0, 1, 3, 66, 66, 98, 200, 200),
    "packed, slow decay, reverse": lambda: packed(drawn("m", 1, 200, rate=1e-3), 0, 63, 64, 200)._replace(reverse=True),
    "packed, no states": lambda: packed(drawn("n", 1, 100), 0, 40, 40, 100)._replace(initial_state=None),
    "packed, a whole number of chunks": lambda: packed(drawn("o", 1, 96), 0, 32, 96),
    "packed, more than one product passes on": lambda: packed(drawn("p", 1, 300, chunk_size=2), 0, 150, 150, 161, 300),
}


@functools.cache
def build(case: str) -> Callable[[], SsdArguments]:
    return functools.cache(CASES[case])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend: str, case: str, device: str) -> None:
    assert_equals_reference(OP, backend, build(case), device_or_skip(device))


@pytest.mark.parametrize("case", CASES)
def test_in_float64_nothing_but_rounding_differs(case: str) -> None:
    expected = outputs_and_gradients(OP.backends[-1], build(case)(), double=True)
    actual = outputs_and_gradients(TORCH, build(case)(), double=True)
    for a, e in zip(actual, expected, strict=True):
        assert relative_rms_error(a, e) < 1e-11


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str, dtype: torch.dtype, device: str) -> None:
    assert_equals_reference(OP, backend, lambda: halved(drawn("half", 2, 100), dtype), device_or_skip(device), dtype)


def halved(arguments: SsdArguments, dtype: torch.dtype) -> SsdArguments:
    return arguments._replace(**{name: getattr(arguments, name).to(dtype) for name in ("x", "dt", "B", "C")})


def sized(
    label: str, batch: int, length: int, heads: int, head_dim: int, groups: int, d_state: int, *bounds: int
) -> SsdArguments:
    """As models have them."""
    draw = Draw(label)
    made = drawn(label, batch, length, heads=heads, groups=groups)._replace(
        x=draw.normal(batch, length, heads, head_dim),
        B=draw.normal(batch, length, groups, d_state),
        C=draw.normal(batch, length, groups, d_state),
        initial_state=draw.normal(batch, heads, head_dim, d_state),
    )
    return packed(made, *bounds) if bounds else made


SIZED: dict[str, Callable[[], SsdArguments]] = {
    "64 x 128": lambda: sized("q", 2, 1000, 8, 64, 1, 128),
    "128 x 256, reverse": lambda: sized("r", 1, 300, 4, 128, 2, 256)._replace(reverse=True),
    "16 x 16, packed": lambda: sized("s", 1, 700, 6, 16, 2, 16, 0, 0, 1, 65, 300, 300, 700, 700),
    "32 x 96, packed, reverse": lambda: sized("t", 1, 700, 6, 32, 1, 96, 0, 1, 65, 300, 300, 700)._replace(
        reverse=True
    ),
    "length 1": lambda: sized("x", ROWS, 1, 4, 64, 2, 128),
    "heads that are cut": lambda: sized("u", 1, 129, 3, 193, 3, 200),
    "one row, many segments": lambda: sized("v", 1, 5000, 2, 64, 1, 64)._replace(D=None, wants_final_state=False),
}


def assert_near(case: Callable[[], SsdArguments], dtype: torch.dtype, device: torch.device) -> None:
    """The kernels against the chunked form in float64. Gradients of A and dt_bias are four numbers (see `ROWS`): of 64
    heads 1.9e-3 off in bfloat16, of four out of them 3e-4 to 1.2e-2. That of D is made of what was given, nothing of
    which is rounded."""
    most = {"gradient of A": 4 * TOLERANCE[dtype], "gradient of dt_bias": 4 * TOLERANCE[dtype]}
    most["gradient of D"] = TOLERANCE[torch.float32]
    for label, error in errors_by_name(TRITON, TORCH, moved(halved(case(), dtype), device)).items():
        assert error < most.get(label, TOLERANCE[dtype]), f"{label}: relative RMS error {error:.1e}"


def test_kernels() -> None:
    """By the interpreter, which takes its time: a short one; on a GPU all."""
    short = drawn("short", 1, 40, heads=2, groups=1)
    assert_near(lambda: packed(short, 0, 3, 3, 40)._replace(reverse=True), torch.float16, PLACE)


@pytest.mark.gpu
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("d_state", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_kernels_of_every_size(head_dim: int, d_state: int, bare: bool) -> None:
    made = sized("sizes", 2, 200, 4, head_dim, 4, d_state)
    if bare:  # as retention has it
        made = made._replace(D=None, dt_bias=None, initial_state=None, dt_softplus=False, wants_final_state=False)
        made = made._replace(A=-torch.tensor([1, 0.5, 0.25, 0.1]) / 32, dt=torch.ones(()).expand(2, 200, 4))
    assert_near(lambda: made, torch.bfloat16, device_or_skip("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *SIZED])
@pytest.mark.parametrize("dtype", HALF)
def test_kernels_on_a_gpu(case: str, dtype: torch.dtype) -> None:
    made = (CASES | SIZED)[case]
    if made().x.numel() == 0:
        pytest.skip("empty")
    assert_near(made, dtype, device_or_skip("cuda"))


@pytest.mark.parametrize("bounds", [(), (0, 30, 30, 47, 130)])
def test_a_walk_over_the_chunks_may_be_cut_into_segments(
    bounds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = gpu.plan(5, 6)._replace(size=16, programs=8)
    monkeypatch.setattr(gpu, "plan", lambda *sizes: short)
    segments = calls_of(monkeypatch, gpu, "_segments")
    made = drawn("segments", 1, 130, heads=1, groups=1)
    assert_near(lambda: packed(made, *bounds) if bounds else made, torch.float16, PLACE)
    assert len(segments) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["64 x 128", "32 x 96, packed, reverse", "one row, many segments"])
def test_kernels_give_the_same_bits_twice(case: str) -> None:
    made = moved(halved(SIZED[case](), torch.bfloat16), device_or_skip("cuda"))
    first, second = (outputs_and_gradients(TRITON, made) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kernels_keep_nothing_but_their_arguments() -> None:
    made = leaves(moved(halved(drawn("kept", 1, 20, heads=2, groups=1), torch.bfloat16), PLACE))
    given = {value.data_ptr() for value in made if isinstance(value, torch.Tensor)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        TRITON.run(made)
    assert set(kept) == given


@pytest.mark.gpu
def test_memory_of_the_kernels() -> None:
    """States of chunks stand in the backward pass, no matrices of pairs of steps: 5 times what x takes here."""
    made = leaves(moved(halved(sized("w", 2, 4096, 8, 64, 1, 128), torch.bfloat16), device_or_skip("cuda")))
    outputs_and_gradients(TRITON, made)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, _ = TRITON.run(made)
    torch.autograd.grad(y, [v for v in made if isinstance(v, torch.Tensor)], torch.ones_like(y), allow_unused=True)
    assert torch.cuda.max_memory_allocated() - before < 10 * made.x.numel() * made.x.element_size()


def test_kernels_compile_in_one_graph() -> None:
    made = moved(halved(drawn("compiled", 1, 20, heads=2, groups=1), torch.bfloat16), PLACE)

    def run(x: torch.Tensor) -> torch.Tensor:
        y, final = ssd(x, *made[1:5], D=made.D, backend="triton")
        return y.float().sum() + final.sum()

    torch._dynamo.reset()
    x = made.x.clone().requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(run(x), x)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["states", "no states", "packed", "packed, no states"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["mamba_ssm", "fla"])
def test_packages_without_gradients_at_the_sizes_of_models(backend: str, dtype: torch.dtype, case: str) -> None:
    """Where a package's backward pass is refused, this is what is left of it."""
    device = device_or_skip("cuda")
    draw, length = Draw("sizes"), 1000
    made = drawn("sizes", 1, length)._replace(
        x=draw.normal(1, length, 4, 64),
        B=draw.normal(1, length, 2, 128),
        C=draw.normal(1, length, 2, 128),
        initial_state=draw.normal(1, 4, 64, 128),
        chunk_size=64,
    )
    made = made._replace(**{name: getattr(made, name).to(dtype) for name in ("x", "dt", "B", "C")})
    if "packed" in case:
        made = packed(made, 0, 63, 64, 320, length)
    if "no states" in case:
        made = made._replace(initial_state=None, wants_final_state=False)
    made = moved(made, device)
    with torch.no_grad():
        run = next(candidate for candidate in OP.backends if candidate.name == backend)
        if (reason := run.why_not(made)) is not None:
            pytest.skip(f"{backend}: {reason}")
        actual = run.run(made)
        double = (v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in made)
        expected = OP.backends[-1].run(SsdArguments(*double))
    for a, e in list(zip(actual, expected, strict=True))[: 1 + made.wants_final_state]:
        # products of this precision, where ours are of float32
        assert relative_rms_error(a, e) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("rate", [1e-4, 1.0, 30.0])
def test_strong_and_slow_decay_to_float32s_last_digits(rate: float) -> None:
    """Sums of log-decays in float32, whose difference is exponentiated, would lose a hundred times as much."""
    made = drawn("digits", 1, 600, rate=rate, chunk_size=256)._replace(initial_state=None, D=None)
    expected = outputs_and_gradients(OP.backends[-1], made, double=True)
    actual = outputs_and_gradients(TORCH, made)
    assert max(relative_rms_error(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-6


def test_the_reference_is_the_matrix_of_the_paper() -> None:
    """Equation 3 of arXiv:2405.21060: y = M x with M_ji = C_jᵀ A_j ... A_{i+1} B_i, Δ folded into A and B."""
    made = drawn("matrix", 1, 9, heads=2, groups=1)._replace(
        dt=Draw("dt").uniform(0, 1, 1, 9, 2), dt_bias=None, dt_softplus=False, initial_state=None, D=None
    )
    x, dt, A, B, C = (value[0].double() if value.ndim > 1 else value.double() for value in made[:5])
    y = torch.zeros(9, 2, 5, dtype=torch.float64)
    for head in range(2):
        for j in range(9):
            for i in range(j + 1):
                decay = torch.exp((dt[i + 1 : j + 1, head] * A[head]).sum())
                y[j, head] += (C[j, 0] @ B[i, 0]) * decay * dt[i, head] * x[i, head]
    double = {name: getattr(made, name).double() for name in ("x", "dt", "A", "B", "C")}
    for backend in ("reference", "torch"):
        torch.testing.assert_close(ssd(**double, backend=backend)[0][0], y)


def test_it_is_a_selective_scan_whose_channels_share_their_decay() -> None:
    made = drawn("scan", 2, 70)
    assert made.D is not None
    assert made.dt_bias is not None
    heads, head_dim, d_state = 4, 5, 6
    wide = {"dt": made.dt, "A": made.A, "D": made.D, "dt_bias": made.dt_bias}
    wide = {name: value.repeat_interleave(head_dim, -1) for name, value in wide.items()}
    wide["A"] = wide["A"][:, None].repeat(1, d_state)
    expected, last = selective_scan(made.x.flatten(2), B=made.B, C=made.C, **wide, dt_softplus=True)
    y, final = ssd(
        made.x,
        made.dt,
        made.A,
        made.B,
        made.C,
        D=made.D,
        dt_bias=made.dt_bias,
        dt_softplus=True,
    )
    torch.testing.assert_close(y.flatten(2), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, last.unflatten(1, (heads, head_dim)), rtol=1e-4, atol=1e-5)


def test_steps_equal_the_whole() -> None:
    made = drawn("steps", 2, 40)
    assert made.initial_state is not None
    options = {"D": made.D, "dt_bias": made.dt_bias, "dt_softplus": True}
    expected, last = ssd(*made[:5], **options, initial_state=made.initial_state)
    state = made.initial_state.clone()
    for t in range(40):
        y = ssd_update_(state, made.x[:, t], made.dt[:, t], made.A, made.B[:, t], made.C[:, t], **options)
        torch.testing.assert_close(y, expected[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_memory_grows_with_chunks_and_not_with_states() -> None:
    """No tensor of a state a position, nor of a pair of chunks, is made: the largest is counted."""
    made = drawn("memory", 1, 8192, heads=2, groups=1, chunk_size=16)
    largest = 0

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes():
                largest = max(largest, made.untyped_storage().nbytes() // made.element_size())
            return made

    with Counted():
        chunked.run(made)
    # 512 chunks of 2 heads: pairs of positions are 8192 x 2 x 16, states 8192 x 2 x 5 x 6, pairs of chunks 512² x 2
    assert largest <= 8192 * 2 * 16


def test_compiles_in_one_graph() -> None:
    made = packed(drawn("compiled", 1, 100), 0, 30, 30, 100)

    def run(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        state = made.initial_state if cu_seqlens is not None else None
        y, final = ssd(x, *made[1:5], initial_state=state, cu_seqlens=cu_seqlens)
        return y.sum() + final.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for bounds in (None, made.cu_seqlens):
        x = made.x.clone().requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x, bounds), x), torch.autograd.grad(run(x, bounds), x), rtol=1e-4, atol=1e-5
        )


def test_autocast_does_not_reach_the_states() -> None:
    made = drawn("autocast", 1, 100)
    expected, _ = ssd(*made[:5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssd(*made[:5])[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 6)}, "x must be"),
        ({"x": torch.zeros(1, 4, 2, 3, dtype=torch.int64)}, "x must be real"),
        ({"dt": torch.zeros(1, 4)}, "dt must be"),
        ({"A": torch.zeros(3)}, "A must be"),
        ({"B": torch.zeros(1, 4, 5)}, "B must be"),
        ({"C": torch.zeros(1, 4, 1, 6)}, "C must have the shape of B"),
        ({"B": torch.zeros(1, 4, 3, 5), "C": torch.zeros(1, 4, 3, 5)}, "3 groups, which do not divide 2 heads"),
        ({"initial_state": torch.zeros(1, 2, 5, 3)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must rise"),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens must be a tensor of int32, not list"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"backend": "triton"}, "multiply matrices of bfloat16 or float16"),
        ({"backend": "fla"}, "'fla' cannot run these arguments: its kernels run on CUDA"),
        ({"backend": "mamba_ssm"}, "'mamba_ssm' cannot run these arguments: its kernels run on CUDA"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    given = {"x": torch.zeros(1, 4, 2, 3), "dt": torch.ones(1, 4, 2), "A": torch.zeros(2)}
    given |= {"B": torch.zeros(1, 4, 1, 5), "C": torch.zeros(1, 4, 1, 5)}
    with pytest.raises(ValueError, match=message):
        ssd(**(given | change))


def gated(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, chunk_size):
    """What flash-linear-attention documents of `chunk_simple_gla`: q, k `(batch, length, heads, d_state)`, v `(...,
    head_dim)`, log-decays g `(batch, length, heads)`, states `(sequences, heads, d_state, head_dim)`."""
    assert scale == 1.0
    assert chunk_size == 64
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ys, finals = [], []
    for s, (start, end) in enumerate(itertools.pairwise(ends)):
        rows = slice(s, s + 1) if cu_seqlens is not None else slice(None)
        h = (
            torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
            if initial_state is None
            else initial_state[rows]
        )
        for t in range(start, end):
            h = h * g[:, t, :, None, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
            ys.append((h * q[:, t, :, :, None]).sum(-2))
        finals.append(h)
    return torch.stack(ys, 1), torch.cat(finals) if output_final_state else None


@pytest.mark.parametrize("wants_state", [True, False])
@pytest.mark.parametrize("case", ["length 63", "packed", "packed, no states", "no decay"])
def test_what_is_handed_to_flash_linear_attention(
    case: str, wants_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its kernel as documented in the place of the kernel, in float32."""
    made = CASES[case]()._replace(chunk_size=64, wants_final_state=wants_state)
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", types.SimpleNamespace(chunk_simple_gla=gated))
    y, state = fla.run(made)
    expected_y, expected_state = OP.backends[-1].run(made)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-5)
    if wants_state:
        torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)


def test_samples_for_kernels_of_half_precision() -> None:
    halved_op = OP.in_half()
    assert halved_op is not None
    for label, made in halved_op.samples(torch.device("cpu")):
        assert TRITON.why_not(moved(made, PLACE)) is None, label
        assert made.A.dtype == torch.float32
    assert OPS["causal_conv"].in_half() is None


def test_packages_are_taken_by_name_only() -> None:
    """Their kernels may be miscompiled, and round more: something that always runs stands before them."""
    names = [backend.name for backend in OP.backends]
    assert names.index("torch") < min(names.index("mamba_ssm"), names.index("fla"))
    assert TORCH.why_not(drawn("any", 1, 3)) is None
