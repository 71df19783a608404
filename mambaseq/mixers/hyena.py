"""Hyena: gates and long convolutions in turn, whose filters are a small network's function of the lag.

Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models", arXiv:2302.10866; filters and defaults
as in HyenaDNA (arXiv:2306.15794). Trained by FFT; a step sums over the history, whose inputs the state keeps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.errors import ConfigError, check_positive, check_sizes, shown
from mambaseq.mixers.base import Mixer, check_state
from mambaseq.mixers.growing import GrowingState, Places, gathered, longest_new, written
from mambaseq.ops import causal_conv, sequences
from mambaseq.ops.chunks import padded
from mambaseq.ops.decoding.step import causal_conv_update_
from mambaseq.ops.dtypes import without_autocast, working_dtype
from mambaseq.ops.linear import apply_linear
from mambaseq.ops.lti.fft import convolution

# the window of a channel falls to this share within its decay length
_DECAYED = 1e-2
_N_INNER = 2

Positions = Literal["fixed", "learned"]


class FilterLinear(nn.Linear):
    """A layer of the filters' network. Like other dynamics it has no weight decay (see `tasks/optimizer.py`)."""

    has_weight_decay = False

    def forward(self, input: Tensor) -> Tensor:
        """Computed in the dtype of the input."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Taps(NamedTuple):
    """Filters at lags 0 and up, `(lags, channels)`, and the weights that they were made of."""

    values: Tensor
    weights: list[tuple[Any, ...]]


class ImplicitFilter(nn.Module):
    """h(lag) = FFN(features(lag)) * (exp(-decay * lag / (l_max - 1)) + shift), a function of nothing but the lag.

    features: lag / (l_max - 1), and cosines and sines of 2 pi f lag / l_max at (emb_dim - 1) / 2 frequencies f. The FFN
    has sines for activations (arXiv:2302.10866, section 3.3). Channels decay at rates evenly spread between those that
    fall to 1e-2 over fast_decay and over slow_decay times l_max.

    positions: "learned" makes the features of the lags below l_max a parameter, `positions` `(l_max, emb_dim)`, that
        begins at these values. There are none for further lags, where the filters are 0.
    """

    stays_float32 = True
    has_weight_decay = False  # of the features

    def __init__(
        self,
        channels: int,
        l_max: int,
        *,
        width: int,
        emb_dim: int,
        sine_frequency: float,
        fast_decay: float,
        slow_decay: float,
        shift: float,
        positions: Positions = "fixed",
    ) -> None:
        super().__init__()
        self.channels, self.l_max, self.emb_dim = channels, l_max, emb_dim
        self.fast_decay, self.slow_decay, self.shift = fast_decay, slow_decay, shift
        sizes = [emb_dim, *[width] * (1 + _N_INNER)]
        self.layers = nn.ModuleList(FilterLinear(a, b) for a, b in itertools.pairwise(sizes))
        self.last = FilterLinear(width, channels, bias=False)
        self.frequency = nn.Parameter(torch.full((width,), sine_frequency))
        self.positions: Tensor | None = None
        if positions == "learned":
            self.positions = nn.Parameter(self._features(l_max).to(self.frequency.dtype))

    def forward(self, length: int) -> Tensor:
        """`(length, channels)`: the filters at lags 0 to length - 1, in float32 (float64 if the weights are)."""
        device, dtype = self.frequency.device, working_dtype(self.frequency)
        known = length if self.positions is None else min(length, self.l_max)
        features = self._features(known)
        time = features[:, :1].to(dtype)
        with without_autocast(device.type):
            h = (features if self.positions is None else self.positions[:known]).to(dtype)  # (known, emb_dim)
            for layer in self.layers:
                h = torch.sin(self.frequency.to(dtype) * layer(h))
            h = self.last(h) * (torch.exp(-time * self._decay(device, dtype)) + self.shift)
            return padded(h, 0, length)

    def _features(self, length: int) -> Tensor:
        """`(length, emb_dim)` float64, since lags of a million are far into the bands' periods."""
        device = self.frequency.device
        lag = torch.arange(length, device=device, dtype=torch.float64)[:, None]  # (length, 1)
        n_bands = (self.emb_dim - 1) // 2
        bands = torch.linspace(1e-4, max(n_bands - 1, 1e-4), n_bands, device=device, dtype=torch.float64)
        angle = 2 * math.pi / self.l_max * lag * bands
        return torch.cat([lag / (self.l_max - 1), angle.cos(), -angle.sin()], -1)

    def _decay(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        fall = -math.log(_DECAYED)
        return torch.linspace(fall / self.slow_decay, fall / self.fast_decay, self.channels, device=device, dtype=dtype)

    def at_least(self, length: int, known: Taps | None) -> Taps:
        """The filters at `length` lags or more, made anew where those that are known are fewer or of other weights."""
        weights = [_identity(p) for p in self.parameters()]
        if known is None or known.values.shape[0] < length or known.weights != weights:
            known = Taps(self(length), weights)
        return known


@dataclasses.dataclass
class HyenaState(GrowingState):
    """conv `(sequences, (order + 1) d_model, short_conv - 1)`: the last inputs of the short convolution, oldest first,
    fp32. history `(sequences, capacity, order - 1, d_model)`: the inputs of the long convolutions, in the dtype they
    are made in. taps: filters that steps have made, for those to come; the same for all sequences."""

    rows: ClassVar[tuple[str, ...]] = ("history",)

    conv: Tensor
    history: Tensor
    taps: Taps | None = None


class Hyena(Mixer):
    """The Hyena operator: v ← h_i * (x_i v) for each gate x_i but the last, which gates what goes to out_proj.

    Filters of fixed positions are functions of the lag, so sequences may be longer than l_max: the window goes on to
    fall, down to `shift`. The state keeps the long convolutions' inputs at all positions; a step reads them all. Packed
    sequences are padded to the longest, whose length is read on the host.

    Args:
        d_model: width of the residual stream.
        order: number of gates; there are order - 1 long convolutions.
        l_max: the length that positions and windows are scaled to: that of the training sequences.
        short_conv: width of the short convolution of the projections.
        filter_order: width of the network that makes the filters.
        emb_dim: features of a lag that it sees; odd: the lag, and cosines and sines.
        sine_frequency: initial frequency of its activations.
        fast_decay: share of l_max over which the window of the fastest channel falls to 1e-2.
        slow_decay: the same of the slowest channel; the others are spread evenly between the two.
        shift: what windows fall to.
        bias: biases of in_proj and out_proj.
        positions: what the filters are made of at each lag: fixed features, or learned ones that begin there. Learned
            ones end at l_max, and so do the filters.
    """

    bounded_state = False
    companion = "mlp"

    def __init__(
        self,
        d_model: int,
        order: int = 2,
        l_max: int = 1024,
        short_conv: int = 3,
        filter_order: int = 64,
        emb_dim: int = 5,
        sine_frequency: float = 10.0,
        fast_decay: float = 0.3,
        slow_decay: float = 1.5,
        shift: float = 0.05,
        bias: bool = True,
        positions: Positions = "fixed",
    ) -> None:
        super().__init__()
        check_sizes("hyena", d_model=d_model, short_conv=short_conv, filter_order=filter_order)
        for name, value in {"order": order, "l_max": l_max}.items():
            if value < 2:
                raise ConfigError(f"hyena: {name} must be at least 2, not {value}.")
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ConfigError(f"hyena: emb_dim must be odd and at least 3 (the lag, cosines and sines), not {emb_dim}.")
        check_positive("hyena", sine_frequency=sine_frequency, fast_decay=fast_decay, slow_decay=slow_decay)
        if not math.isfinite(shift):
            raise ConfigError(f"hyena: shift must be finite, not {shift}.")
        if positions not in ("fixed", "learned"):
            raise ConfigError(f"hyena: positions must be fixed or learned, not {shown(positions)}.")
        self.d_model, self.order, self.short_conv = d_model, order, short_conv
        channels = (order + 1) * d_model
        self.in_proj = nn.Linear(d_model, channels, bias=bias)
        self.conv1d = nn.Conv1d(channels, channels, short_conv, groups=channels, padding=short_conv - 1)
        self.filter = ImplicitFilter(
            (order - 1) * d_model,
            l_max,
            width=filter_order,
            emb_dim=emb_dim,
            sine_frequency=sine_frequency,
            fast_decay=fast_decay,
            slow_decay=slow_decay,
            shift=shift,
            positions=positions,
        )
        self.D = nn.Parameter(torch.randn(order - 1, d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        for module in (self.in_proj, self.out_proj):
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, state: HyenaState | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False
    ) -> Any:
        """See `Mixer.forward`."""
        if state is not None:
            self._check(state, x, cu_seqlens)
        places = Places.of(x, state, cu_seqlens)
        longest = longest_new(x, cu_seqlens) + (0 if state is None else state.longest)
        x, conv_state = causal_conv(
            apply_linear(self.in_proj, x),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=None if state is None else state.conv,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
        )
        last, *gates, v = x.split(self.d_model, dim=-1)
        taps = self.filter(longest).unflatten(-1, (self.order - 1, self.d_model))  # (longest, order - 1, d_model)
        inputs = []
        for i, gate in enumerate(reversed(gates)):
            v = v * gate
            inputs.append(v)
            if cu_seqlens is None and (state is None or not state.longest):
                y = _convolution(v, taps[:, i])
            else:
                past = None if state is None else state.history[:, : state.longest, i]
                y = _convolution(written(past, v, places, places.position, longest), taps[:, i])
                y = gathered(y, places, places.position)
            v = (y + self.D[i].to(y.dtype) * v).to(v.dtype)
        y = apply_linear(self.out_proj, v * last)
        if not return_state:
            return y
        old = None if state is None else state.history
        # (sequences, longest, order - 1, d_model)
        signals = written(old, torch.stack(inputs, 2), places, places.position, longest)
        length = places.new if state is None else state.length + places.new
        return y, HyenaState(length, longest, conv_state, signals, None if state is None else state.taps)

    def _check(self, state: HyenaState, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        n = sequences.count(x, cu_seqlens)
        check_state("hyena", state, HyenaState, x.device, length=(n,))
        conv = (n, (self.order + 1) * self.d_model, self.short_conv - 1)
        history = (n, state.capacity, self.order - 1, self.d_model)
        check_state("hyena", state, HyenaState, x.device, conv=conv, history=history)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> HyenaState:
        """See `Mixer.init_state`; with room for max_length positions, at first for none if it is None."""
        weight = self.in_proj.weight
        device = weight.device if device is None else device
        conv = torch.zeros(batch_size, self.conv1d.in_channels, self.short_conv - 1, device=device)
        shape = (batch_size, max_length or 0, self.order - 1, self.d_model)
        history = torch.zeros(shape, dtype=dtype or weight.dtype, device=device)
        return HyenaState(torch.zeros(batch_size, dtype=torch.int64, device=device), 0, conv, history)

    @torch.no_grad()
    def step_(self, x: Tensor, state: HyenaState) -> Tensor:
        """See `Mixer.step_`. Filters are made once for as many lags as there is room for, and kept with the state."""
        self._check(state, x)
        state.make_room_()
        state.taps = self.filter.at_least(state.capacity, state.taps)
        state.longest += 1
        # a step that is captured in a CUDA graph must read what later ones will need
        n = state.capacity if x.is_cuda else state.longest
        x = apply_linear(self.in_proj, x[:, 0])
        x = causal_conv_update_(state.conv, x, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        last, *gates, v = x.split(self.d_model, dim=-1)
        sequence = torch.arange(x.shape[0], device=x.device)
        lag = state.length[:, None] - torch.arange(n, device=x.device)  # (batch, n)
        taps = state.taps.values[lag.clamp(min=0)].masked_fill_((lag < 0)[..., None], 0)  # (batch, n, channels)
        taps = taps.unflatten(-1, (self.order - 1, self.d_model))  # (sequences, n, order - 1, d_model)
        for i, gate in enumerate(reversed(gates)):
            v = v * gate
            state.history[:, :, i].index_put_((sequence, state.length), v.to(state.history.dtype))
            y = (taps[:, :, i] * state.history[:, :n, i]).sum(1)
            v = (y + self.D[i].to(y.dtype) * v).to(v.dtype)
        state.length.add_(1)
        return apply_linear(self.out_proj, v * last).unsqueeze(1)  # (batch, 1, d_model)


def _convolution(x: Tensor, taps: Tensor) -> Tensor:
    """x `(batch, length, d_model)` with the taps `(length, d_model)` of each channel, in the taps' dtype."""
    signal = x.to(taps.dtype).transpose(1, 2).contiguous()  # (batch, d_model, length)
    return convolution(signal, taps.t().contiguous()).transpose(1, 2)


def _identity(parameter: Tensor) -> tuple[Any, ...]:
    """Changes when the values do: in place, replaced, moved or cast."""
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device
