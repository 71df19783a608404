"""Task: model, loss and metrics as a LightningModule. Nothing here knows a modality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mambaseq.batch import Batch
from mambaseq.data.purpose import asks_for_the_next
from mambaseq.errors import ConfigError
from mambaseq.metrics.answers import Answers, AnswerSheet
from mambaseq.metrics.base import Metric
from mambaseq.metrics.likelihood import MeanLoss
from mambaseq.models import ModelOutput, SequenceModel
from mambaseq.parallel import Context
from mambaseq.tasks.contexts import check_gathers, gather_states, make_context
from mambaseq.tasks.finetuning import FinetuneConfig
from mambaseq.tasks.fitting import check_kinds, check_masked, check_next_token, probe_future, probe_neighbours, rehearse
from mambaseq.tasks.optimizer import OptimizerConfig, make_optimizer
from mambaseq.tasks.sharding import check_shardable, shard


@dataclasses.dataclass
class LengthWarmup:
    """Shorter sequences at first (HyenaDNA's sequence-length warm-up, arXiv:2306.15794).

    Next-token batches are folded into more sequences, which keeps the tokens of a step; labelled sequences are cut.

    Args:
        start: length at the first step, in positions. It doubles stage by stage until it is the data's own. 0 is off.
        steps_per_stage: optimizer steps before the length doubles.
    """

    start: int = 0
    steps_per_stage: int = 100

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps_per_stage < 1:
            raise ConfigError(
                f"length_warmup.start must be at least 0 and length_warmup.steps_per_stage at least 1, not "
                f"{self.start} and {self.steps_per_stage}."
            )

    def length(self, step: int, full: int) -> int:
        """The length at an optimizer step."""
        if self.start == 0:
            return full
        return min(full, self.start << min(step // self.steps_per_stage, 62))


def shorten(batch: Batch, length: int) -> Batch:
    """The batch at a shorter length: folded into more sequences if every token has a target, otherwise cut. With bins
    of positions, the length is a multiple of their size.

    Raises ConfigError for packed batches, whose sequences have lengths of their own.
    """
    full, stride = batch.inputs.shape[1], batch.stride
    if length < full:
        length = max(length // stride, 1) * stride
    if length >= full:
        return batch
    if batch.cu_seqlens is not None:
        raise ConfigError("length_warmup works on windows, not on packed batches; set length_warmup.start to 0.")
    per_token = batch.per_token
    folds = full // length if per_token else 1

    def cut(tensor: Tensor | None, length: int = length) -> Tensor | None:
        if tensor is None:
            return None
        if tensor.dim() == 1:
            return tensor.repeat_interleave(folds)
        tensor = tensor[:, : folds * length]
        return tensor.reshape(tensor.shape[0] * folds, length, *tensor.shape[2:])

    targets = batch.targets
    return Batch(
        inputs=cut(batch.inputs),  # type: ignore[arg-type]
        targets=cut(targets, length // stride) if per_token else targets,
        mask=cut(batch.mask),
        condition=None if batch.condition is None else batch.condition.repeat_interleave(folds, dim=0),
        target_of=batch.target_of,
        stride=stride,
    )


class Task(lightning.LightningModule):
    """Trains a model on batches of any modality.

    Every target counts alike: a batch's loss is a mean over its targets, and if an optimizer step has several batches
    (accumulated, or of several processes), each is weighted by its number of targets. `train/loss` is that of one batch
    on one process; `val/loss` and `test/loss` are means over all targets of the set. If there are several sets, each
    has its own `val/SET/loss`, and `val/loss` is the mean over those with targets.

    metrics: name to metric; logged as `val/NAME` and `test/NAME`; tables are kept in `tables`.
    finetune: which parameters have learning rates of their own, and which `Freezing` keeps frozen.
    seed: randomness of step k (dropout) depends only on (seed, k), so a resumed run repeats it.
    keep_answers: keep what the model answers on each row of the set that is evaluated. answers: those of each set, by
        its name, after an evaluation; None where there are too many.
    ends_training: whether a validation is that of training's end, by the processes of training, as those before it.
    """

    def __init__(
        self,
        model: SequenceModel,
        optimizer: OptimizerConfig | None = None,
        metrics: Mapping[str, Metric] | None = None,
        length_warmup: LengthWarmup | None = None,
        seed: int = 0,
        finetune: FinetuneConfig | None = None,
        keep_answers: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.finetune = finetune or FinetuneConfig()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.length_warmup = length_warmup or LengthWarmup()
        self.seed = seed
        self.stages = nn.ModuleDict(
            {stage: nn.ModuleDict({k: m.clone() for k, m in (metrics or {}).items()}) for stage in ("val_", "test_")}
        )
        self.losses = nn.ModuleDict({stage: MeanLoss() for stage in ("val_", "test_")})
        # for sets after the first, by stage and number
        self._others: dict[tuple[str, int], tuple[MeanLoss, dict[str, Metric]]] = {}
        # in the current accumulation window: targets of its first batch, and of all so far, over all processes
        self._window: tuple[Tensor, Tensor] | None = None
        self._fits = False
        # of the processes that share this one's training sequences
        self._context: Context | None = None
        self._validates_parts = False
        self.ends_training = False
        # of an evaluation: how many batches less than another process this one has, and the last that it has seen
        self._lacking = 0
        self._seen: Batch | None = None
        self.tables: dict[str, list] = {}
        self.results: dict[str, float] = {}
        self.keep_answers = keep_answers
        self.answers: dict[str, Answers | None] = {}
        self._sheets: dict[int, AnswerSheet] = {}

    @property
    def backbone(self) -> nn.Module:
        """The name that callbacks which freeze and thaw expect (Lightning's `BackboneFinetuning`)."""
        return self.model.backbone

    def run_model(self, batch: Batch, return_logits: bool | None = None) -> ModelOutput:
        return self.model(
            batch.inputs,
            batch.targets,
            mask=batch.mask,
            condition=batch.condition,
            cu_seqlens=batch.cu_seqlens,
            return_logits=return_logits,
        )

    def shares(self) -> tuple[int, int]:
        """How many processes share a sequence of training, and one of validation: as many if the loss and all metrics
        are sums over positions (`Metric.splits_time`)."""
        shared = getattr(self.model.backbone, "context_parallel", 1)
        adds = bool(self.model.head.per_token) and all(metric.splits_time for metric in self._metrics("val").values())
        return shared, shared if adds else 1

    def check_strategy(self, trainer: lightning.Trainer) -> None:
        """Raise ConfigError for what cannot be trained where each process has a part of every weight (fsdp2)."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            if self.shares()[0] > 1:
                check_gathers(self.model.backbone)
            check_shardable(self.model, self.optimizer_config.name)

    def setup(self, stage: str) -> None:
        """Raise what `check_strategy` does, of training, and ConfigError for sequences that are to be shared by
        processes (`context_parallel`) in another way than can be. Those of training are, and those that are validated
        meanwhile or at its end, as `shares` says; any other evaluation is of whole ones, by one process each."""
        if stage == "fit":
            self.check_strategy(self.trainer)
        shared, validating = self.shares() if stage == "fit" or self.ends_training else (1, 1)
        self._context = None
        if shared > 1:
            self.model.check_splits_time()
            self._context = make_context(shared, self.trainer.strategy)
            if self._is_sharded:
                gather_states(self.model.backbone)
        self._validates_parts = validating > 1
        module: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        module.sharing, module.sharing_validation = shared, validating

    def configure_model(self) -> None:
        """Shard the model where the strategy (fsdp2) leaves that to the task."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.model, self.trainer.strategy)

    def on_train_start(self) -> None:
        self._window, self._fits = None, False

    def _check_fit(self, batch: Batch) -> None:
        """Raise ConfigError if model, metrics and data do not fit each other; see `fitting`."""
        metrics = self._metrics("val")
        check_kinds(self.model, batch, metrics)
        next_token = asks_for_the_next(self.trainer.datamodule.data, batch)  # type: ignore[attr-defined]
        if next_token:
            check_next_token(self.model, kind=batch.kind)
        if self.trainer.datamodule.data.task == "masked":  # type: ignore[attr-defined]
            check_masked(self.model)
        # parts of a sharded model cannot run alone
        if isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            probe_neighbours(self.model, batch)
            rehearse(self.model, batch, metrics)
            if next_token:
                probe_future(self.model, batch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if not self._fits:
            self._check_fit(batch)
            self._fits = True
        step = self.trainer.datamodule.batches_done  # type: ignore[attr-defined]
        seed = hash((self.seed, step, self.global_rank)) % 2**63
        # `torch.manual_seed` for this device alone: for each kind of device that is not there it formats a stack trace
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch = shorten(batch, self.length_warmup.length(self.global_step, batch.inputs.shape[1]))
        counted = self._count(batch)
        output, _ = self._run_shared(batch)
        assert output.loss is not None
        self.trainer.datamodule.batches_done += 1  # type: ignore[attr-defined]
        # not by `prog_bar`, for which Lightning waits for a GPU after every batch; see `Bar`
        self.log("train/loss", output.loss, batch_size=batch.inputs.shape[0])
        return output.loss if counted is None else self._weighted(output.loss, *counted)

    def _run_shared(self, batch: Batch, return_logits: bool | None = None) -> tuple[ModelOutput, Batch]:
        """The model's output for this process's part of sequences that several share, and the part; the loss is that of
        them all."""
        if self._context is None:
            return self.run_model(batch, return_logits), batch
        chunk_length = getattr(self.model.backbone, "chunk_length", None)
        if chunk_length is not None:  # the positions of a chunk are those of all processes, so that each holds a share
            chunk_length = -(-chunk_length // self._context.size)
        part = self._context.split(
            batch.inputs.shape[1], batch.inputs.shape[0], batch.cu_seqlens, chunk_length=chunk_length
        )
        with part:
            share = part.share(batch)
            return self.run_model(share, return_logits), share

    def _count(self, batch: Batch) -> tuple[Tensor, Tensor, Any] | None:
        """The number of the batch's targets, and that of all processes, once the third has been waited for: the sum is
        begun before the loss is computed. None where batches need no weights."""
        processes = self.trainer.world_size
        if processes == 1 and self.trainer.accumulate_grad_batches == 1:
            return None
        here = batch.n_targets
        if processes == 1:
            return here, here, None
        everywhere = here.clone()
        # Lightning's own reduction waits at a barrier first
        return here, everywhere, torch.distributed.all_reduce(everywhere, async_op=True)

    def _weighted(self, loss: Tensor, here: Tensor, everywhere: Tensor, sum_: Any) -> Tensor:
        """A mean over the batch's targets, scaled so that its mean over batches and processes becomes, after
        `on_before_optimizer_step` has corrected the scale, a mean over all their targets. Does not wait for a GPU."""
        if sum_ is not None:
            sum_.wait()
        if self._window is None:
            self._window = everywhere.clamp(min=1), everywhere
        else:
            self._window = self._window[0], self._window[1] + everywhere
        # gradients of processes that share a sequence are parts of a sum, of which the mean is taken
        processes = self.trainer.world_size
        shares = processes if self._context is None else processes * self._context.size
        # equal counts make this exactly 1; the dtype is explicit, since half-precision runs change the default
        return loss * ((here * shares).float() / self._window[0].float())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Lightning has divided by the number of batches in a whole window, even if there were fewer, and `_weighted`
        by the targets of the first batch; both should be the targets of all batches. This is called before gradients
        are clipped, and after those of fp16 are unscaled."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        batches = self.trainer.accumulate_grad_batches
        if self._window is not None:
            (first, targets), self._window = self._window, None
            if batches > 1 and gradients:
                local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
                torch._foreach_mul_(local, (first * batches).float() / targets.clamp(min=1).float())
        whole = isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if whole and gradients and self.trainer._logger_connector.should_update_logs:
            self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients).float())

    def _measures(self, stage: str, number: int) -> tuple[MeanLoss, dict[str, Metric]]:
        """The loss and metrics of a set."""
        loss: MeanLoss = self.losses[f"{stage}_"]  # type: ignore[assignment]
        if number == 0:
            return loss, self._metrics(stage)
        if (stage, number) not in self._others:
            fresh: dict[str, Any] = {name: one.clone().to(self.device) for name, one in self._metrics(stage).items()}
            for metric in fresh.values():
                metric.reset()
            self._others[stage, number] = MeanLoss().to(self.device), fresh
        return self._others[stage, number]

    def _metrics(self, stage: str) -> dict[str, Metric]:
        return dict(self.stages[f"{stage}_"].items())  # type: ignore[operator]

    def _evaluate(self, batch: Batch, stage: str, number: int) -> None:
        loss, metrics = self._measures(stage, number)
        check_kinds(self.model, batch, metrics)
        reads = self.keep_answers or any(metric.needs_logits for metric in metrics.values())
        self._seen = batch if self._lacking else None
        if stage == "val" and self._validates_parts:
            assert self._context is not None
            if batch.inputs.shape[1] < self._context.size:  # too short for a part each: one of them takes it
                if self._context.rank and not self._is_sharded:
                    return
                output = self.run_model(batch, reads or None)
                if self._context.rank:
                    return
            else:
                output, batch = self._run_shared(batch, reads or None)
        else:
            output = self.run_model(batch, reads or None)
        for metric in (loss, *metrics.values()):
            metric.update(output, batch)
        if self.keep_answers:
            if number not in self._sheets:
                self._sheets[number] = AnswerSheet(self.global_rank, self.trainer.world_size).to(self.device)
            self._sheets[number].update(output, batch)

    @property
    def _is_sharded(self) -> bool:
        """Whether a layer's weights are gathered from all processes when it is run."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def _compare_counts(self, stage: str) -> None:
        """Of sharded models: find how many more batches of this evaluation another process has than this one.

        Raises ConfigError where one has none: it could not help the others to gather weights.
        """
        self._lacking, self._seen = 0, None
        if not self._is_sharded or self.trainer.world_size == 1:
            return
        asked = "num_sanity_val_batches" if self.trainer.sanity_checking else f"num_{stage}_batches"
        found = getattr(self.trainer, asked)
        count = int(sum(found) if isinstance(found, list) else found)
        counts = torch.tensor([count, -count], device=self.device)
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
        most, least = int(counts[0]), -int(counts[1])
        if most and not least:
            raise ConfigError(
                f"The {stage} set has fewer batches than there are processes, all of which a sharded model needs. Set "
                "loader.batch_size lower, or trainer.strategy to ddp."
            )
        self._lacking = most - count

    def _even_out(self, stage: str) -> None:
        """Run the model as often as any other process has, which waits for all to gather weights."""
        batch, self._seen = self._seen, None
        for _ in range(self._lacking if batch is not None else 0):
            assert batch is not None
            if stage == "val" and self._validates_parts and batch.inputs.shape[1] >= self._context.size:  # type: ignore[union-attr]
                self._run_shared(batch)
            else:
                self.run_model(batch)

    def _finish(self, stage: str) -> None:
        self._even_out(stage)
        names = getattr(self.trainer.datamodule, "set_names", {}).get(stage) or [""]  # type: ignore[attr-defined]
        found: dict[str, list[Tensor]] = {}  # for each number, its values on the sets with targets
        empty = True
        for number, name in enumerate(names):
            loss, metrics = self._measures(stage, number)
            values = {"loss": loss.compute(), **{key: metric.compute() for key, metric in metrics.items()}}
            empty &= loss.empty
            for key, value in values.items():
                if key == "loss" or metrics[key].scalar:
                    if name:
                        self._say(f"{stage}/{name}/{key}", value, bar=False)
                    if not loss.empty or len(names) == 1:
                        found.setdefault(key, []).append(value)
                else:
                    self.tables[f"{stage}/{name}/{key}" if name else f"{stage}/{key}"] = value.tolist()
            for metric in (loss, *metrics.values()):
                metric.reset()
            if self.keep_answers:
                self.answers[name] = self._sheets.pop(number).answers()
        for key in ("loss", *(key for key, metric in self._metrics(stage).items() if metric.scalar)):
            several = found.get(key, [torch.tensor(math.nan, device=self.device)])
            self._say(f"{stage}/{key}", several[0] if len(several) == 1 else torch.stack(several).mean())
        self.losses[f"{stage}_"].empty = empty  # type: ignore[assignment]

    def _say(self, key: str, value: Tensor, bar: bool = True) -> None:
        """Keep and log a number. It is the same on every process, because metrics synchronise themselves."""
        if not key.endswith("/loss"):
            self.results[key] = float(value)
        self.log(key, value.float(), prog_bar=bar, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        self._compare_counts("val")

    def on_test_epoch_start(self) -> None:
        self._compare_counts("test")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test", dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        frozen = self.finetune.frozen(self.model, -1)
        fused = self.device.type == "cuda"
        optimizer, schedule = make_optimizer(
            self.model, self.optimizer_config, steps, fused=fused, factors=self.finetune.lr_of, frozen=frozen
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
