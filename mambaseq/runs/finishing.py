"""The end of a run: the exported weights, their results and the curves, whichever of them is missing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import torch

from mambaseq.checkpoints.adapters import split
from mambaseq.checkpoints.export import ModelCard, load_weights, raw_weights, save_model, task_weights
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.data.loaders import SequenceDataModule
from mambaseq.data.module import SequenceData, named_sets
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, build_model
from mambaseq.plain import read_json
from mambaseq.reporting.pictures import learning_curves, save_png
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.lost import by_first_alone
from mambaseq.runs.trainer import misconfigured
from mambaseq.tasks.callbacks import RunCheckpoints, Throughput
from mambaseq.tasks.finite import Diverged
from mambaseq.tasks.lora import LoraConfig
from mambaseq.tasks.task import Task


class Facts(NamedTuple):
    """What a run's page says of it that its folder does not. parameters: of the model. class_names: of the data.
    scale, unit: see `loss_unit`. resumed: whether it was gone on with just now."""

    parameters: int
    class_names: Sequence[str]
    scale: float
    unit: str
    resumed: bool = False

    @classmethod
    def of(cls, model: SequenceModel, data: SequenceData, resumed: bool = False) -> Facts:
        return cls(model.n_parameters(), data.class_names, *loss_unit(model.head), resumed)


class Outcome(NamedTuple):
    """How a training ended. message: for the user; "" for none. facts: None where no model was made."""

    status: Literal["finished", "diverged", "interrupted"]
    message: str = ""
    facts: Facts | None = None

    @property
    def code(self) -> int:
        """The exit code: 0, 1 for a run that diverged, 130 for one that was interrupted and can be resumed."""
        return {"finished": 0, "diverged": 1, "interrupted": 130}[self.status]


@dataclasses.dataclass
class Training:
    """The parts of a training."""

    folder: RunFolder
    data: SequenceData
    datamodule: SequenceDataModule
    card: ModelCard
    task: Task
    lora: LoraConfig
    throughput: Throughput
    checkpoints: RunCheckpoints

    def _exported(self) -> Path:
        return self.folder.best if self.checkpoints.score is not None else self.folder.last

    def is_complete(self, step: int) -> bool:
        """Whether everything that a run of so many steps leaves behind is there and belongs together. Results are
        written last."""
        folder = self.folder
        if not (folder.weights.is_file() and folder.curves.is_file() and folder.results.is_file()):
            return False
        results, exported = folder.read_results(), step
        if self.checkpoints.score is not None:
            exported = read_checkpoint(folder.best, tensors="none")["global_step"]
        try:
            described = read_json(folder.model / "model.json").get("step")
        except UserError:
            return False
        return results.get("steps") == step and results.get("exported_step") == described == exported

    def finish(self, trainer: lightning.Trainer, step: int) -> str:
        """Validate what has not been validated yet, and export. The task has the weights of the last step. Returns a
        message that says what was exported; "" in processes that write nothing."""
        results: dict[str, Any] = self.checkpoints.results
        if self.checkpoints.score is None:
            validates = trainer.limit_val_batches != 0 and bool(named_sets(self.data.validation()))
            if self.checkpoints.validated_step != step and validates:
                self.task.ends_training = True
                with plain_interrupts(), misconfigured("The validation set cannot be read with these settings"):
                    trainer.validate(self.task, datamodule=self.datamodule, verbose=False)
            results = self.task.results
        if trainer.is_global_zero:
            device = str(torch.cuda.get_device_name()) if trainer.strategy.root_device.type == "cuda" else "cpu"
            several = {} if trainer.world_size == 1 else {"devices": trainer.world_size}
            with by_first_alone():
                return self._export(steps=step, device=device, **several, **results)
        return ""

    def _export(self, **results: Any) -> str:
        """Export the weights of a checkpoint, with the results of these weights and no others.

        They are read from the file: where a strategy shards a model, no process has all of it.
        """
        folder, exported = self.folder, self._exported()
        checkpoint = read_checkpoint(exported, tensors="weights")
        model = build_model(self.card.spec)
        tensors, adapter = task_weights(checkpoint), None
        if self.lora.rank and self.lora.export == "kept":
            tensors, factors = split(raw_weights(checkpoint))
            adapter = factors, dataclasses.asdict(self.lora)
        load_weights(model, tensors, exported)
        for path in (folder.results, folder.evaluation):  # of weights that were exported before
            path.unlink(missing_ok=True)
        step, of = checkpoint["global_step"], results["steps"]
        save_model(folder.model, model, dataclasses.replace(self.card, step=step), self.data.tokenizer, adapter=adapter)
        scale, unit = loss_unit(model.head)
        save_png(folder.curves, learning_curves(folder, scale, unit))
        throughput = self.throughput
        folder.update_results(
            parameters=model.n_parameters(),
            exported_step=step,
            train_tokens=throughput.tokens,
            train_seconds=round(throughput.seconds, 2),
            tokens_per_second=round(throughput.rate),
            **results,
        )
        scalars = {key: value for key, value in results.items() if key.startswith("val/") and isinstance(value, float)}
        found = [f"{key} {value:.4f}" for key, value in scalars.items()]
        seen = self.checkpoints.validated_step in (None, of)  # None: nothing was trained, only finished
        best = "" if step == of else f" (the best of {of})" if seen else f" (the best that was validated; {of} was not)"
        return ", ".join([f"{folder.path}: the weights of step {step}{best} are in {folder.model}", *found])


def loss_unit(head: torch.nn.Module) -> tuple[float, str]:
    """The factor of a head's loss in curves, and the unit that results."""
    if getattr(head, "learns", "labels") == "values":
        return 1.0, "loss"
    tokens = getattr(head, "per_token", False) and getattr(head, "continues", "tokens") != ""
    return (1 / math.log(2), "bits a token") if tokens else (1.0, "loss (nats)")


class plain_interrupts:
    """Makes Ctrl-C during Lightning's evaluation a KeyboardInterrupt, instead of Lightning's exit with code 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None


def interrupted(folder: Path, what: str) -> Outcome:
    """What comes of a run that was interrupted: `what` happened, and how it goes on."""
    return Outcome("interrupted", f"{what} Resume with: mambaseq fit --resume {folder}")


def diverged(folder: Path, error: Diverged, saved: int | None) -> Outcome:
    """The message of a run that diverged: why it stopped, and what helps."""
    advice = "--optimizer.lr LOWER (or a longer optimizer.warmup_steps, trainer.gradient_clip_val, another precision)"
    again = (
        f"Its last good checkpoint is of step {saved}. Resume from there: mambaseq fit --resume {folder} {advice}. If "
        "it soon diverges again, start over in another folder."
        if saved is not None
        else f"There is no checkpoint yet. Start over: the same command with {advice}."
    )
    return Outcome(
        "diverged",
        f"{folder}: the run diverged: {error.what} is not finite after step {error.step}, and nothing from that point "
        f"was saved. {again}",
    )
