"""HiPPO's matrices: linear systems whose state holds the coefficients of their input's history in a basis.

Gu, Dao, Ermon, Rudra and Re, "HiPPO: Recurrent Memory with Optimal Polynomial Projections", arXiv:2008.07669.
All in orthonormal bases, where no state grows: A + A^T is negative semidefinite.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mambaseq.errors import ConfigError, shown
from mambaseq.limits import STATE

Measure = Literal["legs", "legt"]


def transition(measure: Measure, order: int) -> tuple[Tensor, Tensor]:
    """A `(order, order)` and B `(order,)` of h' = A h + B x, float64.

    legs: Legendre polynomials of the logarithm of age (in a system that does not change with time), arXiv:2008.07669,
    eq. 3 without its 1/t. legt: those of a sliding window of length 1, appendix D.2. Raises ConfigError for others,
    UserError for an order above `limits.STATE`.
    """
    STATE.check(order, "The mixer's d_state")
    n = torch.arange(order, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    scale = root[:, None] * root  # (order, order)
    if measure == "legs":
        return -(scale.tril(-1) + torch.diag(n + 1)), root
    if measure == "legt":
        alternating = 1 - 2 * ((n[:, None] - n) % 2)  # (order, order)
        return -(scale.tril() + (scale * alternating).triu(1)), root
    raise ConfigError(f"The measure is legs or legt, not {shown(measure)}.")


def legs_normal(order: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues `(order / 2,)` and orthonormal eigenvectors `(order, order / 2)` of the normal part of HiPPO-LegS,
    A + P P^T with P = sqrt(n + 1/2) (arXiv:2111.00396, theorem 1): complex128, those of positive imaginary part.

    The others are their conjugates, so that a real h is 2 Re(V z) with z = V^* h.
    """
    A, root = transition("legs", order)
    skew = A + root[:, None] * root / 2  # (order, order)
    skew.diagonal().zero_()  # -1/2, which the eigenvalues get back
    imag, vectors = torch.linalg.eigh(skew * -1j)
    return torch.complex(torch.full_like(imag, -0.5), imag)[order // 2 :], vectors[:, order // 2 :]


def keep_constant(module: nn.Module, **values: Tensor) -> None:
    """Give a module float64 constants, read by `constant`, that follow its device but not its dtype.

    They are kept as integers of the same bits, which `module.to(torch.bfloat16)` does not round, and are not saved.
    """
    for name, value in values.items():
        module.register_buffer(name, value.double().contiguous().view(torch.int64), persistent=False)


def constant(module: nn.Module, name: str) -> Tensor:
    """A constant given by `keep_constant`."""
    return getattr(module, name).view(torch.float64)
