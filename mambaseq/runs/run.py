"""Runs from Python: `run = ms.fit("dna/demo", max_steps=100)`, `ms.load("runs/dna-demo")`, and what a run can do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mambaseq.atomic import json_text
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.errors import ConfigError, UserError, cut, cut_list, did_you_mean, shown
from mambaseq.reporting.runs import RunFolder, default_folder
from mambaseq.runs.evaluation import evaluate
from mambaseq.runs.generation import Generated, generate_from, generate_to
from mambaseq.runs.lost import from_first
from mambaseq.runs.naming import whole_keys
from mambaseq.runs.parsing import keys_of
from mambaseq.runs.prediction import predict
from mambaseq.runs.training import fit as train

if TYPE_CHECKING:
    import pandas


class NotFinished(UserError):
    """A training diverged. The message says what helps."""


class Run:
    """A run's folder, and what can be done with it.

    path: the folder, as `mambaseq fit --out` made it, or an exported model's, which can be applied but not trained.
    Raises UserError when there is neither.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(path)
        if not (self.path / "model.json").is_file():
            self.folder.require()
        self._loaded: dict[tuple[str | None, str | None], tuple[tuple[int, int], LoadedModel]] = {}

    @property
    def path(self) -> Path:
        return self.folder.path

    def __repr__(self) -> str:
        return f"Run({shown(self.path)})"

    @property
    def results(self) -> dict[str, Any]:
        """The numbers in results.json; {} before the run's end."""
        return self.folder.read_results()

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a logged metric, such as `train/loss` or `val/loss`."""
        return self.folder.curve(metric)

    def resume(
        self,
        *,
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
        allow_changed_data: bool = False,
        **keys: Any,
    ) -> Run:
        """Continue from the last checkpoint, with these settings over the run's own. See `fit` for the arguments."""
        config = str(self.folder.require().config)
        overrides = as_overrides(config, settings, keys)
        return _trained(config, self.folder, overrides, True, progress, allow_changed_data)

    def evaluate(
        self,
        split: Literal["validation", "test"] = "test",
        *,
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
        baselines: bool = False,
        dtype: str | None = None,
        **keys: Any,
    ) -> dict[str, Any]:
        """Metrics of the exported weights, which are also merged into `results`. See `mambaseq.runs.evaluation` for
        intervals and baselines.

        Raises UserError when there is no such set or model.
        """
        if split not in ("validation", "test"):
            raise ConfigError(f"split must be 'validation' or 'test', not {shown(split)}.")
        overrides = as_overrides(str(self.folder.require().config), settings, keys)
        command = "validate" if split == "validation" else "test"
        options: dict[str, Any] = {"progress": progress, "baselines": baselines, "dtype": dtype}
        return from_first(lambda: evaluate(self.folder, command, overrides, **options), self.path)

    def model(self, device: str | None = None, dtype: str | None = None) -> LoadedModel:
        """The exported model, its description and its tokenizer; kept until the run exports another one. dtype: of the
        weights, see `load_model`."""
        from mambaseq.runs.devices import choose_device

        own = self.path / "model.json"
        status = (own if own.is_file() else self.folder.model / "model.json").stat()
        stamp = (status.st_mtime_ns, status.st_ino)
        key = device, dtype
        if key not in self._loaded or self._loaded[key][0] != stamp:
            self._loaded[key] = stamp, load_model(self.path, choose_device(device), dtype)
        return self._loaded[key][1]

    def predict(self, *inputs: str | Path, out: str | Path | None = None, **options: Any) -> pandas.DataFrame | None:
        """Predictions for every record of files that the run's reader understands.

        out: a file to write, as with `mambaseq predict`; without one they are returned as a table.
        options: see `mambaseq.runs.prediction.predict` (reader, condition, condition_column, window, stride, merge,
            both_strands, regions, columns, batch_size, device, skip_bad, ...).
        """
        if not inputs:
            raise ConfigError("predict needs at least one file: run.predict('records.fa').")
        known = [name for name in inspect.signature(predict).parameters if name not in ("checkpoint", "inputs", "out")]
        if wrong := [name for name in options if name not in known]:
            near = did_you_mean(wrong[0][:80], known)
            raise ConfigError(f"predict has no option {shown(wrong[0])}.{near} It has: {', '.join(known)}.")
        found = predict(self.path, [Path(path) for path in inputs], None if out is None else Path(out), **options)
        return found.table

    def embed(self, *inputs: str | Path, out: str | Path | None = None, **options: Any) -> pandas.DataFrame | None:
        """Embeddings of records: `predict` with `what="embeddings"`."""
        return self.predict(*inputs, out=out, what="embeddings", **options)

    def generate(
        self, prompt: str | Sequence[str] | None = None, *, out: str | Path | None = None, **options: Any
    ) -> Generated:
        """Continue a prompt (text, or a file of prompts), a list of texts together, or begin from nothing.

        out: a file to write, in the run's own format.
        options: see `mambaseq.runs.generation.generate_from` (max_new_tokens, samples, condition, temperature, ...).
        """
        if out is None:
            return generate_from(self.path, prompt=prompt, **options)
        return generate_to(self.path, Path(out), prompt=prompt, **options)


def load(path: str | Path) -> Run:
    """The run, or exported model, in a folder. Raises UserError when there is none."""
    return Run(path)


def fit(
    config: str | Path,
    *,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    **keys: Any,
) -> Run:
    """Train a model, and export the best weights, results and pictures.

    config: a name of `mambaseq list configs`, or a YAML file. out: the run's folder; `runs/NAME` when left out.
    settings: over the configuration's, nested as in YAML or by whole keys: `{"data.length": 4096}`.
    keys: the same by the last word of a key, where it is the only one of that name: `max_steps=100`, `lr=1e-3`.

    On several devices each process runs the script from its start, and goes on from here with the same results.

    Raises UserError for what the user has to mend, NotFinished when the run diverged, and KeyboardInterrupt when it was
    interrupted; `ms.load(out).resume()` then continues it.
    """
    name = str(config)
    folder = RunFolder(default_folder(name) if out is None else out)
    return _trained(name, folder, as_overrides(name, settings, keys), False, progress, False)


def _trained(
    config: str, folder: RunFolder, overrides: list[str], resume: bool, progress: bool, allow_changed_data: bool
) -> Run:
    options: dict[str, Any] = {"resume": resume, "progress": progress, "allow_changed_data": allow_changed_data}

    def finished() -> None:
        outcome = train(config, folder, overrides, **options)
        if outcome.status == "diverged":
            raise NotFinished(outcome.message)
        if outcome.status == "interrupted":
            raise KeyboardInterrupt(outcome.message)

    from_first(finished, folder.path)
    return Run(folder.path)


def as_overrides(config: str, settings: Mapping[str, Any] | None, keys: Mapping[str, Any]) -> list[str]:
    """`--key=value` of settings that are given in Python.

    Raises ConfigError for a word that ends no key of this configuration, or more than one.
    """
    written = whole_keys(settings or {})
    if keys:
        known = keys_of(config, [_override(key, value) for key, value in written.items()])
        for word, value in keys.items():
            fitting = [key for key in known if key == word or key.endswith(f".{word}")]
            if word in fitting:
                fitting = [word]
            if len(fitting) != 1:
                told = f" Several end so: {cut_list(fitting)}." if fitting else did_you_mean(word, _last(known))
                raise ConfigError(
                    f"{shown(word)} is not the end of one key of {config}.{told} Whole keys: settings={{...}}."
                )
            written[fitting[0]] = value
    return [_override(key, value) for key, value in written.items()]


def _last(keys: Iterable[str]) -> list[str]:
    return sorted({key.rpartition(".")[2] for key in keys})


def _override(key: str, value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        return f"--{key}={value}"
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} cannot be {value}; no setting is infinite or NaN.")
    try:
        return f"--{key}={json_text(value)}"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} cannot be {shown(value)}: {cut(error)}.") from error
