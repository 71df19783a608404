"""Training of small models, whose kernels are shorter than their launches: the whole step, the drawing of its batch and
the optimizer included, is captured in a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq.atomic import atomic_file
from mambaseq.batch import Batch
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel
from mambaseq.ops import capture
from mambaseq.tasks.optimizer import OptimizerConfig, learning_rate_factor, make_optimizer

BatchOf = Callable[[Tensor], Batch]
"""The batch of a training step, whose number is `()` int64 on the device: the same for the same number."""

_SAVE_EVERY_S = 60.0
_SHOW_EVERY_S = 1.0
_EAGER_STEPS = 3  # before a capture, as PyTorch asks for


@dataclass
class Trained:
    """How a training went. steps: taken in all. seconds: those before an interruption included. steps_per_second: of
    the steps after the capture. loss: mean of the last hundred. captured: whether a graph was replayed."""

    steps: int
    seconds: float
    steps_per_second: float
    loss: float
    captured: bool


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
    check_every: int = 1000,
    cuda_graph: bool = True,
    label: str = "",
) -> Trained:
    """Train a `SequenceModel` in place.

    Args:
        clip: norm that gradients are cut to; 0 leaves them.
        autocast: the dtype of matrix products, None for that of the parameters.
        checkpoint: a file that is written every minute and at the end, and gone on from if it is there: the rest of the
            run then takes the steps that it would have taken.
        finished: asked every `check_every` steps, with the model in evaluation mode, whether to stop early.
        cuda_graph: on a CUDA device, capture the step.
        label: of the progress bar.
    """
    run = _Run(model, batch_of, steps, optimizer, clip, autocast)
    run.may_capture &= cuda_graph
    done, spent = run.load(checkpoint) if checkpoint is not None else (0, 0.0)
    finish = False
    model.train()
    began = saved = shown = time.perf_counter()
    captured_at, captured_from = began, done
    with tqdm(total=steps, initial=done, unit="step", desc=label or None, leave=False, disable=None) as bar:
        while done < steps and not finish:
            if run.may_capture and done - bar.initial == _EAGER_STEPS:
                run.capture()
                run.wait()
                captured_at, captured_from = time.perf_counter(), done
            run.step(done)
            done += 1
            if finished is not None and done % check_every == 0:
                finish = _asked(model, finished)
            now = time.perf_counter()
            if now - shown > _SHOW_EVERY_S:
                bar.update(done - bar.n)
                bar.set_postfix(loss=f"{run.mean_loss():.3f}")  # waits for the GPU, so that steps do not pile up
                shown = now
            if checkpoint is not None and now - saved > _SAVE_EVERY_S:
                run.save(checkpoint, done, spent + now - began)
                saved = time.perf_counter()
    run.wait()
    now = time.perf_counter()
    spent += now - began
    if checkpoint is not None:
        run.save(checkpoint, done, spent)
    model.eval()
    rate = (done - captured_from) / (now - captured_at) if done > captured_from else float("nan")
    return Trained(done, spent, rate, run.mean_loss(), run.graph is not None)


def _asked(model: SequenceModel, question: Callable[[], bool]) -> bool:
    model.eval()
    try:
        return question()
    finally:
        model.train()


class _Run:
    """A model and its optimizer on a device, and the step over and over."""

    def __init__(
        self,
        model: SequenceModel,
        batch_of: BatchOf,
        steps: int,
        config: OptimizerConfig,
        clip: float,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.batch_of, self.clip, self.autocast = model, batch_of, clip, autocast
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.may_capture = self.on_gpu
        self.graph: torch.cuda.CUDAGraph | None = None
        self.config, self.factor = config, learning_rate_factor(config, steps)
        self.optimizer, _ = make_optimizer(model, config, steps, capturable=self.on_gpu)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)
        self.losses = torch.zeros(100, device=self.device)
        self.rate: float | None = None

    def step(self, number: int) -> None:
        rate = self.config.lr * self.factor(number)
        if rate != self.rate:
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            self.rate = rate
        if self.graph is not None:
            self.graph.replay()
        elif self.may_capture:
            with torch.cuda.device(self.device), capture.capturing:
                _, waits = capture.warm_up(self._step, torch.cuda.Stream())
            self.may_capture = not waits
        else:
            self._step()

    def _step(self) -> None:
        batch = self.batch_of(self.number)
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self.autocast))
            loss = self.model(batch.inputs, batch.targets, mask=batch.mask).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        place = (self.number % len(self.losses)).unsqueeze(0)  # an index that stays on the GPU
        self.losses.index_copy_(0, place, loss.detach().float().unsqueeze(0))
        self.number.add_(1)

    def capture(self) -> None:
        """Capture the step; where that fails, steps go on as they are."""
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)  # the graph's gradients are memory of its own
        try:
            with torch.cuda.device(self.device), capture.capturing:
                capture.capture(graph, self._step)
            self.graph = graph
        except RuntimeError as error:
            tqdm.write(f"Training without a CUDA graph: {str(error).partition(chr(10))[0]}")
        self.may_capture = False

    def mean_loss(self) -> float:
        """Of the last steps, a hundred at most."""
        n = min(int(self.number), len(self.losses))
        return float(self.losses[:n].mean()) if n else float("nan")

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def save(self, path: Path, done: int, seconds: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "done": done,
            "seconds": seconds,
        }
        with atomic_file(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> tuple[int, float]:
        """Steps done and seconds spent by what is in the file; none if there is no file.

        Raises UserError for a file of another model.
        """
        if not path.exists():
            return 0, 0.0
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{path} is a checkpoint of another model. Remove it, or choose another --out.") from error
        self.losses.copy_(state["losses"])
        self.number.fill_(state["done"])
        return state["done"], state["seconds"]
