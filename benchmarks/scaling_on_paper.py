"""What many GPUs would send each other, and how long it would take, on paper: context, tensor and data parallel, for
Mamba-1 of 130 M, 1.4 B and 7 B parameters at sequences of 2^17 and 2^20 tokens, on up to 1,024 GPUs.

    python benchmarks/scaling_on_paper.py                 # the table of docs/several_devices.md
    python benchmarks/scaling_on_paper.py --network 25 --mfu 0.3 --json scaling.json

Constants are measured where that is said, on one or two GPUs, and assumed otherwise; each is an option. None of it has
run on more than two GPUs. Efficiency is the time of one GPU without messages over the time of each of N, for N times
the work (data parallel: a sequence a GPU) or the N-th part of it (context, tensor: one sequence for all).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from mambaseq.atomic import json_text

STATE, CONV = 16, 4  # d_state and the convolution's width


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model of Mamba-1 blocks."""

    name: str
    layers: int
    width: int
    vocabulary: int
    tied: bool = True

    @property
    def rank(self) -> int:
        """Of the step sizes' projection."""
        return -(-self.width // 16)

    @property
    def parameters(self) -> int:
        d, inner = self.width, 2 * self.width
        layer = d * 2 * inner + inner * CONV + inner  # in_proj, convolution
        layer += inner * (self.rank + 2 * STATE) + self.rank * inner + inner  # x_proj, dt_proj
        layer += inner * STATE + inner + inner * d + d  # A, D, out_proj, norm
        return self.layers * layer + self.vocabulary * d * (1 if self.tied else 2) + d

    @property
    def flops(self) -> int:
        """Of a token's products with the weights, forward and backward; an embedding that is only looked up is none."""
        looked_up = 0 if self.tied else self.vocabulary * self.width
        return 6 * (self.parameters - looked_up)


MODELS = (
    Model("130 M", 24, 768, 50_280),
    Model("1.4 B", 48, 2048, 50_280),
    Model("7 B", 64, 4096, 65_024, tied=False),
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Constants. Bytes and operations a second, seconds a message.

    peak: bf16 of an H200. mfu: the share of it that a step reaches, measured for 130 M (313 k tokens a second at 1 x
        65,536, benchmarks/train_gpu.json); larger: assumed for 1.4 B and 7 B.
    nvlink, network: a direction of one GPU, within a host of `host` GPUs and between hosts; of data sheets.
    near, far: until a message arrives, within a host and between hosts; assumed.
    backward: its share of a step, beside which gradients are summed; assumed.
    summary: what gathering states takes of a layer, forward and backward, whatever its length; measured for 130 M on
        two GPUs of a host (see docs/several_devices.md), assumed for wider ones; hidden: the share of a layer beside
        which the gathered states travel; assumed.
    """

    peak: float = 989e12
    mfu: float = 0.245
    larger: float = 0.40
    nvlink: float = 450e9
    network: float = 50e9
    host: int = 8
    near: float = 10e-6
    far: float = 25e-6
    backward: float = 2 / 3
    summary: float = 2.4e-3
    hidden: float = 1 / 3

    def seconds_a_token(self, model: Model) -> float:
        share = self.mfu if model.parameters < 5e8 else self.larger
        return model.flops / (self.peak * share)

    def _split(self, n: int) -> tuple[int, int]:
        """GPUs of a host, and hosts."""
        return min(n, self.host), -(-n // self.host)

    def sum_seconds(self, n: int, size: float) -> float:
        """To sum `size` bytes over n GPUs, on each: within hosts, then each GPU its share between hosts."""
        near, hosts = self._split(n)
        sent = 2 * (near - 1) / near * size / self.nvlink + 2 * (hosts - 1) / hosts * size / near / self.network
        return sent + 2 * (math.log2(near) * self.near + math.log2(hosts) * self.far)

    def gather_seconds(self, n: int, size: float) -> float:
        """Until each of n GPUs has the `size` bytes of each."""
        near, hosts = self._split(n)
        sent = (hosts - 1) * size / self.network + (near - 1) * hosts * size / self.nvlink
        return sent + math.log2(near) * self.near + math.log2(hosts) * self.far

    def relay_seconds(self, n: int, size: float) -> float:
        """Until `size` bytes went from each of n GPUs to the next, one after the other."""
        between = self._split(n)[1] - 1
        within = n - 1 - between
        return within * (self.near + size / self.nvlink) + between * (self.far + size / self.network)

    def unhidden_sum(self, model: Model, n: int, computing: float) -> float:
        """What is left of summing fp32 gradients once the backward pass beside it has ended."""
        return max(0.0, self.sum_seconds(n, 4 * model.parameters) - self.backward * computing)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a GPU's step. bytes: that it sends for each token of its own share. seconds: of the step. alone: of the same
    work on a GPU without others."""

    bytes: float
    seconds: float
    alone: float

    @property
    def efficiency(self) -> float:
        return self.alone / self.seconds


def state_bytes(model: Model) -> int:
    """Of the state that a layer hands on, fp32: the scan's, and the convolution's last inputs."""
    return 4 * 2 * model.width * (STATE + CONV - 1)


def _gradient_bytes(model: Model, n: int) -> float:
    return 2 * (n - 1) / n * 4 * model.parameters


def data(machine: Machine, model: Model, tokens: int, n: int) -> Cost:
    """A sequence for each GPU."""
    alone = tokens * machine.seconds_a_token(model)
    return Cost(_gradient_bytes(model, n) / tokens, alone + machine.unhidden_sum(model, n, alone), alone)


def relayed(machine: Machine, model: Model, tokens: int, n: int) -> Cost:
    """One sequence, whose states go from each GPU to the next, layer by layer, and their gradients back."""
    alone = tokens / n * machine.seconds_a_token(model)
    seconds = alone * (model.layers + n - 1) / model.layers + 2 * machine.relay_seconds(n, state_bytes(model))
    sent = 2 * model.layers * state_bytes(model) + _gradient_bytes(model, n)
    return Cost(sent / (tokens / n), seconds + machine.unhidden_sum(model, n, alone), alone)


def gathered(machine: Machine, model: Model, tokens: int, n: int) -> Cost:
    """One sequence, whose GPUs run each layer at once: decays and states, fp32, of each to all."""
    alone = tokens / n * machine.seconds_a_token(model)
    size = state_bytes(model) + 4 * 2 * model.width * STATE
    left = max(0.0, machine.gather_seconds(n, size) - machine.hidden * alone / (2 * model.layers))
    seconds = alone + model.layers * machine.summary + 2 * model.layers * left
    sent = 2 * model.layers * size * (n - 1) + _gradient_bytes(model, n)
    return Cost(sent / (tokens / n), seconds + machine.unhidden_sum(model, n, alone), alone)


def tensor(machine: Machine, model: Model, tokens: int, n: int) -> Cost:
    """One sequence on all GPUs, each with a part of the channels: bf16 sums of what x_proj and out_proj give, and of
    their gradients, in every layer, which nothing hides."""
    alone = tokens * machine.seconds_a_token(model) / n
    size = 2 * (model.width + model.rank + 2 * STATE)
    summing = 2 * model.layers * machine.sum_seconds(n, size * tokens)
    return Cost(2 * (n - 1) / n * 2 * model.layers * size * n, alone + summing, alone)


def mixed(machine: Machine, model: Model, tokens: int, n: int) -> Cost:
    """One sequence for every `host` GPUs, by the faster of the two ways, and data parallel beside it."""
    shared = min(n, machine.host)
    part = min((one(machine, model, tokens, shared) for one in (relayed, gathered)), key=lambda cost: cost.seconds)
    within = part.seconds - machine.unhidden_sum(model, shared, part.alone)
    states = part.bytes - _gradient_bytes(model, shared) / (tokens / shared)
    sent = states + _gradient_bytes(model, n) / (tokens / shared)
    return Cost(sent, within + machine.unhidden_sum(model, n, part.alone), part.alone)


KINDS: dict[str, Callable[[Machine, Model, int, int], Cost]] = {
    "data": data,
    "context, relayed": relayed,
    "context, gathered": gathered,
    "tensor": tensor,
    "context in a host, data between": mixed,
}
SHOWN, MOST = (8, 64, 1024), 1024


def stops(machine: Machine, kind: str, model: Model, tokens: int, least: float = 0.8) -> int:
    """The most GPUs, a power of two up to 1,024, up to which the efficiency stays at `least`."""
    found = 1
    for n in (2**power for power in range(1, MOST.bit_length())):
        if KINDS[kind](machine, model, tokens, n).efficiency < least:
            break
        found = n
    return found


def table(machine: Machine) -> str:
    """In Markdown."""
    columns = "".join(f" on {n:,} |" for n in SHOWN)
    lines = [f"| parameters, tokens | parallel | bytes a token, 8 GPUs |{columns} 80 % up to |"]
    lines.append("|---|---|---:|" + "---:|" * (len(SHOWN) + 1))
    for model in MODELS:
        for power in (17, 20):
            first = f"{model.name}, 2^{power}"
            for kind, cost in KINDS.items():
                size = cost(machine, model, 2**power, 8).bytes
                cells = [f"{cost(machine, model, 2**power, n).efficiency:.0%}" for n in SHOWN]
                most = stops(machine, kind, model, 2**power)
                lines.append(f"| {first} | {kind} | {size:,.0f} | {' | '.join(cells)} | {most:,} |")
                first = ""
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    for field in dataclasses.fields(Machine):
        giga = field.name in ("nvlink", "network")
        parser.add_argument(f"--{field.name}", type=float, help="GB/s" if giga else None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Machine)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() & {"nvlink", "network"}:
        given[name] *= 1e9
    machine = dataclasses.replace(Machine(), **given | ({"host": int(given["host"])} if "host" in given else {}))
    print(table(machine))
    if arguments.json is not None:
        rows = [
            {"model": model.name, "tokens": tokens, "parallel": kind, "gpus": n, **dataclasses.asdict(cost)}
            for model in MODELS
            for tokens in (2**17, 2**20)
            for kind, of in KINDS.items()
            for n in (2**power for power in range(MOST.bit_length()))
            for cost in [of(machine, model, tokens, n)]
        ]
        told = {"machine": dataclasses.asdict(machine), "rows": rows}
        arguments.json.write_text(json_text(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
