"""Callbacks of a run, besides Lightning's own."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from mambaseq.cards import card
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.errors import UserError
from mambaseq.tasks.agreement import Agreement, Sum, leave_signals_to_us
from mambaseq.tasks.finite import Diverged, FiniteGuard
from mambaseq.tasks.record import KEY, DataRecord


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; {checkpoint} resumes it")
        self.step, self.checkpoint = step, checkpoint


class StoppedAtOnce(BaseException):
    """The run was asked to stop a second time, and stopped at once."""


NEVER = 2**62
"""An interval so long that no validation comes."""


class Often(NamedTuple):
    """How often a run saves and validates: a checkpoint every so many optimizer steps and every so many tokens, and a
    validation every so many tokens (0: none of this kind). `throughput` counts the tokens."""

    n_steps: int
    n_tokens: int
    val_n_tokens: int
    throughput: Throughput


class RunCheckpoints(Checkpoint):
    """Writes `last.ckpt`, from which a run resumes, and `best.ckpt`, and stops the run on request.

    last: every so many optimizer steps or tokens, after the whole step. If a validation is due, it is saved after that:
        a run killed in between validates again and knows the score.
    best: after a validation that scored better than the checkpoint on disk. That score is read from the file itself, so
        that no resumed run can replace it by worse weights. A score on other data does not count, nor does NaN.
    stop: Ctrl-C or SIGTERM finish the current step with its validation (on several GPUs the one after it as well, see
        `Agreement`), save, and raise `Interrupted`; a second one raises `StoppedAtOnce`. Stopping within a step would
        leave weights and moments of two different steps.

    monitor: the logged metric that decides `best` ("" keeps none); mode: "min" or "max" of it.
    data: the record of the data, written into every checkpoint. guard: see `FiniteGuard`.
    score, results: of `best`: its monitored value, None before the first, and all of its validation metrics.
    forgotten: why a score on disk does not count; "" if it does. saved_step: of `last`, None before the first.
    validated_step: the optimizer step after which the last validation ran. began: whether training has.
    ended: set when training is over; `last` then records it.
    """

    def __init__(
        self,
        last: Path,
        best: Path,
        often: Often,
        monitor: str = "",
        mode: str = "min",
        data: DataRecord | None = None,
        guard: FiniteGuard | None = None,
    ) -> None:
        self.last, self.best = last, best
        self.often, self.monitor, self.mode = often, monitor, mode
        self._tokens = 0  # at the end of the last optimizer step
        self.data, self.guard = data, guard or FiniteGuard()
        self.score: float | None = None
        self.results: dict[str, float] = {}
        self.forgotten = ""
        self.validated_step: int | None = None
        self._saved_step: int | None = None
        self._beside = False  # whether `last` is written beside training, so may be of an earlier step
        self.began = self.ended = self._flush = False
        self._due = self._stopping = self._asked = False
        self._agree = Agreement()
        self._waits: float | None = None  # seconds between validations, where they go by time
        self._over = Agreement()  # whether that time is over
        self._validated_at = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}({self.monitor}, {self.mode})"  # another metric's score does not count

    @property
    def stopping(self) -> bool:
        """Whether the user has asked the run to stop."""
        return self._asked or self._stopping

    @property
    def saved_step(self) -> int | None:
        if not self._beside:
            return self._saved_step
        with contextlib.suppress(UserError):
            return read_checkpoint(self.last, tensors="none")["global_step"]
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "results": self.results}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint[KEY] = {
            "data": None if self.data is None else self.data.plain(),
            "batch_size": getattr(datamodule, "batch_size", None),
            "world_size": trainer.world_size // getattr(datamodule, "sharing", 1),
            "validating": self._validating(trainer),
            "ended": self.ended,
        }

    @staticmethod
    def _validating(trainer: lightning.Trainer) -> int:
        """How many processes share the validation set."""
        return trainer.world_size // getattr(trainer.datamodule, "sharing_validation", 1)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.recall(trainer, self._validating(trainer))

    def recall(self, trainer: lightning.Trainer, validating: int) -> None:
        """Read score and results of `best`, if they belong to this metric and these data. validating: how many
        processes share the validation set."""
        found: tuple[Any, str] = None, ""
        # before processes have met, each reads for itself
        reads = trainer.is_global_zero or not torch.distributed.is_initialized()
        if reads and self.monitor and self.best.is_file():
            checkpoint = read_checkpoint(self.best, tensors="none")
            try:
                state = checkpoint["callbacks"].get(self.state_key)
                ours = checkpoint.get(KEY, {})
                former = DataRecord.read(ours.get("data"))
                processes = int(ours.get("validating", 1)), validating
                score = None if state is None or state["score"] is None else float(state["score"])
                if state is not None:
                    state = {"score": score, "results": {**state["results"]}}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"The checkpoint {self.best} does not say what its score is ({type(error).__name__}: "
                    f"{str(error)[:200]}). Remove it, or copy it again; the run then looks for its best weights again."
                ) from error
            if state is None:
                found = None, "it was measured by another metric"
            elif former is not None and self.data is not None and not former.same(self.data, processes):
                what = former.other(self.data, processes)
                found = None, f"{score:.4g} at step {checkpoint['global_step']} was measured on {what}"
            elif score is not None and math.isfinite(score):
                found = state, ""
        found = trainer.strategy.broadcast(found)  # all processes must decide alike, even if their disks differ
        state, self.forgotten = found
        if state is not None:
            self.score, self.results = state["score"], state["results"]

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise StoppedAtOnce
        self._asked = True
        with contextlib.suppress(OSError):  # print is not safe here: the signal may have interrupted one
            os.write(2, b"\nStopping after this step; once more stops at once.\n")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.began, self._tokens = True, self.often.throughput.tokens
        self._agree = Agreement()
        self._waits = getattr(trainer, "_val_check_time_interval", None)  # not in all versions of Lightning
        self._wait_anew(trainer)
        leave_signals_to_us(trainer)
        self._beside = getattr(trainer.strategy, "asynchronous", False)
        self._saved_step = trainer.global_step if self.last.is_file() else None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)

    def _wait_anew(self, trainer: lightning.Trainer) -> None:
        """Begin the time until the next validation. Lightning would have every process ask its own clock, and by a time
        of its last validation that is infinite it finds what the first process's clock has said."""
        self._validated_at, self._over = time.monotonic(), Agreement()
        if self._waits is not None:
            trainer._last_val_time = math.inf  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._flush:  # only now is the saved step logged as well
            self._save_logs(trainer)
            self._flush = False
        if self._stopping:
            finish_saving(trainer)
            raise Interrupted(trainer.global_step, self.last)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        stepped = not loop._should_accumulate()  # accumulated gradients are in no checkpoint
        if stepped and _is_last(trainer):
            # Lightning then validates this step as well, whatever the interval
            trainer.should_stop, trainer.check_val_every_n_epoch = True, None
        self._due, validates = False, False
        if stepped:
            before, self._tokens = self._tokens, self.often.throughput.tokens

            def crossed(interval: int) -> bool:
                return interval > 0 and before // interval < self._tokens // interval

            self._due = trainer.global_step % self.often.n_steps == 0 or crossed(self.often.n_tokens)
            validates = crossed(self.often.val_n_tokens)
        if self.often.val_n_tokens:
            trainer.val_check_batch = 1 if validates else NEVER
        if self._waits is not None:
            over = trainer.is_global_zero and time.monotonic() - self._validated_at >= self._waits
            said = self._over(trainer, over)
            trainer._last_val_time = -math.inf if said else math.inf  # type: ignore[attr-defined]
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        validates = sum(trainer.num_val_batches) > 0 and loop._should_check_val_fx(fetcher)
        if not validates:
            self._save_last(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        self._wait_anew(trainer)
        if self.monitor:
            score = float(trainer.callback_metrics[self.monitor])
            if self._is_better(score):
                self.guard.check(trainer, pl_module)
                self.score = score
                self.results = dict(pl_module.results)  # type: ignore[arg-type]
                trainer.save_checkpoint(self.best)
        self._save_last(trainer, pl_module)

    def _is_better(self, score: float) -> bool:
        if not math.isfinite(score) or self.score is None:
            return math.isfinite(score)
        return score < self.score if self.mode == "min" else score > self.score

    def _save_last(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        asked = self._agree(trainer, self._asked)
        if trainer.fit_loop.epoch_loop._should_accumulate() or not (self._due or asked):
            return
        self.guard.check(trainer, pl_module)
        self._save_logs(trainer)  # a resumed run does not log again what is before its checkpoint
        if trainer.training and trainer._logger_connector.should_update_logs:
            metrics = convert_tensors_to_scalars(trainer._logger_connector.metrics["log"])
            for logger in trainer.loggers if metrics else ():
                if callable(ahead := getattr(logger, "log_ahead", None)):
                    step = trainer.fit_loop.epoch_loop._batches_that_stepped
                    ahead({"epoch": trainer.current_epoch, **metrics}, step)
        trainer.save_checkpoint(self.last)
        self._saved_step = trainer.global_step
        self._due, self._stopping, self._flush = False, asked, True

    def _save_logs(self, trainer: lightning.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore()


def finish_saving(trainer: lightning.Trainer) -> None:
    """Wait for a checkpoint that is written beside training (`sharding.FullySharded`)."""
    if callable(finish := getattr(trainer.strategy, "finish_saving", None)):
        finish()


@contextlib.contextmanager
def abandons_saving(trainer: lightning.Trainer) -> Iterator[None]:
    """Around training: whatever ends it, no checkpoint is written beside it any more. `Diverged` is told with the last
    one, so its handler waits for that. After another error it gets ten seconds, when stopped at once none."""
    try:
        yield
    except Diverged:
        raise
    except BaseException as error:
        if callable(abandon := getattr(trainer.strategy, "abandon_saving", None)):
            abandon(10.0 if isinstance(error, Exception) else 0.0)
        raise


def _is_last(trainer: lightning.Trainer) -> bool:
    """Whether the finished optimizer step is the run's last, by its number of steps or epochs."""
    loop = trainer.fit_loop
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    last_epoch = 0 <= epochs <= trainer.current_epoch + 1 and loop.epoch_loop.batch_progress.is_last_batch
    return 0 <= trainer.max_steps <= trainer.global_step or last_epoch


class Throughput(lightning.Callback):
    """Counts tokens, and logs every `log_every_n_steps` steps: `train/tokens_per_second` over the whole run (from the
    end of a batch to that of the next, waiting for data and other processes included, without validation, saving and a
    process's first batch, which compiles kernels), `train/lr` of the first parameter group, `train/grad_norm` before
    clipping, `train/memory_gib` (the most held so far, of the GPU or else of this process), and, on a GPU with a known
    peak, `train/mfu`: the share of the peak that products with the weights use, at 6 floating point operations a token
    and parameter without embeddings.

    Tokens are those of all processes, padding included: the same number in each, so that all may decide by it.

    tokens, seconds: all of the run. rate: tokens a second.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._first_tokens = 0
        self._first_seconds = 0.0
        self._in_batch = Sum()  # whose sequences may be longer in one process than in another
        self._started = 0.0
        self._since: float | None = None  # the end of a batch, until something else than training begins
        self._is_first = True
        self._flops: float | None = None  # of a token, over the peak of all devices a second

    @property
    def rate(self) -> float:
        tokens, seconds = self.tokens - self._first_tokens, self.seconds - self._first_seconds
        if tokens <= 0 or seconds <= 0:  # there was no other batch
            tokens, seconds = self.tokens, self.seconds
        return tokens / max(seconds, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        first = {"first_tokens": self._first_tokens, "first_seconds": self._first_seconds}
        return {"tokens": self.tokens, "seconds": self.seconds, **first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.seconds = int(state_dict["tokens"]), float(state_dict["seconds"])
        self._first_tokens, self._first_seconds = int(state_dict["first_tokens"]), float(state_dict["first_seconds"])

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._is_first, self._since = True, None
        self._flops = _share_of_peak(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter() if self._since is None else self._since
        self._in_batch.begin(trainer, batch.inputs.shape[0] * batch.inputs.shape[1])

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._pause(pl_module)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._pause(pl_module)

    def _pause(self, pl_module: lightning.LightningModule) -> None:
        """Count what a GPU has still to do of the last batches; what comes until the next is no training."""
        if self._since is None:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds += time.perf_counter() - self._since
        self._since = None

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer._logger_connector.should_update_logs:
            pl_module.log("train/lr", float(optimizer.param_groups[0]["lr"]))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        on_gpu = pl_module.device.type == "cuda"
        logs = trainer._logger_connector.should_update_logs
        if on_gpu and (logs or self._is_first):  # the host may be ahead of it by many batches
            torch.cuda.synchronize(pl_module.device)
        self._since = time.perf_counter()
        seconds = self._since - self._started
        tokens = self._in_batch.read() // getattr(trainer.datamodule, "sharing", 1)  # type: ignore[attr-defined]
        self.seconds += seconds
        self.tokens += tokens
        if self._is_first:
            self._first_tokens, self._first_seconds = self._first_tokens + tokens, self._first_seconds + seconds
            self._is_first = False
        if logs:
            if self.tokens > self._first_tokens:  # of first batches alone it would be a rate of compiling
                pl_module.log("train/tokens_per_second", self.rate)
            held = torch.cuda.max_memory_allocated(pl_module.device) if on_gpu else _largest_memory()
            pl_module.log("train/memory_gib", held / 2**30)
            if self._flops is not None:
                pl_module.log("train/mfu", self.rate * self._flops)


def _largest_memory() -> int:
    """The most bytes that this process has held; 0 if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations of products a second at best, None if unknown."""
    if (known := card(torch.cuda.get_device_name(device))) is not None:
        return known.flops_in(dtype, torch.get_float32_matmul_precision() != "highest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for chips that it does not know
        try:
            return get_available_flops(device, dtype)
        except ValueError:
            return None


def _share_of_peak(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> float | None:
    """Operations of a token's products with the weights, over what all devices can do in a second; None if unknown."""
    model: Any = pl_module.model
    if pl_module.device.type != "cuda":
        return None
    precision = str(trainer.precision)
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    peak = _peak(pl_module.device, dtype)
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    tables -= {id(p) for p in model.head.parameters()}  # a tied embedding is multiplied with
    count = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    return 6 * count / (peak * trainer.world_size) if peak else None
