"""Simplified state spaces (S5): one diagonal system that all channels write to and read from.

Smith, Warrington and Linderman, "Simplified State Space Layers for Sequence Modeling", arXiv:2208.04933.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_sizes
from mambaseq.mixers.hippo import legs_normal
from mambaseq.mixers.initialisation import log_uniform_dt
from mambaseq.mixers.lti_layer import LTILayer
from mambaseq.ops import state_space_scan
from mambaseq.ops.dtypes import without_autocast, working_dtype


class DiagonalMIMO(nn.Module):
    """h' = diag(A) h + B x, y = 2 Re(C h) + D x by zero-order hold, each state with its own step size; see `S5`."""

    stays_float32 = True

    def __init__(self, channels: int, d_state: int, blocks: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.channels, self.d_state = channels, d_state
        A, vectors = legs_normal(2 * d_state // blocks)
        order = 2 * d_state
        B = torch.randn(order, channels, dtype=torch.float64) * channels**-0.5
        C = torch.randn(channels, order, dtype=torch.float64) * order**-0.5
        V = torch.block_diag(*[vectors] * blocks)  # (order, d_state)
        self.log_dt = nn.Parameter(log_uniform_dt(d_state, dt_min, dt_max))
        self.A_log_real = nn.Parameter((-A.real).log().float().repeat(blocks))  # (d_state,)
        self.A_imag = nn.Parameter(A.imag.float().repeat(blocks))  # (d_state,)
        self.B = nn.Parameter(torch.view_as_real(V.mH @ B.to(V.dtype)).float())  # (d_state, channels, 2)
        self.C = nn.Parameter(torch.view_as_real(C.to(V.dtype) @ V).float())  # (channels, d_state, 2)
        self.D = nn.Parameter(torch.randn(channels))

    def _system(self) -> tuple[Tensor, Tensor]:
        """Abar - 1 and Bbar / B, `(d_state,)` complex128."""
        A = torch.complex(-torch.exp(self.A_log_real.double()), self.A_imag.double())
        change = torch.expm1(self.log_dt.double().exp() * A)
        return change, change / A

    def _write(self, x: Tensor, gain: Tensor) -> Tensor:
        """Bbar x: `(…, channels)` → `(…, d_state)` complex."""
        B = gain[:, None] * torch.view_as_complex(self.B.double())  # (d_state, channels)
        weight = torch.view_as_real(B).to(x.dtype)  # (d_state, channels, 2)
        return torch.view_as_complex((x @ weight.permute(1, 0, 2).flatten(1)).unflatten(-1, (-1, 2)))

    def _read(self, h: Tensor, x: Tensor) -> Tensor:
        """2 Re(C h) + D x: `(…, d_state)` → `(…, channels)`."""
        C = torch.view_as_complex(self.C.to(x.dtype)).conj()
        return torch.view_as_real(h).flatten(-2) @ (2 * torch.view_as_real(C.resolve_conj())).flatten(1).mT + self.D * x

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x `(batch, length, channels)` to y, and the state `(sequences, d_state)`, made if `return_state`."""
        change, gain = self._system()
        one = torch.ones_like(change)[:, None]  # (d_state, 1)
        # what writes to the states and reads from them is kept in full precision, as they are
        with without_autocast(x.device.type):
            u = x.to(working_dtype(x))
            h, final = state_space_scan(
                self._write(u, gain),
                (1 + change)[:, None, None],  # (d_state, 1, 1)
                one,
                one[..., None],  # (d_state, 1, 1)
                initial_state=None if state is None else state[..., None],  # (sequences, d_state, 1)
                return_final_state=return_state,
                cu_seqlens=cu_seqlens,
            )
            y = self._read(h[..., 0], u).to(x.dtype)
        return y, final[..., 0] if return_state else final

    def step_(self, x: Tensor, state: Tensor) -> Tensor:
        """x `(batch, channels)`; changes state `(batch, d_state)` in place."""
        change, gain = self._system()
        u = x.to(state.real.dtype)
        with without_autocast(x.device.type):
            # (Abar - 1) h, for h's digits where Abar is near 1
            state.add_(change.to(state.dtype) * state + self._write(u, gain))
            return self._read(state, u).to(x.dtype)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.d_state,)

    def state_dtype(self) -> torch.dtype:
        return torch.complex64


class S5(LTILayer):
    """S5 layer: one diagonal system of many inputs and outputs, GELU, and a gated linear output ("full GLU").

    Args:
        d_model: width of the residual stream.
        d_state: states of the layer, shared by all channels; one half of the conjugate pairs.
        blocks: how many times the normal part of HiPPO-LegS, of 2 d_state / blocks states, is in A at initialisation.
        dt_min: smallest initial step size, one a state; they are spread log-uniformly from it to dt_max.
        dt_max: largest initial step size.
    """

    def __init__(
        self, d_model: int, d_state: int = 64, blocks: int = 4, dt_min: float = 1e-3, dt_max: float = 0.1
    ) -> None:
        check_sizes("s5", d_model=d_model, d_state=d_state, blocks=blocks)
        if d_state % blocks:
            raise ConfigError(f"s5: blocks must divide d_state, and {blocks} does not divide {d_state}.")
        super().__init__("s5", d_model, DiagonalMIMO(d_model, d_state, blocks, dt_min, dt_max))
