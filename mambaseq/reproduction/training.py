"""Training of small models, whose kernels are shorter than their launches: the whole step, including the drawing of its
batch and the optimizer, is captured in a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq.atomic import atomic_file
from mambaseq.backbones.base import Backbone
from mambaseq.batch import Batch
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel
from mambaseq.ops.gpu import capture
from mambaseq.tasks.optimizer import OptimizerConfig, learning_rate_factor, make_optimizer

BatchOf = Callable[[Tensor], Batch]
"""A function that gives the batch of a training step from the step's number, `()` int64 on the device."""

_SAVE_EVERY_S = 15.0
_TELL_FIRST_S, _TELL_EVERY_S = 2.0, 30.0  # where there is no terminal for a bar: then twice as late, up to this
_SHOW_EVERY_S = 1.0
_EAGER_STEPS = 3  # steps before a capture, as PyTorch requires; kernels are compiled by then


@dataclasses.dataclass
class Trained:
    """How a training went. steps: all steps taken. seconds: including those before an interruption. steps_per_second:
    of the steps after the first three, which compile kernels, without checks and checkpoints. loss: mean of the last
    hundred. captured: whether a graph was replayed. clock: seconds of such steps alone, which `train(clock=...)`
    limits."""

    steps: int
    seconds: float
    steps_per_second: float
    loss: float
    captured: bool
    clock: float


def train(
    model: SequenceModel,
    batch_of: BatchOf,
    steps: int,
    optimizer: OptimizerConfig,
    *,
    clip: float = 1.0,
    autocast: torch.dtype | None = None,
    checkpoint: Path | None = None,
    finished: Callable[[], bool] | None = None,
    watch: Callable[[int], object] | None = None,
    check_every: int = 1000,
    cuda_graph: bool = True,
    label: str = "",
    clock: float | None = None,
    average: float = 0.0,
) -> Trained:
    """Train a `SequenceModel` in place; afterwards it is in evaluation mode.

    Args:
        clip: largest norm of gradients; 0 for no limit.
        autocast: the dtype of matrix products, None for that of the parameters.
        checkpoint: a file written every 15 seconds and at the end. If it exists, training continues from it, with the
            same steps as without an interruption.
        finished: called every `check_every` steps, with the model in evaluation mode; says whether to stop early.
        watch: called as `finished` is, before it, with the number of steps done: for curves. A run that goes on from a
            checkpoint may tell a step again.
        cuda_graph: on a CUDA device, capture the step, unless the backbone has graphs of its own.
        label: of the progress bar.
        clock: end after so many seconds of steps, and let the learning rate follow the clock as if `steps`, which are
            still the most, took all of it. Compiling, checks, checkpoints and calls that were killed do not count, so
            that models are trained for equal time; such a run does not repeat bit by bit.
        average: decay of an exponential moving average of the weights, such as 0.999, with which the model is checked
            and left; early steps keep at most (1 + step) / (10 + step) of it. 0 for none.

    Raises UserError for a checkpoint of another run.
    """
    run = _Run(model, batch_of, steps, optimizer, clip, autocast, cuda_graph, clock, average)
    done, spent, finish = run.load(checkpoint) if checkpoint is not None else (0, 0.0, False)
    first, measured_from = done, done
    earlier = run.clock  # of the calls before
    model.train()
    began = saved = shown = told = measured = time.perf_counter()
    silent = _TELL_FIRST_S
    aside = 0.0  # seconds of checks and checkpoints since `measured`
    with tqdm(total=steps, initial=done, unit="step", desc=label or None, leave=False, disable=None) as bar:
        while done < steps and not finish and (clock is None or run.clock < clock):
            if done - first == _EAGER_STEPS:
                run.capture()
                run.wait()
                measured, measured_from, aside = time.perf_counter(), done, 0.0
            run.step(done if clock is None else steps * run.clock / clock)
            done += 1
            now = time.perf_counter()
            if done - first > _EAGER_STEPS:
                run.clock = earlier + now - measured - aside
            if now - shown > _SHOW_EVERY_S:
                bar.update(done - bar.n)
                bar.set_postfix(loss=f"{run.mean_loss():.3f}")  # waits for the GPU, so that steps do not pile up
                shown = now
            if bar.disable and now - told > silent:
                of = f" of {steps:,}" if clock is None else f", {run.clock:.0f} of {clock:.0f} s"
                tqdm.write(f"{label or 'training'}: step {done:,}{of}, loss {run.mean_loss():.3f}")
                told, silent = now, min(2 * silent, _TELL_EVERY_S)
            due = checkpoint is not None and now - saved > _SAVE_EVERY_S
            ask = done % check_every == 0 and not (finished is None and watch is None)
            if not (due or ask):
                continue
            run.wait()
            paused = time.perf_counter()
            if ask:
                with run.averaged():
                    finish = _asked(model, done, finished, watch)
            if checkpoint is not None and due:
                run.save(checkpoint, done, spent + time.perf_counter() - began, finish)
                saved = time.perf_counter()
            aside += time.perf_counter() - paused
    run.wait()
    now = time.perf_counter()
    spent += now - began
    if checkpoint is not None:
        run.save(checkpoint, done, spent, finish)
    run.close()
    run.put_average()
    model.eval()
    # a run that only began or ended here has no measured steps: its total time is used
    rate = (done - measured_from) / (now - measured - aside) if done > measured_from else done / spent
    return Trained(done, spent, rate, run.mean_loss(), run.captured, run.clock)


def _asked(
    model: SequenceModel, done: int, finished: Callable[[], bool] | None, watch: Callable[[int], object] | None
) -> bool:
    model.eval()
    try:
        if watch is not None:
            watch(done)
        return finished is not None and finished()
    finally:
        model.train()


def _digest(tensors: list[Any]) -> str:
    found = hashlib.sha256()
    for value in tensors:
        found.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def _check_sums(path: Path) -> None:
    """Raise BadZipFile if a tensor in a checkpoint differs from its checksum, which PyTorch does not check."""
    with zipfile.ZipFile(path) as file:
        if (damaged := file.testzip()) is not None:
            raise zipfile.BadZipFile(damaged)


class _Run:
    """A model and its optimizer on a device, and their repeated step."""

    def __init__(
        self,
        model: SequenceModel,
        batch_of: BatchOf,
        steps: int,
        config: OptimizerConfig,
        clip: float,
        autocast: torch.dtype | None,
        cuda_graph: bool,
        clock: float | None = None,
        average: float = 0.0,
    ) -> None:
        self.model, self.batch_of, self.clip, self.autocast = model, batch_of, clip, autocast
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        has_graphs = any(isinstance(module, Backbone) and module.cuda_graph is True for module in model.modules())
        self.may_capture = self.on_gpu and cuda_graph and not has_graphs
        self.stream = torch.cuda.Stream(self.device) if self.may_capture else None
        self.waits = False  # whether the last step waited for the GPU
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured = False
        self.config, self.factor = config, learning_rate_factor(config, steps)
        self.optimizer, _ = make_optimizer(model, config, steps, capturable=self.on_gpu)
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)
        self.losses = torch.zeros(100, device=self.device)
        self.rate: float | None = None
        self.clock, self.decay = 0.0, average
        self.average = [p.detach().clone() for p in self.parameters] if average else []
        self.identity = {
            "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
            "optimizer": dataclasses.asdict(config),
            "steps": steps,
            "clip": clip,
            "autocast": str(autocast),
            **({} if clock is None else {"clock": clock}),
            **({"average": average} if average else {}),
            "initial weights": _digest(self.parameters),  # which distinguish seeds and a model's options
        }

    def step(self, number: float) -> None:
        """number: of the step, or where it is on the clock, for the learning rate."""
        rate = self.config.lr * self.factor(number)
        if rate != self.rate:
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)  # the address that the graph reads
                else:
                    group["lr"] = rate
            self.rate = rate
        if self.graph is not None:
            self.graph.replay()
        elif self.stream is not None and self.may_capture:
            with torch.cuda.device(self.device), capture.capturing:
                _, self.waits = capture.warm_up(self._step, self.stream)
        else:
            self._step()

    def _step(self) -> None:
        batch = self.batch_of(self.number)
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self.autocast))
            given = {} if batch.condition is None else {"condition": batch.condition}  # which baselines do not take
            loss = self.model(batch.inputs, batch.targets, mask=batch.mask, **given).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        if self.average:
            self._follow()
        place = (self.number % len(self.losses)).unsqueeze(0)  # an index that stays on the GPU
        self.losses.index_copy_(0, place, loss.detach().float().unsqueeze(0))
        self.number.add_(1)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights, by a share that is computed on the device: a graph can hold it."""
        n = self.number.float() + 1
        share = 1 - ((1 + n) / (10 + n)).clamp(max=self.decay)
        difference = torch._foreach_sub(self.parameters, self.average)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(self.average, difference)

    @torch.no_grad()
    def put_average(self) -> None:
        """Put the average, if there is one, into the model, at the weights' addresses."""
        if self.average:
            torch._foreach_copy_(self.parameters, self.average)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the average in place of its weights."""
        kept = [p.detach().clone() for p in self.parameters] if self.average else []
        self.put_average()
        try:
            yield
        finally:
            if kept:
                with torch.no_grad():
                    torch._foreach_copy_(self.parameters, kept)

    def capture(self) -> None:
        """Capture the step, if possible; otherwise steps continue without a graph."""
        if not self.may_capture:
            return
        self.may_capture = False
        if self.waits:
            tqdm.write("Training without a CUDA graph: a step waits for the GPU.")
            return
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)  # the graph's gradients have their own memory
        try:
            with torch.cuda.device(self.device), capture.capturing:
                capture.capture(graph, self._step, self.stream)
        except RuntimeError as error:
            self.optimizer.zero_grad(set_to_none=True)
            tqdm.write(f"Training without a CUDA graph: {str(error).partition(chr(10))[0]}")
            return
        self.graph, self.captured = graph, True

    def close(self) -> None:
        """Return the graph's memory, including that of gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = None

    def mean_loss(self) -> float:
        """The mean loss of the last steps, at most a hundred."""
        n = min(int(self.number), len(self.losses))
        return float(self.losses[:n].mean()) if n else float("nan")

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def save(self, path: Path, done: int, seconds: float, finished: bool) -> None:
        state = {
            "run": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "losses": self.losses,
            "clock": self.clock,
            "average": self.average,
            "random": [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.on_gpu else [])],
            "done": done,
            "seconds": seconds,
            "finished": finished,
        }
        with atomic_file(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> tuple[int, float, bool]:
        """Load the file: steps done, seconds spent, and whether it stopped early; zeros if there is no file.

        Raises UserError for a file of another run, without changing anything.
        """
        if not path.exists():
            return 0, 0.0, False
        remedy = "Remove it, or choose another --out."
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            _check_sums(path)
        except Exception as error:  # torch's error depends on where the file is damaged
            raise UserError(f"{path} cannot be read as a checkpoint. {remedy}") from error
        found = state.get("run", {}) if isinstance(state, dict) else {}
        different = [key for key in {**self.identity, **found} if found.get(key) != self.identity.get(key)]
        if different:
            raise UserError(f"{path} is a checkpoint of another run: {', '.join(different)} differ. {remedy}")
        kept = ("model", "optimizer", "losses", "random", "done", "seconds", "finished")
        if missing := [key for key in kept if key not in state]:
            raise UserError(f"{path} is not a checkpoint of a trial: it has no {', '.join(missing)}. {remedy}")
        self.model.load_state_dict(state["model"])
        # groups stay ours: a graph will read their learning rates at these addresses
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]})
        self.losses.copy_(state["losses"])
        self.clock = state.get("clock", 0.0)
        for mine, saved in zip(self.average, state.get("average", ()), strict=True):
            mine.copy_(saved)
        self.number.fill_(state["done"])
        torch.set_rng_state(state["random"][0])
        if self.on_gpu and len(state["random"]) > 1:
            torch.cuda.set_rng_state(state["random"][1], self.device)
        return state["done"], state["seconds"], state["finished"]
