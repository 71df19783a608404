"""Mel spectrograms as embeddings, and a residual network over them: what recognises short sounds."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torchaudio.functional
from torch import Tensor, nn

from mambaseq.backbones.patterns import MakeMixer
from mambaseq.backbones.stateless import StatelessBackbone
from mambaseq.encoders import Encoder, refuse_condition
from mambaseq.errors import ConfigError
from mambaseq.mixers.base import Mixer
from mambaseq.ops import sequences
from mambaseq.specs import check_layers
from mambaseq_audio.io import check_rate
from mambaseq_audio.mulaw import LEVELS

_FLOOR = 1e-4  # of a band's power, below the noise of 8-bit mu-law in speech
_SPREAD = 4.0  # about that of log powers around their mean


def unpacked(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed sequences `(1, length, ...)` as rows `(sequences, longest, ...)`, padded with zeros on the right, and
    their mask `(sequences, longest)`. The host waits for their lengths."""
    bounds = sequences.offsets(cu_seqlens, x.shape[1])
    longest = max([1, *(stop - start for start, stop in itertools.pairwise(bounds))])
    mask = torch.arange(longest, device=x.device) < cu_seqlens.diff()[:, None]
    rows = x.new_zeros(*mask.shape, *x.shape[2:])
    rows[mask] = x[0]
    return rows, mask


class MelEncoder(Encoder):
    """Sound `(batch, length)` in mu-law levels, or `(batch, length, 1)` float in [-1, 1], to embeddings of the frames
    of its mel spectrogram, `(batch, ceil(length / stride), d_model)`.

    Log powers in mel bands, less each band's mean over the sequence, so that neither loudness nor a microphone's
    frequency response matters, through a linear map. Around a sequence is silence.

    Args:
        d_model: width.
        sample_rate: samples a second, as in the data.
        n_mels: mel bands, from 0 to half the sample rate.
        window: samples of a frame (Hann), transformed at twice as many points.
        stride: samples from a frame to the next.
        mask_bands: in training, up to so many neighbouring bands of each sequence are hidden (SpecAugment,
            arXiv:1904.08779).
        mask_frames: the same for neighbouring frames.
    """

    causal = False
    takes_mask: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        sample_rate: int = 8000,
        n_mels: int = 40,
        window: int = 256,
        stride: int = 80,
        mask_bands: int = 0,
        mask_frames: int = 0,
    ) -> None:
        super().__init__()
        check_rate(sample_rate, "model.encoder.sample_rate")
        if not (2 <= window <= 2**16 and 1 <= stride <= window and 1 <= n_mels <= 512):
            raise ConfigError(
                f"The encoder audio/mel needs 2 <= window <= 2^16, 1 <= stride <= window and 1 <= n_mels <= 512, not "
                f"window {window}, stride {stride} and n_mels {n_mels}."
            )
        if not (0 <= mask_bands < n_mels and 0 <= mask_frames <= 2**20):
            raise ConfigError(
                f"model.encoder.mask_bands must be below n_mels ({n_mels}), and mask_frames from 0 to 2^20; they are "
                f"{mask_bands} and {mask_frames}."
            )
        self.stride, self.mask_bands, self.mask_frames = stride, mask_bands, mask_frames
        with torch.device("cpu"), warnings.catch_warnings():  # bands are looked at, and a meta tensor has no values
            warnings.simplefilter("ignore", UserWarning)  # of empty bands, which are an error here
            bands = torchaudio.functional.melscale_fbanks(window + 1, 0.0, sample_rate / 2, n_mels, sample_rate)
            hann = torch.hann_window(window)
        if bool((bands.sum(0) == 0).any()):
            raise ConfigError(
                f"{n_mels} mel bands are too many for a window of {window} samples: some would hold no frequency. "
                "Lower model.encoder.n_mels, or raise window."
            )
        self.hann: Tensor
        self.bands: Tensor
        self.register_buffer("hann", hann, persistent=False)
        self.register_buffer("bands", bands, persistent=False)  # (frequencies, n_mels)
        self.linear = nn.Linear(n_mels, d_model)

    def forward(
        self,
        inputs: Tensor,
        condition: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Raises ConfigError for a condition."""
        refuse_condition("audio/mel", condition)
        if cu_seqlens is not None:
            sequences.check(cu_seqlens, len(inputs), inputs.shape[1])
            rows, mask = unpacked(inputs, cu_seqlens)
            return self.linear(self._frames(rows, mask))[mask[:, :: self.stride]][None]
        return self.linear(self._frames(inputs, mask))

    def _frames(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """`(batch, ceil(length / stride), n_mels)` in the linear map's dtype."""
        if inputs.is_floating_point():
            signal = inputs[..., 0].float()
        else:
            signal = torchaudio.functional.mu_law_decoding(inputs, LEVELS).float()
        if mask is not None:
            signal = signal.masked_fill(~mask, 0.0)
        with torch.autocast(signal.device.type, enabled=False):
            n, window = -(-inputs.shape[1] // self.stride), len(self.hann)
            power = torchaudio.functional.spectrogram(
                signal, 0, self.hann, 2 * window, self.stride, window, 2.0, False, pad_mode="constant"
            )
            frames = (power[..., :n].transpose(1, 2) @ self.bands + _FLOOR).log()
        real = frames.new_ones(frames.shape[:2]) if mask is None else mask[:, :: self.stride].to(frames.dtype)
        count = real.sum(1).clamp(min=1)[:, None, None]
        mean = (frames * real[..., None]).sum(1, keepdim=True) / count
        frames = (frames - mean) / _SPREAD
        if self.training:
            frames = self._hidden(frames, 2, self.mask_bands)
            frames = self._hidden(frames, 1, self.mask_frames)
        return frames.to(self.linear.weight.dtype)

    @staticmethod
    def _hidden(frames: Tensor, dim: int, most: int) -> Tensor:
        """A stretch of up to `most` positions along a dimension is put to the mean, in each row another."""
        if not most:
            return frames
        n, shape = frames.shape[dim], [len(frames), 1, 1]
        length = torch.rand(shape, device=frames.device) * (most + 1)
        start = torch.rand(shape, device=frames.device) * n
        shape[0], shape[dim] = 1, n
        place = torch.arange(n, device=frames.device).view(shape)
        return frames.masked_fill((place >= start) & (place < start + length), 0.0)


class ResidualConvolution(nn.Module):
    """x + convolution(GELU(convolution(norm(x)))), `(batch, length, d_model)`. Padding, and what is outside, is 0."""

    def __init__(self, d_model: int, width: int, dilation: int, dropout: float, scale: float) -> None:
        super().__init__()
        reach = width // 2
        self.norm = nn.LayerNorm(d_model)
        self.first = nn.Conv1d(d_model, d_model, width, padding=reach * dilation, dilation=dilation)
        self.second = nn.Conv1d(d_model, d_model, width, padding=reach)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.second.weight *= scale

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        def real(hidden: Tensor) -> Tensor:
            return hidden if mask is None else hidden * mask[:, None]

        y = real(self.norm(x).transpose(1, 2).to(self.first.weight.dtype))
        y = self.second(real(F.gelu(self.first(y)))).transpose(1, 2)
        return x + self.dropout(y)


class ConvolutionStack(StatelessBackbone):
    """A small residual network: convolutions over time, both ways, `(batch, length, d_model)` to the same. It has no
    mixers and no state; nothing can be generated by it or continued.

    Args:
        make_mixer: not used.
        n_layers: residual layers of two convolutions each, the first dilated by 1, 2, 4, 1, 2, 4, ...
        width: positions that a convolution reads, an odd number.
        dropout: probability with which a layer's contribution is dropped, element by element, in training.
    """

    called: ClassVar[str] = "audio/convolutions"
    takes_mask: ClassVar[bool] = True

    def __init__(self, make_mixer: MakeMixer, n_layers: int = 6, width: int = 3, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        if n_layers < 1 or not (1 <= width <= 101 and width % 2):
            raise ConfigError(
                f"The backbone audio/convolutions needs at least one layer and an odd width up to 101, not n_layers "
                f"{n_layers} and width {width}."
            )
        check_layers(n_layers)
        self.d_model = d_model = make_mixer(0).d_model  # the width is known to what makes mixers alone
        self.layers = nn.ModuleList(
            ResidualConvolution(d_model, width, 2 ** (layer % 3), dropout, 1 / math.sqrt(n_layers))
            for layer in range(n_layers)
        )
        self.norm_f = nn.LayerNorm(d_model)

    def mixers(self) -> list[Mixer]:
        """None: []."""
        return []

    def forward(
        self,
        x: Tensor,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """mask: `(batch, length)` bool, of real positions; no other one sees the padding on the right. For packed
        sequences the host waits for their lengths.

        Raises ConfigError if a state is given or wanted.
        """
        self.refuse_states(state, return_state)
        if cu_seqlens is not None:
            sequences.check(cu_seqlens, len(x), x.shape[1])
            rows, mask = unpacked(x, cu_seqlens)
            return self._through_layers(rows, mask)[mask][None]
        return self._through_layers(x, mask)

    def _through_layers(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x.float()
        for layer in self.layers:
            x = layer(x, mask)
        found: Tensor = self.norm_f(x)
        return found
