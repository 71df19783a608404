"""Clips that a model makes while it is trained, beside real ones: in TensorBoard and on the run's page."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import matplotlib.image
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from mambaseq.data.module import SequenceData, named_sets
from mambaseq.errors import ConfigError, UserError, paragraph
from mambaseq.generation import generate
from mambaseq.generation.checks import continues
from mambaseq.limits import SEEDS, check_setting
from mambaseq.models import SequenceModel
from mambaseq.plain import read_yaml
from mambaseq.reporting import Section
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks.averaging import WeightAverage
from mambaseq.tasks.callbacks import RunCheckpoints
from mambaseq_audio.players import scales, thumbnail
from mambaseq_audio.references import Reference, references, signal_of, sound_of
from mambaseq_audio.samples import Samples

MOST_CLIPS, MOST_SECONDS = 16, 60.0


class Listening(lightning.Callback):
    """Generates clips every so many steps, and when training ends, with the same seeds and conditions each time: those
    of recordings of the validation set, which stand beside them.

    They go to TensorBoard (sounds and spectrograms) and into the run's folder, `samples/`, with a page of their own
    that is there while the run trains; the run's report.html shows them at its end. Clips of at most 12 steps are kept,
    the first, the last and others ever further apart, so a run's folder and page stay small.

    Training is as it would be without: nothing that it reads, draws or logs is touched. What fails is told, and the run
    goes on. With `ema`, the average of the weights speaks, which is what will be exported. Under several processes the
    first one does it.

    Args:
        every_n_steps: optimizer steps between.
        n: clips each time, at most 16; as many different conditions as there are.
        seconds: of a clip, at most 60; left out, what the run's `generation` says, or the data's length, at most 10.
        temperature: left out, what the run's `generation` says.
        seed: of all clips.
        prompt_seconds: so much of the recording is continued; 0 begins with nothing.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        n: int = 4,
        seconds: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
        prompt_seconds: float = 0.0,
    ) -> None:
        check_setting("every_n_steps", every_n_steps, 1, 2**62)
        check_setting("n", n, 1, MOST_CLIPS)
        if seconds is not None:
            check_setting("seconds", seconds, 0.01, MOST_SECONDS)
        check_setting("temperature", 1.0 if temperature is None else temperature, 0, 100)
        check_setting("seed", seed, *SEEDS)
        check_setting("prompt_seconds", prompt_seconds, 0, MOST_SECONDS)
        self.every_n_steps, self.n, self.seed = every_n_steps, n, seed
        self.seconds, self.temperature, self.prompt_seconds = seconds, temperature, prompt_seconds
        self._data: SequenceData | None = None
        self._references: list[Reference] = []
        self._samples: Samples | None = None
        self._options: dict[str, Any] = {}
        self._count = 0  # tokens of a clip
        self._prompt = 0  # tokens of a recording that are continued
        self._heard = -1  # the last step

    @staticmethod
    def section(run: Path) -> Section | None:
        """What the run's page shows of it; None where nothing was made."""
        return Samples(run).section()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(
                f"audio/listening works on one device and under ddp, not under {type(trainer.strategy).__name__}, "
                "where no process has whole weights. Leave it out of trainer.callbacks, or change trainer.strategy."
            )
        data: SequenceData = trainer.datamodule.data  # type: ignore[attr-defined]
        self._check(data, pl_module.model)  # type: ignore[arg-type]
        if not trainer.is_global_zero:
            return
        folder = RunFolder(trainer.default_root_dir)
        said = read_yaml(folder.config).get("generation") if folder.config.is_file() else None
        generation: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 0}
        generation |= said if isinstance(said, dict) else {}
        self._options = {key: generation[key] for key in ("temperature", "top_k", "top_p")}
        if self.temperature is not None:
            self._options["temperature"] = self.temperature
        self._data, self._heard = data, -1
        self._references = references(data, self.n)
        rate, channels = sound_of(data)
        self._count = int(generation["max_new_tokens"] or data.length)
        one = self._references[0].ids
        a_second = len(one) / max(len(self._signal(one)) / rate, 1e-9)  # tokens
        most = 10.0 if self.seconds is None else self.seconds
        self._count = max(1, round(min(self._count if self.seconds is None else math.inf, most * a_second)))
        self._prompt = round(self.prompt_seconds * a_second)
        self._samples = Samples(folder.path)
        settings = {
            "sample_rate": rate,
            "channels": channels,
            "n": self.n,
            "tokens": self._count,
            "prompt": self._prompt,
            "seconds": (self._prompt + self._count) / a_second,
            "seed": self.seed,
            "names": [one.name for one in self._references],
            **self._options,
        }
        with self._told(trainer, "begin"):
            reals = [self._signal(one.ids[: self._prompt + self._count]) for one in self._references]
            self._samples.begin(settings, reals, trainer.global_step)

    def _check(self, data: SequenceData, model: SequenceModel) -> None:
        """Raise ConfigError for a run that makes no sound."""
        if data.tokenizer is None or "sample_rate" not in data.writer_options() or not continues(model, "tokens"):
            raise ConfigError(
                "audio/listening is for models that generate sound: data with a writer of sounds, such as audio/clips "
                "or audio/waveform, a causal backbone and the head lm. Leave it out of trainer.callbacks."
            )
        if not any(len(items) for items in named_sets(data.validation()).values()):
            raise ConfigError(
                "audio/listening plays clips beside recordings of the validation set, and there is none. Set "
                "data.validation (or data.validation_fraction), or leave it out of trainer.callbacks."
            )

    def _signal(self, ids: np.ndarray) -> np.ndarray:
        """The sound of ids: `(length,)`, or `(length, 2)`, float32."""
        assert self._data is not None
        assert self._data.tokenizer is not None
        return signal_of(self._data.tokenizer, ids, sound_of(self._data)[1])

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # before the next step instead of after this one: what counts tokens a second does not see it, and the step is
        # saved by then
        step = trainer.global_step
        if step > 0 and step % self.every_n_steps == 0 and not _stopping(trainer):
            self._listen(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.global_step > 0:
            self._listen(trainer, pl_module)

    def _listen(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step = trainer.global_step
        if self._samples is None or step == self._heard:
            return
        self._heard = step
        if self._samples.has(step):  # a resumed run
            return
        began = time.perf_counter()
        with self._told(trainer, step):
            with untouched(pl_module, _average(trainer)):
                signals = self._generated(pl_module.model, pl_module.device)  # type: ignore[arg-type]
            self._samples.add(step, signals, time.perf_counter() - began)
            self._log(trainer, step, signals)

    def _generated(self, model: SequenceModel, device: torch.device) -> list[np.ndarray]:
        """A clip for each recording. Those with prompts of one length are made together."""
        data = self._data
        assert data is not None
        by_length: dict[int, list[int]] = {}
        for number, one in enumerate(self._references):
            by_length.setdefault(min(self._prompt, len(one.ids)), []).append(number)
        found: dict[int, np.ndarray] = {}
        start = np.asarray(data.start_ids, dtype=np.int64)
        for length, members in by_length.items():
            prompts = np.stack(
                [np.concatenate([start, self._references[i].ids[:length].astype(np.int64)]) for i in members]
            )
            conditions = [self._references[i].condition for i in members]
            known = [one for one in conditions if one is not None]
            made = generate(
                model,
                torch.from_numpy(prompts).to(device),
                self._count,
                condition=torch.cat(known).to(device) if known else None,
                seed=self.seed,
                **self._options,
            ).cpu()
            for number, row in zip(members, made.numpy(), strict=True):
                found[number] = self._signal(row[len(start) :])
        return [found[number] for number in range(len(self._references))]

    @contextlib.contextmanager
    def _told(self, trainer: lightning.Trainer, step: int | str) -> Iterator[None]:
        """A failure is printed and noted instead of ending the run."""
        try:
            yield
        except Exception as error:  # whatever goes wrong with a clip: training matters more
            reason = paragraph(f"{type(error).__name__}: {error}", 300)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            at = f" at step {step}" if isinstance(step, int) else ""
            told = f"{trainer.default_root_dir}: no clips could be made to listen to{at} ({reason}); training goes on"
            print(told, file=sys.stderr, flush=True)
            if self._samples is not None and isinstance(step, int):
                with contextlib.suppress(UserError, OSError):
                    self._samples.failed(step, reason)
            elif self._samples is not None:
                self._samples = None  # not even the recordings could be written

    def _log(self, trainer: lightning.Trainer, step: int, signals: Sequence[np.ndarray]) -> None:
        """To TensorBoard: each clip, and the real one's picture beside its own; the recordings once."""
        assert self._data is not None
        assert self._samples is not None
        loggers = [one for one in trainer.loggers if isinstance(one, TensorBoardLogger)]
        if not loggers:
            return
        rate, _ = sound_of(self._data)
        reals = [self._signal(one.ids[: self._prompt + self._count]) for one in self._references]
        seconds, peak = scales([*reals, *signals], rate)
        for number, (one, real, made) in enumerate(zip(self._references, reals, signals, strict=True)):
            name = f"listening/{number} {one.name}"
            pictures = [_pixels(thumbnail(signal, rate, seconds, peak)) for signal in (real, made)]
            gap = np.full((len(pictures[0]), 4, 3), 255, dtype=np.uint8)
            for logger in loggers:
                board = logger.experiment
                if len(self._samples.steps()) == 1:
                    board.add_audio(f"{name}, real", _mono(real), step, rate)
                board.add_audio(f"{name}, generated", _mono(made), step, rate)
                board.add_image(
                    f"{name}, real and generated",
                    np.concatenate([pictures[0], gap, pictures[1]], axis=1),
                    step,
                    dataformats="HWC",
                )
        for logger in loggers:
            logger.experiment.flush()


def _stopping(trainer: lightning.Trainer) -> bool:
    """Whether the user has asked the run to stop: it should not generate first."""
    return any(one.stopping for one in trainer.callbacks if isinstance(one, RunCheckpoints))  # type: ignore[attr-defined]


def _average(trainer: lightning.Trainer) -> WeightAverage | None:
    found = (one for one in trainer.callbacks if isinstance(one, WeightAverage))  # type: ignore[attr-defined]
    return next(found, None)


@contextlib.contextmanager
def untouched(module: lightning.LightningModule, average: WeightAverage | None = None) -> Iterator[None]:
    """During the block the model may draw and evaluate; afterwards random numbers and modes are those from before.

    average: is put into the model for the block.
    """
    modes = [(one, one.training) for one in module.modules()]
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), average.inside() if average else contextlib.nullcontext():
        try:
            yield
        finally:
            for one, mode in modes:
                one.training = mode


def _mono(signal: np.ndarray) -> torch.Tensor:
    """As TensorBoard takes it, `(1, length)`."""
    mono = signal if signal.ndim == 1 else signal.mean(1)
    return torch.from_numpy(np.ascontiguousarray(mono))[None]


def _pixels(png: bytes) -> np.ndarray:
    """`(height, width, 3)` uint8."""
    return (matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3] * 255).round().astype(np.uint8)
