"""RWKV-4's time mixing: the paper's equations in a loop, and its initial values."""

from __future__ import annotations

import math

import torch

from mambaseq.mixers.rwkv4 import RWKV4


def time_mixing(mixer: RWKV4, x: torch.Tensor) -> torch.Tensor:
    """Equations 11 to 18, one position after another, sums as they are."""
    p = dict(mixer.named_parameters())
    last = num = den = torch.zeros_like(x[:, 0])
    outputs = []
    for t in range(x.shape[1]):
        now = x[:, t]

        def project(weight: str, mix: str, now: torch.Tensor = now, last: torch.Tensor = last) -> torch.Tensor:
            return (p[mix] * now + (1 - p[mix]) * last) @ p[weight].T

        r = project("receptance.weight", "time_mix_r")
        k = project("key.weight", "time_mix_k")
        v = project("value.weight", "time_mix_v")
        bonus = torch.exp(p["time_first"] + k)
        outputs.append(torch.sigmoid(r) * (num + bonus * v) / (den + bonus) @ p["out_proj.weight"].T)
        decay = torch.exp(-torch.exp(p["time_decay"]))
        num, den, last = decay * num + torch.exp(k) * v, decay * den + torch.exp(k), now
    return torch.stack(outputs, 1)


def test_equals_the_equations_in_a_loop() -> None:
    torch.manual_seed(0)
    mixer = RWKV4(8).double()
    x = torch.randn(2, 40, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *mixer.parameters()]
    found, expected = mixer(x), time_mixing(mixer, x)
    weight = torch.randn_like(x)
    # the dynamics are computed in fp32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_large_keys_do_not_overflow() -> None:
    torch.manual_seed(0)
    mixer = RWKV4(8)
    with torch.no_grad():
        mixer.key.weight.mul_(60)
        x = torch.randn(2, 3000, 8, requires_grad=True)
        assert mixer.key(x).abs().max() > 80
    y = mixer(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    for tensor in (x, *mixer.parameters()):
        assert tensor.grad.isfinite().all()


def test_initial_values_are_those_of_a_middle_layer() -> None:
    mixer = RWKV4(7)
    assert mixer.time_decay[0] == -5
    assert mixer.time_decay[-1] == 3
    torch.testing.assert_close(mixer.time_decay[3], torch.tensor(-5 + 8 * 0.5**1.35))
    first = math.log(0.3)
    torch.testing.assert_close(mixer.time_first[:4], torch.tensor([first, first + 0.5, first - 0.5, first]))
    torch.testing.assert_close(mixer.time_mix_k[4], torch.tensor((4 / 7) ** 0.5))
    torch.testing.assert_close(mixer.time_mix_r[4], torch.tensor((4 / 7) ** 0.25))
    torch.testing.assert_close(mixer.time_mix_v, mixer.time_mix_k + 0.15)


def test_steps_run_in_half_precision_and_under_autocast() -> None:
    torch.manual_seed(0)
    mixer, x = RWKV4(8), torch.randn(2, 6, 8)
    expected = mixer(x)
    half, state = RWKV4(8).bfloat16(), mixer.init_state(2)
    half.load_state_dict(mixer.state_dict())
    found = torch.cat([half.step_(x[:, t : t + 1].bfloat16(), state) for t in range(6)], 1)
    assert found.dtype == torch.bfloat16
    assert state.wkv.dtype == torch.float32
    assert (found.float() - expected).norm() <= 3e-2 * expected.norm()
    state = mixer.init_state(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([mixer.step_(x[:, t : t + 1].bfloat16(), state) for t in range(6)], 1)
    assert (found.float() - expected).norm() <= 3e-2 * expected.norm()


def test_an_empty_sequence_leaves_its_state_as_it_was() -> None:
    mixer = RWKV4(8)
    x, bounds = torch.randn(1, 9, 8), torch.tensor([0, 0, 5, 5, 9, 9], dtype=torch.int32)
    with torch.no_grad():
        _, states = mixer(x, cu_seqlens=bounds, return_state=True)
        _, again = mixer(x[:, :0], state=states, cu_seqlens=torch.zeros(6, dtype=torch.int32), return_state=True)
    for name, empty in mixer.init_state(5).tensors().items():
        for sequence in (0, 2, 4):
            assert torch.equal(getattr(states, name)[sequence], empty[sequence])
        assert torch.equal(getattr(again, name), getattr(states, name))
