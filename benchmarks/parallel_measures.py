"""What `context_parallel.py` measures with: ranks that begin together, rows that are kept as they come, models and
data, and the comparison of a sequence that is split with one that is whole."""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from parallel_report import keep
from torch import Tensor

from mambaseq.atomic import json_text
from mambaseq.backbones.base import ContextStates
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.parallel import Context, Part
from mambaseq.parallel.context import Like

FORMS: tuple[ContextStates, ...] = ("relayed", "gathered")


class Echo(Context):
    """One GPU as a rank of several: all that it hears is what it says."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self._sent = rank, size, []

    def begin_gather(self, tensors: Sequence[Tensor]) -> Any:
        return Heard([list(tensors)] * self.size)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        return tensor.detach().clone()


class ThroughCpu(Context):
    """By gloo, which sends what is in memory: ranks that are all on one GPU, which NCCL refuses."""

    def send(self, tensors: Sequence[Tensor], to: int, back: bool = False) -> None:
        super().send([tensor.cpu() for tensor in tensors], to, back)

    def receive(self, kinds: Any, source: int, device: torch.device, back: bool = False) -> list[Tensor]:
        found = super().receive(kinds, source, torch.device("cpu"), back)
        return [tensor.to(device) for tensor in found]

    def begin_gather(self, tensors: Sequence[Tensor]) -> Any:
        device = tensors[0].device
        everyone = super().begin_gather([tensor.cpu() for tensor in tensors]).wait()
        return Heard([[tensor.to(device) for tensor in one] for one in everyone])

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [one.to(tensor.device) for one in super().gather(tensor.cpu())]

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        return super()._reduced(tensor.cpu(), how).to(tensor.device)


class Waits:
    """Within `with`, how long this rank waits for messages: a GPU's stream, or a CPU."""

    def __init__(self, context: Context, device: torch.device) -> None:
        self._context, self._device = context, device
        self._events: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        receive = self._context.receive

        def timed(*arguments: Any, **options: Any) -> list[Tensor]:
            begin = self._now()
            found = receive(*arguments, **options)
            self._events.append((begin, self._now()))
            return found

        self._context.receive = timed  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        del self._context.receive

    def seconds(self) -> Tensor:
        """`(1,)`: of all messages together, once the device has run them."""
        cuda = self._device.type == "cuda"
        each = [begin.elapsed_time(end) / 1e3 if cuda else end - begin for begin, end in self._events]
        return torch.tensor([sum(each)], device=self._device)


@contextlib.contextmanager
def quiet(context: Context, device: torch.device) -> Iterator[None]:
    """Nothing is sent, and what is received are zeros."""

    def zeros(kinds: Sequence[Like], *_: Any) -> list[Tensor]:
        return [torch.zeros(kind.shape, dtype=kind.dtype, device=device) for kind in kinds]

    context.send, context.receive = (lambda *_, **__: None), zeros  # type: ignore[method-assign]
    try:
        yield
    finally:
        del context.send, context.receive


class Heard:
    def __init__(self, everyone: list[list[Tensor]]) -> None:
        self._everyone = everyone

    def wait(self) -> list[list[Tensor]]:
        return self._everyone


class Collections:
    """Within `with`, the seconds in which Python looked for what nothing holds, while it did nothing else."""

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0

    def _call(self, phase: str, _: Any) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._began

    def __enter__(self) -> Collections:
        gc.callbacks.append(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        gc.callbacks.remove(self._call)


def idle_in_graphs() -> int:
    """Bytes of CUDA graphs' own memory in which no tensor is that PyTorch counts: a replay's, which it does not see."""
    segments = torch.cuda.memory_snapshot()
    own = [one for one in segments if tuple(one.get("segment_pool_id", (0, 0))) != (0, 0)]
    return sum(one["total_size"] - one["allocated_size"] for one in own)


def replays(model: SequenceModel) -> dict[str, Any]:
    """How many stages of chunks were replayed from CUDA graphs, and why no more are, where that is."""
    graphs = model.backbone.chunk_graphs  # type: ignore[union-attr]
    why: dict[str, Any] = {} if graphs.why_not is None else {"why_not_replayed": graphs.why_not}
    return {"replays": graphs.replays} | why  # type: ignore[operator]


class Measure:
    """What all measurements share: the ranks, sizes, and the rows found so far. told: of the last call that was timed,
    besides what `timed` gives."""

    def __init__(self, context: Context, device: torch.device, out: Path | None, tiny: bool) -> None:
        self.context, self.device, self.out, self.tiny = context, device, out, tiny
        self.rows: list[dict[str, Any]] = []
        self.began = time.perf_counter()
        self.told: dict[str, float] = {}

    def worst(self, value: float) -> float:
        """The largest of all ranks' values."""
        return max(float(v) for v in self.context.gather(torch.tensor([value], device=self.device)))

    def timed(self, function: Callable[[], Any], repeats: int, warm_up: int) -> tuple[float, float] | None:
        """Median seconds of a call that all ranks begin together, the slowest's, and its peak of memory in GiB, that of
        graphs with it. None where it needs more than a rank has."""
        cuda = self.device.type == "cuda"
        seconds = []
        for number in range(warm_up + repeats):
            self.worst(0.0)  # all have come here
            if cuda:
                torch.cuda.synchronize()
                if number == warm_up:
                    torch.cuda.reset_peak_memory_stats()
            asked = torch.cuda.memory_stats().get("num_device_alloc", 0) if cuda else 0
            start, lacks = time.perf_counter(), 0.0
            with Collections() as collections:
                try:
                    function()
                    if cuda:
                        torch.cuda.synchronize()
                except torch.OutOfMemoryError:
                    lacks = 1.0
            taken = time.perf_counter() - start
            more = torch.cuda.memory_stats().get("num_device_alloc", 0) - asked if cuda else 0
            # what the host lost to Python's collector, and how often it asked the driver for memory
            self.told = {"gc_ms": 1e3 * self.worst(collections.seconds), "mallocs": self.worst(more)}
            if self.worst(lacks):
                return None
            if number >= warm_up:
                seconds.append(self.worst(taken))
        peak = (torch.cuda.max_memory_allocated() + idle_in_graphs()) / 2**30 if cuda else 0.0
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
        sequences: int = 1,
        also: Mapping[str, Any] | None = None,
        before: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        """A row: the whole sequence on one GPU (each rank does so by itself), and split over all in some ways.
        sequences: how many the ranks work on at a time. also: what the functions find. before: what is run before some
        of them, which is not measured."""
        ranks = ranks or self.context.size
        row: dict[str, Any] = {"name": name, "length": length, "ranks": ranks}
        for key, function in {"one": one, **split}.items():
            if before is not None and key in before:
                before[key]()
            self.tidy()
            found = self.timed(function, repeats, warm_up)
            row[f"{key}_s"], row[f"{key}_gib"] = found or (None, None)
            if before is not None:
                row |= {f"{key}_{name}": value for name, value in self.told.items()}
            if found and key != "one" and row["one_s"]:
                row[f"{key}_efficiency"] = sequences * row["one_s"] / (ranks * row[f"{key}_s"])
                row[f"{key}_memory"] = row[f"{key}_gib"] / row["one_gib"] if row["one_gib"] else None
        self.keep(row | dict(also or {}))

    def tidy(self) -> None:
        """Give back what nothing holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def keep(self, row: dict[str, Any]) -> None:
        """Print a row, and write it to the file at once."""
        row["at_s"] = round(time.perf_counter() - self.began, 1)
        self.rows.append(row)
        if self.context.rank:
            return
        print(json_text(row), flush=True)
        if self.out is not None:
            gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else None
            keep(self.out, row, gpu=gpu, torch=torch.__version__)


def step_of(
    model: SequenceModel, tokens: Tensor, labels: Tensor, part: Part | None, everyone: Context | None = None
) -> Callable[[], Tensor]:
    """Forward and backward of a step, and the sum of gradients over the ranks; gives the loss. everyone: these, where
    more than the part's have sequences."""

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
            part.context.finish()
            (everyone or part.context).sum_gradients(model.parameters())
        return loss.detach()

    return step


def data(length: int, vocabulary: int, device: torch.device, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (batch, length + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def model_of(device: torch.device, size: dict[str, int], **options: Any) -> SequenceModel:
    """cuda_graph: False, unless it is given."""
    torch.manual_seed(0)
    return causal_lm(**size, **({"cuda_graph": False} | options)).to(device)


def check(measure: Measure, chunks_alone: bool) -> None:
    """The loss and all gradients of a small model in fp32, whole and split, plain, by chunks, and of a hybrid; see
    `check_one`."""
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
        (
            "mamba, in chunks, by graphs",
            "auto",
            {"chunk_length": length // 8, "cuda_graph": True},
            {"chunk_length": length // 8},
        ),
        ("mamba, mamba2 and s4d", "auto", {"pattern": ["mamba", "mamba2", "s4d"]}, {}),
    ]
    for name, form, options, how in cases:
        if chunks_alone and not how:
            continue
        model = model_of(device, size, **options)
        model.backbone.context_states = form  # type: ignore[assignment]
        check_one(measure, name, model, data(length, 64, device, 2), how)


def check_one(
    measure: Measure, name: str, model: SequenceModel, of: tuple[Tensor, Tensor], how: dict[str, Any]
) -> None:
    """Compare loss and gradients of one model; the row of what differs by more than rounding is `wrong`."""
    context, (tokens, labels) = measure.context, of
    length = tokens.shape[1]
    found = []
    by_graphs = measure.device.type == "cuda" and getattr(model.backbone, "cuda_graph", False) is True
    replayed = [0]
    for part in (None, context.split(length, 2, **how)):
        for _ in range(3 if by_graphs else 1):  # captured at the second
            model.zero_grad()
            if part is None:
                loss = model(tokens, labels).loss
                loss.backward()
            else:
                with part:
                    loss = model(part.take(tokens), part.take(labels)).loss
                loss.backward()
                context.sum_gradients(model.parameters())
        if by_graphs:
            replayed.append(replays(model)["replays"])
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
    if not (row["loss_error"] < 1e-4 and row["gradient_error"] < 1e-2 and row["gradient_error_median"] < 1e-3):
        row["wrong"] = True
    if by_graphs:
        row |= replays(model)
        row["replays"] = [after - before for before, after in itertools.pairwise(replayed)]
        row["wrong"] = row.get("wrong", False) or not all(row["replays"])
    measure.keep(row)


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
