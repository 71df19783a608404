"""The time mixing of RWKV-4.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048, section 3.1 and appendix E.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from mambaseq.mixers.base import Mixer, State, check_state
from mambaseq.ops import causal_conv, sequences, wkv
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.wkv import empty_state, wkv_update_

# The layer's place in the stack, from 0 to 1: the published initialisation depends on it, but a mixer does not know it.
_DEPTH = 0.5


@dataclasses.dataclass
class RWKV4State(State):
    """shift `(batch, d_model, 1)` fp32: the last input.
    wkv `(batch, 3, d_model)` fp32: numerator, denominator and the largest exponent in them (see `mambaseq.ops.wkv`)."""

    shift: Tensor
    wkv: Tensor


class RWKV4(Mixer):
    """RWKV-4's time mixing: r, k and v of a mixture of this input and the last, an average of the values of the past
    weighted by exp(k) and a decay a channel, a sigmoid gate, out_proj (eq. 11 to 18).

    Initial decays, bonuses and mixtures are those published for a layer in the middle of the stack; linear maps have
    PyTorch's initial values, not zeros, since this layer stands alone.

    Args:
        d_model: width of the residual stream.
    """

    companion = "mlp"

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        channel = torch.arange(d_model, dtype=torch.float64)
        mix = (channel / d_model) ** (1 - _DEPTH)  # share of the present input
        self.time_mix_r = nn.Parameter(mix.sqrt().float())
        self.time_mix_k = nn.Parameter(mix.float())
        self.time_mix_v = nn.Parameter((mix + 0.3 * _DEPTH).float())
        # log of the decay: from a memory of 150 positions in the first channel to none in the last
        spread = (channel / max(d_model - 1, 1)) ** (0.7 + 1.3 * _DEPTH)
        self.time_decay = nn.Parameter((8 * spread - 5).float())
        zigzag = (channel + 1) % 3 - 1
        self.time_first = nn.Parameter((math.log(0.3) + 0.5 * zigzag).float())
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RWKV4State | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        last = None if state is None else state.shift

        def shifted(mix: Tensor, wanted: bool = False) -> tuple[Tensor, Tensor]:
            """mix x_t + (1 - mix) x_{t-1}, a causal filter of two taps a channel."""
            taps = torch.stack([1 - mix, mix], dim=1)  # (d_model, 2)
            return causal_conv(x, taps, initial_state=last, return_final_state=wanted, cu_seqlens=cu_seqlens)

        gate = torch.sigmoid(self.receptance(shifted(self.time_mix_r)[0]))
        k = self.key(shifted(self.time_mix_k)[0])
        v, shift_state = shifted(self.time_mix_v, return_state)
        decay, bonus = self._dynamics()
        y, wkv_state = wkv(
            k,
            self.value(v),
            decay,
            bonus,
            initial_state=None if state is None else state.wkv,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
        )
        y = self.out_proj(gate * y)
        return (y, RWKV4State(shift_state, wkv_state)) if return_state else y

    def _check(self, state: RWKV4State, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        n = sequences.count(x, cu_seqlens)
        check_state("rwkv4", state, RWKV4State, x.device, shift=(n, self.d_model, 1), wkv=(n, 3, self.d_model))

    def _dynamics(self) -> tuple[Tensor, Tensor]:
        """w and u in fp32: the past fades by exp(-w) a position, the present counts exp(u) times."""
        return torch.exp(self.time_decay.float()), self.time_first.float()

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RWKV4State:
        """See `Mixer.init_state`."""
        device = self.time_decay.device if device is None else device
        shift = torch.zeros(batch_size, self.d_model, 1, dtype=dtype or torch.float32, device=device)
        return RWKV4State(shift, empty_state(batch_size, self.d_model, torch.float32, device))

    @torch.no_grad()
    def step_(self, x: Tensor, state: RWKV4State) -> Tensor:
        """See `Mixer.step_`."""
        self._check(state, x)
        x = x[:, 0]
        real = working_dtype(x)
        last, now = state.shift[..., 0].to(real), x.to(real)
        mixes = (self.time_mix_r, self.time_mix_k, self.time_mix_v)
        r, k, v = (torch.lerp(last, now, mix.to(real)).to(x.dtype) for mix in mixes)
        state.shift[..., 0] = x
        y = wkv_update_(state.wkv, self.key(k), self.value(v), *self._dynamics())
        return self.out_proj(torch.sigmoid(self.receptance(r)) * y).unsqueeze(1)  # (batch, 1, d_model)
