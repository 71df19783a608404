"""Where the time of a training step goes: data, encoder, layers by their mixer, head, backward, optimizer, messages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch import nn

from mambaseq.atomic import atomic_file, json_text
from mambaseq.backbones.base import ResidualLayer
from mambaseq.parallel.context import Context, Gathering

DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward, the rest", "backward", "optimizer"
MESSAGES, CALLBACKS = "messages between processes", "callbacks and logs"
FILE = "parts.json"
# calls that wait for others
_MESSAGES = [(Context, name) for name in ("receive", "finish", "sum", "largest", "gather")] + [(Gathering, "wait")]


class StepParts(Profiler):
    """Times the parts of some training steps, for the run's page: `--trainer.profiler parts`.

    A part's time is what it takes without the parts inside of it. On a GPU it is the GPU's, by events in its stream, so
    nothing waits for it; a wait for the host counts for the part that the host is in. While steps are timed the model
    has hooks, so no CUDA graph is replayed. Validation and checkpoints are left out.

    Args:
        steps: how many batches are timed.
        skip: how many of each start of the run are not, which compile kernels.
    """

    def __init__(self, steps: int = 20, skip: int = 5) -> None:
        super().__init__()
        self.steps, self.skip = steps, skip
        self._task: Any = None
        self._seen = 0  # batches, timed or not
        self._stack: list[str] = []
        self._undo: list[Callable[[], Any]] = []
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._last: Any = None
        self.seconds: dict[str, float] = defaultdict(float)
        self.timed = 0
        self._running = self._closed = self._aside = False

    def watch(self, task: Any) -> None:
        """Whose steps are timed: a `Task`."""
        self._task = task

    def start(self, action_name: str) -> None:
        if action_name.endswith(".on_validation_start"):
            self._aside = True
        elif action_name.endswith(".train_dataloader_next") or action_name == "run_training_batch":
            self._aside = False
        if action_name.endswith(".train_dataloader_next") and not self._closed:
            if self._running and self.timed >= self.steps:
                self._close()
            elif not self._running and self._seen >= self.skip and self._task is not None:
                self._open()
        if self._running and (part := _part_of(action_name)) is not None:
            self._enter(part)

    def stop(self, action_name: str) -> None:
        if action_name == "run_training_batch":
            self._seen += 1
            self.timed += self._running
        if self._running and self._stack and _part_of(action_name) is not None:
            self._leave()

    def teardown(self, stage: str | None) -> None:
        if self._running:
            self._close()
        super().teardown(stage)

    def _open(self) -> None:
        self._running = True
        for module, part in _parts(self._task.model):
            self._undo.append(module.register_forward_pre_hook(lambda *_, part=part: self._enter_module(part)).remove)
            self._undo.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True).remove)
        if self._task._context is not None:
            for owner, name in _MESSAGES:
                self._wrap(owner, name)

    def _wrap(self, owner: type, name: str) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._enter(MESSAGES)
            try:
                return function(*arguments, **options)
            finally:
                self._leave()

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, function))

    def _enter_module(self, part: str) -> None:
        # what is run again in the backward pass belongs to that
        self._enter(BACKWARD if BACKWARD in self._stack else part)

    def _enter(self, part: str) -> None:
        self._mark()
        self._stack.append(part)

    def _leave(self) -> None:
        if self._stack:  # empty where timing has begun or ended inside of a part
            self._mark()
            self._stack.pop()

    def _mark(self) -> None:
        """The time since the last mark was that of the innermost part."""
        part = self._stack[-1] if self._stack and not self._aside else ""
        if self._task.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
            return
        now = perf_counter()
        if part:
            self.seconds[part] += now - self._last
        self._last = now

    def _close(self) -> None:
        self._running, self._closed = False, True
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._stack.clear()
        if self._marks:
            self._marks[-1][1].synchronize()
            for (_, before), (part, event) in zip(self._marks, self._marks[1:], strict=False):
                if part:
                    self.seconds[part] += before.elapsed_time(event) / 1e3
            self._marks.clear()
        if self.dirpath and self.local_rank == 0 and self.timed:
            with atomic_file(Path(self.dirpath) / FILE, "w", encoding="utf-8") as file:
                file.write(json_text(self.told()) + "\n")

    def told(self) -> dict[str, Any]:
        """Milliseconds of each part in a batch, in the order in which they come, and how many batches were timed."""
        first, last = [DATA], [FORWARD, BACKWARD, OPTIMIZER, MESSAGES, CALLBACKS]
        names = [*first, *(name for name in self.seconds if name not in (*first, *last)), *last]
        parts = {name: 1e3 * self.seconds[name] / max(self.timed, 1) for name in names if name in self.seconds}
        return {"batches": self.timed, "milliseconds": parts}

    def summary(self) -> str:
        if not self.timed:
            if not self._seen:
                return ""
            return (
                f"too few batches ({self._seen}) to time the parts of a step, as the first {self.skip} are left out: "
                f"give at least {self.skip + 1} steps, or {self.skip + self.steps} to time {self.steps}"
            )
        parts = self.told()["milliseconds"]
        whole = sum(parts.values())
        lines = [f"{name:<32} {value:10.2f} ms  {value / whole:4.0%}" for name, value in parts.items()]
        return "\n".join([f"a training batch, mean of {self.timed}:", *lines, f"{'all':<32} {whole:10.2f} ms"])


def _part_of(action: str) -> str | None:
    """The part that an action of Lightning's belongs to; "" for one that is left out, None for one inside of others."""
    where, _, what = action.rpartition(".")
    if what in ("train_dataloader_next", "batch_to_device"):
        return DATA
    if where.startswith("[Strategy]"):
        return {"training_step": FORWARD, "backward": BACKWARD}.get(what)
    if what in ("optimizer_step", "configure_gradient_clipping", "optimizer_zero_grad", "lr_scheduler_step"):
        return OPTIMIZER
    if what in ("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_optimizer_step"):
        return CALLBACKS
    return "" if action == "save_checkpoint" else None


def _parts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of a model whose calls are timed, and what they are called."""
    found: list[tuple[nn.Module, str]] = [(model.encoder, "encoder"), (model.head, "head and loss")]  # type: ignore[list-item]
    for module in model.backbone.modules():  # type: ignore[union-attr]
        if isinstance(module, ResidualLayer):
            found.append((module, f"{type(module.mixer).__name__} layers"))
    return found
