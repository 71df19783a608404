"""H3: algorithm 1 in a loop, heads included, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambaseq.errors import ConfigError
from mambaseq.mixers.h3 import H3


def algorithm_1(mixer: H3, x: torch.Tensor) -> torch.Tensor:
    """Shift and diagonal SSM as recurrences of state matrices, one head after another."""
    p = dict(mixer.named_parameters())
    q, k, v = (x @ p[f"{name}_proj.weight"].T + p[f"{name}_proj.bias"] for name in "qkv")
    # the shift SSM: its state matrix moves every entry on by one, its input enters first, C reads all of it
    width = mixer.shift_width
    A = torch.diag(torch.ones(width - 1, dtype=x.dtype), -1)
    B, C = F.one_hot(torch.tensor(0), width).to(x.dtype), p["shift"].flip(1)
    h, shifted = torch.zeros(*x.shape[::2], width, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = h @ A.T + k[:, t, :, None] * B
        shifted.append((h * C).sum(-1))
    k = torch.stack(shifted, 1)

    dt, size, outputs = p["ssm.log_dt"].exp(), mixer.head_dim, []
    A = torch.complex(-p["ssm.A_log_real"].exp(), p["ssm.A_imag"])
    C = torch.view_as_complex(p["ssm.C"])
    for head in range(x.shape[2] // size):
        here = slice(head * size, (head + 1) * size)
        decay = torch.exp(dt[head] * A[head])
        enter = (decay - 1) / A[head] * p["ssm.B"][head]  # zero-order hold
        h, ys = torch.zeros(len(x), size, size, A.shape[1], dtype=A.dtype), []
        for t in range(x.shape[1]):
            kv = torch.einsum("bi,bj->bij", k[:, t, here], v[:, t, here])
            h = decay * h + enter * kv[..., None]
            y = 2 * (h * C[head]).sum(-1).real + p["ssm.D"][head] * kv
            ys.append(torch.einsum("bi,bij->bj", q[:, t, here], y))
        outputs.append(torch.stack(ys, 1))
    return torch.cat(outputs, -1) @ p["out_proj.weight"].T + p["out_proj.bias"]


@pytest.mark.parametrize("options", [{"d_state": 4}, {"d_state": 4, "head_dim": 3, "shift_width": 5}])
def test_equals_algorithm_1_in_a_loop(options: dict) -> None:
    torch.manual_seed(0)
    mixer = H3(6, **options).double()
    x = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    inputs, weight = [x, *mixer.parameters()], torch.randn_like(x)
    found, expected = mixer(x), algorithm_1(mixer, x)
    # the system is computed in fp32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head_dim": 5}, "multiple of head_dim 5"),
        ({"shift_width": 0}, "positive"),
        ({"dt_min": 1.0}, "dt_min"),
        ({"init": "real"}, "init 'real' needs a real A"),
        ({"init": "legs", "real": True}, "A real A needs init 'real', not 'legs'"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        H3(6, **options)
