"""H3, the "hungry hungry hippo": two state-space models between multiplicative interactions.

Fu et al., "Hungry Hungry Hippos: Towards Language Modeling with State Space Models", arXiv:2212.14052, section 3.1
and algorithm 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_sizes
from mambaseq.mixers.base import Mixer, State, check_state
from mambaseq.mixers.s4d import DiagonalSSM
from mambaseq.ops import causal_conv, lti_scan, sequences
from mambaseq.ops.decoding.step import causal_conv_update_, lti_update_
from mambaseq.ops.linear import apply_linear


@dataclasses.dataclass
class H3State(State):
    """conv `(batch, d_model, shift_width - 1)` fp32: the last keys, which is the state of the shift SSM.
    ssm `(batch, d_model * head_dim, d_state)`: of the diagonal SSM, heads first, then k, then v; complex64, or
    fp32 where A is real."""

    conv: Tensor
    ssm: Tensor


class H3(Mixer):
    """H3 layer: `q · SSM_diag(SSM_shift(k) v)`, then out_proj; in heads, the product with v is an outer product.

    The shift SSM of a channel, whose state is its last inputs, is a learned causal filter (section 3.1): it runs as
    a convolution. The diagonal SSM of a head is S4D's, and shared by all `head_dim ** 2` products of the head.

    Args:
        d_model: width of the residual stream.
        d_state: states of the diagonal SSM (one half of the conjugate pairs).
        head_dim: size of a head. 1 multiplies channel by channel; the scan's work and state grow with it.
        shift_width: taps of the shift SSM's filter, the present among them. The paper takes as many as it has states;
            a few are enough to compare a token with those before it.
        init: initialisation of the diagonal SSM's A: lin, inv or legs, or, for a real A, real. None takes lin or real.
        real: a real A in the diagonal SSM instead of a complex one.
        dt_min: smallest initial step size; they are spread log-uniformly from it to dt_max.
        dt_max: largest initial step size.
        bias: biases of the linear maps.
        mode: "fft" (convolution), "scan" (recurrence), or None for the faster of the two where both can run.
    """

    companion = "mlp"

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        head_dim: int = 1,
        shift_width: int = 4,
        init: Literal["lin", "inv", "legs", "real"] | None = None,
        real: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bias: bool = True,
        mode: Literal["fft", "scan"] | None = None,
    ) -> None:
        super().__init__()
        check_sizes("h3", d_model=d_model, d_state=d_state, head_dim=head_dim, shift_width=shift_width)
        if d_model % head_dim:
            raise ConfigError(
                f"h3: d_model {d_model} is not a multiple of head_dim {head_dim}; choose one that divides."
            )
        self.d_model, self.head_dim, self.shift_width = d_model, head_dim, shift_width
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        # initial taps as PyTorch's depthwise convolutions have them
        bound = shift_width**-0.5
        self.shift = nn.Parameter(torch.empty(d_model, shift_width).uniform_(-bound, bound))
        self.ssm = DiagonalSSM(
            d_model // head_dim, d_state, init=init, real=real, dt_min=dt_min, dt_max=dt_max, mode=mode
        )
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        for module in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, state: H3State | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        q, k, v = (apply_linear(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, conv_state = causal_conv(
            k,
            self.shift,
            initial_state=None if state is None else state.conv,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
        )
        *system, D = self._system()
        y, ssm_state = lti_scan(
            self._outer(k, v),
            *system,
            D=D,
            initial_state=None if state is None else state.ssm,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
            mode=self.ssm.mode,
        )
        y = apply_linear(self.out_proj, self._read(q, y))
        return (y, H3State(conv_state, ssm_state)) if return_state else y

    def _check(self, state: H3State, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        n = sequences.count(x, cu_seqlens)
        check_state("h3", state, H3State, x.device, **{name: (n, *shape) for name, shape in self._shapes().items()})

    def _system(self) -> tuple[Tensor, ...]:
        """dt, A, B, C and D of each product of a head."""
        copies = self.head_dim**2
        parameters = (*self.ssm.system(), self.ssm.D)
        # (d_model * head_dim, ...)
        return tuple(p.repeat_interleave(copies, dim=0) for p in parameters) if copies > 1 else parameters

    def _outer(self, k: Tensor, v: Tensor) -> Tensor:
        """k, v `(..., d_model)` to every product inside of a head, `(..., d_model * head_dim)`."""
        if self.head_dim == 1:
            return k * v
        k, v = (M.unflatten(-1, (-1, self.head_dim)) for M in (k, v))  # (..., heads, head_dim)
        return (k[..., :, None] * v[..., None, :]).flatten(-3)

    def _read(self, q: Tensor, y: Tensor) -> Tensor:
        """q `(..., d_model)` with y, of the shape of `_outer`, to `(..., d_model)`: summed over the index of k."""
        if self.head_dim == 1:
            return q * y
        # (..., heads, head_dim), (..., heads, head_dim of k, head_dim of v)
        q, y = q.unflatten(-1, (-1, self.head_dim)), y.unflatten(-1, (-1, self.head_dim, self.head_dim))
        return (q[..., None] * y).sum(-2).flatten(-2)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        channels = self.d_model * self.head_dim
        return {"conv": (self.d_model, self.shift_width - 1), "ssm": (channels, self.ssm.d_state)}

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> H3State:
        """See `Mixer.init_state`."""
        device = self.shift.device if device is None else device
        shapes = self._shapes()
        return H3State(
            torch.zeros(batch_size, *shapes["conv"], dtype=dtype or torch.float32, device=device),
            torch.zeros(batch_size, *shapes["ssm"], dtype=self.ssm.state_dtype(), device=device),
        )

    @torch.no_grad()
    def step_(self, x: Tensor, state: H3State) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        q, k, v = (apply_linear(layer, x[:, 0]) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k = causal_conv_update_(state.conv, k, self.shift)
        dt, A, B, C, D = self._system()
        y = lti_update_(state.ssm, self._outer(k, v), dt, A, B, C, D=D)
        return apply_linear(self.out_proj, self._read(q, y)).unsqueeze(1)  # (batch, 1, d_model)
