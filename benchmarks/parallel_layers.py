"""Sequences split along time: the scan, the block and the whole step, see `context_parallel.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from parallel_measures import (
    FORMS,
    Echo,
    Measure,
    Waits,
    check_one,
    data,
    dtype_of,
    model_of,
    quiet,
    replays,
    step_of,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mambaseq.backbones.automatic import EAGER_CALLS
from mambaseq.backbones.base import ContextStates
from mambaseq.backbones.residual import ResidualStack
from mambaseq.domain import catalog
from mambaseq.mixers.base import Mixer, State
from mambaseq.models import SequenceModel, build_model
from mambaseq.parallel import Context, Part
from mambaseq.parallel.recurrences import selective_scan


@dataclasses.dataclass
class ScanState(State):
    ssm: Tensor


class Scan(Mixer):
    """The selective scan alone, of given steps and matrices."""

    sums_up = True

    def __init__(self, d_inner: int, length: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype_of(device))

        self.d_model = d_inner
        self.dt, self.B, self.C = normal(1, length, d_inner) - 4, normal(1, length, 16), normal(1, length, 16)
        A = -torch.arange(1, 17, device=device, dtype=torch.float32).repeat(d_inner, 1)
        self.A = torch.nn.Parameter(A)

    def forward(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, return_state: bool = False) -> Any:
        n = x.shape[1]
        y, final = selective_scan(
            x,
            self.dt[:, :n],
            self.A,
            self.B[:, :n],
            self.C[:, :n],
            z=x,
            dt_softplus=True,
            initial_state=None if state is None else state.ssm,
            return_final_state=return_state,
        )
        return (y, ScanState(final)) if return_state else y

    def scale_residual_(self, factor: float) -> None:
        pass

    def init_state(self, batch_size: int, max_length: Any = None, dtype: Any = None, device: Any = None) -> Any:
        return ScanState(torch.zeros(batch_size, self.d_model, 16, device=device or self.A.device))


def layers_of(measure: Measure, length: int, width: int, layers: int) -> None:
    """The scan and the block, in stacks of layers: forward and backward over random inputs."""
    device, context = measure.device, measure.context
    part = context.split(length, 1)

    def both(stack: ResidualStack, x: Tensor, part: Part | None, form: ContextStates = "auto") -> Callable[[], None]:
        def run() -> None:
            stack.context_states = form
            stack.zero_grad()
            device_type = x.device.type
            with part or contextlib.nullcontext(), torch.autocast(device_type, torch.bfloat16, device_type == "cuda"):
                y = stack(x)
            y.backward(torch.ones_like(y))
            context.finish()

        return run

    for name, channels, counts in (("scan", 2 * width, (1, layers)), ("block", width, (1, layers // 2, layers))):
        x = torch.randn(1, length, channels, device=device, dtype=dtype_of(device), requires_grad=True)
        mine = part.take(x.detach()).clone().requires_grad_()
        for count in counts:

            def made(layer: int, name: str = name, channels: int = channels) -> Mixer:
                return Scan(channels, length, device) if name == "scan" else catalog()["mixers"].get("mamba")(channels)

            torch.manual_seed(0)
            shared = made(0)  # one for all layers: its tensors are large
            mixers = [shared] * count if name == "scan" else [shared, *map(made, range(1, count))]
            stack = ResidualStack(mixers.__getitem__, count)
            stack = stack.to(device)
            split = {form: both(stack, mine, part, form) for form in FORMS}
            measure.compare(f"{name} x {count}", length, both(stack, x, None), split)
            del stack, shared, mixers
    halves = [row for row in measure.rows if row["name"] in (f"block x {layers // 2}", f"block x {layers}")]
    row: dict[str, Any] = {"name": "block, of a stack", "length": length, "ranks": context.size}
    for key in ("one", *FORMS):
        if all(half.get(f"{key}_s") for half in halves):
            more = halves[1][f"{key}_s"] - halves[0][f"{key}_s"]
            if more <= 0:  # times of small layers differ more from one another than by what a layer takes
                continue
            row[f"{key}_s"] = more / (layers - layers // 2)
            if key != "one" and row.get("one_s"):
                row[f"{key}_efficiency"] = row["one_s"] / (context.size * row[f"{key}_s"])
    measure.keep(row)


def steps_of(measure: Measure, length: int, size: dict[str, int]) -> None:
    """A whole step, as `step_of`; the losses of one and of all are kept beside it."""
    device, context = measure.device, measure.context
    model = model_of(device, size)
    tokens, labels = data(length, size["vocab_size"], device)
    part = context.split(length, 1)
    losses: dict[str, float] = {}

    def noted(key: Any, step: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            model.backbone.context_states = "auto" if key == "one" else key
            losses[f"{key}_loss"] = float(step())

        return run

    measure.compare(
        "step",
        length,
        noted("one", step_of(model, tokens, labels, None)),
        {form: noted(form, step_of(model, tokens, labels, part)) for form in FORMS},
        also=losses,
    )


def steps_in_chunks(
    measure: Measure, length: int, size: dict[str, int], chunk_length: int, with_eager: bool = True
) -> None:
    """As `steps_of`, in chunks: all ranks together have chunk_length positions at a time, as one GPU does. Chunks are
    replayed from CUDA graphs where that is of use, `replays` of them in a step; `eager` are those of several GPUs that
    are not. Of each one step is measured, after one like it, which takes its memory from the driver.

    with_eager: measure `eager`, too."""
    device, context = measure.device, measure.context
    model = model_of(device, size, chunk_length=chunk_length, cuda_graph="auto")
    tokens, labels = data(length, size["vocab_size"], device)
    found: dict[str, Any] = {}
    few, share = 2 * chunk_length, chunk_length // context.size

    def noted(key: str, part: Part | None) -> Callable[[], None]:
        step = step_of(model, tokens, labels, part)

        def run() -> None:
            before = replays(model)["replays"]
            found[f"{key}_loss"] = float(step())
            found[f"{key}_replays"] = replays(model)["replays"] - before
            found.update({k: v for k, v in replays(model).items() if k != "replays"})

        return run

    def prepared(key: str, times: int, part: Part | None) -> Callable[[], None]:
        """Kernels are compiled and chunks are captured by shorter steps, of two chunks each."""

        def run() -> None:
            model.backbone.cuda_graph = False if key == "eager" else "auto"
            for _ in range(times):
                step_of(model, tokens[:, :few], labels[:, :few], part)()

        return run

    shorter, part = context.split(few, 1, chunk_length=share), context.split(length, 1, chunk_length=share)
    before = {"one": prepared("one", 1, None), "eager": prepared("eager", 1, shorter)}
    before["relayed"] = prepared("relayed", 1 + EAGER_CALLS // 2, shorter)
    split = {key: noted(key, part) for key in (("eager", "relayed") if with_eager else ("relayed",))}
    name = f"step, chunk_length {chunk_length}"
    measure.compare(name, length, noted("one", None), split, repeats=1, also=found, before=before)


def groups_of(measure: Measure, lengths: Sequence[int], size: dict[str, int], chunk_length: int, shared: int) -> None:
    """Whole steps in chunks where each `shared` ranks have a sequence of their own: data parallel and context parallel.
    All groups have the same one, so that the loss is that of one GPU, which each rank finds by itself. Measured are
    second steps, as by `steps_in_chunks`."""
    device, everyone = measure.device, measure.context
    groups = everyone.size // shared
    mesh = init_device_mesh(device.type, (groups, shared), mesh_dim_names=("data", "context"))
    context = Context(mesh["context"])
    model = model_of(device, size, chunk_length=chunk_length)
    for length in lengths:
        tokens, labels = data(length, size["vocab_size"], device)
        part, losses = context.split(length, 1, chunk_length=chunk_length // shared), dict[str, float]()
        steps = {"one": step_of(model, tokens, labels, None), "relayed": step_of(model, tokens, labels, part, everyone)}

        def noted(key: str, steps: Any = steps, losses: Any = losses) -> None:
            losses[f"{key}_loss"] = float(steps[key]())

        one, split = functools.partial(noted, "one"), functools.partial(noted, "relayed")
        name = f"step, ddp x context parallel {shared}, chunk_length {chunk_length}"
        measure.compare(name, length, one, {"relayed": split}, repeats=1, sequences=groups, also=losses)


def apart(measure: Measure, length: int, size: dict[str, int], chunk_length: int, by_graphs: bool) -> None:
    """Where the time of a chunk goes, in ms, that of the slowest rank: `chunk_ms` the whole; `quiet_ms` without
    messages (states are zeros); `waits_ms` of it a GPU waits for a neighbour's; and what the host needs to start it,
    which is the time of a chunk of few positions: `host_ms`, and `host_quiet_ms` without messages. Those of one GPU by
    itself, whose chunks are as long as those of all ranks: `one_ms`, `host_one_ms`. by_graphs: all are replayed, stages
    of a chunk as often as `replays` of each says; if not, none."""
    device, context = measure.device, measure.context
    model = model_of(device, size, chunk_length=chunk_length, cuda_graph=by_graphs)
    few = chunk_length // 2 if measure.tiny else 256
    name = "a chunk, apart" if by_graphs else "a chunk, apart, eager"
    row: dict[str, Any] = {"name": name, "length": length, "ranks": context.size}
    for name, positions in (("", chunk_length), ("host_", few)):
        tokens, labels = data(length // chunk_length * positions, size["vocab_size"], device)
        model.backbone.chunk_length = positions
        part = context.split(tokens.shape[1], 1, chunk_length=positions // context.size)
        alone, split = step_of(model, tokens, labels, None), step_of(model, tokens, labels, part)
        short = context.split(2 * positions, 1, chunk_length=positions // context.size)
        for of in (None, short):  # kernels are compiled, and chunks captured
            for _ in range(3 if by_graphs else 1):
                step_of(model, tokens[:, : 2 * positions], labels[:, : 2 * positions], of)()
        waits = Waits(context, device)
        for key, step, around in (
            ("one", alone, contextlib.nullcontext()),
            ("chunk", split, waits),
            ("quiet", split, quiet(context, device)),
        ):
            measure.tidy()
            before = replays(model)["replays"]
            with around:
                found = measure.timed(step, repeats=1, warm_up=0)
            row[f"{name}{key}_replays"] = replays(model)["replays"] - before
            row[f"{name}{key}_gc"] = measure.told["gc_ms"] / len(part.mine)
            told = "host" if name and key == "chunk" else f"{name}{key}"
            row[f"{told}_ms"] = 1e3 * found[0] / len(part.mine) if found else None
        if not name:
            row["waits_ms"] = [1e3 * float(one) / len(part.mine) for one in context.gather(waits.seconds())]
    measure.keep(row | replays(model))


def both_ways(measure: Measure) -> None:
    """Both strands of DNA, each read both ways (as Caduceus does): correct, then a step."""
    device, context = measure.device, measure.context

    def made(width: int, layers: int) -> SequenceModel:
        torch.manual_seed(0)
        pairs = {"vocab_size": 16, "complement": [3, 2, 1, 0, *range(4, 16)]}
        return build_model(
            {
                "d_model": width,
                "encoder": {"name": "rc_tokens", **pairs},
                "backbone": {"name": "reverse_complement", "n_layers": layers, "cuda_graph": False},
                "mixer": {"name": "mamba"},
                "head": {"name": "rc_lm", **pairs},
            }
        ).to(device)

    small = 96 if measure.tiny else 8192
    check_one(measure, "both strands, both ways", made(32, 4), data(small, 16, device, 2), {})
    length = 128 if measure.tiny else 2**16
    model = made(32, 2) if measure.tiny else made(256, 16)
    tokens, labels = data(length, 16, device)
    measure.compare(
        "step, both strands, both ways",
        length,
        step_of(model, tokens, labels, None),
        {"relayed": step_of(model, tokens, labels, context.split(length, 1))},
    )


def alone(measure: Measure, length: int, size: dict[str, int], counts: Sequence[int]) -> None:
    """A rank of several by itself, states gathered: a step, and what a layer adds to a stack."""
    device = measure.device
    model = model_of(device, size)
    model.backbone.context_states = "gathered"  # type: ignore[assignment]
    tokens, labels = data(length, size["vocab_size"], device)
    whole = step_of(model, tokens, labels, None)
    for count in counts:
        part = Echo(count // 2, count).split(length, 1)
        measure.compare("step, alone", length, whole, {"gathered": step_of(model, tokens, labels, part)}, ranks=count)
    del model, whole
    x = torch.randn(1, length, 2 * size["d_model"], device=device, dtype=dtype_of(device), requires_grad=True)
    scan = Scan(2 * size["d_model"], length, device)
    stack = ResidualStack([scan].__getitem__, 1).to(device)
    stack.context_states = "gathered"
    for count in counts:
        part = Echo(count // 2, count).split(length, 1)
        mine = part.take(x.detach()).clone().requires_grad_()

        def run(x: Tensor, part: Part | None) -> None:
            stack.zero_grad()
            with part or contextlib.nullcontext(), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
                y = stack(x)
            y.backward(torch.ones_like(y))

        split = {"gathered": functools.partial(run, mine, part)}
        measure.compare("scan x 1, alone", length, functools.partial(run, x, None), split, ranks=count)
