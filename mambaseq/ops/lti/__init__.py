"""Time-invariant state-space models: S4D (Gu et al. 2022, arXiv:2206.11893) and Mamba without selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.errors import shown
from mambaseq.ops import dispatch, sequences
from mambaseq.ops.dtypes import working_dtype
from mambaseq.ops.eager import wants_reference
from mambaseq.ops.lti import arguments as _arguments
from mambaseq.ops.lti import cpu, cuda, fft, reference, scan
from mambaseq.ops.lti.arguments import LtiArguments

Discretization = Literal["zoh", "bilinear", "mamba"]
Mode = Literal["fft", "scan"]


def _gated(run: Callable[[LtiArguments], tuple[Tensor, Tensor]]) -> Callable[[LtiArguments], tuple[Tensor, Tensor]]:
    """A backend with D and the gate behind it, in the working precision."""

    def whole(arguments: LtiArguments) -> tuple[Tensor, Tensor]:
        y, final = run(arguments)
        real = arguments.real_dtype
        if arguments.D is not None:
            y = y + arguments.D.to(real) * arguments.x
        if arguments.z is not None:
            y = y * F.silu(arguments.z.to(real))
        return y, final

    return whole


OP = dispatch.Op(
    name="lti_scan",
    backends=(
        dispatch.Backend("cuda", cuda.run, cuda.why_not),
        dispatch.Backend("cpu", _gated(cpu.run), cpu.why_not),
        dispatch.Backend("fft", _gated(fft.run), fft.why_not),
        dispatch.Backend("torch", _gated(scan.run), scan.why_not),
        dispatch.Backend("reference", _gated(reference.run), scan.why_not),
    ),
    samples=_arguments.samples,
)


def discretize(dt: Tensor, A: Tensor, B: Tensor, discretization: Discretization = "zoh") -> tuple[Tensor, Tensor]:
    """The logarithm of Abar, and Bbar, of h' = A h + B x sampled at steps of dt.

        zoh       Abar = exp(dt A)                        Bbar = (exp(dt A) - 1) / A · B
        bilinear  Abar = (1 + dt A / 2) / (1 - dt A / 2)  Bbar = dt / (1 - dt A / 2) · B
        mamba     Abar = exp(dt A)                        Bbar = dt B

    The first two as in S4D (arXiv:2206.11893), the last one as in Mamba (arXiv:2312.00752).

    Args:
        dt: `(channels,)`.
        A, B: `(channels, d_state)`, real or complex.

    Returns:
        two tensors `(channels, d_state)`. The bilinear rule makes a real Abar negative where dt A < -2, so
        its logarithm is complex, also for real A.

    Raises:
        ValueError: another discretization.
    """
    z = dt[:, None] * A  # (channels, d_state)
    if discretization == "zoh":
        # (exp(z) - 1) / z tends to 1 at 0, where the quotient itself is undefined.
        near = z.abs() < 1e-6
        safe = torch.where(near, torch.ones_like(z), z)
        ratio = torch.where(near, 1 + z / 2, torch.expm1(safe) / safe)
        return z, ratio * dt[:, None] * B
    if discretization == "bilinear":
        decay = (1 + z / 2) / (1 - z / 2)
        if not decay.is_complex():
            decay = torch.complex(decay, torch.zeros_like(decay))
        return torch.log(decay), dt[:, None] / (1 - z / 2) * B
    if discretization == "mamba":
        return z, dt[:, None] * B
    raise ValueError(f"discretization must be 'zoh', 'bilinear' or 'mamba', not {shown(discretization)}")


def lti_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    discretization: Discretization = "zoh",
    mode: Mode | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a diagonal linear system that does not change with time, on each channel its own.

        h_t = Abar h_{t-1} + Bbar x_t
        y_t = (h_t · C + D x_t) silu(z_t)

    With complex A one half of each conjugate pair is kept: `h_t · C` becomes `2 Re(h_t · C)`. Abar and Bbar
    are those of `discretize`.

    Args:
        x: `(batch, length, channels)`, float64, float32, bfloat16 or float16. Float64 is computed in float64,
            all others in float32.
        dt: `(channels,)`, the step sizes.
        A: `(channels, d_state)`, real or complex.
        B: `(channels, d_state)`; it may be complex only if A is.
        C: the same.
        D: `(channels,)`, the skip connection.
        z: the gate, the shape of x.
        initial_state: `(batch, channels, d_state)`, or `(sequences, channels, d_state)` with `cu_seqlens`;
            zeros if None.
        return_final_state: make the state after the last position of each sequence. Without it some
            backends return an empty tensor instead, which is faster.
        cu_seqlens: `(sequences + 1,)` int32, with batch 1: sequence s lies at
            `cu_seqlens[s]:cu_seqlens[s + 1]`; no state crosses a boundary. Sequences may be empty.
        reverse: time runs from the last position of each sequence to its first.
        discretization: "zoh" (zero-order hold), "bilinear" or "mamba" (Abar exact, Bbar = dt B).
        mode: "fft", a convolution with the kernel C · Abar^l Bbar, or "scan", the recurrence; they agree.
            None takes the faster, as measured. Packed sequences are always scanned.
        backend: the name of an implementation; None takes the fastest that can run these arguments.

    Returns:
        y, the shape and dtype of x, and the final state in float32 (complex64 if A is complex;
        float64 and complex128 if x is float64). Both carry gradients to every floating-point argument.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the mode or backend asked for cannot run these.
    """
    _check(x, dt, A, B, C, D, z, initial_state, cu_seqlens, mode)
    real, wide = working_dtype(x), working_dtype(x, A)
    log_decay, B = discretize(dt.to(real), A.to(wide), B.to(wide), discretization)
    becomes_complex = log_decay.is_complex() and not A.is_complex()
    if becomes_complex:  # and the output 2 Re of what it should be
        C = C / 2
    arguments = LtiArguments(x, log_decay, B, C, initial_state, cu_seqlens, reverse, mode, D, z)
    if wants_reference():
        arguments, backend = arguments._replace(mode=None), "reference"
    if backend is None and (mode is None or cu_seqlens is not None):
        arguments = arguments._replace(mode=_faster_mode(arguments))
    y, final_state = dispatch.run(OP, arguments, backend)
    y = y.to(x.dtype)
    return y, final_state.real if becomes_complex else final_state


def _faster_mode(arguments: LtiArguments) -> Mode:
    """The scan where there are kernels for it: on a CPU, where work grows with the number of states, they are the
    faster up to 64 of them at the least, since the convolution has its kernel to compute. PyTorch's own scan is always
    the slower."""
    if arguments.cu_seqlens is not None or any(kernels.why_not(arguments) is None for kernels in (cpu, cuda)):
        return "scan"
    return "fft"


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str | None,
) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be real floating-point numbers, not {x.dtype}")
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, length, channels), not {tuple(x.shape)}")
    batch, length, channels = x.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (channels={channels}, d_state), not {tuple(A.shape)}")
    named: dict[str, Tensor | None] = {
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "initial_state": state,
    }
    for name in ("B", "C"):
        value = named[name]
        if value is not None and value.shape != A.shape:
            raise ValueError(f"{name} must have the shape of A {tuple(A.shape)}, not {tuple(value.shape)}")
    for name in ("dt", "D"):
        value = named[name]
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name} must be (channels={channels},), not {tuple(value.shape)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z must have the shape of x {tuple(x.shape)}, not {tuple(z.shape)}")
    n_sequences = batch
    if cu_seqlens is not None:
        sequences.check(cu_seqlens, batch, length)
        n_sequences = cu_seqlens.shape[0] - 1
    if state is not None and state.shape != (n_sequences, *A.shape):
        raise ValueError(f"initial_state must be {(n_sequences, *A.shape)}, not {tuple(state.shape)}")
    if mode not in (None, "fft", "scan"):
        raise ValueError(f"mode must be 'fft', 'scan' or None, not {shown(mode)}")
    for name, value in named.items():
        if value is None:
            continue
        if value.is_complex() and not A.is_complex():
            raise ValueError(f"{name} is complex but A is real")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}")
