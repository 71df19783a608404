"""The first law for the selective scan: every backend equals the reference, gradients included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import DEVICES, Draw, assert_equals_reference, backend_or_skip, device_or_skip, moved

from mambaseq.ops import OPS, selective_scan
from mambaseq.ops.dispatch import outputs_and_gradients
from mambaseq.ops.gpu import nvrtc
from mambaseq.ops.selective_scan import chunked, cuda, segments
from mambaseq.ops.selective_scan.arguments import ScanArguments

OP = OPS["selective_scan"]
BACKENDS = [backend.name for backend in OP.backends if backend.name != "reference"]


def plain(label: str, batch: int, length: int, channels: int, d_state: int) -> ScanArguments:
    """Step sizes as Mamba has them, from 1e-3 to 1e-1, and its A, -1 … -d_state."""
    draw = Draw(label)
    A = -torch.arange(1.0, d_state + 1).repeat(channels, 1)
    return ScanArguments(
        x=draw.normal(batch, length, channels),
        dt=torch.exp(draw.uniform(np.log(1e-3), np.log(1e-1), batch, length, channels)),
        A=A,
        B=draw.normal(batch, length, d_state),
        C=draw.normal(batch, length, d_state),
    )


def full(label: str, batch: int, length: int, channels: int, d_state: int) -> ScanArguments:
    draw = Draw(label)
    arguments = plain(label, batch, length, channels, d_state)
    return arguments._replace(
        dt=draw.normal(batch, length, channels),
        D=draw.normal(channels),
        z=draw.normal(batch, length, channels),
        dt_bias=draw.uniform(-6, -2, channels),
        dt_softplus=True,
        initial_state=draw.normal(batch, channels, d_state),
    )


def packed(arguments: ScanArguments, *bounds: int) -> ScanArguments:
    shape = (len(bounds) - 1, *arguments.A.shape)
    return arguments._replace(
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32), initial_state=Draw("states").normal(*shape)
    )


def sliced(arguments: ScanArguments) -> ScanArguments:
    """As a block makes them: x and z halves of one tensor, B and C parts of another."""
    assert arguments.z is not None
    x, z = torch.cat([arguments.x, arguments.z], -1).chunk(2, -1)
    B, C = torch.cat([arguments.x[..., :7], arguments.B, arguments.C], -1)[..., 7:].chunk(2, -1)
    return arguments._replace(x=x, z=z, B=B, C=C)


def grouped(label: str) -> ScanArguments:
    draw = Draw(label)
    arguments = full(label, 2, 63, 66, 3)
    return arguments._replace(B=draw.normal(2, 63, 2, 3), C=draw.normal(2, 63, 3, 3))


def in_two_groups(label: str) -> ScanArguments:
    """B in two groups of 64 channels, C in one."""
    draw = Draw(label)
    arguments = full(label, 2, 63, 128, 5)
    return arguments._replace(B=draw.normal(2, 63, 2, 5), C=draw.normal(2, 63, 1, 5))


def slow_decay(label: str, length: int) -> ScanArguments:
    """Decays of 1 - 1e-5 … 1 - 1e-3: what enters first is still there at the end."""
    draw = Draw(label)
    arguments = plain(label, 1, length, 3, 4)
    return arguments._replace(
        dt=draw.uniform(0.5, 1.5, 1, length, 3),
        A=-torch.tensor([1e-5, 1e-4, 3e-4, 1e-3]).repeat(3, 1),
        initial_state=draw.normal(1, 3, 4),
    )


def fast_decay(label: str) -> ScanArguments:
    """Decays down to exp(-500), which is 0 in float32."""
    arguments = plain(label, 2, 63, 5, 4)
    return arguments._replace(dt=Draw(label).uniform(0, 5, 2, 63, 5), A=arguments.A * 25)


def complex_(label: str, length: int, *, slow: bool) -> ScanArguments:
    draw = Draw(label)
    arguments = full(label, 2, length, 5, 3)
    real = -draw.uniform(1e-4, 1e-3, 5, 3) if slow else -draw.uniform(0.5, 5, 5, 3)
    return arguments._replace(
        A=torch.complex(real, draw.uniform(-3, 3, 5, 3)),
        B=draw.normal(2, length, 3, dtype=torch.complex64),
        C=draw.normal(5, 3, dtype=torch.complex64),
        dt=draw.uniform(0.5, 1.5, 2, length, 5) if slow else arguments.dt,
        dt_bias=None if slow else arguments.dt_bias,
        dt_softplus=not slow,
        initial_state=draw.normal(2, 5, 3, dtype=torch.complex64),
    )


def constant(label: str) -> ScanArguments:
    draw = Draw(label)
    return full(label, 2, 63, 5, 3)._replace(B=draw.normal(5, 3), C=draw.normal(5, 3))


def turning(label: str, batch: int, length: int, channels: int, d_state: int, constant: str = "") -> ScanArguments:
    """Complex throughout; `constant` names those of B and C that are."""
    draw = Draw(label)

    def matrix(name: str) -> torch.Tensor:
        shape = (channels,) if name in constant else (batch, length)
        return draw.normal(*shape, d_state, dtype=torch.complex64)

    return full(label, batch, length, channels, d_state)._replace(
        A=torch.complex(-draw.uniform(0.5, 5, channels, d_state), draw.uniform(-30, 30, channels, d_state)),
        B=matrix("B"),
        C=matrix("C"),
        initial_state=draw.normal(batch, channels, d_state, dtype=torch.complex64),
    )


def fast_turns(label: str) -> ScanArguments:
    """Angles of tens of turns a step, which decay slowly."""
    draw = Draw(label)
    arguments = turning(label, 2, 63, 5, 3)
    A = torch.complex(-draw.uniform(0.01, 0.1, 5, 3), draw.uniform(-300, 300, 5, 3))
    return arguments._replace(A=A, dt=draw.uniform(0, 1, 2, 63, 5), dt_bias=None, dt_softplus=False)


def packed_turning(arguments: ScanArguments, *bounds: int) -> ScanArguments:
    shape = (len(bounds) - 1, *arguments.A.shape)
    return packed(arguments, *bounds)._replace(
        initial_state=Draw("complex states").normal(*shape, dtype=torch.complex64)
    )


def constant_one(name: str, arguments: ScanArguments) -> ScanArguments:
    return arguments._replace(**{name: Draw(name).normal(*arguments.A.shape)})


def y_alone(arguments: ScanArguments) -> ScanArguments:
    """What mamba-ssm can do: no state on either side."""
    return arguments._replace(initial_state=None, wants_final_state=False)


CASES: dict[str, Callable[[], ScanArguments]] = {
    "length 1": lambda: plain("a", 3, 1, 65, 5),
    "length 2": lambda: full("b", 2, 2, 130, 16),
    "length 63": lambda: full("c", 2, 63, 65, 4),
    "one channel, one state": lambda: full("d", 3, 63, 1, 1),
    "length 1000": lambda: plain("e", 1, 1000, 65, 5),
    "length 1000, reverse": lambda: full("f", 2, 1000, 3, 16)._replace(reverse=True),
    "length 4097": lambda: full("g", 1, 4097, 3, 4),
    "length 0": lambda: full("h", 2, 0, 3, 4),
    "reverse": lambda: full("i", 2, 63, 130, 3)._replace(reverse=True),
    "packed": lambda: packed(full("j", 1, 200, 65, 4), 0, 0, 1, 3, 66, 66, 98, 200),
    "packed, last empty, reverse": lambda: packed(full("k", 1, 200, 65, 4), 0, 63, 64, 200, 200)._replace(reverse=True),
    "packed, no state": lambda: packed(plain("l", 1, 70, 3, 2), 0, 30, 70)._replace(initial_state=None),
    "packed, all empty": lambda: packed(full("m", 1, 0, 3, 2), 0, 0, 0),
    "slices": lambda: sliced(full("n", 2, 63, 65, 5)),
    "groups": lambda: grouped("o"),
    "no gate": lambda: full("p", 2, 63, 65, 4)._replace(z=None),
    "no softplus": lambda: plain("q", 2, 63, 65, 4)._replace(dt_bias=torch.full((65,), 0.01)),
    "slow decay": lambda: slow_decay("r", 4097),
    "slow decay, packed": lambda: packed(slow_decay("s", 1500), 0, 1000, 1500),
    "fast decay": lambda: fast_decay("t"),
    "complex": lambda: complex_("u", 63, slow=False),
    "complex, slow decay, reverse": lambda: complex_("v", 1000, slow=True)._replace(reverse=True),
    "constant B and C": lambda: constant("w"),
    "constant B, length 400, reverse": lambda: constant_one("B", full("ah", 2, 400, 65, 5))._replace(reverse=True),
    "constant C, packed": lambda: packed(constant_one("C", full("ai", 1, 200, 66, 16)), 0, 0, 1, 66, 66, 200),
    "constant B and C, 40 states": lambda: constant_one("B", constant_one("C", full("aj", 2, 63, 65, 40))),
    "complex, B and C vary": lambda: turning("ak", 2, 63, 65, 5),
    "complex, length 1": lambda: turning("al", 3, 1, 130, 16),
    "complex, one channel, one state": lambda: turning("am", 3, 63, 1, 1),
    "complex, length 400, reverse": lambda: turning("an", 1, 400, 66, 16)._replace(reverse=True),
    "complex, no gate": lambda: turning("ao", 2, 300, 65, 8)._replace(z=None, D=None),
    "complex, constant B": lambda: turning("ap", 2, 300, 65, 3, "B"),
    "complex, constant B and C": lambda: turning("aq", 2, 300, 65, 16, "BC"),
    "complex, real B": lambda: turning("ar", 2, 63, 65, 5)._replace(B=Draw("real").normal(2, 63, 5)),
    "complex, fast turns": lambda: fast_turns("as"),
    "complex, packed, 20 states": lambda: packed_turning(turning("at", 1, 200, 65, 20), 0, 0, 1, 3, 66, 66, 98, 200),
    "complex, packed, reverse": lambda: packed_turning(turning("au", 1, 700, 66, 4, "C"), 0, 600, 600, 700)._replace(
        reverse=True
    ),
    "complex, groups of 64 channels": lambda: turning("av", 2, 63, 128, 5)._replace(
        B=Draw("groups").normal(2, 63, 2, 5, dtype=torch.complex64)
    ),
    "17 states": lambda: full("ae", 2, 63, 65, 17),
    "40 states, packed, reverse": lambda: packed(full("af", 1, 200, 66, 40), 0, 1, 1, 90, 200)._replace(reverse=True),
    "groups of 64 channels": lambda: in_two_groups("ag"),
    "y alone, length 1": lambda: y_alone(plain("x", 3, 1, 65, 5)),
    "y alone": lambda: y_alone(full("y", 2, 1000, 65, 4)),
    "y alone, length 4097": lambda: y_alone(full("z", 1, 4097, 3, 16)),
    "y alone, no gate": lambda: y_alone(full("aa", 2, 63, 130, 5))._replace(z=None),
    "y alone, groups": lambda: y_alone(grouped("ab")),
    "y alone, slow decay": lambda: y_alone(slow_decay("ac", 1500)),
    "y alone, constant B and C": lambda: y_alone(constant("ad")),
}


@functools.cache
def build(case: str, dtype: torch.dtype) -> Callable[[], ScanArguments]:
    """What depends on the input in `dtype`, parameters and states in float32."""

    @functools.cache
    def arguments() -> ScanArguments:
        made = CASES[case]()
        names = ("x", "dt", "B", "C", "z")
        halves = {
            name: value.to(dtype)
            for name in names
            if (value := getattr(made, name)) is not None and not value.is_complex()
        }
        return made._replace(**halves) if dtype != torch.float32 else made

    return arguments


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
