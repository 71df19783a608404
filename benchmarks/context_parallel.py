"""Sequences split along time over the GPUs of a host (`mambaseq.parallel`): first that the numbers are those of one
GPU, then the time and memory of the scan, the block and the whole step, against one GPU with the whole sequence.

    torchrun --nproc_per_node 2 benchmarks/context_parallel.py --out context_parallel.json
    torchrun --nproc_per_node 2 benchmarks/context_parallel.py --tiny          # on a CPU, by gloo, in seconds

Efficiency is the time on one GPU / (ranks x the time on all). A step is forward, backward and the sum of the gradients
over the ranks. "scan x 24" is as many scans, each of the output of the last. "block" is what a layer adds to a stack:
the time of 24 minus that of 12, over 12. A single layer alone cannot be faster than on one GPU, since states go from
rank to rank; in a stack a rank is one layer behind the one before it, which bounds the efficiency of L layers on N
ranks by L / (L + N - 1).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mambaseq.atomic import json_text
from mambaseq.backbones.residual import ResidualStack
from mambaseq.domain import catalog
from mambaseq.mixers.base import Mixer, State
from mambaseq.models import SequenceModel, build_model, causal_lm
from mambaseq.parallel import Context, Part
from mambaseq.parallel.recurrences import selective_scan

LAYERS = 24


@dataclasses.dataclass
class ScanState(State):
    ssm: Tensor


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
        all_: Callable[[], Any],
        repeats: int = 3,
        warm_up: int = 1,
    ) -> None:
        """A row: the whole sequence on one GPU (each rank does so by itself), and split over all."""
        row: dict[str, Any] = {"name": name, "length": length, "ranks": self.context.size}
        for key, function in (("one", one), ("all", all_)):
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                row[f"{key}_s"], row[f"{key}_gib"] = self.timed(function, repeats, warm_up)
            except torch.OutOfMemoryError:  # on every rank alike
                row[f"{key}_s"] = None
                continue
        if row["one_s"] and row["all_s"]:
            row["efficiency"] = row["one_s"] / (self.context.size * row["all_s"])
            row["memory"] = row["all_gib"] / row["one_gib"] if row["one_gib"] else None
            row["tokens_per_s"] = length / row["all_s"]
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
    return causal_lm(**size, mixer="mamba", cuda_graph=False, **options).to(device)


def check(measure: Measure) -> None:
    """The loss and all gradients of a small model in fp32, whole and split, plain, packed by chunks, and of a hybrid.

    Raises SystemExit where they differ by more than rounding."""
    device = measure.device
    size = {"vocab_size": 64, "d_model": 32 if measure.tiny else 128, "n_layers": 4}
    length = 96 if measure.tiny else 8192
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("mamba", {}, {}),
        ("mamba, in chunks", {"chunk_length": length // 8}, {"chunk_length": length // 8}),
        ("mamba, checkpoints", {"checkpoint": True}, {}),
        ("mamba, mamba2 and s4d", {"pattern": ["mamba", "mamba2", "s4d"]}, {}),
    ]
    for name, options, how in cases:
        check_one(measure, name, model_of(device, size, **options), data(length, 64, device, 2), how)


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


def layers_of(measure: Measure, length: int, width: int, layers: int) -> None:
    """The scan and the block, in stacks of layers: forward and backward over random inputs."""
    device, context = measure.device, measure.context
    part = context.split(length, 1)

    def both(stack: ResidualStack, x: Tensor, part: Part | None) -> Callable[[], None]:
        def run() -> None:
            stack.zero_grad()
            device_type = x.device.type
            with part or contextlib.nullcontext(), torch.autocast(device_type, torch.bfloat16, device_type == "cuda"):
                y = stack(x)
            y.backward(torch.ones_like(y))
            context.finish()

        return run

    for name, channels, counts in (("scan", 2 * width, (1, layers)), ("block", width, (layers // 2, layers))):
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
            measure.compare(f"{name} x {count}", length, both(stack, x, None), both(stack, mine, part))
            del stack, shared, mixers
    halves = [row for row in measure.rows if row["name"] in (f"block x {layers // 2}", f"block x {layers}")]
    if all(row.get("efficiency") for row in halves):
        one, all_ = ((halves[1][key] - halves[0][key]) / (layers - layers // 2) for key in ("one_s", "all_s"))
        measure.keep(
            {
                "name": "block, of a stack",
                "length": length,
                "ranks": context.size,
                "one_s": one,
                "all_s": all_,
                "efficiency": one / (context.size * all_),
            }
        )


def steps_of(measure: Measure, length: int, size: dict[str, int], chunk_length: int | None, repeats: int) -> None:
    """A whole step, as `step_of`; the losses of one and of all are kept beside it."""
    device, context = measure.device, measure.context
    model = model_of(device, size, chunk_length=chunk_length)
    tokens, labels = data(length, size["vocab_size"], device)
    part = context.split(length, 1, chunk_length=chunk_length)
    losses: dict[str, float] = {}

    def noted(key: str, step: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            losses[key] = float(step())

        return run

    name = "step" if chunk_length is None else f"step, chunk_length {chunk_length}"
    warm_up = 1 if repeats > 1 else 0
    measure.compare(
        name,
        length,
        noted("one", step_of(model, tokens, labels, None)),
        noted("all", step_of(model, tokens, labels, part)),
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
        step_of(model, tokens, labels, context.split(length, 1)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file, written after each measurement")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU, by gloo")
    parser.add_argument("--longest", type=int, default=22, help="log2 of the longest sequence in chunks (from 20)")
    parts = ("step", "chunks", "layers", "ways")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts, help="with none, numbers are checked alone")
    options = parser.parse_args()
    device = torch.device("cpu")
    if not options.tiny:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.tiny else "nccl")
    context = Context(dist.group.WORLD)
    measure = Measure(context, device, options.out, options.tiny)
    check(measure)
    if options.tiny:
        length, chunk_length, width = 128, 32, 16
        size = {"vocab_size": 32, "d_model": 16, "n_layers": 4}
        lengths = [256]
    else:
        length, chunk_length, width = 2**17, 2**16, 768
        size = {"vocab_size": 50280, "d_model": width, "n_layers": LAYERS}
        lengths = [2**n for n in range(20, options.longest + 1, 2)]
    if "step" in options.only:
        steps_of(measure, length, size, None, repeats=3)
    if "chunks" in options.only:
        for long in lengths:
            steps_of(measure, long, size, chunk_length, repeats=2 if long == lengths[0] else 1)
    if "layers" in options.only:
        layers_of(measure, length, width, size["n_layers"])
    if "ways" in options.only:
        both_ways(measure)
    context.finish()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
