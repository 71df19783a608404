"""Checks a domain's parts one after another: as its configurations use them, or on made-up data if none does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from mambaseq.backbones.base import Backbone
from mambaseq.checking import laws
from mambaseq.checking.datasets import check_items, check_order, check_sources, ragged, training_items
from mambaseq.checking.files import check_reader, check_writer
from mambaseq.checking.laws import LawBroken
from mambaseq.checking.samples import CHANNELS, CODES, TOKENS, sequences
from mambaseq.checking.training import STEPS, check_training, unsaid
from mambaseq.data.cache import NotFetched
from mambaseq.data.module import SequenceData, named_sets
from mambaseq.domain import KINDS, catalog, not_installed
from mambaseq.errors import ConfigError, UserError, did_you_mean, paragraph, shown
from mambaseq.mixers.base import Mixer
from mambaseq.models import SequenceModel, build_model
from mambaseq.plain import parse_yaml
from mambaseq.reporting.runs import RunFolder
from mambaseq.reporting.sections import Section
from mambaseq.runs.config import RunConfig
from mambaseq.runs.evaluation import evaluate
from mambaseq.runs.parsing import keys_of, parse_config
from mambaseq.specs import arguments_of

T = TypeVar("T")

_LONGEST = 256  # positions of a window, where data.length can be set
_SMALL = {
    "--loader.batch_size": "2",
    "--loader.num_workers": "0",
    "--length_warmup.start": "0",
    "--checkpoint.every_n_steps": "2",
    "--trainer.max_steps": str(STEPS),
    "--trainer.max_epochs": "null",
    "--trainer.accelerator": "cpu",
    "--trainer.devices": "1",
    "--trainer.precision": "32-true",
    "--trainer.limit_val_batches": "2",
    "--trainer.val_check_interval": "2",
    "--trainer.check_val_every_n_epoch": "null",
    "--trainer.accumulate_grad_batches": "1",
}
_SMALLER = {"--model.d_model": "16", "--model.backbone.n_layers": "2"}
_GIVEN = {
    "vocab_size": TOKENS,
    "n_codes": CODES,
    "n_channels": CHANNELS,
    "n_classes": TOKENS,
    "n_outputs": 2,
    "n_labels": 3,
}
_GIVEN_LISTS = {"complement": [3, 2, 1, 0, 4, 5]}
_AROUND = {  # by strands
    1: {"encoder": "tokens", "backbone": "residual", "head": "classification"},
    2: {"encoder": "rc_tokens", "backbone": "reverse_complement", "head": "rc_classification"},
}


class Finding(NamedTuple):
    """The result of a check: a part keeps a law, breaks it (with the reason), or could not be checked."""

    part: str
    law: str
    state: Literal["ok", "fails", "not checked"]
    reason: str = ""

    @property
    def failed(self) -> bool:
        return self.state == "fails"

    def __str__(self) -> str:
        return f"{self.state}: {self.part}: {self.law}{f': {self.reason}' if self.reason else ''}"


class _Domain:
    """told: called with each finding when it is made. own: the domain's parts, by kind and name. used: the classes of
    parts that its configurations use, which are checked."""

    def __init__(self, name: str, folder: Path, told: Callable[[Finding], None] | None) -> None:
        self.name, self.folder, self.told = name, folder, told
        self.findings: list[Finding] = []
        self.own: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        self.used: set[Any] = set()
        self.data: dict[str, SequenceData] = {}
        self.models: list[tuple[SequenceModel, list[Any], SequenceData]] = []

    def hold(self, part: str, law: str, check: Callable[[], T]) -> T | None:
        """Note whether a check raises; where data are to be fetched first, that it was not checked. Returns its result,
        None if it raises."""
        try:
            found = check()
        except NotFetched as error:  # the domain is not to blame
            self.skip(part, law, paragraph(error))
        except (LawBroken, UserError) as error:
            self.note(Finding(part, law, "fails", paragraph(error)))
        except Exception as error:  # a third party's part may raise anything
            self.note(Finding(part, law, "fails", paragraph(f"{type(error).__name__}: {error}")))
        else:
            self.note(Finding(part, law, "ok"))
            return found
        return None

    def skip(self, part: str, law: str, reason: str) -> None:
        self.note(Finding(part, law, "not checked", reason))

    def note(self, finding: Finding) -> None:
        self.findings.append(finding)
        if self.told is not None:
            self.told(finding)

    def load(self) -> None:
        for kind in KINDS:
            for entry in catalog()[kind]:
                if not entry.name.startswith(f"{self.name}/"):
                    continue
                if kind == "configs":
                    self.own[kind][entry.name] = entry
                    continue
                loaded = self.hold(
                    f"{kind.removesuffix('s')} {entry.name}",
                    "can be imported, and is of its kind",
                    lambda kind=kind, entry=entry: catalog()[kind].get(entry.name),  # type: ignore[misc]
                )
                if loaded is not None:
                    self.own[kind][entry.name] = loaded

    def is_own(self, kind: str, part: Any) -> str | None:
        """The name of a part of this domain; None for parts of others."""
        return next((name for name, loaded in self.own[kind].items() if loaded is type(part)), None)

    def configuration(self, name: str) -> None:
        part = f"config {name}"
        made = self.hold(part, "its model can be made and its data set up", lambda: _small(name))
        if made is None:
            return
        settings, overrides, model, data = made
        self.used |= {type(one) for one in settings.trainer["callbacks"] or []}
        callbacks = parse_yaml(settings.yaml, name)["trainer"]["callbacks"] or []
        chosen = settings.settings["data"]["name"]
        if chosen in self.own["datasets"] and chosen not in self.data:
            self.dataset(chosen, lambda: settings.make_data(setup=True))
        self.data.setdefault(chosen, data)
        items = self.hold(part, "training gives batches", lambda: _items(model, data))
        if items is None:
            return
        self.models.append((model, items, data))
        self.model(part, model, items)
        run = self.hold(
            part,
            f"{STEPS} steps are the same when killed and resumed",
            lambda: check_training(name, overrides, Path(tempfile.mkdtemp(dir=self.folder)), callbacks),
        )
        if run is None:
            return
        if name in self.own["reports"] and named_sets(data.test()):  # the demo's reports need the test's results
            self.hold(part, "its test set is evaluated", lambda: _evaluate(run))
        for report in sorted({name, chosen} & self.own["reports"].keys()):
            write = self.own["reports"][report]
            self.hold(f"report {report}", "gives a Section", lambda write=write: _report(write, run.path))  # type: ignore[misc]

    def model(self, part: str, model: SequenceModel, items: list[Any]) -> None:
        """A model, and those of its parts that belong to this domain."""
        self.used |= {type(one) for one in (model.encoder, model.head, model.backbone, *model.backbone.mixers())}
        told = part
        if (name := self.is_own("encoders", model.encoder)) is not None:
            told = f"encoder {name}"
        self.hold(told, "the encoder sees only what it declares", lambda: laws.check_encoder(model, items))
        for mixer in {type(one): one for one in model.backbone.mixers()}.values():
            if (name := self.is_own("mixers", mixer)) is not None:
                self.stateful(f"mixer {name}", mixer, mixer.d_model)
        if (name := self.is_own("backbones", model.backbone)) is not None:
            width = (model.spec or {})["d_model"] * model.backbone.strands
            self.stateful(f"backbone {name}", model.backbone, width)
        told = part if (name := self.is_own("heads", model.head)) is None else f"head {name}"
        self.hold(told, "alone, padded and packed give the same", lambda: laws.check_joined(model, items))

    def stateful(self, part: str, one: Mixer | Backbone, width: int) -> None:
        if not one.causal:
            self.hold(part, "packed sequences give the same as alone", lambda: laws.check_packed(one, width))
            return
        ways = "full, in chunks, step by step and packed give the same"
        self.hold(part, ways, lambda: laws.check_ways_to_run(one, width))
        self.hold(part, "the future is not seen", lambda: laws.check_future(one, width))
        self.hold(part, "a given state stays as it is", lambda: laws.check_given_state(one, width))

    def dataset(self, name: str, make: Callable[[], SequenceData]) -> None:
        part = f"dataset {name}"
        data = self.hold(part, "it is made and set up, twice", lambda: _set_up_twice(make))
        if data is None:
            return
        self.data[name] = data
        self.hold(part, "items are batches of one, as declared", lambda: check_items(data))
        self.hold(part, "the order depends only on the seed", lambda: check_order(make))
        self.hold(part, "sources and options are plain and constant", lambda: check_sources(make))

    def rest(self) -> None:
        """Check the parts that no configuration uses."""
        for name, kind in self.own["datasets"].items():
            if name in self.data:
                continue
            if needed := _needed(kind, 0):
                self.skip(f"dataset {name}", "data", f"no configuration uses it, and it needs {', '.join(needed)}")
            else:
                self.dataset(name, kind)
        for kinds in ("encoders", "mixers", "backbones", "heads"):
            for name, loaded in self.own[kinds].items():
                if loaded not in self.used:
                    self.made_up(kinds.removesuffix("s"), name, loaded)
        for kind, key, check in (("readers", "reader", check_reader), ("writers", "writer", check_writer)):
            for name, function in self.own[kind].items():
                data = next((one for one in self.data.values() if getattr(one, key) == name), None)
                part = f"{key} {name}"
                if data is None:
                    self.skip(part, "files", f"no checked dataset names it as its {key}")
                else:
                    self.hold(part, "files", lambda f=function, d=data, c=check: c(f, d, self.folder))  # type: ignore[misc]
        for name, metric in self.own["metrics"].items():
            self.metric(name, metric)
        for name, kind in self.own["optimizers"].items():
            part, law = f"optimizer {name}", "saved and resumed, its steps are the same"
            if needed := [one for one in _needed(kind, 1) if one != "lr"]:
                self.skip(part, law, f"it needs {', '.join(needed)}")
            else:
                self.hold(part, law, lambda kind=kind: laws.check_optimizer(lambda groups: kind(groups, lr=0.1)))  # type: ignore[misc]
        for name, kind in self.own["callbacks"].items():
            if kind not in self.used:
                self.skip(f"callback {name}", "exact resume", "no configuration uses it")

    def made_up(self, kind: str, name: str, loaded: Any) -> None:
        part = f"{kind} {name}"
        options = {key: value for key, value in (_GIVEN | _GIVEN_LISTS).items() if key in _arguments(loaded)}
        if needed := [key for key in _needed(loaded, 1) if key not in options]:
            self.skip(part, "laws", f"no configuration uses it, and it needs {', '.join(needed)}")
            return
        model = self.hold(part, "it can be made", lambda: _model_around(kind, name, loaded, options))
        if model is not None:
            try:
                items = sequences(model, kind == "encoder" and "n_channels" in options)
            except AttributeError:
                self.skip(part, "laws", "no configuration uses it, and its targets are unknown")
                return
            self.model(part, model, items)

    def metric(self, name: str, kind: Any) -> None:
        part, law = f"metric {name}", "one by one it gives the same as in batches"
        for model, items, data in self.models:
            batch = items[0]
            fits = kind.per_token in (None, batch.per_token) and kind.measures in (None, batch.kind)
            if batch.targets is not None and fits:
                self.hold(part, law, lambda: laws.check_metric(kind(data.class_names), model, items))  # noqa: B023
                return
        self.skip(part, law, "no configuration has targets for it")


def check(name: str, told: Callable[[Finding], None] | None = None) -> list[Finding]:
    """Test a domain against the laws. told: called with each finding when it is made.

    Every configuration is made small and trained for a few steps on the CPU. Raises ConfigError for an unknown domain.
    """
    names = catalog()
    if name not in names.domains:
        broken = [reason for point, reason in names.broken.items() if point.partition(" ")[0] == name]
        why = f" Its package cannot be loaded: {broken[0]}." if broken else not_installed(name)
        near = did_you_mean(name, names.domains)
        why = why or f"{near} A new one's package must be installed first: `pip install -e FOLDER`."
        raise ConfigError(f"No domain is named {shown(name)}.{why} `mambaseq list domains` shows them.")
    with tempfile.TemporaryDirectory(prefix="mambaseq-check-") as folder:
        checked = _Domain(name, Path(folder), told)
        checked.load()
        for config in checked.own["configs"]:
            torch.manual_seed(0)
            checked.configuration(config)
        torch.manual_seed(0)
        checked.rest()
    return checked.findings


def _small(name: str) -> tuple[RunConfig, list[str], SequenceModel, SequenceData]:
    """A configuration made as small as possible, its model and its data."""
    known = set(keys_of(name, []))
    options = {key: value for key, value in _SMALL.items() if key[2:] in known}
    smaller = {key: value for key, value in _SMALLER.items() if key[2:] in known}
    length = parse_config(name, []).settings["data"].get("length")
    if isinstance(length, int) and length > _LONGEST:
        smaller["--data.length"] = str(_LONGEST)
    for more in (smaller, {}):  # not every model can be made small
        overrides = [f"{key}={value}" for key, value in (options | more).items()]
        try:
            settings = parse_config(name, overrides)
            data = settings.make_data(setup=True)
            model = build_model(settings.model_spec(data)).eval()
        except UserError:
            if not more:
                raise
        else:
            break
    settings.make_metrics(data)
    return settings, overrides, model, data


def _items(model: SequenceModel, data: SequenceData) -> list[Any]:
    items = training_items(data, 3)
    if any(item.cu_seqlens is not None for item in items):
        raise LawBroken("its items are packed; a batch of one is one sequence (loader.pack packs them).")
    return ragged(items, getattr(model.encoder, "min_length", 1))


def _set_up_twice(make: Callable[[], SequenceData]) -> SequenceData:
    data = make()
    data.setup()
    data.setup()
    return data


def _evaluate(run: RunFolder) -> None:
    with unsaid():
        evaluate(run, "test", [], progress=False)


def _report(report: Callable[[Path], Section], folder: Path) -> None:
    with unsaid():
        found = report(folder)
    if not isinstance(found, Section):
        raise LawBroken(f"it gives a {type(found).__name__}, not a mambaseq.reporting.Section.")


def _arguments(kind: Any) -> list[str]:
    return list(arguments_of(kind))


def _needed(kind: Any, given: int) -> list[str]:
    """The arguments that have no default, without the first ones."""
    parameters = list(arguments_of(kind).values())[given:]
    named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    return [one.name for one in named if one.default is one.empty]


def _model_around(kind: str, name: str, loaded: Any, options: dict[str, Any]) -> SequenceModel:
    spec: dict[str, Any] = {"d_model": 12, "mixer": {"name": "mamba"}}
    for part, usual in _AROUND[getattr(loaded, "strands", 1)].items():
        arguments = _arguments(catalog()[f"{part}s"].get(usual))
        given = {key: value for key, value in (_GIVEN | _GIVEN_LISTS).items() if key in arguments}
        spec[part] = {"name": usual, **given}
    spec["backbone"]["n_layers"] = 1
    spec[kind] = {"name": name, **options}
    return build_model(spec).eval()
