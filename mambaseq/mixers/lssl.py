"""Linear state-space layers (LSSL): systems whose matrix is a full one.

Gu, Johnson, Goel, Saab, Dao, Rudra and Re, "Combining Recurrent, Convolutional, and Continuous-time Models with
Linear State-Space Layers", arXiv:2110.13985.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_sizes
from mambaseq.mixers.hippo import Measure, constant, keep_constant, transition
from mambaseq.mixers.initialisation import log_uniform_dt
from mambaseq.mixers.lti_layer import LTILayer
from mambaseq.ops import state_space_scan
from mambaseq.ops.dtypes import without_autocast, working_dtype


class FullSSM(nn.Module):
    """h' = A h + B x, y = C h + D x on each channel, discretised by the generalised bilinear rule; see `LSSL`.

    Abar = (1 - alpha dt A)^-1 (1 + (1 - alpha) dt A)      Bbar = (1 - alpha dt A)^-1 dt B          (eq. 3)
    """

    stays_float32 = True

    def __init__(
        self,
        channels: int,
        d_state: int,
        outputs: int,
        measure: Measure,
        trainable_A: bool,
        alpha: float,
        dt_min: float,
        dt_max: float,
    ) -> None:
        super().__init__()
        self.channels, self.d_state, self.trainable_A, self.alpha = channels, d_state, trainable_A, alpha
        A, B = transition(measure, d_state)
        self.triangular = not trainable_A and measure == "legs"  # its A is zero above the diagonal
        if trainable_A:
            self.A, self.B = nn.Parameter(A.float()), nn.Parameter(B.float())
        else:
            keep_constant(self, A=A, B=B)
        self.log_dt = nn.Parameter(log_uniform_dt(channels, dt_min, dt_max))
        self.C = nn.Parameter(torch.randn(channels, outputs, d_state))
        self.D = nn.Parameter(torch.ones(channels, outputs))

    def _system(self) -> tuple[Tensor, Tensor]:
        """Abar - 1 `(channels, d_state, d_state)` and Bbar `(channels, d_state)`, float64."""
        if self.trainable_A:
            A, B = self.A.double(), self.B.double()
        else:
            A, B = constant(self, "A"), constant(self, "B")
        dt = self.log_dt.double().exp()[:, None, None]  # (channels, 1, 1)
        one = torch.eye(self.d_state, dtype=A.dtype, device=A.device)
        # both at once; no check, for which the host would wait
        # (channels, d_state, d_state), (channels, d_state, d_state + 1)
        matrix, right = one - self.alpha * dt * A, dt * torch.cat([A, B[:, None]], 1)
        if self.triangular:  # HiPPO-LegS; what the others take cannot be captured in a CUDA graph
            solved = torch.linalg.solve_triangular(matrix, right, upper=False)
        else:
            solved, _ = torch.linalg.solve_ex(matrix, right)
        return solved[..., :-1], solved[..., -1]

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x `(batch, length, channels)` to y `(batch, length, channels, outputs)`, and the state
        `(sequences, channels, d_state)`, made if `return_state`."""
        change, B = self._system()
        one = torch.eye(self.d_state, dtype=change.dtype, device=change.device)
        u = x.to(working_dtype(x))
        y, final = state_space_scan(
            u, one + change, B, self.C, initial_state=state, return_final_state=return_state, cu_seqlens=cu_seqlens
        )
        return (y + self.D * u[..., None]).to(x.dtype), final

    def step_(self, x: Tensor, state: Tensor) -> Tensor:
        """x `(batch, channels)`; changes state `(batch, channels, d_state)` in place."""
        change, B = (value.to(state.dtype) for value in self._system())
        u = x.to(state.dtype)[..., None]  # (batch, channels, 1)
        with without_autocast(x.device.type):
            # (Abar - 1) h, for h's digits where Abar is near 1
            state.add_((change @ state[..., None])[..., 0] + B * u)  # (batch, channels, d_state)
            y = (self.C.to(state.dtype) @ state[..., None])[..., 0]  # (batch, channels, outputs)
        return (y + self.D * u).to(x.dtype)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.channels, self.d_state

    def state_dtype(self) -> torch.dtype:
        return torch.float32


class LSSL(LTILayer):
    """Linear state-space layer: one full matrix A for all channels, whose step sizes differ; GELU, and a linear output.

    A step of generation solves a linear system a channel, d_state^3 operations: take S4 to generate with many states.

    Args:
        d_model: width of the residual stream; one system a channel.
        d_state: states a channel.
        outputs: outputs of each system (M in the paper), all of which the linear output reads.
        measure: HiPPO matrix that A and B are at initialisation: legs (all of the past) or legt (a window of 1 / dt).
        trainable_A: train A and B, rather than keep them.
        alpha: of the generalised bilinear rule: 0.5 the bilinear, 1 the backward Euler rule.
        dt_min: smallest initial step size; they are spread log-uniformly from it to dt_max.
        dt_max: largest initial step size.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 32,
        outputs: int = 1,
        measure: Measure = "legs",
        trainable_A: bool = False,
        alpha: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ) -> None:
        check_sizes("lssl", d_model=d_model, d_state=d_state, outputs=outputs)
        if not 0.5 <= alpha <= 1:
            raise ConfigError(f"lssl: alpha must be from 0.5 to 1, where no step size is unstable, not {alpha}.")
        ssm = FullSSM(d_model, d_state, outputs, measure, trainable_A, alpha, dt_min, dt_max)
        super().__init__("lssl", d_model, ssm)

    def _make_output(self) -> nn.Linear:
        return nn.Linear(self.d_model * self.ssm.C.shape[1], self.d_model)

    def _output(self, y: Tensor) -> Tensor:
        return self.out_proj(F.gelu(y.flatten(-2)))  # from (…, channels * outputs)
