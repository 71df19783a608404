"""The Triton kernels of the delta rule equal the chunked form in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import ROWS, TOLERANCE, Draw, device_or_skip, errors_by_name, moved
from test_delta_rule import CASES, OP, TORCH, drawn, forgetful, packed
from torch import Tensor

from mambaseq.ops import delta_rule
from mambaseq.ops.delta_rule import DeltaArguments, gpu
from mambaseq.ops.dispatch import explain, leaves, outputs_and_gradients, relative_rms_error

ROOT = Path(__file__).parents[2]
TRITON = next(backend for backend in OP.backends if backend.name == "triton")
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton's kernels run, interpreted or not
# by case, how much more than twice an output's rounding is let pass: without a decay it goes on from position to
# position; where all decays but a few are 0, what is left of the gradient of g is the rounding of its terms; over few
# channels (5 of keys, 3 of values) nothing averages out, and those of P, T, U, Z and of the gradients of pairs, 2e-3 to
# 2.6e-3 each, come to 8.5e-3
SLACK = {
    "no decay, no state": 3,
    "strong decay": 4,
    "channels, strong and none at all": 4,
    "channels, length 100, reverse": 1.25,
}


def as_dtype(made: DeltaArguments, dtype: torch.dtype) -> DeltaArguments:
    return made._replace(**{name: getattr(made, name).to(dtype) for name in ("q", "k", "v")})


def sized(
    label: str,
    batch: int,
    length: int,
    heads: int,
    d_key: int,
    d_value: int,
    *bounds: int,
    key_heads: int = 0,
    channels: bool = False,
) -> DeltaArguments:
    """As models have them: queries and keys of length 1, slow and fast decays."""
    draw = Draw(label)
    key_heads = key_heads or heads
    q, k = (F.normalize(draw.normal(batch, length, key_heads, d_key), dim=-1) for _ in range(2))
    made = DeltaArguments(
        q=q,
        k=k,
        v=draw.normal(batch, length, heads, d_value),
        g=-draw.uniform(0, 0.2, batch, length, heads, *([d_key] if channels else [])),
        beta=draw.uniform(0, 1, batch, length, heads),
        initial_state=draw.normal(len(bounds) - 1 if bounds else batch, heads, d_value, d_key),
    )
    return made._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32)) if bounds else made


def assert_near(made: DeltaArguments, dtype: torch.dtype, device: torch.device, slack: float = 1) -> None:
    """Run past `why_not`, which refuses float32 on a CPU."""
    most = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2 * slack)
    for label, error in errors_by_name(TRITON, TORCH, moved(as_dtype(made, dtype), device)).items():
        assert error < most, f"{label}: relative RMS error {error:.1e}"


def first_head(made: DeltaArguments) -> DeltaArguments:
    state = None if made.initial_state is None else made.initial_state[:, :1]
    rows = {name: getattr(made, name)[:, :, :1] for name in ("v", "g", "beta")}
    return made._replace(**rows, initial_state=state)


def test_kernels() -> None:
    """By the interpreter, which takes its time: short ones; on a GPU all."""
    made = packed(drawn("short", 1, 40, key_heads=1), 0, 3, 3, 40)
    assert_near(first_head(made)._replace(reverse=True), torch.float16, PLACE)


def test_kernels_hand_states_from_chunk_to_chunk() -> None:
    made = sized("two", 1, 70, 1, 40, 24)
    assert_near(made._replace(initial_state=None, wants_final_state=False), torch.bfloat16, PLACE)


def test_kernels_in_full_precision() -> None:
    """Differences of sums of decays to float32's last digits; no correction."""
    made = first_head(forgetful(drawn("full", 1, 50, rate=30.0, key_heads=1)))
    assert_near(made, torch.float32, PLACE)
    assert_near(made._replace(beta=None), torch.float32, PLACE)


def test_kernels_with_a_decay_a_channel_in_full_precision() -> None:
    """Slow decays behind fast ones: float32 has no digits for both in one sum."""
    made = moved(first_head(drawn("full, channels", 1, 60, rate=0.1, channels=True, key_heads=1)), PLACE)
    assert made.g is not None
    made.g[:, :40] -= 100
    double = made._replace(**{name: getattr(made, name).double() for name in ("q", "k", "v", "initial_state")})
    for actual, expected in zip(TRITON.run(made), TORCH.run(double), strict=True):
        assert relative_rms_error(actual, expected) < 1e-5


@pytest.mark.parametrize("rate", [1, 2, 4, 8, 16, 32, 100])
def test_products_with_a_decay_a_channel_end_on_every_level(rate: float) -> None:
    """From whole chunks at once to pairs of neighbours: twice as fast decays need one level more."""
    made = moved(first_head(drawn("levels", 1, 66, rate=0.1, channels=True, key_heads=1)), PLACE)
    assert made.g is not None
    made.g[..., ::2] = -rate * Draw("rates").uniform(0.9, 1, *made.g[..., ::2].shape).to(PLACE)
    double = made._replace(**{name: getattr(made, name).double() for name in ("q", "k", "v", "initial_state")})
    for actual, expected in zip(TRITON.run(made), TORCH.run(double), strict=True):
        assert relative_rms_error(actual, expected) < 1e-5
    rounded = as_dtype(made, torch.bfloat16)
    for actual, expected in zip(TRITON.run(rounded), TORCH.run(as_dtype(rounded, torch.float64)), strict=True):
        assert relative_rms_error(actual, expected) < 2 * TOLERANCE[torch.bfloat16]


def test_gradients_with_a_decay_a_channel_in_full_precision() -> None:
    """Of log-decays, from which spans that do not reach over them are taken away again: nothing is left of these."""
    made = first_head(drawn("full gradients, channels", 1, 66, rate=0.1, channels=True, key_heads=1))
    assert made.g is not None
    made.g[:, 20::16] -= 30
    assert_near(made, torch.float32, PLACE)
    assert_near(made._replace(beta=None, reverse=True), torch.float32, PLACE)


def test_what_lies_behind_a_reset_leaves_nothing_of_decays_before_it() -> None:
    """Sums of a chunk's later positions are taken away again, as many digits as these have: those before, of a
    ten-thousandth of their size, are nearly as exact as without."""
    made = leaves(drawn("behind a reset", 1, 64, rate=0.1, channels=True, key_heads=1))
    assert made.g is not None
    with torch.no_grad():
        made.g[:, 32] = -200
    rounded = leaves(as_dtype(made, torch.bfloat16))
    dy = torch.randn(made.v.shape, generator=torch.Generator().manual_seed(0))
    dy[:, 32:] *= 1e4
    found, expected = (
        torch.autograd.grad(backend.run(given)[0], given.g, dy.to(given.v.dtype))[0][:, :32]
        for backend, given in ((TRITON, rounded), (TORCH, leaves(as_dtype(rounded, torch.float64))))
    )
    assert relative_rms_error(found, expected) < 5 * TOLERANCE[torch.bfloat16]


def test_kernels_with_a_decay_a_channel() -> None:
    """Forgetting all and nothing; padding of a chunk, and a second one."""
    made = forgetful(drawn("channels", 1, 66, channels=True, key_heads=1))
    assert_near(first_head(made)._replace(initial_state=None, reverse=True), torch.bfloat16, PLACE)


@pytest.mark.parametrize("channels", [False, True])
def test_kernels_walk_parts_of_long_sequences_at_once(channels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sequences with fewer chunks than parts, of none, and of several."""
    parts = []

    def three(*_: object) -> int:
        parts.append(3)
        return 3

    monkeypatch.setattr(gpu, "_parts", three)
    made = sized("parts", 1, 330, 1, 20, 24, 0, 0, 40, 330, channels=channels)
    assert_near(made._replace(reverse=channels), torch.bfloat16, PLACE)
    assert len(parts) >= 3  # the forward pass, states again, the backward pass
    _, final = TRITON.run(moved(as_dtype(made, torch.bfloat16), PLACE))
    assert final.untyped_storage().nbytes() == final.nbytes  # it keeps no others alive


def test_kernels_walk_in_parts_where_they_have_nothing_else_to_do() -> None:
    device = torch.device("cpu")
    assert gpu._parts(device, 1, 8, 10_000) == 1
    if torch.cuda.is_available():
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        assert gpu._parts(torch.device("cuda", 0), 48, 4, 1024) == 2 * processors // 48 + 1
        assert gpu._parts(torch.device("cuda", 0), processors, 8, 1024) == 1


def test_kernels_compile_in_one_graph() -> None:
    made = moved(as_dtype(sized("compiled", 1, 5, 1, 5, 3), torch.bfloat16), PLACE)

    def run(v: Tensor) -> Tensor:
        y, final = delta_rule(made.q, made.k, v, made.g, made.beta, backend="triton")
        return y.float().sum() + final.sum()

    torch._dynamo.reset()
    v = made.v.clone().requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(v), v)[0], torch.autograd.grad(run(v), v)[0])


def test_kernels_keep_nothing_but_their_arguments() -> None:
    made = leaves(moved(as_dtype(drawn("kept", 1, 5), torch.bfloat16), PLACE))
    given = {value.data_ptr() for value in made if isinstance(value, Tensor)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        TRITON.run(made)
    assert set(kept) == given


def test_kernels_round_queries_and_keys_to_the_dtype_of_values() -> None:
    made = moved(sized("rounded", 1, 5, 1, 5, 3), PLACE)
    made = made._replace(v=made.v.bfloat16())
    y, final, dq, dk, *_ = outputs_and_gradients(TRITON, made)
    assert dq.dtype == dk.dtype == torch.float32
    rounded = TRITON.run(as_dtype(made, torch.bfloat16))
    assert torch.equal(y, rounded[0])
    assert torch.equal(final, rounded[1])


def test_kernels_are_taken_where_they_can_run() -> None:
    made = moved(as_dtype(drawn("taken", 1, 5), torch.bfloat16), PLACE)
    assert explain(OP, made)[0] == ("triton", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(1, 4, 2, 3, dtype=torch.float64)}, "v is torch.float64"),
        ({"v": torch.zeros(1, 4, 2, 3)}, "float16 and, on a GPU, float32"),
        ({"beta": torch.zeros(1, 4, 2, dtype=torch.float64)}, "beta is float64"),
        ({"k": torch.zeros(1, 4, 2, 300)}, "keys have 300 channels"),
        ({"v": torch.zeros(1, 4, 2, 3), "k": torch.zeros(1, 4, 2, 200)}, "take 128 in torch.float32"),
        ({"v": torch.zeros(1, 4, 2, 0).half()}, "empty"),
    ],
)
def test_what_the_kernels_refuse(change: dict[str, Tensor], message: str) -> None:
    k = torch.zeros(1, 4, 2, 5)
    made = DeltaArguments(k, k, torch.zeros(1, 4, 2, 3).half())._replace(**change)
    reason = gpu.why_not(made) if "k" not in change else gpu.why_not_these(made)
    assert reason is not None
    assert message in reason


def compiled(cache: Path, *options: str) -> list[dict[str, Any]]:
    """What `benchmarks/delta_compiled.py` tells of the kernels, compiled for a GPU that need not be there; it fails
    where they want more shared memory than there is, or have operands narrower than 128 bytes."""
    command = [sys.executable, str(ROOT / "benchmarks" / "delta_compiled.py"), *options]
    there = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, env={**there, "TRITON_CACHE_DIR": str(cache)})
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_products_read_no_narrow_operands(tmp_path: Path) -> None:
    """Those narrower than 128 bytes are read from wrong places on a Hopper GPU."""
    lines = compiled(tmp_path, "--dtypes", "bfloat16", "--sizes", "16x32", "--decays", "channels")
    found = {line["kernel"] for line in lines if line["widths"]}
    assert found == {
        "pairs_of_channels",
        "walk",
        "output",
        "walk_back",
        "gradients_of_pairs",
        "gradients_of_channels",
    }


def test_queries_and_keys_in_full_precision_take_no_more_shared_memory(tmp_path: Path) -> None:
    """Tiles of the walks, of which a program has several at once, are planned for the dtype of v."""
    size = ("--dtypes", "bfloat16", "--sizes", "128x128", "--decays", "heads")
    most = {line["kernel"]: line["shared"] for line in compiled(tmp_path, *size, "--keys", "float32")}
    assert 128 * 1024 < most["walk_back"] <= 227 * 1024


def test_plans_fit_what_a_gpu_has() -> None:
    """Small tiles where shared memory is less than an H100's; chunked PyTorch where these do not fit."""
    sizes = 128, 128, torch.bfloat16, False
    assert gpu.plan(*sizes) == gpu.plan(*sizes, room=227 * 1024)
    assert gpu.plan(*sizes, room=163 * 1024).walk_back == gpu.Shape(4, 1, 32)
    assert gpu.plan(*sizes, room=163 * 1024).output == gpu.plan(128, 128, torch.float16, False).output


@pytest.mark.parametrize(
    ("room", "d_key", "fits"), [(101_376, 128, True), (101_376, 192, False), (166_912, 256, True), (65_536, 16, False)]
)
def test_kernels_that_do_not_fit_are_refused(
    room: int, d_key: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_room", lambda _: room)
    reason = gpu._too_little_on(torch.device("cuda", 0), d_key)
    assert fits if reason is None else not fits and f"gives them {room}" in reason


SIZED: dict[str, Callable[[], DeltaArguments]] = {
    "128 x 128": lambda: sized("a", 2, 1000, 4, 128, 128),
    "128 x 128, packed, reverse": lambda: sized("b", 1, 700, 2, 128, 128, 0, 0, 1, 65, 300, 300, 700)._replace(
        reverse=True
    ),
    "128 x 128, channels": lambda: sized("d", 2, 300, 2, 128, 128, channels=True),
    "64 x 128, keys shared": lambda: sized("c", 1, 500, 4, 64, 128, key_heads=2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", SIZED)
def test_kernels_at_the_sizes_of_models(case: str, dtype: torch.dtype) -> None:
    assert_near(SIZED[case](), dtype, device_or_skip("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 4096])
def test_kernels_of_every_length(length: int) -> None:
    assert_near(sized("length", max(1, ROWS // length), length, 2, 128, 128), torch.bfloat16, device_or_skip("cuda"))


def one_position(rows: int, d_key: int, d_value: int, rule: str) -> DeltaArguments:
    made = sized("one", rows, 1, 2, d_key, d_value, channels=rule != "gated delta")
    return made._replace(beta=None) if rule == "GLA" else made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["gated delta", "KDA", "GLA"])
def test_kernels_of_one_position(rule: str, dtype: torch.dtype) -> None:
    """In float16 the gradient of beta is off by 3.6e-4 of many numbers, by more than 1.8e-3 in one of 15 pairs."""
    assert_near(one_position(ROWS, 128, 128, rule), dtype, device_or_skip("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(16, 16), (16, 64), (32, 32), (64, 64), (80, 48), (128, 256), (192, 96), (256, 64)])
@pytest.mark.parametrize("channels", [False, True])
def test_kernels_of_every_size(channels: bool, size: tuple[int, int]) -> None:
    assert_near(sized("size", 2, 200, 2, *size, channels=channels), torch.bfloat16, device_or_skip("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [name for name, build in CASES.items() if gpu.why_not_these(build()) is None])
def test_kernels_on_a_gpu(case: str) -> None:
    assert_near(CASES[case](), torch.bfloat16, device_or_skip("cuda"), SLACK.get(case, 1))


@pytest.mark.gpu
def test_kernels_take_queries_and_keys_in_full_precision() -> None:
    """As the mixers hand them over; they are rounded to the dtype of v."""
    made = sized("mixed", 1, 300, 2, 128, 128)
    made = moved(made._replace(v=made.v.bfloat16()), device_or_skip("cuda"))
    assert max(errors_by_name(TRITON, TORCH, made).values()) < 4 * TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("case", SIZED)
def test_kernels_give_the_same_bits_twice(case: str) -> None:
    made = moved(as_dtype(SIZED[case](), torch.bfloat16), device_or_skip("cuda"))
    first, second = (outputs_and_gradients(TRITON, made) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
