"""The kernels of one step on GPUs equal PyTorch in float64; without a GPU they run under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from agreement import Draw, calls_of, poisoned_memory, relative_rms_error
from torch import Tensor

from mambaseq.ops.decoding import gpu as step_gpu
from mambaseq.ops.decoding import step
from mambaseq.ops.decoding.step import ssd_update_

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# From float64 on the same inputs: y is rounded to its dtype (the interpreter cuts bf16 off instead), the state is
# float32 whatever they are.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7, torch.float16: 2**-11}
DTYPES = list(TOLERANCE)
SHAPES = [(1, 1, 1, 1, 1), (3, 65, 16, 1, 1), (2, 9, 5, 3, 3), (1, 6, 40, 1, 2), (5, 4, 128, 4, 1), (2, 3, 256, 1, 1)]


def wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def views(draw: Draw, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Neighbouring columns of one projection's output `(batch, features)`, each in its own shape."""
    batch = shapes[0][0]
    widths = [torch.Size(shape[1:]).numel() for shape in shapes]
    whole = draw.normal(batch, 3 + sum(widths)).to(DEVICE, dtype)
    return [part.unflatten(1, s[1:]) for part, s in zip(whole[:, 3:].split(widths, 1), shapes, strict=True)]


def check_state_update(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, options: tuple[bool, ...], A_dtype: torch.dtype
) -> None:
    batch, channels, d_state, groups_B, groups_C = shape
    has_D, has_z, has_bias, softplus, is_log = options
    draw = Draw(f"{shape}")
    x, z = views(draw, dtype, (batch, channels), (batch, channels))
    dt, B, C = views(draw, dtype, (batch, channels), (batch, groups_B, d_state), (batch, groups_C, d_state))
    dt = dt - 3 if softplus else dt.abs()
    B, C = (M.squeeze(1) if M.shape[1] == 1 else M for M in (B, C))
    A = draw.uniform(-1.0, 1.5, channels, d_state) if is_log else -draw.uniform(0.1, 5, channels, d_state)
    A = A.to(DEVICE, A_dtype)
    D, bias = (draw.normal(channels).to(DEVICE, A_dtype) for _ in range(2))
    state = draw.normal(batch, channels, d_state).to(DEVICE)
    D, z, bias = D if has_D else None, z if has_z else None, bias if has_bias else None
    expected_state = state.double()
    expected = step.selective_state_update_(
        expected_state,
        x.double(),
        dt.double(),
        A.double(),
        B.double(),
        C.double(),
        D=wide(D),
        z=wide(z),
        dt_bias=wide(bias),
        dt_softplus=softplus,
        A_is_log=is_log,
    )
    B, C = (M[:, None] if M.ndim == 2 else M for M in (B, C))
    before = state.data_ptr()
    with poisoned_memory():
        y = step_gpu.selective_state_update_(state, x, dt, A, B, C, D, z, bias, softplus, is_log)
    assert state.data_ptr() == before
    assert y.dtype == dtype
    assert relative_rms_error(y, expected) <= TOLERANCE[dtype]
    assert relative_rms_error(state, expected_state) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_state_update(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    check_state_update(shape, dtype, (True,) * 5, torch.float32)
    check_state_update(shape, dtype, (True,) * 5, dtype)


@pytest.mark.parametrize("at", range(6))
def test_state_update_with_one_option_or_none(at: int) -> None:
    options = tuple(i == at for i in range(5))
    check_state_update((2, 7, 3, 1, 1), torch.float32, options, torch.float32)


@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_state_update_many_sequences_a_program(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_gpu, "_MANY_PROGRAMS", 0)
    check_state_update((batch, 70, 16, 1, 1), torch.float32, (True,) * 5, torch.float32)
    check_state_update((batch, 70, 16, 2, 1), torch.float32, (True,) * 5, torch.float32)


def close_in_float64(run: str, state: Tensor, x: Tensor, values: list[Tensor], options: dict) -> None:
    """A step of a kernel and the same by PyTorch."""
    expected_state = _wider(state)
    expected = getattr(step, run)(
        expected_state, x.double(), *(_wider(v) for v in values), **{k: _wider(v) for k, v in options.items()}
    )
    before = state.data_ptr()
    given = list(options.values())
    with poisoned_memory():
        y = getattr(step_gpu, run)(state, x, *values, *given)
    assert state.data_ptr() == before
    assert y.dtype == x.dtype
    assert relative_rms_error(y, expected) <= TOLERANCE[x.dtype]
    assert relative_rms_error(state, expected_state) <= TOLERANCE[torch.float32]


def _wider(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 65, 16, 1, 1), (2, 9, 5, 3, 9), (1, 1, 1, 1, 1), (6, 70, 3, 1, 1)])
def test_complex_state_update(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_gpu, "_MANY_PROGRAMS", 0 if shape[0] == 6 else 1024)
    batch, channels, d_state, groups_B, groups_C = shape
    draw = Draw(f"complex {shape}")
    x, dt, z = views(draw, dtype, *[(batch, channels)] * 3)
    A = torch.complex(-draw.uniform(0.1, 5, channels, d_state), draw.uniform(-30, 30, channels, d_state))
    B, C = (draw.normal(batch, groups, d_state, dtype=torch.complex64) for groups in (groups_B, groups_C))
    state = draw.normal(batch, channels, d_state, dtype=torch.complex64).to(DEVICE)
    D, bias = (draw.normal(channels).to(DEVICE) for _ in range(2))
    options = {"D": D, "z": z, "dt_bias": bias - 3, "dt_softplus": True, "A_is_log": False}
    close_in_float64("selective_state_update_", state, x, [dt, *(v.to(DEVICE) for v in (A, B, C))], options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "d_state", "groups"), [(3, 4, 5, 6, 2), (1, 1, 1, 1, 1), (2, 3, 64, 128, 1)]
)
def test_ssd_update(batch: int, heads: int, head_dim: int, d_state: int, groups: int, dtype: torch.dtype) -> None:
    draw = Draw(f"ssd {heads}")
    shapes = ((batch, heads, head_dim), (batch, groups, d_state), (batch, groups, d_state), (batch, heads))
    x, B, C, dt = views(draw, dtype, *shapes)
    A = -draw.uniform(0.1, 5, heads).to(DEVICE)
    D, bias = (draw.normal(heads).to(DEVICE) for _ in range(2))
    for options in ((D, bias - 3, True), (None, None, False)):
        state = draw.normal(batch, heads, head_dim, d_state).to(DEVICE)
        expected_state, step_size = state.double(), dt if options[2] else dt.abs()
        wider = [wide(v) for v in (x, step_size, A, B, C)]
        names = dict(
            zip(("D", "dt_bias", "dt_softplus"), (wide(options[0]), wide(options[1]), options[2]), strict=True)
        )
        expected = ssd_update_(expected_state, *wider, **names)
        with poisoned_memory():
            y = step_gpu.ssd_update_(state, x, step_size, A, B, C, *options)
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert relative_rms_error(y, expected) <= TOLERANCE[dtype]
        assert relative_rms_error(state, expected_state) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("rule", ["zoh", "bilinear", "mamba"])
@pytest.mark.parametrize(
    ("batch", "channels", "d_state", "is_complex"),
    [(3, 65, 16, True), (1, 5, 40, False), (2, 3, 1, True), (6, 70, 3, False)],
)
def test_lti_update(
    batch: int, channels: int, d_state: int, is_complex: bool, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_gpu, "_MANY_PROGRAMS", 0 if batch == 6 else 1024)
    draw = Draw(f"lti {batch} {channels} {d_state}")
    dtype = torch.complex64 if is_complex else torch.float32
    A = -draw.uniform(0.1, 5, channels, d_state)
    A = torch.complex(A, draw.uniform(-100, 100, channels, d_state)) if is_complex else A
    A[0, 0] = 0  # a system that does not decay
    B, C = (draw.normal(channels, d_state, dtype=dtype) for _ in range(2))
    state = draw.normal(batch, channels, d_state, dtype=dtype).to(DEVICE)
    dt, D = torch.exp(draw.uniform(-9, -1, channels)).to(DEVICE), draw.normal(channels).to(DEVICE)
    x, z = views(draw, torch.float32, *[(batch, channels)] * 2)
    for given in ({"D": D, "z": z}, {"D": None, "z": None}):
        close_in_float64(
            "lti_update_", state, x, [dt, *(v.to(DEVICE) for v in (A, B, C))], {**given, "discretization": rule}
        )


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_system_update(is_complex: bool, rule: str) -> None:
    """From what is learned, as from what is made of it."""
    draw = Draw(f"system {is_complex}")
    dtype = torch.complex64 if is_complex else torch.float32
    x, z = views(draw, torch.float32, (3, 70), (3, 70))
    log_dt, A_log, A_imag, B, C, D = (
        v.to(DEVICE)
        for v in (
            draw.uniform(-9, -1, 70),
            draw.normal(70, 5),
            draw.uniform(-60, 60, 70, 5),
            draw.normal(70, 5),
            draw.normal(70, 5, dtype=dtype),
            draw.normal(70),
        )
    )
    state = draw.normal(3, 70, 5, dtype=dtype).to(DEVICE)
    A = -torch.exp(A_log.double())
    A = torch.complex(A, A_imag.double()) if is_complex else A
    expected_state = _wider(state)
    assert isinstance(expected_state, Tensor)
    expected = step.lti_update_(
        expected_state,
        x.double(),
        log_dt.double().exp(),
        A,
        B.to(A.dtype),
        C.to(A.dtype),
        D=D.double(),
        z=z.double(),
        discretization=rule,  # type: ignore[arg-type]
    )
    numbers = torch.view_as_real(C) if is_complex else C
    y = step_gpu.system_update_(state, x, log_dt, A_log, A_imag if is_complex else None, B, numbers, D, z, rule)
    assert relative_rms_error(y, expected) <= TOLERANCE[torch.float32]
    assert relative_rms_error(state, expected_state) <= TOLERANCE[torch.float32]


def test_small_steps_stay_exact() -> None:
    """softplus of very negative numbers, which log(1 + exp(v)) loses to rounding, and of large ones."""
    dt = torch.linspace(-20, 20, 97, device=DEVICE)[None]
    state, one = torch.zeros(1, 97, 1, device=DEVICE), torch.ones(1, 97, device=DEVICE)
    A, B = torch.zeros(97, 1, device=DEVICE), torch.ones(1, 1, 1, device=DEVICE)
    y = step_gpu.selective_state_update_(state, one, dt, A, B, B, None, None, None, True, False)
    expected = torch.log1p(torch.exp(dt.double()))
    assert ((y - expected).abs() / expected).max() <= 3e-6
    assert torch.equal(state[..., 0], y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "channels", "width"), [(3, 130, 4), (1, 3, 1), (2, 2, 2), (2, 5, 7), (1, 1, 3)])
@pytest.mark.parametrize(("has_bias", "activation"), [(True, "silu"), (False, None)])
def test_causal_conv_update(
    batch: int, channels: int, width: int, has_bias: bool, activation: str | None, dtype: torch.dtype
) -> None:
    draw = Draw(f"conv {channels}")
    _, x = views(draw, dtype, (batch, channels), (batch, channels))
    weight, bias = (v.to(DEVICE, dtype) for v in (draw.normal(channels, width), draw.normal(channels)))
    state = draw.normal(batch, channels, width - 1).to(DEVICE)
    expected_state, bias = state.double(), bias if has_bias else None
    for _ in range(2):
        expected = step.causal_conv_update_(
            expected_state, x.double(), weight.double(), wide(bias), activation=activation
        )
        with poisoned_memory():
            y = step_gpu.causal_conv_update_(state, x, weight, bias, activation == "silu")
        assert y.dtype == dtype
        assert relative_rms_error(y, expected) <= TOLERANCE[dtype]
        assert torch.equal(state, expected_state.float())


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    batch, channels, d_state = shape
    state, x = torch.zeros(shape, device=DEVICE), torch.zeros(batch, channels, device=DEVICE)
    A, B = torch.zeros(channels, d_state, device=DEVICE), torch.zeros(batch, 1, d_state, device=DEVICE)
    assert step_gpu.selective_state_update_(state, x, x, A, B, B, None, None, None, True, True).shape == x.shape
    assert step_gpu.causal_conv_update_(state, x, torch.zeros(channels, 5, device=DEVICE), None, True).shape == x.shape


def test_views_with_other_strides_are_taken_too() -> None:
    draw = Draw("transposed")
    x, dt, A = draw.normal(7, 2), draw.uniform(0, 1, 7, 2), -draw.uniform(0, 1, 3, 7)
    x, dt, A = (v.to(DEVICE).t() for v in (x, dt, A))
    B, C, D = draw.normal(2, 3).to(DEVICE), draw.normal(2, 3).to(DEVICE), draw.normal(1).to(DEVICE).expand(7)
    state = draw.normal(2, 7, 3).to(DEVICE)
    expected_state = state.double()
    expected = step.selective_state_update_(
        expected_state, x.double(), dt.double(), A.double(), B.double(), C.double(), D=D.double()
    )
    y = step_gpu.selective_state_update_(state, x, dt, A, B[:, None], C[:, None], D, None, None, False, False)
    assert relative_rms_error(y, expected) <= TOLERANCE[torch.float32]
    assert relative_rms_error(state, expected_state) <= TOLERANCE[torch.float32]


def test_cpu_tensors_are_left_to_the_cpu() -> None:
    assert not step_gpu.can_run(torch.zeros(1, 2, 3), torch.zeros(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 7, 128])
def test_at_real_sizes(cuda: torch.device, batch: int, dtype: torch.dtype) -> None:
    check_state_update((batch, 4096, 16, 1, 1), dtype, (True,) * 5, dtype)
    check_state_update((batch, 1001, 20, 7, 1), dtype, (True,) * 5, torch.float32)


@pytest.mark.gpu
def test_gpu_tensors_take_the_kernels(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of(monkeypatch, step_gpu, "selective_state_update_")
    convolved = calls_of(monkeypatch, step_gpu, "causal_conv_update_")
    x, B = torch.rand(2, 5, device=cuda), torch.rand(2, 3, device=cuda)
    A = -torch.rand(5, 3, device=cuda)
    step.selective_state_update_(torch.zeros(2, 5, 3, device=cuda), x, x, A, B, B)
    step.causal_conv_update_(torch.zeros(2, 5, 3, device=cuda), x, torch.rand(5, 4, device=cuda))
    assert (len(seen), len(convolved)) == (1, 1)
    A.requires_grad_()
    y = step.selective_state_update_(torch.rand(2, 5, 3, device=cuda), x, x, A, B, B)
    assert torch.autograd.grad(y.sum(), A)[0].abs().sum() > 0
    assert len(seen) == 1


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_32_bit_offsets(cuda: torch.device) -> None:
    """A state of more than 2^31 elements (9 GiB): its last sequence is updated like any other."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of GPU memory")
    batch, channels, d_state = 2**31 // (4096 * 128) + 2, 4096, 128
    state = torch.empty(batch, channels, d_state, device=cuda)
    state[-1] = 1.0
    x = torch.rand(batch, channels, device=cuda)
    A, B = -torch.rand(channels, d_state, device=cuda), torch.rand(batch, 1, d_state, device=cuda)
    one = torch.ones(1, channels, d_state, device=cuda)
    expected = step_gpu.selective_state_update_(one, x[-1:], x[-1:], A, B[-1:], B[-1:], None, None, None, True, False)
    y = step_gpu.selective_state_update_(state, x, x, A, B, B, None, None, None, True, False)
    torch.testing.assert_close(state[-1:], one)
    torch.testing.assert_close(y[-1:], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_greatest_logit(dtype: torch.dtype) -> None:
    wide = Draw("logits").normal(5, 20_100).to(DEVICE, dtype)
    logits = wide[:, 50:]  # rows that do not touch
    logits[1, [7, 19_999]] = 90.0
    logits[2] = -torch.inf
    logits[3, 16_500] = torch.nan
    logits[4, 20_049] = torch.inf
    with poisoned_memory():
        ids, peaks = step_gpu.likeliest(logits)
    expected = logits.float().max(-1)
    assert torch.equal(ids, expected.indices)
    assert ids.tolist()[1:] == [7, 0, 16_500, 20_049]
    assert torch.equal(peaks, expected.values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf))
