"""The Mamba-1 block (S6), its ablations and its time-invariant variant.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, algorithm 2, section
3.4 and, for the ablations, 4.6. Parameter names and shapes are those of the published checkpoints
(`state-spaces/mamba-*`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_not_negative, check_sizes
from mambaseq.mixers.base import Mixer, State, check_backend, check_state
from mambaseq.mixers.initialisation import AInit, constant_B, constant_C, initial_A_parts, initial_dt_bias
from mambaseq.mixers.norm import RMSNorm
from mambaseq.mixers.s4d import DiagonalSSM
from mambaseq.ops import sequences
from mambaseq.ops.blocks.lti import LtiBlockArguments, lti_block
from mambaseq.ops.blocks.lti import why_not as why_not_whole_lti
from mambaseq.ops.blocks.mamba import BlockArguments, mamba_block
from mambaseq.ops.blocks.mamba import why_not as why_not_whole
from mambaseq.ops.decoding import block, layer, layer_rows, rows
from mambaseq.ops.decoding.block import BlockWeights, block_positions, block_step_, can_run_positions, can_step
from mambaseq.ops.decoding.step import causal_conv_update_, selective_state_update_
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.linear import apply_linear, is_plain
from mambaseq.parallel import blocks, ends
from mambaseq.parallel.recurrences import causal_conv, selective_scan


@dataclasses.dataclass
class MambaState(State):
    """conv `(batch, d_inner, d_conv - 1)`: the last inputs of the convolution, oldest first, fp32.
    ssm `(batch, d_inner, d_state)`: fp32, or complex64 where A is complex."""

    accumulated: ClassVar[tuple[str, ...]] = ("ssm",)

    conv: Tensor
    ssm: Tensor


_OUTER_LAYERS = ("in_proj", "conv1d", "out_proj")
_LAYERS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


class BiaslessLinear(nn.Linear):
    """A linear map whose bias is added elsewhere (in fp32, inside of the scan). Stays a module call, so that
    adapters wrapped around it are not bypassed."""

    adds_bias = False

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class Mamba(Mixer):
    """Mamba block: in_proj, causal convolution, selective scan, gate, out_proj.

    Args:
        d_model: width of the residual stream.
        d_state: states a channel (N).
        d_conv: width of the causal convolution.
        expand: d_inner = expand * d_model.
        dt_rank: rank of the projection to dt; "auto" is ceil(d_model / 16).
        dt_min: smallest initial step size: softplus(dt_bias) is log-uniform in [dt_min, dt_max] at initialisation.
        dt_max: largest initial step size.
        dt_init_floor: no initial dt is below it.
        conv_bias: a bias in the convolution.
        bias: biases in in_proj and out_proj.
        selective_dt: dt depends on the input (Table 7); if not, it is softplus(dt_bias), a constant a channel.
        selective_B: B depends on the input; if not, it is a learned `(d_inner, d_state)`, 1 at initialisation, as in
            S4D (algorithm 1).
        selective_C: C depends on the input; if not, it is a learned `(d_inner, d_state)`, standard normal at
            initialisation.
        selective_norm_eps: divide dt's factor before dt_proj, B and C, where they depend on the input, by their root
            mean square, with this epsilon and without weights (Falcon Mamba, arXiv:2410.05355, section 3.1); None for
            not.
        complex: complex A, and B and C read as pairs of real and imaginary part (Table 8). The d_state states a
            channel are one half of conjugate pairs, so twice as many real numbers.
        A_init: initial A: s4d-real -(n + 1), constant -1/2, random -exp(N(0, 1)), or s4d-lin -1/2 + n i, which goes
            with `complex: true`. None takes s4d-real, or s4d-lin for a complex A.
        lti: make dt, B and C independent of the input (time-invariant: the paper's audio ablation, section 4.4.2).
        lti_init: the S4D initialisation of A with `lti: true`: lin, inv or legs, or, for a real A, real. None takes lin
            or real.
        lti_complex: a complex A with `lti: true`.
        backend: what runs the scan; None for the fastest that can (see `mambaseq doctor`).
    """

    sums_up = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        selective_dt: bool = True,
        selective_B: bool = True,
        selective_C: bool = True,
        selective_norm_eps: float | None = None,
        complex: bool = False,
        A_init: AInit | None = None,
        lti: bool = False,
        lti_init: Literal["lin", "inv", "legs", "real"] | None = None,
        lti_complex: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes("mamba", d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        if dt_rank != "auto" and dt_rank < 1:
            raise ConfigError(f'mamba: dt_rank must be positive or "auto", not {dt_rank}.')
        check_backend("mamba", "selective_scan", backend)
        all_selective = selective_dt and selective_B and selective_C
        if lti and not (all_selective and not complex and A_init is None and selective_norm_eps is None):
            raise ConfigError(
                "mamba: lti: true makes all of dt, B and C constant and has lti_init and lti_complex; leave out "
                "selective_dt, selective_B, selective_C, selective_norm_eps, complex and A_init."
            )
        if selective_norm_eps is not None:
            check_not_negative("mamba", selective_norm_eps=selective_norm_eps)
        self.selective_norm_eps = selective_norm_eps
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.lti, self.complex, self.backend = lti, complex, backend
        # what the kernels of a whole block compute, and those of a step
        self._is_whole = all_selective and not lti and selective_norm_eps is None
        self._is_published = self._is_whole and not complex
        numbers = 2 * d_state if complex else d_state
        widths = {"dt": (selective_dt, self.dt_rank), "B": (selective_B, numbers), "C": (selective_C, numbers)}
        self._widths = {name: width for name, (selective, width) in widths.items() if selective}  # of x_proj's output
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        if lti:
            self.ssm = DiagonalSSM(
                self.d_inner, d_state, init=lti_init, real=not lti_complex, dt_min=dt_min, dt_max=dt_max
            )
        else:
            self._make_selective(A_init, (dt_min, dt_max, dt_init_floor))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        for module in (self.in_proj, self.out_proj):
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _make_selective(self, A_init: AInit | None, dt_range: tuple[float, float, float]) -> None:
        if self._widths:
            self.x_proj = nn.Linear(self.d_inner, sum(self._widths.values()), bias=False)
        if "dt" in self._widths:
            self.dt_proj = BiaslessLinear(self.dt_rank, self.d_inner, bias=True)
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            with torch.no_grad():
                self.dt_proj.bias.copy_(initial_dt_bias(self.d_inner, *dt_range))
        else:
            self.dt_bias = nn.Parameter(initial_dt_bias(self.d_inner, *dt_range))
        A_log, A_imag = initial_A_parts(A_init, self.d_inner, self.d_state, self.complex)
        self.A_log = nn.Parameter(A_log)
        if A_imag is not None:
            self.A_imag = nn.Parameter(A_imag)
        if "B" not in self._widths:
            self.B = nn.Parameter(constant_B(self.d_inner, self.d_state, self.complex))
        if "C" not in self._widths:
            self.C = nn.Parameter(constant_C(self.d_inner, self.d_state, self.complex))
        self.D = nn.Parameter(torch.ones(self.d_inner))

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        if x.is_cuda and self._is_whole and self._has_plain(_LAYERS) and self.backend in (None, "cuda"):
            whole = self._block_arguments(x, state, cu_seqlens, return_state)
            if (split := ends.current()) is None and why_not_whole(whole) is None:
                y, *new = mamba_block(whole)
                return (y, MambaState(*new)) if return_state else y
            if split is not None and blocks.why_not(whole, split) is None:
                y, *new = blocks.mamba_block(whole, split)
                return (y, MambaState(*new)) if return_state else y
        if (
            x.is_cuda
            and ends.current() is None
            and self.lti
            and self.backend in (None, "cuda")
            and self._has_plain(_OUTER_LAYERS)
        ):
            whole_lti = self._lti_block_arguments(x, state, cu_seqlens, return_state)
            if why_not_whole_lti(whole_lti) is None:
                y, *new = lti_block(whole_lti)
                return (y, MambaState(*new)) if return_state else y
        x, z = apply_linear(self.in_proj, x).chunk(2, dim=-1)
        x, conv_state = causal_conv(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state.conv,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
        )
        initial = None if state is None else state.ssm
        if self.lti:
            y, ssm_state = self.ssm(x, z=z, state=initial, cu_seqlens=cu_seqlens, return_state=return_state)
        else:
            dt, B, C = self._selective(x)
            y, ssm_state = selective_scan(
                x,
                dt,
                self._A(),
                B,
                C,
                D=self.D,
                z=z,
                dt_bias=self._dt_bias(),
                dt_softplus=True,
                initial_state=initial,
                return_final_state=return_state,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
            )
        y = apply_linear(self.out_proj, y)
        return (y, MambaState(conv_state, ssm_state)) if return_state else y

    def _check(self, state: MambaState, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        n = sequences.count(x, cu_seqlens)
        shapes = {"conv": (n, self.d_inner, self.d_conv - 1), "ssm": (n, self.d_inner, self.d_state)}
        check_state("mamba", state, MambaState, x.device, **shapes)

    def _is_plain(self) -> bool:
        """Whether kernels may do what the layers would: none is wrapped, hooked or quantised."""
        return self._is_published and self._has_plain(_LAYERS)

    def _has_plain(self, layers: tuple[str, ...]) -> bool:
        return all(is_plain(self._modules[name]) for name in layers)  # type: ignore[arg-type]

    def _block_arguments(
        self, x: Tensor, state: MambaState | None, cu_seqlens: Tensor | None, wants_state: bool
    ) -> BlockArguments:
        """Computed in autocast's dtype where it is on, as the linear layers by themselves would be."""
        return BlockArguments(
            _in_autocast(x),
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
            self.out_proj.weight,
            self.out_proj.bias,
            None if state is None else state.conv,
            None if state is None else state.ssm,
            self.A_imag if self.complex else None,
            cu_seqlens,
            wants_state,
        )

    def _lti_block_arguments(
        self, x: Tensor, state: MambaState | None, cu_seqlens: Tensor | None, wants_state: bool
    ) -> LtiBlockArguments:
        """See `_block_arguments`."""
        decay, B, C = self.ssm.discrete()
        return LtiBlockArguments(
            _in_autocast(x),
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight,
            self.conv1d.bias,
            decay,
            B,
            C,
            self.ssm.D,
            self.out_proj.weight,
            self.out_proj.bias,
            None if state is None else state.conv,
            None if state is None else state.ssm,
            cu_seqlens,
            wants_state,
        )

    def _A(self) -> Tensor:
        A = -torch.exp(self.A_log.float())
        return torch.complex(A, self.A_imag.float()) if self.complex else A

    def _dt_bias(self) -> Tensor:
        return self.dt_proj.bias if "dt" in self._widths else self.dt_bias

    def _selective(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt, the shape of x; B and C `(..., d_state)`, or `(d_inner, d_state)` where they do not depend on x."""
        made: dict[str, Tensor] = {}
        if self._widths:
            products = apply_linear(self.x_proj, x).split(list(self._widths.values()), dim=-1)
            if (eps := self.selective_norm_eps) is not None:
                products = [F.rms_norm(one.to(working_dtype(one)), one.shape[-1:], eps=eps).to(one) for one in products]
            made = dict(zip(self._widths, products, strict=True))
        dt = apply_linear(self.dt_proj, made["dt"]) if "dt" in made else torch.zeros_like(x)
        B, C = (made[name] if name in made else getattr(self, name) for name in ("B", "C"))
        if self.complex:  # neighbours are the real and imaginary part of a state
            real = working_dtype(x)
            B, C = (torch.complex(M[..., ::2].to(real), M[..., 1::2].to(real)) for M in (B, C))
        return dt, B, C

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MambaState:
        """See `Mixer.init_state`."""
        device = self.in_proj.weight.device if device is None else device
        ssm_dtype = self.ssm.state_dtype() if self.lti else torch.complex64 if self.complex else torch.float32
        return MambaState(
            torch.zeros(batch_size, self.d_inner, self.d_conv - 1, dtype=dtype or torch.float32, device=device),
            torch.zeros(batch_size, self.d_inner, self.d_state, dtype=ssm_dtype, device=device),
        )

    @torch.no_grad()
    def step_(self, x: Tensor, state: MambaState) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        if self._is_plain():
            weights = self._weights()
            if can_step(x[:, 0], state.conv, state.ssm, weights):
                return block_step_(x[:, 0], state.conv, state.ssm, weights).unsqueeze(1)  # (batch, 1, d_model)
        inner = apply_linear(self.in_proj, x[:, 0])
        if inner.is_cuda and self._is_plain() and rows.can_step_rows(inner, state.conv, state.ssm, self._weights()):
            y = rows.step_rows_(inner, state.conv, state.ssm, self._weights())
            return apply_linear(self.out_proj, y).unsqueeze(1)  # (batch, 1, d_model)
        x, z = inner.chunk(2, dim=-1)
        x = causal_conv_update_(state.conv, x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        if self.lti:
            y = self.ssm.step_(x, state.ssm, z)
        else:
            dt, B, C = self._selective(x)
            # a constant matrix has a row for each channel, as if it were a group of its own
            constant = (len(x), self.d_inner, self.d_state)
            y = selective_state_update_(
                state.ssm,
                x,
                dt,
                self._A() if self.complex else self.A_log,
                B if "B" in self._widths else B.expand(constant),  # constant: (batch, d_inner, d_state)
                C if "C" in self._widths else C.expand(constant),
                D=self.D,
                z=z,
                dt_bias=self._dt_bias(),
                dt_softplus=True,
                A_is_log=not self.complex,
            )
        return apply_linear(self.out_proj, y).unsqueeze(1)  # (batch, 1, d_model)

    def can_step_layer(self, residual: Tensor, norm: RMSNorm, state: MambaState) -> bool:
        """See `Mixer.can_step_layer`."""
        if self._has_own_step() or type(state) is not MambaState or not self._is_plain():
            return False
        given = residual, layer.LayerNorm(norm.weight, norm.eps or 0.0), state.conv, state.ssm, self._weights()
        return layer.can_step(*given) or layer_rows.can_step(*given)

    def layer_step_(self, residual: Tensor, norm: RMSNorm, state: MambaState) -> Tensor:
        """See `Mixer.layer_step_`."""
        self._check(state, residual)
        given = layer.LayerNorm(norm.weight, norm.eps or 0.0)
        step = layer.mamba_step_ if len(residual) == 1 else layer_rows.step_
        return step(residual, given, state.conv, state.ssm, self._weights())

    def cpu_layer(self, stream: Tensor, norm: RMSNorm, state: MambaState) -> block.Layer | None:
        """See `Mixer.cpu_layer`."""
        if self._has_own_step() or not self._is_plain():
            return None
        self._check(state, stream)
        found = block.Layer(norm.weight, norm.eps or 0.0, self._weights(), state.conv, state.ssm)
        return found if block.can_step_layer(stream, found) else None

    def _has_own_step(self) -> bool:
        return "step_" in vars(self) or type(self).step_ is not Mamba.step_

    @torch.no_grad()
    def positions(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState] | None:
        """See `Mixer.positions`."""
        self._check(state, x)
        if not self._is_plain():
            return None
        weights = self._weights()
        if not can_run_positions(x[0], state.conv, state.ssm, weights):
            return None
        y, *states = block_positions(x[0], state.conv, state.ssm, weights)
        return y[None], MambaState(*states)

    def _weights(self) -> BlockWeights:
        # by nn.Module's own tables: a token asks for all of them in every layer, which `is_plain` has looked at
        modules: Any = self._modules
        in_proj, conv, x_proj, dt_proj, out_proj = (modules[name]._parameters for name in _LAYERS)
        return BlockWeights(
            in_proj["weight"],
            in_proj["bias"],
            conv["weight"],
            conv["bias"],
            x_proj["weight"],
            dt_proj["weight"],
            dt_proj["bias"],
            self.A_log,
            self.D,
            out_proj["weight"],
            out_proj["bias"],
        )


def _in_autocast(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else x
