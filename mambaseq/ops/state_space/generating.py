"""The kernel of a diagonal plus low-rank system by its generating function (S4, arXiv:2111.00396).

    sum_l K_l z^l = C (1 - Abar z)^-1 Bbar        (algorithm 1 there)

is for bilinear Abar a sum over states that is linear in their number (a Cauchy kernel and Woodbury's identity), and
values of it on a circle give K by the inverse Fourier transform. S4 takes the unit circle, where the sum must be cut
off at the length, for which C becomes C (1 - Abar^L). Here the circle is a smaller one: what comes after the cut is
shrunk below notice, C stays what it is, and no power of Abar is needed. Float64 has the digits that this costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# What is left, on the circle, of a term that wraps around; its root is what rounding grows by.
_WRAPPED = 1e-10
# Complex numbers held at once.
_ELEMENTS = 2**24


def dplr_kernel(dt: Tensor, diagonal: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """K `(channels, length)` float64 of h' = A h + B x, y = C h with A = diag(diagonal) - P P^*, by the bilinear rule.

    Args:
        dt: `(channels,)` float64.
        diagonal, P, B, C: `(channels, d_state)` complex128, one half of the conjugate pairs.
        length: how much of the kernel.
    """
    channels, d_state = diagonal.shape
    # v / (w - s diagonal) and its conjugate pair together are 2 (Re(v) w - Re(v diagonal^*) s) / |w - s diagonal|^2,
    # where |.|^2 is a polynomial of complex w and s with real coefficients
    values = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], 1)  # (channels, 4, d_state)
    weights = 2 * torch.cat([values.real, (values * diagonal.conj()[:, None]).real], 1)  # (channels, 8, d_state)
    size = 2 * length
    radius = math.exp(math.log(_WRAPPED) / size)
    angle = torch.arange(length + 1, device=dt.device, dtype=torch.float64) * (-2 * math.pi / size)
    nodes = torch.polar(torch.full_like(angle, radius), angle)
    room = max(1, _ELEMENTS // (channels * d_state))
    # a piece's sums over states are made again in the backward pass, rather than kept. No random numbers: their state
    # could not be read while a CUDA graph is captured.
    pieces = [
        checkpoint(_values, part, dt, diagonal, weights, use_reentrant=False, preserve_rng_state=False)
        for part in (nodes.split(room) if length else ())
    ]
    if not pieces:
        return dt.new_zeros(channels, 0)
    kernel = torch.fft.irfft(torch.cat(pieces, 1), size)[:, :length]
    return kernel * radius ** -torch.arange(length, device=dt.device, dtype=torch.float64)


def _values(nodes: Tensor, dt: Tensor, diagonal: Tensor, weights: Tensor) -> Tensor:
    """The generating function at nodes `(nodes,)`: `(channels, nodes)`."""
    w, s = 1 - nodes, (dt / 2)[:, None] * (1 + nodes)  # (nodes,), (channels, nodes)
    absolute = diagonal.real.square() + diagonal.imag.square()
    poles = w.square() - 2 * diagonal.real[..., None] * (w * s)[:, None] + absolute[..., None] * s.square()[:, None]
    poles = poles.reciprocal()  # (channels, d_state, nodes)
    sums = torch.complex(weights @ poles.real, weights @ poles.imag)
    cb, cp, pb, pp = (w[None, None] * sums[:, :4] - s[:, None] * sums[:, 4:]).unbind(1)  # each (channels, nodes)
    return dt[:, None] * (cb - s * cp * pb / (1 + s * pp))
