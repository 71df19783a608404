"""The gated delta rule: chunks equal the loop, the loop the papers' matrices, one step the whole."""

from __future__ import annotations

import functools
import itertools
import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICES, TOLERANCE, Draw, assert_equals_reference, calls_of, device_or_skip, moved

from mambaseq.ops import OPS, delta_rule, ssd
from mambaseq.ops.delta_rule import DeltaArguments, delta_rule_update_, fla, step
from mambaseq.ops.dispatch import outputs_and_gradients, relative_rms_error

OP = OPS["delta_rule"]
TORCH, REFERENCE, PACKAGE = (
    next(backend for backend in OP.backends if backend.name == name) for name in ("torch", "reference", "fla")
)


def drawn(
    label: str, batch: int, length: int, *, channels: bool = False, rate: float = 1.0, key_heads: int = 2
) -> DeltaArguments:
    """Of decays of about exp(-rate), each channel its own with `channels`, and of beta between 0 and 2."""
    draw, heads = Draw(label), 2
    g = draw.uniform(0, 2 * rate, batch, length, heads, *([5] if channels else []))
    return DeltaArguments(
        q=draw.normal(batch, length, key_heads, 5),
        k=F.normalize(draw.normal(batch, length, key_heads, 5), dim=-1),
        v=draw.normal(batch, length, heads, 3),
        g=-g,
        beta=draw.uniform(0, 2, batch, length, heads),
        initial_state=draw.normal(batch, heads, 3, 5),
        chunk_size=32,
    )


def packed(arguments: DeltaArguments, *bounds: int) -> DeltaArguments:
    state = Draw("states").normal(len(bounds) - 1, 2, 3, 5)
    return arguments._replace(cu_seqlens=torch.tensor(bounds, dtype=torch.int32), initial_state=state)


CASES: dict[str, Callable[[], DeltaArguments]] = {
    "length 0": lambda: drawn("a", 2, 0),
    "length 1, reverse": lambda: drawn("b", 2, 1)._replace(reverse=True),
    "length 63, keys shared": lambda: drawn("c", 2, 63, key_heads=1),
    "channels, length 100, reverse": lambda: drawn("d", 2, 100, channels=True, rate=0.1)._replace(reverse=True),
    "channels, strong and none at all": lambda: mixed(drawn("e", 1, 130, channels=True)),
    "strong decay": lambda: drawn("f", 1, 70, rate=100.0),
    "all forgotten": lambda: forgetful(drawn("p", 1, 70)),
    "channels, all forgotten": lambda: forgetful(drawn("q", 1, 70, channels=True)),
    "chunks of 1": lambda: drawn("g", 1, 20, channels=True)._replace(chunk_size=1),
    "no decay, no state": lambda: drawn("h", 1, 100)._replace(g=None, initial_state=None),
    "no delta, channels, keys shared": lambda: drawn("i", 2, 70, channels=True, key_heads=1)._replace(beta=None),
    "no delta, no decay": lambda: drawn("j", 1, 70)._replace(g=None, beta=None),
    "packed": lambda: packed(drawn("k", 1, 150), 0, 0, 1, 3, 66, 66, 98, 150, 150),
    "packed, channels, reverse": lambda: packed(drawn("l", 1, 100, channels=True), 0, 63, 64, 100)._replace(
        reverse=True
    ),
    "packed, no states, no delta": lambda: packed(drawn("m", 1, 70), 0, 40, 40, 70)._replace(
        initial_state=None, beta=None
    ),
    "packed, length 0": lambda: packed(drawn("n", 1, 0), 0, 0, 0),
    "packed, no sequence": lambda: packed(drawn("o", 1, 0), 0),
}
CASES = {name: functools.cache(build) for name, build in CASES.items()}


def mixed(arguments: DeltaArguments) -> DeltaArguments:
    """Channels that forget all at once beside those that forget nothing: a quotient of decays would overflow."""
    assert arguments.g is not None
    return arguments._replace(g=arguments.g * torch.tensor([0, 1e-4, 1, 30, 1000]))


def forgetful(arguments: DeltaArguments) -> DeltaArguments:
    """Two positions behind which nothing of before is left; the sums' digits are those of decays between."""
    assert arguments.g is not None
    g = arguments.g.clone()
    g[:, 20], g[:, 40] = -torch.inf, -1e30
    return arguments._replace(g=g)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, device: str) -> None:
    assert_equals_reference(OP, "torch", CASES[case], device_or_skip(device))


@pytest.mark.parametrize("case", ["channels, strong and none at all", "packed", "no decay, no state"])
def test_in_float64_nothing_but_rounding_differs(case: str) -> None:
    expected = outputs_and_gradients(REFERENCE, CASES[case](), double=True)
    actual = outputs_and_gradients(TORCH, CASES[case](), double=True)
    for a, e in zip(actual, expected, strict=True):
        assert relative_rms_error(a, e) < 1e-12


def test_half_precision() -> None:
    @functools.cache
    def halves() -> DeltaArguments:
        made = drawn("half", 2, 70, channels=True)
        return made._replace(**{name: getattr(made, name).bfloat16() for name in ("q", "k", "v")})

    assert_equals_reference(OP, "torch", halves, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("channels", [False, True])
def test_the_reference_is_the_papers_product_of_matrices(channels: bool) -> None:
    """Equation 10 of arXiv:2412.06464, and equation 1 of arXiv:2510.26692 (transposed)."""
    made = drawn("matrices", 1, 9, channels=channels)
    q, k, v, g, beta, state = (value[0].double() for value in made[:6] if isinstance(value, torch.Tensor))
    expected, S = torch.zeros_like(v), state.clone()
    for t in range(9):
        for head in range(2):
            key = k[t, head]
            decay = g[t, head].exp() * torch.ones(5).double()
            kept = torch.diag(decay) @ (torch.eye(5).double() - beta[t, head] * torch.outer(key, key))
            S[head] = S[head] @ kept + beta[t, head] * torch.outer(v[t, head], key)
            expected[t, head] = S[head] @ q[t, head]
    for backend in ("reference", "torch"):
        y, final = delta_rule(
            *(value[None] for value in (q, k, v, g, beta)), initial_state=state[None], backend=backend
        )
        torch.testing.assert_close(y[0], expected)
        torch.testing.assert_close(final[0], S)


def test_without_the_rule_it_is_the_state_space_dual() -> None:
    made = drawn("dual", 2, 50)._replace(beta=None)
    assert made.g is not None
    expected, last = ssd(made.v, -made.g, -torch.ones(2), made.k, made.q, initial_state=made.initial_state)
    # the dual multiplies its inputs by the step, too
    y, final = delta_rule(made.q, made.k, made.v * -made.g[..., None], made.g, initial_state=made.initial_state)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [False, True])
def test_steps_are_the_whole(channels: bool) -> None:
    made = drawn("steps", 2, 40, channels=channels, key_heads=1)
    assert made.initial_state is not None
    expected, final = delta_rule(*made[:5], initial_state=made.initial_state)
    state = made.initial_state.clone()
    steps = [delta_rule_update_(state, *(value[:, t] for value in made[:5] if value is not None)) for t in range(40)]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decays", [None, 1, 6])
@pytest.mark.parametrize("delta", [False, True])
def test_one_step_on_cpu_is_one_kernel(delta: bool, decays: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw("one step")
    q, k = (draw.normal(2, 2, 9)[..., 3:] for _ in range(2))
    v, beta = draw.normal(2, 4, 35), draw.uniform(0, 2, 2, 4) if delta else None
    g = None if decays is None else -draw.uniform(0, 2, 2, 4, *([6] if decays > 1 else []))
    state = draw.normal(2, 4, 35, 6)
    expected_state = state.double()
    expected = delta_rule_update_(expected_state, q.double(), k.double(), v.double(), g, beta)
    called = calls_of(monkeypatch, step, "update_on_cpu_")
    torch.testing.assert_close(delta_rule_update_(state, q, k, v, g, beta), expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state.float(), rtol=1e-5, atol=1e-5)
    assert called


def test_what_is_held_grows_with_the_length_and_not_with_channels_of_pairs() -> None:
    """The largest tensor of decays a channel: no pair of positions has channels of its own."""
    draw, largest = Draw("memory"), 0
    q, k, g = (draw.uniform(0, 1, 1, 2048, 1, 64) for _ in range(3))
    v, beta = draw.normal(1, 2048, 1, 8), draw.uniform(0, 1, 1, 2048, 1)

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes():
                largest = max(largest, made.untyped_storage().nbytes() // made.element_size())
            return made

    with Counted():
        delta_rule(q, F.normalize(k, dim=-1), v, -g, beta, backend="torch")
    assert largest <= 2 * 2048 * 64  # keys and queries in one


def documented(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, beta=None):  # type: ignore[no-untyped-def]
    """What flash-linear-attention documents of its kernels: q, k `(batch, length, heads, d_key)`, v `(..., d_value)`,
    log-decays g, states `(sequences, heads, d_key, d_value)`."""
    assert scale == 1.0
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ys, finals = [], []
    for s, (start, end) in enumerate(itertools.pairwise(ends)):
        rows = slice(s, s + 1) if cu_seqlens is not None else slice(None)
        h = q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state[rows]
        for t in range(start, end):
            decay = g[:, t].exp()
            h = h * (decay[..., None] if g.ndim == 4 else decay[..., None, None])
            new = v[:, t] if beta is None else beta[:, t, :, None] * (v[:, t] - (h * k[:, t, :, :, None]).sum(2))
            h = h + k[:, t, :, :, None] * new[:, :, None]
            ys.append((h * q[:, t, :, :, None]).sum(2))
        finals.append(h)
    return torch.stack(ys, 1), torch.cat(finals) if output_final_state else None


@pytest.mark.parametrize(
    "case",
    ["length 63, keys shared", "no decay, no state", "no delta, channels, keys shared", "packed", "all forgotten"],
)
def test_what_is_handed_to_flash_linear_attention(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its kernels as documented in the place of the kernels, in float32."""
    made = CASES[case]()
    for module, name in fla._KERNELS.values():
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: documented}))
    expected_y, expected_state = REFERENCE.run(made)
    y, state = fla.run(made)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)
    assert fla.run(made._replace(wants_final_state=False))[1].numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_the_package_at_the_sizes_of_models(channels: bool, delta: bool) -> None:
    """Without gradients, which the package's kernels may refuse."""
    device, draw = device_or_skip("cuda"), Draw("sizes")
    q, k = draw.normal(1, 1000, 4, 64), F.normalize(draw.normal(1, 1000, 4, 64), dim=-1)
    g = -draw.uniform(0, 0.5, 1, 1000, 4, *([64] if channels else []))
    made = DeltaArguments(
        q / 8, k, draw.normal(1, 1000, 4, 128), g, draw.uniform(0, 1, 1, 1000, 4) if delta else None,
        draw.normal(4, 4, 128, 64), torch.tensor([0, 63, 64, 320, 1000], dtype=torch.int32),
    )  # fmt: skip
    made = moved(made._replace(**{name: getattr(made, name).bfloat16() for name in ("q", "k", "v")}), device)
    with torch.no_grad():
        if (reason := PACKAGE.why_not(made)) is not None:
            pytest.skip(f"fla: {reason}")
        double = (t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in made)
        for actual, expected in zip(PACKAGE.run(made), TORCH.run(DeltaArguments(*double)), strict=True):
            # products of this precision, where ours are of float32
            assert relative_rms_error(actual, expected) < 4 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(1, 4, 6)}, "v must be"),
        ({"v": torch.zeros(1, 4, 2, 3, dtype=torch.int64)}, "v must be real"),
        ({"k": torch.zeros(1, 3, 2, 5)}, "k must be"),
        ({"q": torch.zeros(1, 4, 2, 6)}, "q must have the shape of k"),
        ({"q": torch.zeros(1, 4, 3, 5), "k": torch.zeros(1, 4, 3, 5)}, "3 heads, which do not divide the 2 of v"),
        ({"g": torch.zeros(1, 4, 2, 3)}, "g must be"),
        ({"beta": torch.zeros(1, 4, 2, 1)}, "beta must be"),
        ({"beta": torch.zeros(1, 4, 2, device="meta")}, "beta is on meta, but v is on cpu"),
        ({"initial_state": torch.zeros(1, 2, 5, 3)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must rise"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"backend": "fla"}, "'fla' cannot run these arguments: its kernels run on CUDA"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    given = {"q": torch.zeros(1, 4, 2, 5), "k": torch.zeros(1, 4, 2, 5), "v": torch.zeros(1, 4, 2, 3)}
    with pytest.raises(ValueError, match=message):
        delta_rule(**(given | change))
