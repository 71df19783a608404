"""Training over the GPUs of a host: sequences split along time (`mambaseq.parallel`), data parallel, sharded models.

    torchrun --nproc_per_node 2 benchmarks/context_parallel.py --out two.json
    torchrun --nproc_per_node 2 benchmarks/context_parallel.py --tiny          # on a CPU, by gloo, in seconds
    torchrun --nproc_per_node 4 benchmarks/context_parallel.py --one-gpu       # numbers alone, all ranks on one GPU
    python benchmarks/context_parallel.py --table one.json two.json --picture docs/images/several_devices.svg

First that the numbers are those of one GPU, then the time and memory of the scan, the block and the whole step, against
one GPU with the whole sequence. Efficiency is the time on one GPU / (ranks x the time on all). A step is forward,
backward and the sum of the gradients over the ranks. States are relayed (a rank is one layer behind the one before it,
which bounds the efficiency of L layers on N ranks by L / (L + N - 1)) or gathered (all ranks run a layer at once).
"scan x 24" is as many scans, each of the output of the last. "block" is what a layer adds to a stack: the time of 24
minus that of 12, over 12. "alone" is one GPU as a rank of several that hears its own messages: what gathering computes,
without what ranks wait for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mambaseq.atomic import json_text
from mambaseq.backbones.base import ContextStates
from mambaseq.backbones.residual import ResidualStack
from mambaseq.domain import catalog
from mambaseq.mixers.base import Mixer, State
from mambaseq.models import SequenceModel, build_model, causal_lm
from mambaseq.parallel import Context, Part
from mambaseq.parallel.recurrences import selective_scan
from mambaseq.tasks.sharding import shard_over

LAYERS = 24


@dataclasses.dataclass
class ScanState(State):
    ssm: Tensor


class Echo(Context):
    """One GPU as a rank of several: all that it hears is what it says."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self._sent = rank, size, []

    def begin_gather(self, tensors: Sequence[Tensor]) -> Any:
        return Heard([list(tensors)] * self.size)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        return tensor.detach().clone()


class ThroughCpu(Context):
    """All ranks on one GPU: NCCL refuses that, and gloo sends what is in memory."""

    def send(self, tensors: Sequence[Tensor], to: int, back: bool = False) -> None:
        super().send([tensor.cpu() for tensor in tensors], to, back)

    def receive(self, kinds: Any, source: int, device: torch.device, back: bool = False) -> list[Tensor]:
        found = super().receive(kinds, source, torch.device("cpu"), back)
        return [tensor.to(device) for tensor in found]

    def begin_gather(self, tensors: Sequence[Tensor]) -> Any:
        device = tensors[0].device
        everyone = super().begin_gather([tensor.cpu() for tensor in tensors]).wait()
        return Heard([[tensor.to(device) for tensor in one] for one in everyone])

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        return super()._reduced(tensor.cpu(), how).to(tensor.device)


class Heard:
    def __init__(self, everyone: list[list[Tensor]]) -> None:
        self._everyone = everyone

    def wait(self) -> list[list[Tensor]]:
        return self._everyone


class Measure:
    """What all measurements share: the ranks, sizes, and the rows found so far."""

    def __init__(self, context: Context, device: torch.device, out: Path | None, tiny: bool) -> None:
        self.context, self.device, self.out, self.tiny = context, device, out, tiny
        self.rows: list[dict[str, Any]] = []
        self.began = time.perf_counter()

    def worst(self, value: float) -> float:
        """The largest of all ranks' values."""
        return max(float(v) for v in self.context.gather(torch.tensor([value], device=self.device)))

    def timed(self, function: Callable[[], Any], repeats: int, warm_up: int) -> tuple[float, float]:
        """Median seconds of a call that all ranks begin together, the slowest's, and its peak of memory in GiB."""
        for _ in range(warm_up):
            function()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(repeats):
            self.worst(0.0)  # all have come here
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(self.worst(time.perf_counter() - start))
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        return statistics.median(seconds), self.worst(peak)

    def compare(
        self,
        name: str,
        length: int,
        one: Callable[[], Any],
        split: dict[str, Callable[[], Any]],
        repeats: int = 3,
        warm_up: int = 1,
        ranks: int = 0,
    ) -> None:
        """A row: the whole sequence on one GPU (each rank does so by itself), and split over all in some ways."""
        ranks = ranks or self.context.size
        row: dict[str, Any] = {"name": name, "length": length, "ranks": ranks}
        for key, function in {"one": one, **split}.items():
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                row[f"{key}_s"], row[f"{key}_gib"] = self.timed(function, repeats, warm_up)
            except torch.OutOfMemoryError:  # on every rank alike
                row[f"{key}_s"] = None
                continue
            if key != "one" and row["one_s"]:
                row[f"{key}_efficiency"] = row["one_s"] / (ranks * row[f"{key}_s"])
                row[f"{key}_memory"] = row[f"{key}_gib"] / row["one_gib"] if row["one_gib"] else None
        self.keep(row)

    def keep(self, row: dict[str, Any]) -> None:
        row["at_s"] = round(time.perf_counter() - self.began, 1)
        self.rows.append(row)
        if self.context.rank:
            return
        print(json_text(row), flush=True)
        if self.out is not None:
            gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else None
            found = {"bench": "context_parallel", "gpu": gpu, "torch": torch.__version__, "rows": self.rows}
            self.out.write_text(json_text(found, indent=2) + "\n")


def step_of(model: SequenceModel, tokens: Tensor, labels: Tensor, part: Part | None) -> Callable[[], Tensor]:
    """Forward and backward of a step, and the sum of gradients over the ranks; gives the loss."""

    def step() -> Tensor:
        model.zero_grad()
        device = tokens.device.type
        if part is None:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                loss = model(tokens, labels).loss
            loss.backward()
        else:
            with part, torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                loss = model(part.take(tokens), part.take(labels)).loss
            loss.backward()
            part.context.sum_gradients(model.parameters())
        return loss.detach()

    return step


def data(length: int, vocabulary: int, device: torch.device, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (batch, length + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def model_of(device: torch.device, size: dict[str, int], **options: Any) -> SequenceModel:
    torch.manual_seed(0)
    return causal_lm(**size, cuda_graph=False, **options).to(device)


def check(measure: Measure) -> None:
    """The loss and all gradients of a small model in fp32, whole and split, plain, packed by chunks, and of a hybrid.

    Raises SystemExit where they differ by more than rounding."""
    device = measure.device
    size = {"vocab_size": 64, "d_model": 32 if measure.tiny else 128, "n_layers": 4}
    length = 96 if measure.tiny else 8192
    forms: list[tuple[str, ContextStates, dict[str, Any], dict[str, Any]]] = [
        (
            f"{mixer}, {form}{', checkpoints' if checkpoint else ''}",
            form,
            {"mixer": mixer, "checkpoint": checkpoint},
            {},
        )
        for mixer in ("mamba", "mamba2")
        for form in ("relayed", "gathered")
        for checkpoint in ((False, True) if mixer == "mamba" and form == "gathered" else (False,))
    ]
    cases: list[tuple[str, ContextStates, dict[str, Any], dict[str, Any]]] = [
        *forms,
        ("mamba, in chunks", "auto", {"chunk_length": length // 8}, {"chunk_length": length // 8}),
        ("mamba, mamba2 and s4d", "auto", {"pattern": ["mamba", "mamba2", "s4d"]}, {}),
    ]
    for name, form, options, how in cases:
        model = model_of(device, size, **options)
        model.backbone.context_states = form  # type: ignore[assignment]
        check_one(measure, name, model, data(length, 64, device, 2), how)


def check_one(
    measure: Measure, name: str, model: SequenceModel, of: tuple[Tensor, Tensor], how: dict[str, Any]
) -> None:
    """Compare loss and gradients of one model, see `check`."""
    context, (tokens, labels) = measure.context, of
    length = tokens.shape[1]
    found = []
    for part in (None, context.split(length, 2, **how)):
        model.zero_grad()
        if part is None:
            loss = model(tokens, labels).loss
            loss.backward()
        else:
            with part:
                loss = model(part.take(tokens), part.take(labels)).loss
            loss.backward()
            context.sum_gradients(model.parameters())
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (loss, gradients), (split_loss, split_gradients) = found
    errors = [
        float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(split_gradients, gradients, strict=True)
    ]
    row = {
        "name": f"correct: {name}",
        "length": length,
        "ranks": context.size,
        "loss": float(loss),
        "loss_error": measure.worst(abs(float(split_loss - loss))),
        "gradient_error": measure.worst(max(errors)),
        "gradient_error_median": measure.worst(statistics.median(errors)),
    }
    measure.keep(row)
    if not (row["loss_error"] < 1e-4 and row["gradient_error"] < 1e-2 and row["gradient_error_median"] < 1e-3):
        raise SystemExit(f"{name}: the split sequence's numbers are others: {row}")


class Scan(Mixer):
    """The selective scan alone, of given steps and matrices."""

    sums_up = True

    def __init__(self, d_inner: int, length: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(_dtype(device))

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


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


FORMS: tuple[ContextStates, ...] = ("relayed", "gathered")


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
        x = torch.randn(1, length, channels, device=device, dtype=_dtype(device), requires_grad=True)
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
            row[f"{key}_s"] = (halves[1][f"{key}_s"] - halves[0][f"{key}_s"]) / (layers - layers // 2)
            if key != "one" and row.get("one_s"):
                row[f"{key}_efficiency"] = row["one_s"] / (context.size * row[f"{key}_s"])
    measure.keep(row)


def steps_of(measure: Measure, length: int, size: dict[str, int], chunk_length: int | None, repeats: int) -> None:
    """A whole step, as `step_of`; the losses of one and of all are kept beside it."""
    device, context = measure.device, measure.context
    model = model_of(device, size, chunk_length=chunk_length)
    tokens, labels = data(length, size["vocab_size"], device)
    part = context.split(length, 1, chunk_length=chunk_length)
    losses: dict[str, float] = {}
    forms: tuple[ContextStates, ...] = FORMS if chunk_length is None else ("relayed",)

    def noted(key: Any, step: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            model.backbone.context_states = "auto" if key == "one" else key
            losses[key] = float(step())

        return run

    name = "step" if chunk_length is None else f"step, chunk_length {chunk_length}"
    warm_up = 1 if repeats > 1 else 0
    measure.compare(
        name,
        length,
        noted("one", step_of(model, tokens, labels, None)),
        {form: noted(form, step_of(model, tokens, labels, part)) for form in forms},
        repeats,
        warm_up,
    )
    if not context.rank:
        print(f"  loss: {losses}", flush=True)
    measure.rows[-1] |= {f"{key}_loss": loss for key, loss in losses.items()}


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
    x = torch.randn(1, length, 2 * size["d_model"], device=device, dtype=_dtype(device), requires_grad=True)
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


def trained(measure: Measure, name: str, how: str, size: dict[str, int], batch: int, length: int) -> None:
    """Training steps with sequences of a rank's own (batch x length): tokens a second of all, MFU, memory. how: ddp or
    fsdp2, whose weights are made on the GPUs, random ones."""
    device, ranks = measure.device, measure.context.size
    model: Any
    if how == "ddp":
        model = model_of(device, size)
        count = model.n_parameters()
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        with torch.device("meta"):
            model = causal_lm(**size, checkpoint=size["d_model"] > 2048, cuda_graph=False)
        count = model.n_parameters()
        shard_over(model, init_device_mesh(device.type, (ranks,)))
        model.to_empty(device=device)
        for key, parameter in model.named_parameters():
            local: Any = parameter.to_local()  # type: ignore[attr-defined]
            with torch.no_grad():
                if local.dim() > 1 and not key.endswith("A_log"):
                    local.normal_(std=0.02)
                else:
                    local.fill_(-4.0 if key.endswith("dt_proj.bias") else 0.0 if "bias" in key else 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    tokens, labels = data(length, size["vocab_size"], device, batch)
    losses: list[Tensor] = []

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            loss = model(tokens, labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    row: dict[str, Any] = {
        "name": f"{how}, {name}",
        "ranks": ranks,
        "parameters": count,
        "batch": batch,
        "length": length,
    }
    try:
        row["step_s"], row["gib"] = measure.timed(step, repeats=5 if count < 5e8 else 2, warm_up=2)
        row["tokens_per_s"] = ranks * batch * length / row["step_s"]
        row["losses"] = [float(loss) for loss in losses[:: max(1, len(losses) - 1)]]
        if device.type == "cuda" and (peak := get_available_flops(device, torch.bfloat16)):
            row["mfu"] = 6 * count * row["tokens_per_s"] / (peak * ranks)
    except torch.OutOfMemoryError:  # on every rank alike
        row["step_s"] = None
    measure.keep(row)


def told(files: Sequence[Path], picture: Path | None) -> None:
    """Print the rows of several files as tables, and draw their efficiencies."""
    rows = [row for path in files for row in json.loads(path.read_text())["rows"]]
    print("| | positions | GPUs | one GPU, s | relayed, s | efficiency | gathered, s | efficiency | memory a rank |")
    print("|---|---|---|---|---|---|---|---|---|")
    shown = [row for row in rows if any(f"{form}_efficiency" in row for form in FORMS)]
    for row in shown:
        cells = [row["name"], f"{row['length']:,}", row["ranks"], f"{row['one_s']:.4f}"]
        for form in FORMS:
            seconds, share = row.get(f"{form}_s"), row.get(f"{form}_efficiency")
            cells += ["", ""] if not seconds else [f"{seconds:.4f}", f"{100 * share:.0f} %"]
        memory = [row[f"{form}_memory"] for form in FORMS if row.get(f"{form}_memory")]
        print("|", " | ".join(map(str, [*cells, f"{100 * max(memory):.0f} %" if memory else ""])), "|")
    print("\n| | parameters | GPUs | tokens/s | MFU | GiB a GPU |\n|---|---|---|---|---|---|")
    for row in rows:
        if row.get("tokens_per_s"):
            share = f"{100 * row['mfu']:.1f} %" if "mfu" in row else ""
            numbers = (
                f"{row['parameters']:,}",
                row["ranks"],
                f"{row['tokens_per_s']:,.0f}",
                share,
                f"{row['gib']:.1f}",
            )
            print("|", " | ".join(map(str, (row["name"], *numbers))), "|")
    if picture is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 0.35 * len(shown) + 1.2), layout="constrained")
        axes = figure.subplots()
        names = [f"{row['name']}, {row['length']:,} on {row['ranks']}" for row in shown]
        for at, form in enumerate(FORMS):
            values = [100 * row.get(f"{form}_efficiency", 0) for row in shown]
            axes.barh([n + 0.4 * at for n in range(len(shown))], values, 0.38, label=form)
        axes.set_yticks([n + 0.2 for n in range(len(shown))], names)
        axes.invert_yaxis()
        axes.set_xlim(0, 105)
        axes.set_xlabel("efficiency, % of as many times one GPU")
        axes.legend()
        figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file, written after each measurement")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU, by gloo")
    parser.add_argument("--longest", type=int, default=22, help="log2 of the longest sequence in chunks (from 20)")
    parts = ("alone", "layers", "step", "chunks", "ways", "ddp", "fsdp2", "large")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts, help="with none, numbers are checked alone")
    parser.add_argument("--unchecked", action="store_true", help="do not check the numbers first")
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on one GPU, by gloo: for checks")
    parser.add_argument("--table", nargs="+", type=Path, help="print these files as tables, and measure nothing")
    parser.add_argument("--picture", type=Path, help="where --table draws them")
    options = parser.parse_args()
    if options.table:
        told(options.table, options.picture)
        return
    device = torch.device("cpu")
    if not options.tiny:
        device = torch.device("cuda", 0 if options.one_gpu else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.tiny or options.one_gpu else "nccl")
    context = (ThroughCpu if options.one_gpu else Context)(dist.group.WORLD)
    measure = Measure(context, device, options.out, options.tiny)
    if not options.unchecked:
        check(measure)
    if options.tiny:
        length, chunk_length, width = 128, 32, 16
        size = {"vocab_size": 32, "d_model": 16, "n_layers": 4}
        lengths = [256]
        models = {"130 M": (size, 2, 64)}
    else:
        length, chunk_length, width = 2**17, 2**16, 768
        size = {"vocab_size": 50280, "d_model": width, "n_layers": LAYERS}
        lengths = [2**n for n in range(20, options.longest + 1, 2)]
        # 9 B in fp32 with AdamW's moments and gradients are 134 GiB
        models = {
            "130 M": (size, 8, 2048),
            "1.4 B": (size | {"d_model": 2048, "n_layers": 48}, 4, 2048),
            "9 B": (size | {"d_model": 4096, "n_layers": 86}, 2, 2048),
        }
    if "alone" in options.only and not context.rank and context.size == 1:
        alone(measure, length, size, (2, 4, 8))
    if "layers" in options.only and context.size > 1:
        layers_of(measure, length, width, size["n_layers"])
    if "step" in options.only and context.size > 1:
        steps_of(measure, length, size, None, repeats=3)
    if "ddp" in options.only:
        trained(measure, "130 M", "ddp", *models["130 M"])
    if "fsdp2" in options.only:
        for name in ("130 M", "1.4 B"):
            if name in models:
                trained(measure, name, "fsdp2", *models[name])
    if "large" in options.only and "9 B" in models and context.size > 1:
        trained(measure, "9 B", "fsdp2", *models["9 B"])
    if "chunks" in options.only and context.size > 1:
        for long in lengths:
            steps_of(measure, long, size, chunk_length, repeats=2 if long == lengths[0] else 1)
    if "ways" in options.only and context.size > 1:
        both_ways(measure)
    context.finish()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
