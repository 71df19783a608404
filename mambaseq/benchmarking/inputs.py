"""Arguments of every op, for `mambaseq doctor` and for what `mambaseq bench ops` times as it is registered.

A maker is `make(normal, batch, length, channels, **sizes)`: `normal(*shape)` gives float32 noise, and the arguments are
in float32 too, like those that layers hand over: step sizes around 1e-2, keys of length 1, decays near 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.ops.causal_conv.arguments import ConvArguments
from mambaseq.ops.decays.arguments import DecayArguments
from mambaseq.ops.delta_rule import DeltaArguments
from mambaseq.ops.linear_cross_entropy.arguments import LossArguments
from mambaseq.ops.lti.arguments import LtiArguments
from mambaseq.ops.norm.arguments import AddNormArguments, GatedNormArguments, UnitNormArguments
from mambaseq.ops.selective_scan.arguments import ScanArguments
from mambaseq.ops.ssd.arguments import SsdArguments
from mambaseq.ops.state_space.arguments import StateSpaceArguments
from mambaseq.ops.trapezoid import TrapezoidArguments
from mambaseq.ops.wkv.arguments import WkvArguments

VOCABULARY = {"cuda": 16384, "cpu": 1000}
D_STATE = 16
HEAD_DIM = 64

Normal = Callable[..., Tensor]


def normal_of(device: torch.device) -> Normal:
    """Noise that is the same at every call of this function."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def selective_scan(normal: Normal, batch: int, length: int, channels: int) -> ScanArguments:
    return ScanArguments(
        x=normal(batch, length, channels),
        dt=normal(batch, length, channels),
        A=-normal(channels, D_STATE).abs(),
        B=normal(batch, length, D_STATE),
        C=normal(batch, length, D_STATE),
        D=normal(channels),
        z=normal(batch, length, channels),
        dt_bias=normal(channels) - 4,
        dt_softplus=True,
        wants_final_state=False,
    )


def causal_conv(normal: Normal, batch: int, length: int, channels: int) -> ConvArguments:
    return ConvArguments(normal(batch, length, channels), normal(channels, 4), normal(channels), "silu")


def lti_scan(normal: Normal, batch: int, length: int, channels: int, d_state: int = D_STATE) -> LtiArguments:
    """Complex, as S4D and Mamba without selection have it."""
    size = (channels, d_state)
    log_decay = torch.complex(-0.1 * normal(*size).abs(), normal(*size))
    B, C = (torch.complex(normal(*size), normal(*size)) for _ in range(2))
    return LtiArguments(normal(batch, length, channels), log_decay, B, C)


def state_space_scan(
    normal: Normal, batch: int, length: int, channels: int, d_state: int = D_STATE
) -> StateSpaceArguments:
    """A system a channel, whose states turn and fade by a hundredth a step."""
    A = 0.99 * torch.linalg.qr(normal(channels, d_state, d_state)).Q
    C = normal(channels, 1, d_state)
    return StateSpaceArguments(
        normal(batch, length, channels), A, normal(channels, d_state), C, wants_final_state=False
    )


def ssd(
    normal: Normal, batch: int, length: int, channels: int, head_dim: int = HEAD_DIM, d_state: int = HEAD_DIM
) -> SsdArguments:
    """One group of B and C."""
    x = normal(batch, length, channels // head_dim, head_dim)
    heads = x.shape[2]
    return SsdArguments(
        x=x,
        dt=normal(batch, length, heads),
        A=-torch.linspace(1, 16, heads, device=x.device),
        B=normal(batch, length, 1, d_state),
        C=normal(batch, length, 1, d_state),
        D=normal(heads),
        dt_bias=normal(heads) - 4,
        dt_softplus=True,
        wants_final_state=False,
    )


def wkv(normal: Normal, batch: int, length: int, channels: int) -> WkvArguments:
    k, v = normal(batch, length, channels), normal(batch, length, channels)
    return WkvArguments(k, v, normal(channels).abs(), normal(channels))


def gla(
    normal: Normal, batch: int, length: int, channels: int, head_dim: int = HEAD_DIM, d_state: int = HEAD_DIM
) -> DeltaArguments:
    """Without the rule: a decay a channel of the keys, no beta. d_state: channels of a key."""
    heads = channels // head_dim
    key = (batch, length, heads, d_state)
    return DeltaArguments(
        q=normal(*key) * d_state**-0.5,
        k=F.normalize(normal(*key), dim=-1),
        v=normal(batch, length, heads, head_dim),
        g=F.logsigmoid(normal(*key)) / 16,
        wants_final_state=False,
    )


def kda(
    normal: Normal, batch: int, length: int, channels: int, head_dim: int = HEAD_DIM, d_state: int = HEAD_DIM
) -> DeltaArguments:
    """The rule, and a decay a channel of the keys."""
    beta = normal(batch, length, channels // head_dim).sigmoid()
    return gla(normal, batch, length, channels, head_dim, d_state)._replace(beta=beta)


def gated_delta(
    normal: Normal, batch: int, length: int, channels: int, head_dim: int = HEAD_DIM, d_state: int = HEAD_DIM
) -> DeltaArguments:
    """The rule, and a decay a head."""
    g = -0.1 * normal(batch, length, channels // head_dim).abs()
    return kda(normal, batch, length, channels, head_dim, d_state)._replace(g=g)


def trapezoidal_scan(
    normal: Normal,
    batch: int,
    length: int,
    channels: int,
    head_dim: int = HEAD_DIM,
    d_state: int = HEAD_DIM,
    rank: int = 1,
) -> TrapezoidArguments:
    """rank: inputs a head, which lie outside of the heads, as the projection leaves them."""
    heads = channels // head_dim
    one = (batch, length, heads)
    x, B, C = (normal(batch, length, rank, heads, size).transpose(2, 3) for size in (head_dim, d_state, d_state))
    return TrapezoidArguments(
        x=x,
        dt=0.1 * normal(*one).abs(),
        A=-normal(*one).abs(),
        trap=normal(*one).sigmoid(),
        B=B,
        C=C,
        wants_final_state=False,
    )


def add_rms_norm(normal: Normal, batch: int, length: int, channels: int) -> AddNormArguments:
    x, residual = normal(batch, length, channels), normal(batch, length, channels)
    return AddNormArguments(x, residual, normal(channels))


def gated_rms_norm(normal: Normal, batch: int, length: int, channels: int) -> GatedNormArguments:
    return GatedNormArguments(normal(batch, length, channels), normal(batch, length, channels), normal(channels))


def unit_norm(normal: Normal, batch: int, length: int, channels: int, head_dim: int = HEAD_DIM) -> UnitNormArguments:
    return UnitNormArguments(normal(batch, length, channels), head_dim)


def log_decays(normal: Normal, batch: int, length: int, channels: int, head_dim: int = HEAD_DIM) -> DecayArguments:
    return DecayArguments(normal(batch, length, channels), normal(channels // head_dim), normal(channels))


def linear_cross_entropy(normal: Normal, batch: int, length: int, channels: int) -> LossArguments:
    hidden = normal(batch * length, channels)
    vocabulary = VOCABULARY.get(hidden.device.type, VOCABULARY["cpu"])
    labels = torch.arange(batch * length, device=hidden.device) % vocabulary
    return LossArguments(hidden, normal(vocabulary, channels), labels)


MAKERS: dict[str, Callable[..., Any]] = {
    "selective_scan": selective_scan,
    "causal_conv": causal_conv,
    "lti_scan": lti_scan,
    "state_space_scan": state_space_scan,
    "ssd": ssd,
    "wkv": wkv,
    "delta_rule": gated_delta,
    "trapezoidal_scan": trapezoidal_scan,
    "add_rms_norm": add_rms_norm,
    "gated_rms_norm": gated_rms_norm,
    "unit_norm": unit_norm,
    "log_decays": log_decays,
    "linear_cross_entropy": linear_cross_entropy,
}
"""By the op's name in `mambaseq.ops.OPS`."""
