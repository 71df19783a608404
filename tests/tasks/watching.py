"""A callback that keeps what each training step really used."""

from __future__ import annotations

from typing import Any

import lightning

SEEN: list[dict[str, Any]] = []


class Watcher(lightning.Callback):
    """What each step really used."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        SEEN.append({"groups": groups, "items": self.items, "length": self.length})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.items, self.length = batch.inputs[:, 0].tolist(), None
        model = pl_module.model
        handle = model.register_forward_pre_hook(lambda module, arguments: self._shape(arguments, handle))

    def _shape(self, arguments, handle) -> None:
        self.length = arguments[0].shape[1]
        handle.remove()


NORMS: list[float] = []


class Norms(lightning.Callback):
    """The norm of the gradients of each step, as the optimizer had them."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            total = sum(float(p.grad.square().sum()) for p in pl_module.parameters() if p.grad is not None)
            NORMS.append(total**0.5)
