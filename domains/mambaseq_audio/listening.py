"""Clips that a model makes while it is trained, beside real ones: in TensorBoard and on the run's page."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import matplotlib.image
import numpy as np
import soundfile
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from mambaseq.atomic import atomic_file, json_text
from mambaseq.data.module import SequenceData, named_sets
from mambaseq.errors import ConfigError, UserError, paragraph
from mambaseq.generation import generate
from mambaseq.generation.decode import continues
from mambaseq.limits import SEEDS, check_setting
from mambaseq.models import SequenceModel
from mambaseq.plain import read_json, read_yaml
from mambaseq.reporting import Section
from mambaseq.reporting.page import write_page
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks.averaging import WeightAverage
from mambaseq.tasks.callbacks import RunCheckpoints
from mambaseq_audio.io import encode_wav
from mambaseq_audio.players import FORMAT, Clip, grid, scales, thumbnail

MOST_CLIPS, MOST_SECONDS = 16, 60.0
KEPT = 12
"""Steps whose clips a run keeps; see `thinned`."""
EMBEDDED = 8 * 2**20
"""Bytes of sound that a run's page holds itself."""
_LOOKED_AT = 256  # validation items among which those with different conditions are looked for


class Reference(NamedTuple):
    """A real recording of the validation set. ids: `(length,)` int64. condition: `(1,)` or None. name: of its
    condition, or its number."""

    ids: np.ndarray
    condition: torch.Tensor | None
    name: str


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
        signal = np.asarray(self._data.tokenizer.decode(ids), dtype=np.float32)
        _, channels = sound_of(self._data)
        return signal if channels == 1 else signal[: len(signal) // channels * channels].reshape(-1, channels)

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
            prompts = np.stack([np.concatenate([start, self._references[i].ids[:length]]) for i in members])
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


def sound_of(data: SequenceData) -> tuple[int, int]:
    """Samples a second and channels of what data of sounds write."""
    options = data.writer_options()
    return int(options["sample_rate"]), int(options.get("channels", 1))


def references(data: SequenceData, count: int) -> list[Reference]:
    """At most so many recordings of the validation set, spread over it, with as many different conditions as there are;
    in the order of the set. They depend on nothing but the data."""
    items = next(iter(named_sets(data.validation()).values()))
    beginnings = getattr(items, "beginnings", None)
    places = list(range(len(items))) if beginnings is None else beginnings()
    spread = np.unique(np.linspace(0, len(places) - 1, min(len(places), _LOOKED_AT)).astype(int))
    by_condition: dict[tuple[Any, ...], list[int]] = {}
    for number in spread.tolist():
        condition = items[places[number]].condition
        key = () if condition is None else tuple(condition.flatten().tolist())
        by_condition.setdefault(key, []).append(places[number])
    groups = [by_condition[key] for key in sorted(by_condition)]
    if len(groups) >= count:  # conditions spread over all
        chosen = [groups[i][0] for i in np.linspace(0, len(groups) - 1, count).astype(int).tolist()]
    else:
        rounds = -(-count // len(groups))
        taken = [
            group[i]
            for group in groups
            for i in np.unique(np.linspace(0, len(group) - 1, min(rounds, len(group))).astype(int)).tolist()
        ]
        chosen = sorted(taken)[:count] if len(groups) == 1 else taken[:count]
    found, seen = [], dict[str, int]()
    for place in chosen:
        batch = items[place]
        assert batch.targets is not None
        name = _name(data, batch.condition) or "recording"
        seen[name] = seen.get(name, 0) + 1
        told = name if seen[name] == 1 and name != "recording" else f"{name} {seen[name]}"
        found.append(Reference(batch.targets[0].numpy().astype(np.int64), batch.condition, told))
    return found


def _name(data: SequenceData, condition: torch.Tensor | None) -> str:
    if condition is None:
        return ""
    names = data.condition_names
    numbers = [int(one) for one in condition.flatten().tolist()]
    if len(numbers) == 1 and numbers[0] < len(names):
        return names[numbers[0]]
    return " ".join(map(str, numbers))


def thinned(steps: Sequence[int], most: int = KEPT) -> list[int]:
    """Which of these steps, in ascending order, are kept: all up to so many; then those go whose neighbours are nearest
    by their ratio. The first and the last stay.

    >>> thinned([1, 2, 3, 4, 8], most=4)
    [1, 2, 4, 8]
    """
    kept = list(steps)
    while len(kept) > max(most, 2):
        ratios = [kept[i + 1] / max(kept[i - 1], 1) for i in range(1, len(kept) - 1)]
        del kept[1 + ratios.index(min(ratios))]
    return kept


class Samples:
    """The folder `samples/` of a run: `real/`, a folder for each step, `samples.json` with what they are, and a page.
    Each clip is a sound file with its picture beside it."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / "samples"
        self.record: dict[str, Any] = {}
        if (self.path / "samples.json").is_file():
            with contextlib.suppress(UserError):
                self.record = read_json(self.path / "samples.json")

    def begin(self, settings: dict[str, Any], reals: Sequence[np.ndarray], step: int) -> None:
        """Write the recordings; keep of what is there what a run at this step has made by these settings. Raises
        UserError for a full disk."""
        seconds, peak = scales(reals, settings["sample_rate"])
        settings = {**settings, "seconds": max(seconds, settings["seconds"]), "peak": peak}
        same = self.record.get("settings") == settings
        for one in self.steps():
            if one > step or not same:
                self._remove(one)
        of = self.record.get("steps", {})
        kept = {str(one): of[str(one)] for one in self.steps() if same and one <= step}
        self.record = {"settings": settings, "steps": kept}
        self._write("real", reals)
        self._save()

    def steps(self) -> list[int]:
        found = self.record.get("steps", {})
        return sorted(int(name) for name in found if name.isdecimal()) if isinstance(found, dict) else []

    def has(self, step: int) -> bool:
        return step in self.steps() and not self.record["steps"][str(step)].get("failed")

    def add(self, step: int, signals: Sequence[np.ndarray], seconds: float) -> None:
        """Write the clips of a step, remove those of steps that are not kept, and write the page. Raises UserError for
        a full disk."""
        self._write(f"step-{step}", signals)
        self.record["steps"][str(step)] = {"seconds": round(seconds, 2)}
        for one in set(self.steps()) - set(thinned(self.steps())):
            self._remove(one)
            del self.record["steps"][str(one)]
        self._save()

    def failed(self, step: int, reason: str) -> None:
        self.record["steps"][str(step)] = {"failed": reason}
        self._save()

    def _remove(self, step: int) -> None:
        shutil.rmtree(self.path / f"step-{step}", ignore_errors=True)

    def _write(self, name: str, signals: Sequence[np.ndarray]) -> None:
        settings = self.record["settings"]
        (self.path / name).mkdir(parents=True, exist_ok=True)
        for number, signal in enumerate(signals):
            with atomic_file(self.path / name / f"{number}.{FORMAT}") as file:
                file.write(encode_wav(signal, settings["sample_rate"], FORMAT))
            with atomic_file(self.path / name / f"{number}.png") as file:
                file.write(thumbnail(signal, settings["sample_rate"], settings["seconds"], settings["peak"]))

    def _save(self) -> None:
        with atomic_file(self.path / "samples.json", "w", encoding="utf-8") as file:
            file.write(json_text(self.record, indent=1) + "\n")
        if (section := self.section(beside=True)) is not None:
            write_page(self.path / "index.html", f"{self.run.name}: as it learns", section.summary, [section])

    def section(self, beside: bool = False) -> Section | None:
        """The clips, a row for each recording, a column for each step; None where there are none. The page holds at
        most 8 MiB of sound, and has links to the files of what is more. beside: for a page in the folder itself, which
        holds none."""
        settings, steps = self.record.get("settings"), self.steps()
        if not isinstance(settings, dict) or not steps:
            return None
        names = [str(name) for name in settings["names"]]
        folders = {"real": "real", **{f"step {step:,}": f"step-{step}" for step in steps}}
        left, linked = 0 if beside else EMBEDDED, 0
        cells: dict[str, list[Clip | str]] = {}
        # the recordings, the last and the first step are what is to be heard in any case
        for column in sorted(folders, key=lambda one: one not in (*list(folders)[:2], list(folders)[-1])):
            folder = self.path / folders[column]
            files = [folder / f"{number}.{FORMAT}" for number in range(len(names))]
            size = sum(file.stat().st_size for file in files if file.is_file())
            inside = size <= left
            left, linked = left - inside * size, linked + (not inside)
            missing = self.record["steps"].get(column.removeprefix("step ").replace(",", ""), {}).get("failed")
            base = "" if beside else "samples/"
            cells[column] = [
                _clip(file, f"{base}{folders[column]}/{file.name}", inside, settings["seconds"])
                or missing
                or "Its file is missing."
                for file in files
            ]
        outside = "" if beside or not linked else f" The sounds of {linked} columns are in samples/, beside this page."
        took = self.record["steps"][str(steps[-1])].get("seconds")
        begun = f", each goes on from {settings['prompt']:,} samples of the recording" if settings.get("prompt") else ""
        body = (
            f"<p>Each time the same conditions, and the same seed ({settings['seed']}) and temperature "
            f"({float(settings['temperature']):g}){begun}. All pictures have one scale of time and loudness, that of "
            f"the recordings. At most {KEPT} steps are kept, early ones nearer to each other."
            + (f" The last one took {took:.1f} s." if took is not None else "")
            + ("" if beside else ' While a run trains, <a href="samples/index.html">samples/index.html</a> has them.')
            + outside
            + "</p>"
        )
        rows = [(name, {column: cells[column][number] for column in folders}) for number, name in enumerate(names)]
        summary = f"{len(names)} clips after each of {len(steps)} steps, up to {steps[-1]:,}, beside real recordings"
        return Section("As it learns to speak", summary, body + grid(rows, list(folders), name="clips as it learns"))


def _clip(file: Path, link: str, inside: bool, seconds: float) -> Clip | None:
    """A clip that has been written; None where it is not there."""
    try:
        own = soundfile.info(file).duration
        sound = file.read_bytes() if inside else link
        return Clip(sound, file.with_suffix(".png").read_bytes(), own, min(own / seconds, 1.0))
    except (soundfile.SoundFileError, OSError):
        return None


def _mono(signal: np.ndarray) -> torch.Tensor:
    """As TensorBoard takes it, `(1, length)`."""
    mono = signal if signal.ndim == 1 else signal.mean(1)
    return torch.from_numpy(np.ascontiguousarray(mono))[None]


def _pixels(png: bytes) -> np.ndarray:
    """`(height, width, 3)` uint8."""
    return (matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3] * 255).round().astype(np.uint8)
