"""A run's checked configuration: its sections, and the data, model and metrics that it makes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mambaseq.checkpoints.card import check_generation
from mambaseq.conditions import encoder_options, listed
from mambaseq.data.loaders import SequenceDataModule
from mambaseq.data.module import SequenceData
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, cut_list, did_you_mean, shown, under_key
from mambaseq.heads.losses import balanced_weights
from mambaseq.limits import WORKERS
from mambaseq.metrics.base import Metric
from mambaseq.models import check_parts
from mambaseq.registry import Registry
from mambaseq.runs.naming import MODEL_PARTS, PROVIDED
from mambaseq.specs import arguments_of
from mambaseq.tasks.averaging import EmaConfig
from mambaseq.tasks.finetuning import FinetuneConfig
from mambaseq.tasks.lora import LoraConfig
from mambaseq.tasks.optimizer import OptimizerConfig
from mambaseq.tasks.task import LengthWarmup

# arguments that the data give where the configuration leaves them out: type and help
OFFERED: dict[str, tuple[Any, str]] = {
    "n_outputs": (int | None, "numbers that a target is; left out, what the data say, or the default of the part"),
    "channel_mean": (list[float] | None, "of each channel, in its units; left out, what the data say"),
    "channel_std": (list[float] | None, "of each channel, in its units; left out, what the data say"),
}


@dataclasses.dataclass
class LoaderConfig:
    """How batches are put together.

    Args:
        batch_size: sequences in a batch of each process; an optimizer step has trainer.accumulate_grad_batches of them.
        num_workers: processes that read data beside the training; 0 reads in the training's own process.
        pack: join sequences of different lengths end to end instead of padding them.
    """

    batch_size: int = 8
    num_workers: int = 0
    pack: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ConfigError(
                f"loader.batch_size must be at least 1 and loader.num_workers at least 0, not {self.batch_size} and "
                f"{self.num_workers}."
            )
        WORKERS.check(self.num_workers, "loader.num_workers")


@dataclasses.dataclass
class CheckpointConfig:
    """When a run is saved and validated, and which weights are the best.

    Args:
        every_n_steps: optimizer steps between checkpoints that a run can be resumed from.
        every_n_tokens: tokens between further checkpoints; 0 for none.
        val_every_n_tokens: tokens between validations, instead of trainer.val_check_interval and
            trainer.check_val_every_n_epoch; 0 leaves it to those.
        monitor: the validation metric that chooses the best weights, such as val/loss; "" takes the last weights.
        mode: whether its smallest (min) or largest (max) value is the best; null takes what the metric says.
    """

    every_n_steps: int = 100
    every_n_tokens: int = 0
    val_every_n_tokens: int = 0
    monitor: str = ""
    mode: Literal["min", "max"] | None = None

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ConfigError(f"checkpoint.every_n_steps must be at least 1; it is {self.every_n_steps}.")
        for name in ("every_n_tokens", "val_every_n_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"checkpoint.{name} must not be negative; it is {getattr(self, name)}.")


@dataclasses.dataclass
class GenerationConfig:
    """Defaults of `mambaseq generate` for this run.

    Args:
        max_new_tokens: tokens (or steps of a signal) to add; 0 takes the length of the data's sequences.
        temperature: below 1 likely tokens are drawn more often, above 1 less often; 0 takes the likeliest.
        top_k: draw from so many of the likeliest tokens; 0 from all.
        top_p: draw from the likeliest tokens that together have this probability; 1 from all.
        min_p: leave out tokens less likely than this share of the likeliest one.
        repetition_penalty: above 1, tokens that are there already become less likely.
        presence_penalty: what is subtracted from the logits of tokens that were generated already; may be below 0.
    """

    max_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_generation(dataclasses.asdict(self))


SECTIONS = {
    "loader": LoaderConfig,
    "optimizer": OptimizerConfig,
    "finetune": FinetuneConfig,
    "lora": LoraConfig,
    "ema": EmaConfig,
    "length_warmup": LengthWarmup,
    "checkpoint": CheckpointConfig,
    "generation": GenerationConfig,
}


@dataclasses.dataclass
class RunConfig:
    """A checked configuration.

    settings: everything but `trainer`, as plain values. trainer: arguments of `lightning.Trainer`, its classes made.
    classes: the class behind each name ("data", "encoder", ...). yaml: all of it, as it is saved with the run.
    defaults: gives what each key has that nobody sets, by whole keys.
    inherited: gives the configuration's name for each key that a named one or a base sets (see `naming.inherited`).
    """

    settings: dict[str, Any]
    trainer: dict[str, Any]
    classes: dict[str, Any]
    yaml: str
    defaults: Callable[[], dict[str, Any]]
    inherited: Callable[[], dict[str, str]]

    def callbacks(self) -> list[Any]:
        """Those that the configuration names, made."""
        given = self.trainer.get("callbacks") or []
        return list(given) if isinstance(given, list | tuple) else [given]

    def make_data(self, *, setup: bool = False, left_out: Path | None = None) -> SequenceData:
        """The dataset. setup: call its `setup` as well. left_out: see
        `SequenceData.left_out_file`. Raises UserError that names the setting under `data` that is
        wrong."""
        with self.naming_data_keys():
            data: SequenceData = self.classes["data"](**self._data_options())
            data.left_out_file = left_out
            if setup:
                data.setup()
        return data

    @contextlib.contextmanager
    def naming_data_keys(self) -> Iterator[None]:
        """Have a UserError name the setting under `data` that is wrong, and the configuration that sets it where that
        is not the user's own."""
        try:
            with under_key("data", self._data_options()):
                yield
        except UserError as error:
            about = re.match(r"data\.\w+(\.\w+)*", str(error))
            if about is not None and (name := self.inherited().get(key := about[0])) is not None:
                option = arguments_of(self.classes["data"]).get(key.removeprefix("data."))
                may_be_null = option is not None and (option.default is None or "None" in str(option.annotation))
                remedy = "set it to null to leave it out" if may_be_null else "set it to a value of your own"
                error.args = (f"{error} {name} sets {key}; {remedy}.",)
            raise

    def _data_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings["data"].items() if key != "name"}

    def make_datamodule(self, data: SequenceData) -> SequenceDataModule:
        return SequenceDataModule(data, seed=self.settings["seed"], **self.settings["loader"])

    def check_model(self) -> None:
        """Raise UserError for wrong values of the model's parts, before data are read: of backbone and mixers, and of
        an encoder and a head that need nothing of the data."""
        needs = (PROVIDED | OFFERED.keys()) - {"d_model", "make_mixer"}
        lacking = {part for part in MODEL_PARTS if needs & arguments_of(self.classes[part]).keys()}
        if "mixer" in lacking:
            lacking.add("backbone")
        check_parts(self.settings["model"], lacking)

    def model_spec(self, data: SequenceData) -> dict[str, Any]:
        """The description for `build_model`, with what the data give filled in. Raises ConfigError when the data lack
        what a part needs."""
        known = {
            "vocab_size": data.vocab_size,
            "n_codes": data.n_codes,
            "n_channels": data.n_channels,
            "n_conditions": data.n_conditions,
            "n_classes": len(data.class_names) or None,
            "complement": None if data.complement is None else [int(i) for i in data.complement],
            **encoder_options(data.conditions),
        }
        if missing := encoder_options(data.conditions).keys() - arguments_of(self.classes["encoder"]).keys():
            raise ConfigError(
                f"The dataset {shown(self.settings['data']['name'])} has several conditions, or numbers "
                f"({listed(data.conditions)}), which the encoder {shown(self.settings['model']['encoder']['name'])} "
                f"does not take ({cut_list(sorted(missing))}). Choose the encoder tokens or signal, or other "
                f"conditions."
            )
        model = self.settings["model"]
        spec: dict[str, Any] = {"d_model": model["d_model"], "tie_embeddings": model["tie_embeddings"]}
        for part in MODEL_PARTS:
            spec[part] = dict(model[part])
            for argument in PROVIDED & known.keys() & arguments_of(self.classes[part]).keys():
                if known[argument] is None:
                    raise ConfigError(
                        f"The {part} {shown(model[part]['name'])} needs {argument}, which the dataset "
                        f"{shown(self.settings['data']['name'])} does not have{self._data_as_set()}. Choose another "
                        f"{part} or dataset."
                    )
                spec[part][argument] = known[argument]
            self._fill_in(spec[part], part, data)
            self._balance(spec[part], part, data)
        if "mixers" in model:
            spec["mixers"] = {name: dict(options) for name, options in model["mixers"].items()}
        return spec

    def _fill_in(self, options: dict[str, Any], part: str, data: SequenceData) -> None:
        """Fill in what the data give of `OFFERED`. Raises ConfigError where neither the data nor the configuration
        does."""
        parameters = arguments_of(self.classes[part])
        for argument in sorted(OFFERED.keys() & parameters.keys()):
            value = options.pop(argument, None)
            said = getattr(data, argument) if value is None else value
            if said is not None:
                options[argument] = [float(one) for one in said] if isinstance(said, Sequence) else int(said)
            elif parameters[argument].default is inspect.Parameter.empty:
                raise ConfigError(
                    f"The {part} {shown(options['name'])} needs {argument}, which the dataset "
                    f"{shown(self.settings['data']['name'])} does not have. Set model.{part}.{argument}."
                )

    def _balance(self, options: dict[str, Any], part: str, data: SequenceData) -> None:
        """Put numbers in the place of `balanced`. Raises ConfigError for data that do not count their classes."""
        for key in ("class_weights", "positive_weights"):
            if options.get(key) != "balanced":
                continue
            if data.class_counts is None:
                raise ConfigError(
                    f"model.{part}.{key} is balanced, but the dataset {shown(self.settings['data']['name'])} does not "
                    f"count its classes{self._data_as_set()}. Give a number for each class."
                )
            options[key] = balanced_weights(key, data.class_counts)

    def _data_as_set(self) -> str:
        """The dataset's settings that differ from their defaults, for a message: what it has may depend on them."""
        defaults = arguments_of(self.classes["data"])
        given = [
            f"data.{key} {shown(value)}"
            for key, value in self.settings["data"].items()
            if key in defaults and value != defaults[key].default
        ]
        return f" with {cut_list(given)}" if given else ""

    def make_metrics(self, data: SequenceData) -> dict[str, Metric]:
        registry: Registry[type[Metric]] = catalog()["metrics"]
        return {
            label: registry.get(name, "metrics")(data.class_names)
            for label, name in metric_labels(self.settings["metrics"]).items()
        }

    def best(self, metrics: Mapping[str, Metric], sets: Iterable[str] = ()) -> tuple[str, str]:
        """The logged metric that chooses the best weights, and whether its "min" or "max" is best ("" and "min" when
        the last weights are kept). sets: names of the validation sets where there are several. Raises ConfigError when
        the metric is not logged, or does not say which of the two."""
        chosen = CheckpointConfig(**self.settings["checkpoint"])
        if not chosen.monitor:
            return "", "min"
        higher: dict[str, bool | None] = {"val/loss": False}
        higher |= {f"val/{name}": metric.higher_is_better for name, metric in metrics.items() if metric.scalar}
        if chosen.monitor not in higher:
            # as it stands under metrics, or its last word where no other metric has it
            word = chosen.monitor.removeprefix("val/")
            meant = [name for name in higher if name == f"val/{word}"] or [n for n in higher if n.endswith(f"/{word}")]
            if word and len(meant) == 1:
                chosen.monitor = meant[0]
        higher |= {f"val/{name}/{key.removeprefix('val/')}": how for name in sets for key, how in [*higher.items()]}
        if chosen.monitor not in higher:
            raise ConfigError(
                f"checkpoint.monitor is {shown(chosen.monitor)}, which this run does not log."
                f"{did_you_mean(chosen.monitor, higher)} Known: {', '.join(sorted(higher))}; `metrics` adds others."
            )
        if chosen.mode is None and higher[chosen.monitor] is None:
            raise ConfigError(
                f"The metric {shown(chosen.monitor)} does not say whether higher is better. Set checkpoint.mode to min "
                f"or max."
            )
        return chosen.monitor, chosen.mode or ("max" if higher[chosen.monitor] else "min")

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(**self.settings["optimizer"])

    def finetune(self) -> FinetuneConfig:
        return FinetuneConfig(**self.settings["finetune"])

    def lora(self) -> LoraConfig:
        return LoraConfig(**self.settings["lora"])

    def ema(self) -> EmaConfig:
        return EmaConfig(**self.settings["ema"])

    def length_warmup(self) -> LengthWarmup:
        return LengthWarmup(**self.settings["length_warmup"])


def metric_labels(names: Sequence[str]) -> dict[str, str]:
    """The label that each metric is logged under, and its name. The label is the registered name, or the class of an
    import path where no other class has that name.

    >>> metric_labels(["accuracy", "series/mae", "package.module:Mae"])
    {'accuracy': 'accuracy', 'series/mae': 'series/mae', 'Mae': 'package.module:Mae'}
    """
    short = [name.rpartition(":")[2] for name in names]
    return {one if short.count(one) == 1 else name: name for one, name in zip(short, names, strict=True)}
