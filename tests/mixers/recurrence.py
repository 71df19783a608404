"""What the tests of time-invariant mixers share: the textbook's recurrence, one step after the other, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(Abar: Tensor, Bbar: Tensor, C: Tensor, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = Abar h_{t-1} + Bbar x_t, y_t = C h_t for each channel: Abar `(channels, n, n)`, Bbar `(channels, n)`,
    C `(channels, outputs, n)`, x `(batch, length, channels)`; y `(batch, length, channels, outputs)` and the last h."""
    if h is None:
        h = Abar.new_zeros(x.shape[0], *Bbar.shape)
    ys = []
    for t in range(x.shape[1]):
        h = torch.einsum("cnk,bck->bcn", Abar, h) + Bbar * x[:, t, :, None]
        ys.append(torch.einsum("cmn,bcn->bcm", C, h))
    return torch.stack(ys, 1), h


def bilinear(A: Tensor, B: Tensor, dt: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """The generalised bilinear rule with steps dt `(channels,)` of A `(channels, n, n)` and B `(channels, n)`."""
    one = torch.eye(A.shape[-1], dtype=A.dtype)
    dt = dt[:, None, None]
    inverse = torch.linalg.inv(one - alpha * dt * A)
    return inverse @ (one + (1 - alpha) * dt * A), (inverse @ (dt * B[..., None]))[..., 0]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative RMS errors."""
    for one, other in zip(actual, expected, strict=True):
        error = (one - other).detach().norm() / other.detach().norm()
        assert error <= tolerance, float(error)
