"""The time-invariant scan as a convolution, by the fast Fourier transform (Gu et al. 2022, arXiv:2206.11893).

The kernel K_l = C · Abar^l Bbar is never laid out with its states: time is split as l = q T + r, so that
Abar^l = (Abar^T)^q Abar^r and K is for each channel a product of a (length / T, d_state) and a (d_state, T)
matrix, with T near the root of the length. The initial state enters and the final state leaves by the same
products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambaseq.ops.chunks import padded
from mambaseq.ops.dtypes import without_autocast
from mambaseq.ops.lti.arguments import LtiArguments


def convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum of kernel_l x_{t-l}, l from 0 to t: both `(…, length)`, float32 or float64, and contiguous."""
    if not x.numel():
        return x
    size = 2 * x.shape[-1]  # so that nothing comes round
    spectrum = torch.fft.rfft(x, size) * torch.fft.rfft(kernel, size)
    return torch.fft.irfft(spectrum, size)[..., : x.shape[-1]]


def why_not(arguments: LtiArguments) -> str | None:
    """The reason why a convolution cannot run these arguments, or None."""
    if arguments.mode == "scan":
        return "mode is 'scan'"
    if arguments.cu_seqlens is not None:
        return "sequences are packed"
    return None


def run(arguments: LtiArguments) -> tuple[Tensor, Tensor]:
    """y in the working precision, float64 if x is float64 and otherwise float32, and the final state."""
    # Autocast would round the powers of Abar to half precision in the matrix products.
    with without_autocast(arguments.x.device.type):
        return _convolve(arguments)


def _convolve(arguments: LtiArguments) -> tuple[Tensor, Tensor]:
    wide = arguments.state_dtype
    x = arguments.x.to(arguments.real_dtype)
    log_decay, B, C = (value.to(wide) for value in arguments[1:4])
    batch, length = x.shape[:2]
    state = arguments.initial_state
    if length == 0:
        empty = log_decay.new_zeros(batch, *log_decay.shape)
        return x, empty if state is None else state.to(wide, copy=True)
    if arguments.reverse:
        x = x.flip(1)
    signal = x.transpose(1, 2).contiguous()  # (batch, channels, length)

    step = math.ceil(math.sqrt(length))
    n_steps = math.ceil(length / step)
    times = torch.arange(max(step, n_steps), device=x.device, dtype=x.dtype)
    fine = torch.exp(times[:step, None] * log_decay[:, None])  # Abar^r, (channels, T, d_state)
    coarse = torch.exp((step * times[:n_steps, None]) * log_decay[:, None])  # Abar^(qT)

    def sum_of_decays(weight: Tensor) -> Tensor:
        """sum_n weight[..., n] Abar_n^l for all l: `(…, channels, d_state)` → `(…, channels, length)`."""
        left, right = coarse * weight[..., None, :], fine
        if left.is_complex():
            # (…, channels, n_steps or T, 2 d_state)
            left, right = 2 * torch.cat([left.real, -left.imag], -1), torch.cat([right.real, right.imag], -1)
        return (left @ right.transpose(-1, -2)).flatten(-2)[..., :length]

    y = convolution(signal, sum_of_decays(C * B))

    # sum_t Abar^(length - 1 - t) x_t, with time running backwards so that powers grow.
    # (batch, channels, n_steps, T)
    ages = padded(signal.flip(-1), -1, step * n_steps).unflatten(-1, (n_steps, step))
    if fine.is_complex():
        inner = torch.complex(ages @ fine.real, ages @ fine.imag)
    else:
        inner = ages @ fine
    final = B * (coarse * inner).sum(-2)
    if state is not None:
        state = state.to(wide)
        y = y + sum_of_decays(C * torch.exp(log_decay) * state)
        final = final + torch.exp(length * log_decay) * state
    y = y.transpose(1, 2)  # (batch, length, channels)
    return (y.flip(1) if arguments.reverse else y), final
