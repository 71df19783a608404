"""Arguments of the selective scan, of every kind that its backends tell apart."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from agreement import Draw

from mambaseq.ops.selective_scan.arguments import ScanArguments


def plain(label: str, batch: int, length: int, channels: int, d_state: int) -> ScanArguments:
    """Step sizes as Mamba has them, from 1e-3 to 1e-1, and its A, -1 … -d_state."""
    draw = Draw(label)
    A = -torch.arange(1.0, d_state + 1).repeat(channels, 1)
    return ScanArguments(
        x=draw.normal(batch, length, channels),
        dt=torch.exp(draw.uniform(np.log(1e-3), np.log(1e-1), batch, length, channels)),
        A=A,
        B=draw.normal(batch, length, d_state),
        C=draw.normal(batch, length, d_state),
    )


def full(label: str, batch: int, length: int, channels: int, d_state: int) -> ScanArguments:
    draw = Draw(label)
    arguments = plain(label, batch, length, channels, d_state)
    return arguments._replace(
        dt=draw.normal(batch, length, channels),
        D=draw.normal(channels),
        z=draw.normal(batch, length, channels),
        dt_bias=draw.uniform(-6, -2, channels),
        dt_softplus=True,
        initial_state=draw.normal(batch, channels, d_state),
    )


def packed(arguments: ScanArguments, *bounds: int) -> ScanArguments:
    shape = (len(bounds) - 1, *arguments.A.shape)
    return arguments._replace(
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32), initial_state=Draw("states").normal(*shape)
    )


def sliced(arguments: ScanArguments) -> ScanArguments:
    """As a block makes them: x and z halves of one tensor, B and C parts of another."""
    assert arguments.z is not None
    x, z = torch.cat([arguments.x, arguments.z], -1).chunk(2, -1)
    B, C = torch.cat([arguments.x[..., :7], arguments.B, arguments.C], -1)[..., 7:].chunk(2, -1)
    return arguments._replace(x=x, z=z, B=B, C=C)


def grouped(label: str) -> ScanArguments:
    draw = Draw(label)
    arguments = full(label, 2, 63, 66, 3)
    return arguments._replace(B=draw.normal(2, 63, 2, 3), C=draw.normal(2, 63, 3, 3))


def in_two_groups(label: str) -> ScanArguments:
    """B in two groups of 64 channels, C in one."""
    draw = Draw(label)
    arguments = full(label, 2, 63, 128, 5)
    return arguments._replace(B=draw.normal(2, 63, 2, 5), C=draw.normal(2, 63, 1, 5))


def slow_decay(label: str, length: int) -> ScanArguments:
    """Decays of 1 - 1e-5 … 1 - 1e-3: what enters first is still there at the end."""
    draw = Draw(label)
    arguments = plain(label, 1, length, 3, 4)
    return arguments._replace(
        dt=draw.uniform(0.5, 1.5, 1, length, 3),
        A=-torch.tensor([1e-5, 1e-4, 3e-4, 1e-3]).repeat(3, 1),
        initial_state=draw.normal(1, 3, 4),
    )


def fast_decay(label: str) -> ScanArguments:
    """Decays down to exp(-500), which is 0 in float32."""
    arguments = plain(label, 2, 63, 5, 4)
    return arguments._replace(dt=Draw(label).uniform(0, 5, 2, 63, 5), A=arguments.A * 25)


def complex_(label: str, length: int, *, slow: bool) -> ScanArguments:
    draw = Draw(label)
    arguments = full(label, 2, length, 5, 3)
    real = -draw.uniform(1e-4, 1e-3, 5, 3) if slow else -draw.uniform(0.5, 5, 5, 3)
    return arguments._replace(
        A=torch.complex(real, draw.uniform(-3, 3, 5, 3)),
        B=draw.normal(2, length, 3, dtype=torch.complex64),
        C=draw.normal(5, 3, dtype=torch.complex64),
        dt=draw.uniform(0.5, 1.5, 2, length, 5) if slow else arguments.dt,
        dt_bias=None if slow else arguments.dt_bias,
        dt_softplus=not slow,
        initial_state=draw.normal(2, 5, 3, dtype=torch.complex64),
    )


def constant(label: str) -> ScanArguments:
    draw = Draw(label)
    return full(label, 2, 63, 5, 3)._replace(B=draw.normal(5, 3), C=draw.normal(5, 3))


def turning(label: str, batch: int, length: int, channels: int, d_state: int, constant: str = "") -> ScanArguments:
    """Complex throughout; `constant` names those of B and C that are."""
    draw = Draw(label)

    def matrix(name: str) -> torch.Tensor:
        shape = (channels,) if name in constant else (batch, length)
        return draw.normal(*shape, d_state, dtype=torch.complex64)

    return full(label, batch, length, channels, d_state)._replace(
        A=torch.complex(-draw.uniform(0.5, 5, channels, d_state), draw.uniform(-30, 30, channels, d_state)),
        B=matrix("B"),
        C=matrix("C"),
        initial_state=draw.normal(batch, channels, d_state, dtype=torch.complex64),
    )


def fast_turns(label: str) -> ScanArguments:
    """Angles of tens of turns a step, which decay slowly."""
    draw = Draw(label)
    arguments = turning(label, 2, 63, 5, 3)
    A = torch.complex(-draw.uniform(0.01, 0.1, 5, 3), draw.uniform(-300, 300, 5, 3))
    return arguments._replace(A=A, dt=draw.uniform(0, 1, 2, 63, 5), dt_bias=None, dt_softplus=False)


def packed_turning(arguments: ScanArguments, *bounds: int) -> ScanArguments:
    shape = (len(bounds) - 1, *arguments.A.shape)
    return packed(arguments, *bounds)._replace(
        initial_state=Draw("complex states").normal(*shape, dtype=torch.complex64)
    )


def constant_one(name: str, arguments: ScanArguments) -> ScanArguments:
    return arguments._replace(**{name: Draw(name).normal(*arguments.A.shape)})


def y_alone(arguments: ScanArguments) -> ScanArguments:
    """What mamba-ssm can do: no state on either side."""
    return arguments._replace(initial_state=None, wants_final_state=False)


CASES: dict[str, Callable[[], ScanArguments]] = {
    "length 1": lambda: plain("a", 3, 1, 65, 5),
    "length 2": lambda: full("b", 2, 2, 130, 16),
    "length 63": lambda: full("c", 2, 63, 65, 4),
    "one channel, one state": lambda: full("d", 3, 63, 1, 1),
    "length 1000": lambda: plain("e", 1, 1000, 65, 5),
    "length 1000, reverse": lambda: full("f", 2, 1000, 3, 16)._replace(reverse=True),
    "length 4097": lambda: full("g", 1, 4097, 3, 4),
    "length 0": lambda: full("h", 2, 0, 3, 4),
    "reverse": lambda: full("i", 2, 63, 130, 3)._replace(reverse=True),
    "packed": lambda: packed(full("j", 1, 200, 65, 4), 0, 0, 1, 3, 66, 66, 98, 200),
    "packed, last empty, reverse": lambda: packed(full("k", 1, 200, 65, 4), 0, 63, 64, 200, 200)._replace(reverse=True),
    "packed, no state": lambda: packed(plain("l", 1, 70, 3, 2), 0, 30, 70)._replace(initial_state=None),
    "packed, all empty": lambda: packed(full("m", 1, 0, 3, 2), 0, 0, 0),
    "slices": lambda: sliced(full("n", 2, 63, 65, 5)),
    "groups": lambda: grouped("o"),
    "no gate": lambda: full("p", 2, 63, 65, 4)._replace(z=None),
    "no softplus": lambda: plain("q", 2, 63, 65, 4)._replace(dt_bias=torch.full((65,), 0.01)),
    "slow decay": lambda: slow_decay("r", 4097),
    "slow decay, packed": lambda: packed(slow_decay("s", 1500), 0, 1000, 1500),
    "fast decay": lambda: fast_decay("t"),
    "complex": lambda: complex_("u", 63, slow=False),
    "complex, slow decay, reverse": lambda: complex_("v", 1000, slow=True)._replace(reverse=True),
    "constant B and C": lambda: constant("w"),
    "constant B, length 400, reverse": lambda: constant_one("B", full("ah", 2, 400, 65, 5))._replace(reverse=True),
    "constant C, packed": lambda: packed(constant_one("C", full("ai", 1, 200, 66, 16)), 0, 0, 1, 66, 66, 200),
    "constant B and C, 40 states": lambda: constant_one("B", constant_one("C", full("aj", 2, 63, 65, 40))),
    "complex, B and C vary": lambda: turning("ak", 2, 63, 65, 5),
    "complex, length 1": lambda: turning("al", 3, 1, 130, 16),
    "complex, one channel, one state": lambda: turning("am", 3, 63, 1, 1),
    "complex, length 400, reverse": lambda: turning("an", 1, 400, 66, 16)._replace(reverse=True),
    "complex, no gate": lambda: turning("ao", 2, 300, 65, 8)._replace(z=None, D=None),
    "complex, constant B": lambda: turning("ap", 2, 300, 65, 3, "B"),
    "complex, constant B and C": lambda: turning("aq", 2, 300, 65, 16, "BC"),
    "complex, real B": lambda: turning("ar", 2, 63, 65, 5)._replace(B=Draw("real").normal(2, 63, 5)),
    "complex, fast turns": lambda: fast_turns("as"),
    "complex, packed, 20 states": lambda: packed_turning(turning("at", 1, 200, 65, 20), 0, 0, 1, 3, 66, 66, 98, 200),
    "complex, packed, reverse": lambda: packed_turning(turning("au", 1, 700, 66, 4, "C"), 0, 600, 600, 700)._replace(
        reverse=True
    ),
    "complex, groups of 64 channels": lambda: turning("av", 2, 63, 128, 5)._replace(
        B=Draw("groups").normal(2, 63, 2, 5, dtype=torch.complex64)
    ),
    "17 states": lambda: full("ae", 2, 63, 65, 17),
    "40 states, packed, reverse": lambda: packed(full("af", 1, 200, 66, 40), 0, 1, 1, 90, 200)._replace(reverse=True),
    "groups of 64 channels": lambda: in_two_groups("ag"),
    "y alone, length 1": lambda: y_alone(plain("x", 3, 1, 65, 5)),
    "y alone": lambda: y_alone(full("y", 2, 1000, 65, 4)),
    "y alone, length 4097": lambda: y_alone(full("z", 1, 4097, 3, 16)),
    "y alone, no gate": lambda: y_alone(full("aa", 2, 63, 130, 5))._replace(z=None),
    "y alone, groups": lambda: y_alone(grouped("ab")),
    "y alone, slow decay": lambda: y_alone(slow_decay("ac", 1500)),
    "y alone, constant B and C": lambda: y_alone(constant("ad")),
}


@functools.cache
def build(case: str, dtype: torch.dtype) -> Callable[[], ScanArguments]:
    """What depends on the input in `dtype`, parameters and states in float32."""

    @functools.cache
    def arguments() -> ScanArguments:
        made = CASES[case]()
        names = ("x", "dt", "B", "C", "z")
        halves = {
            name: value.to(dtype)
            for name in names
            if (value := getattr(made, name)) is not None and not value.is_complex()
        }
        return made._replace(**halves) if dtype != torch.float32 else made

    return arguments
