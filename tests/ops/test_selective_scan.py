"""The first law for the selective scan: every backend equals the reference, gradients included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import DEVICES, Draw, assert_equals_reference, backend_or_skip, device_or_skip, moved
from scan_cases import CASES, build, complex_, full, plain

from mambaseq.ops import OPS, selective_scan
from mambaseq.ops.dispatch import outputs_and_gradients
from mambaseq.ops.gpu import nvrtc
from mambaseq.ops.selective_scan import chunked, cuda, segments
from mambaseq.ops.selective_scan.arguments import ScanArguments

OP = OPS["selective_scan"]
BACKENDS = [backend.name for backend in OP.backends if backend.name != "reference"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend: str, case: str, device: str) -> None:
    assert_equals_reference(OP, backend, build(case, torch.float32), device_or_skip(device))


HALF = [
    "complex, B and C vary",
    "constant B, length 400, reverse",
    "length 63",
    "packed",
    "groups",
    "groups of 64 channels",
    "40 states, packed, reverse",
    "reverse",
    "y alone",
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HALF)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str, case: str, dtype: torch.dtype, device: str) -> None:
    assert_equals_reference(OP, backend, build(case, dtype), device_or_skip(device), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [0, 2, 4])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for case in CASES
        if "complex" not in case and "packed" not in case and "constant" not in case
        for dtype in ([torch.float32, torch.bfloat16] if case in HALF else [torch.float32])
    ],
)
def test_either_forward_kernel(case: str, dtype: torch.dtype, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels through whole sequences, by threads of two or four states, and many through pieces of them, whatever
    the shape."""
    monkeypatch.setattr(segments, "narrow_states", lambda *shape: narrow)
    assert_equals_reference(OP, "cuda", build(case, dtype), device_or_skip("cuda"), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    [
        "length 1000",
        "packed",
        "length 4097",
        "complex, length 400, reverse",
        "complex, packed, reverse",
        "constant B and C",
    ],
)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "mamba_ssm"])  # it sums by atomics
def test_two_runs_give_the_same_numbers(backend: str, case: str, device: str) -> None:
    arguments = moved(build(case, torch.bfloat16)(), device_or_skip(device))
    chosen = backend_or_skip(OP, backend, arguments)
    for a, b in zip(outputs_and_gradients(chosen, arguments), outputs_and_gradients(chosen, arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_inputs_after_large_ones(backend: str, device: str) -> None:
    """What a strong decay wipes out does not take the next inputs with it."""
    place = device_or_skip(device)
    for exponent in (12.0, 20.0, 50.0):
        x = torch.tensor([1e5, 1e-3, 2e-3, -1e-3, 1e4, 3e-3, 1e-3]).view(1, 7, 1)
        one = torch.ones(1, 7, 1)
        arguments = ScanArguments(x, exponent * one, -one[0, :1], one, one, wants_final_state=False)
        expected, _ = next(b for b in OP.backends if b.name == "reference").run(
            ScanArguments(*(v.double() for v in arguments[:5]))
        )
        moved_there = moved(arguments, place)
        y, _ = backend_or_skip(OP, backend, moved_there).run(moved_there)
        torch.testing.assert_close(y.cpu(), expected.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "case", ["length 1000", "packed", "complex, slow decay, reverse", "constant B and C", "groups"]
)
def test_chunks_of_16(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_ELEMENTS_OF_CHUNK", 0)
    assert_equals_reference(OP, "torch", build(case, torch.float32), torch.device("cpu"))


def test_reference_is_the_definition() -> None:
    """Against the recurrence written out in NumPy, one number at a time."""
    a = full("definition", 2, 5, 4, 3)._replace(
        B=Draw("B").normal(2, 5, 2, 3), C=Draw("C").normal(4, 3), cu_seqlens=None
    )
    y, final = selective_scan(
        *a[:5],
        D=a.D,
        z=a.z,
        dt_bias=a.dt_bias,
        dt_softplus=True,
        initial_state=a.initial_state,
        backend="reference",
    )
    x, dt, A, B, C, D, z, bias, _, h = (v.double().numpy() if torch.is_tensor(v) else v for v in a[:10])
    h = h.copy()
    for b, t, c in np.ndindex(2, 5, 4):
        delta = np.log1p(np.exp(dt[b, t, c] + bias[c]))
        out = D[c] * x[b, t, c]
        for n in range(3):
            h[b, c, n] = np.exp(delta * A[c, n]) * h[b, c, n] + delta * x[b, t, c] * B[b, t, c // 2, n]
            out += h[b, c, n] * C[c, n]
        out *= z[b, t, c] / (1 + np.exp(-z[b, t, c]))
        assert y[b, t, c].item() == pytest.approx(out, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(final, torch.from_numpy(h).float())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_gradcheck_of_reference(kind: str, reverse: bool) -> None:
    made = full("gradcheck", 1, 3, 2, 2) if kind == "real" else complex_("gradcheck", 3, slow=False)
    wide = [
        v.to(torch.complex128 if v.is_complex() else torch.float64)[:1]
        if v.ndim == 3
        else v.double()
        if not v.is_complex()
        else v.to(torch.complex128)
        for v in (made.x, made.dt, made.A, made.B, made.C, made.D, made.z, made.dt_bias, made.initial_state)
        if v is not None
    ]

    def run(x, dt, A, B, C, D, z, dt_bias, state):  # type: ignore[no-untyped-def]
        return OP.backends[-1].run(ScanArguments(x, dt, A, B, C, D, z, dt_bias, True, state, None, reverse))

    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in wide])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_two_parts_are_the_whole(backend: str, reverse: bool) -> None:
    """The final state of one part is the initial state of the other."""
    whole = full("parts", 2, 70, 5, 4)._replace(reverse=reverse)
    if next(b for b in OP.backends if b.name == backend).why_not(whole):
        pytest.skip(f"{backend} does not run this here")

    def run(start: int, end: int, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x, dt, B, C, z = (v[:, start:end] for v in (whole.x, whole.dt, whole.B, whole.C, whole.z))
        return selective_scan(
            x,
            dt,
            whole.A,
            B,
            C,
            D=whole.D,
            z=z,
            dt_bias=whole.dt_bias,
            dt_softplus=True,
            initial_state=state,
            reverse=reverse,
            backend=backend,
        )

    y, final = run(0, 70, whole.initial_state)
    spans = [(33, 70), (0, 33)] if reverse else [(0, 33), (33, 70)]
    state, parts = whole.initial_state, []
    for span in spans:
        part, state = run(*span, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts[::-1] if reverse else parts, 1), y)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_nan_stays_where_it_can_reach(backend: str) -> None:
    a = plain("nan", 1, 40, 3, 4)
    a.x[0, 20, 1] = float("nan")
    y, _ = selective_scan(*a[:5], backend=backend)
    expected = torch.zeros(1, 40, 3, dtype=torch.bool)
    expected[0, 20:, 1] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("name", ["dt", "A"])
def test_nan_in_the_decay_shows(name: str) -> None:
    a = plain("nan", 1, 40, 3, 4)
    getattr(a, name)[0, 0] = float("nan")
    assert selective_scan(*a[:5], backend="cpu")[0].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, "x must be"),
        ({"dt": torch.zeros(1, 4, 4)}, "dt must have the shape of x"),
        ({"A": torch.zeros(4, 2)}, "A must be"),
        ({"B": torch.zeros(1, 4, 3)}, "B must be"),
        ({"B": torch.zeros(1, 4, 2, 2)}, "2 groups, which do not divide 3 channels"),
        ({"C": torch.zeros(1, 4, 2, dtype=torch.complex64)}, "C is complex but A is real"),
        ({"D": torch.zeros(2)}, "D must be"),
        ({"initial_state": torch.zeros(1, 3, 3)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "rise from 0 to the length 4"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "rise from 0 to the length 4"),
        ({"backend": "fast"}, "there are 'cpu'"),
        ({"backend": "mamba_ssm"}, "'mamba_ssm' cannot run these arguments: its kernels run on CUDA"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    given = {
        "x": torch.zeros(1, 4, 3),
        "dt": torch.zeros(1, 4, 3),
        "A": torch.zeros(3, 2),
        "B": torch.zeros(1, 4, 2),
        "C": torch.zeros(1, 4, 2),
    }
    with pytest.raises(ValueError, match=message):
        selective_scan(**(given | change))


DIRTY = """
extern "C" __global__ void dirty(int numbers) {
    extern __shared__ volatile int memory[];
    for (int i = threadIdx.x; i < numbers; i += blockDim.x) memory[i] = -1;
}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_read_from_shared_memory_that_was_not_written(packed: bool, tmp_path: Path) -> None:
    """Left full of NaN before each pass; the last segments are shorter than a tile."""
    device = device_or_skip("cuda")
    if (reason := cuda.why_not_on(device)) is not None:
        pytest.skip(reason)
    source = tmp_path / "dirty.cu"
    source.write_text(DIRTY)
    size = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    dirty = nvrtc.kernel((source,), "dirty", {}, 256, size, 0)
    draw = Draw(f"dirty {packed}")
    length = 4097 if not packed else 1000
    leaves = [
        tensor.to(device).requires_grad_()
        for tensor in (
            draw.normal(1, length, 64),
            draw.normal(1, length, 64),
            -torch.rand(64, 16) - 0.1,
            draw.normal(1, length, 16),
            draw.normal(1, length, 16),
        )
    ]
    bounds = torch.tensor([0, 140, 300, 310, 1000], dtype=torch.int32, device=device) if packed else None

    def run(backend: str, clean: bool) -> list[torch.Tensor]:
        if not clean:
            dirty(1024, size // 4)
        y, final = selective_scan(*leaves, dt_softplus=True, cu_seqlens=bounds, backend=backend)
        if not clean:
            dirty(1024, size // 4)
        return [y, final, *torch.autograd.grad([y.sum() + final.sum()], leaves)]

    for actual, expected in zip(run("cuda", False), run("torch", True), strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_two_to_the_31_elements() -> None:
    device = device_or_skip("cuda")
    if (reason := cuda.why_not_on(device)) is not None:
        pytest.skip(reason)
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    generator = torch.Generator(device).manual_seed(0)
    length, channels, d_state, tail = 2**21 + 64, 1024, 16, 1500

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    rows = {name: normal(1, length, channels) for name in ("x", "dt", "z")}
    rows |= {name: normal(1, length, d_state) for name in ("B", "C")}
    assert rows["x"].numel() > 2**31
    others = {
        "A": -torch.arange(1, d_state + 1, device=device).float().repeat(channels, 1),
        "D": torch.ones(channels, device=device),
        "dt_bias": torch.full((channels,), -4.0, device=device),
        "dt_softplus": True,
    }
    end = {name: value[:, -tail:].clone().requires_grad_() for name, value in rows.items()}
    with torch.no_grad():  # the state forgets within the steps before
        before = {name: value[:, -tail - 5000 : -tail] for name, value in rows.items()}
        _, state = selective_scan(**before, **others, backend="torch")
    expected, _ = selective_scan(**end, **others, initial_state=state, backend="torch")
    dy = normal(1, tail, channels)
    dy[:, :500] = 0
    gradients = torch.autograd.grad(expected, list(end.values()), dy)

    leaves = {name: value.requires_grad_() for name, value in rows.items()}
    y, _ = selective_scan(**leaves, **others, backend="cuda")
    whole = torch.zeros_like(y)
    whole[:, -tail:] = dy
    found = torch.autograd.grad(y, list(leaves.values()), whole)
    for a, b in ((y, expected), *zip(found, gradients, strict=True)):
        assert (a[:, -tail:].float() - b.float()).norm() <= 5e-3 * b.float().norm()
