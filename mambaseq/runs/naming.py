"""What a configuration can name, as far as the catalogue and sources tell it: nothing heavy is imported, so that a
wrong name is told at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mambaseq.data.cache import check_there
from mambaseq.domain import catalog, not_installed
from mambaseq.errors import ConfigError, UserError, cut_list, did_you_mean, shown, under_key
from mambaseq.plain import flatten, read_yaml
from mambaseq.registry import Registry
from mambaseq.reporting.runs import RunFolder
from mambaseq.resources import find, is_resource
from mambaseq.runs.signatures import SECTIONS, arguments_in

MODEL_PARTS = {"encoder": "tokens", "backbone": "residual", "mixer": "mamba", "head": "lm"}
GROUPS = (
    *("data", "model", "loader", "optimizer", "finetune", "lora", "ema"),
    *("length_warmup", "checkpoint", "generation", "trainer"),
)
TOP = ("seed", "metrics", *GROUPS)
PROVIDED = {
    "d_model",
    "make_mixer",
    "vocab_size",
    "n_codes",
    "n_channels",
    "n_conditions",
    "n_classes",
    "complement",
    "condition_sizes",
    "condition_means",
    "condition_stds",
}
"""Arguments that a part gets from the model or the data, never from the configuration."""


_SECTION = re.compile(rf"{'|'.join(GROUPS)}|model\.({'|'.join(MODEL_PARTS)}|mixers(\.[^.]+)?)")
_PART = re.compile(rf"data|optimizer|model\.({'|'.join(MODEL_PARTS)}|mixers\.[^.]+)")  # sections that have a name
_DEFAULTS = {**MODEL_PARTS, "optimizer": "adamw"}
_FILES = 100  # below a configuration


def resolve_config(name: str) -> Path:
    """The file of a registered configuration, or the path itself. Raises ConfigError when there is neither."""
    configs: Registry[Any] = catalog()["configs"]
    if name in configs:
        return find(configs.entry(name).target)
    own = os.path.join(name, "config.yaml")  # noqa: PTH118 - Path's methods raise for some names
    if os.path.isfile(name):  # noqa: PTH113
        return Path(name)
    if os.path.isfile(own):  # noqa: PTH113
        raise ConfigError(
            f"{shown(name, 200)} is a run's folder. `mambaseq fit --resume {name[:200]}` goes on with the run; another "
            f"one begins with its configuration, --config {own[:200]}."
        )
    known = [*(entry.name for entry in configs), *_beside(name)]
    near = not_installed(name.partition("/")[0]) or did_you_mean(name, known)
    raise ConfigError(
        f"No configuration is named {shown(name, 200)} and no file is there.{near} "
        f"`mambaseq list configs` shows what there is."
    )


def _beside(name: str) -> list[str]:
    """Runs' folders and YAML files where a path would be."""
    try:
        there = list(itertools.islice(Path(name).parent.iterdir(), 1000))
        found = [one for one in there if one.suffix in (".yaml", ".yml") or (one / "config.yaml").is_file()]
    except (OSError, ValueError):
        return []
    return [str(one) for one in found]


def read_layers(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A configuration's file and those that it names under `base`, each with its contents but for that key: what lies
    over others comes after them, the file itself last.

    `base` is a name or a list of them, of which later ones lie over earlier ones: registered configurations, YAML files
    by their paths from the file's folder, or files that ship with a package (`package:relative/path.yaml`).
    Raises UserError as `read_yaml` does; ConfigError for a base that is not there, for one of itself, and for too many.
    """
    return _layers(path, ())


def _layers(path: Path, over: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    if (own := path.resolve()) in over:
        raise ConfigError(f"{path} is a base of itself. Let it, or what names it under base, stand without.")
    raw = read_yaml(path, "A configuration is a YAML mapping with at least data.name.")
    named = raw.pop("base", [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"{path}: base must name a configuration or a YAML file, or a list of them, not {shown(named)}."
        )
    found: list[tuple[Path, dict[str, Any]]] = []
    for name in names:
        if len(over) < _FILES:
            found += _layers(_base(name, path), (*over, own))
        if max(len(over), len(found)) >= _FILES:
            raise ConfigError(f"{over[0] if over else path} has more than {_FILES} files below it, by their bases.")
    return [*found, (path, raw)]


def _base(name: str, path: Path) -> Path:
    """The file of a base that a configuration's file names."""
    configs: Registry[Any] = catalog()["configs"]
    beside = os.path.join(path.parent, name)  # noqa: PTH118 - as in `resolve_config`
    try:
        if name in configs:
            return find(configs.entry(name).target)
        if os.path.isfile(beside):  # noqa: PTH113
            return Path(beside)
        if is_resource(name):
            return find(name)
    except UserError as error:
        raise ConfigError(f"{path}: base: {error}") from error
    near = not_installed(name.partition("/")[0]) or did_you_mean(name, [entry.name for entry in configs])
    raise ConfigError(
        f"{path}: base: no configuration is named {shown(name, 200)}, and no such file is beside it.{near} "
        "`mambaseq list configs` shows what there is."
    )


def laid_over(under: Mapping[str, Any], over: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """Settings over those of a base: sections setting by setting, every other value as a whole. A part (the data, a
    mixer, the optimizer) that is given another name begins anew, since options of the same name mean something else
    there, as do the `tokenizer_options` of another `tokenizer`. null takes a section of the base away."""
    found = dict(under)
    for name, value in over.items():
        whole, below = f"{key}.{name}" if key else name, under.get(name)
        if takes_away(value, whole, below):
            found.pop(name, None)
            continue
        if isinstance(value, Mapping) and isinstance(below, Mapping) and _SECTION.fullmatch(whole):
            former = below.get("name", _DEFAULTS.get(name, name))
            anew = _PART.fullmatch(whole) and value.get("name", former) != former
            value = value if anew else laid_over(below, value, whole)
        elif below is not None and below != value and f"{name}_options" not in over:
            found.pop(f"{name}_options", None)
        found[name] = value
    return found


def takes_away(value: Any, key: str, below: Any) -> bool:
    """Whether what stands under a whole key takes away the section that a base has there (`below`), if it has one: the
    lines of a section (`trainer:`) may all be commented out."""
    there = isinstance(below, Mapping) and _SECTION.fullmatch(key) is not None
    return value is None and (there or key in GROUPS)


def config_of(config: str) -> str:
    """A run's configuration where a folder is named; otherwise what is named. Raises UserError for another folder."""
    folder = os.path.isdir(config)  # noqa: PTH112 - Path's raises for some names
    return str(RunFolder(config).require().config) if folder else config


def check_names(overrides: list[str], source: str, options: list[str], config: str | None = None) -> None:
    """Raise ConfigError for a word that nearly is one of the command's options, for a key that there is not, in the
    words or in the configuration's file, and for a registered name that there is not. Where the sources of the named
    classes do not tell all that they take, a key is for the parser of the configuration.

    source: the command, for the message. options: those of the command itself, with their dashes. config: a registered
        configuration or its file, whose names say which keys there are.
    """
    keys = None
    if config is not None:
        layers, raw = _written(config)
        keys = _keys(raw, overrides)
        changed = {word[2:].partition("=")[0] for word in overrides if word.startswith("--")}
        own = keys if changed.isdisjoint(_NAMED) else _keys(raw, [])  # of a class that is replaced: they are dropped
        left = flatten(raw)
        for file, settings in reversed(layers):  # each key where it is written last
            here = {key: left.pop(key) for key in flatten(settings) if key in left}
            _check_keys(here, (keys, own), config if file == layers[-1][0] else str(file), source, changed)
    for index, word in enumerate(overrides):
        key, given, text = word[2:].partition("=")
        if not word.startswith("--") or not key or key in _OF_THE_PARSER:
            continue
        top, dot, _ = key.partition(".")
        if (top := top.rstrip("+")) not in TOP:
            near = did_you_mean(f"--{top[:80]}", [f"--{name}" for name in TOP] if dot else options, least=0.8)
            ends = [] if dot or keys is None else sorted(one for one in keys.known if one.endswith(f".{top}"))
            ends = _ELSEWHERE.get(key, ends)
            if not near and ends:
                near = f" Did you mean {cut_list([shown(f'--{one}') for one in ends])}?"
        else:
            near = "" if keys is None else keys.near(key.rstrip("+"), "--")
        if near:
            told, chosen = shown(word.partition("=")[0], 200), _chosen(overrides)
            raise ConfigError(f"there is no key or option {told}.{near} `{source}{chosen} --help` lists the keys.")
        kind = _REGISTERED.get(key)
        name = text if given else overrides[index + 1] if index + 1 < len(overrides) else ""
        if kind is not None and name and ":" not in name:
            catalog()[kind].entry(name, key)


def _chosen(overrides: list[str]) -> str:
    """The names of registered classes that the words choose, as words: which keys there are is a matter of them."""
    found = {}
    for word, after in itertools.zip_longest(overrides, overrides[1:], fillvalue=""):
        key, given, text = word.removeprefix("--").partition("=")
        if key in _NAMED and re.fullmatch(r"\w[\w/.:-]{0,79}", name := text if given else after):
            found[key] = name
    return "".join(f" --{key} {name}" for key, name in found.items())


def check_settings(settings: Mapping[str, Any], config: str, where: str) -> None:
    """Raise ConfigError as `check_names` does, for settings by whole keys over a configuration, and for its own.

    where: what holds the settings, for the message.
    """
    source = f"mambaseq fit --config {config}"
    check_names([], source, [], config)
    words = [f"--{key}={value}" for key, value in settings.items() if isinstance(value, str)]
    words += [f"--{key}=" for key, value in settings.items() if not isinstance(value, str)]
    _check_keys(settings, (_keys(_written(config)[1], words),), where, source)


def _check_keys(
    written: Mapping[str, Any], keys: Sequence[_Keys], where: str, source: str, but: Container[str] = ()
) -> None:
    """Raise ConfigError for a key that is none of any of `keys`, and for a registered name that there is not.

    written: values by whole keys. where: what holds them. source: the command, for the message. but: keys whose names
        do not count.
    """
    for key in written:
        if all(near := [one.near(key) for one in keys]):
            raise ConfigError(f"{where}: there is no key {shown(key, 200)}.{near[0]} `{source} --help` lists the keys.")
    for key, value in written.items():
        kind = _REGISTERED.get(key)
        if kind is not None and key not in but and isinstance(value, str) and value and ":" not in value:
            catalog()[kind].entry(value, f"{where}: {key}")
    metrics = written.get("metrics")
    for name in metrics if isinstance(metrics, list) and "metrics" not in but else ():
        if isinstance(name, str) and ":" not in name:
            catalog()["metrics"].entry(name, f"{where}: metrics")


def _written(config: str) -> tuple[list[tuple[Path, dict[str, Any]]], dict[str, Any]]:
    """A configuration's file and its bases (see `read_layers`), and what they hold together; nothing for one that
    cannot be read, which what reads it all will tell."""
    try:
        layers = read_layers(resolve_config(config))
    except UserError:
        return [], {}
    raw: dict[str, Any] = {}
    for _, settings in layers:
        raw = laid_over(raw, settings)
    return layers, raw


def inherited(config: str, overrides: list[str]) -> dict[str, str]:
    """Whole keys that neither the user's file nor the overrides set, each with what does: the name of a registered
    configuration, or another base's file."""
    layers, raw = _written(config)
    given = {word[2:].partition("=")[0].rstrip("+") for word in overrides if word.startswith("--")}
    left = {key: None for key in flatten(raw) if not any(f"{key}.".startswith(f"{one}.") for one in given)}
    found: dict[str, str] = {}
    for file, settings in reversed(layers):  # each key where it is written last
        here = [key for key in flatten(settings) if key in left]
        if file != layers[-1][0] or config in catalog()["configs"]:
            found |= dict.fromkeys(here, _called(file))
        left = {key: None for key in left if key not in here}
    return found


def _called(file: Path) -> str:
    """The name of the registered configuration whose file it is; the path of another."""
    for entry in catalog()["configs"]:
        with contextlib.suppress(UserError):  # of a package that is gone
            if find(entry.target) == file:
                return entry.name
    return str(file)


def check_files(raw: Mapping[str, Any], overrides: list[str]) -> None:
    """Raise DataError for a path under data.files of one of our datasets where nothing is (see `check_there`).

    raw: the configuration. overrides: `--key value`, over it; those of other kinds than a path are for the parser.
    """
    given = {key: value for key, value in (raw.get("data") or {}).items() if key in ("name", "files")}
    for index, word in enumerate(overrides):
        key, equals, text = word.partition("=")
        if key.startswith("--data.") and key.partition(".")[2].rstrip("+") in ("name", "files"):
            given[key.partition(".")[2]] = text if equals else "".join(overrides[index + 1 : index + 2])
    name, files = given.get("name"), given.get("files")
    datasets = catalog()["datasets"]
    if not isinstance(name, str) or name not in datasets or datasets.entry(name).origin.partition(" ")[0] != "mambaseq":
        return
    if isinstance(files, str) and files and files != "null" and files[0] not in "[{\"'":
        with under_key("data", given):
            check_there(files)


_OF_THE_PARSER = ("help", "config", "print_config")
_ELSEWHERE = {name: ["trainer.precision"] for name in ("dtype", "precision")}
"""What other commands and programs call an option, and the keys that it is here."""
_NAMED = {"data.name": "datasets", **{f"model.{part}.name": f"{part}s" for part in MODEL_PARTS}}
_REGISTERED = {**_NAMED, "optimizer.name": "optimizers"}


def whole_keys(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings, nested as in YAML or not, by whole keys; a mapping that is a setting's value stays one.

    Raises ConfigError for a key under none of a configuration's own, such as an option of the command line.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        whole = f"{prefix}{key}"
        if (top := whole.partition(".")[0].rstrip("+")) not in TOP:
            near = _below(whole) or did_you_mean(top[:80], TOP)
            raise ConfigError(f"there is no key {shown(whole)}.{near} Known: {', '.join(TOP)}.")
        if isinstance(value, Mapping) and _SECTION.fullmatch(whole):
            found |= whole_keys(value, f"{whole}.")
        else:
            found[whole] = value
    return found


def _below(key: str) -> str:
    """A hint at the sections that have a key of this name, where it is given without one."""
    there = {section: arguments_in(target) or () for section, target in SECTIONS.items()}
    found = [f"{section}.{key}" for section, names in there.items() if key in names]
    found = _ELSEWHERE.get(key, found)
    return f" Did you mean {cut_list([shown(one) for one in found])}?" if found else ""


def near_key(key: str, known: Iterable[str], dashes: str = "") -> str:
    """`did_you_mean` among the keys beside this one. Last steps are compared, since those before are the same and would
    make any two keys alike. dashes: put before keys, as options have them."""
    part, _, name = key.rpartition(".")
    steps = (one.removeprefix(f"{part}.") for one in known if not part or one.startswith(f"{part}."))
    alike = [f"{dashes}{part}.{one}" if part else f"{dashes}{one}" for one in steps if did_you_mean(name, [one])]
    return did_you_mean(f"{dashes}{key}", alike)


class _Keys(NamedTuple):
    """Keys of a configuration. known: those that sources tell. whole: the parts (`model.head`) of which they tell
    all."""

    known: set[str]
    whole: set[str]

    def near(self, key: str, dashes: str = "") -> str:
        """What there is instead of a key that there is not; "" for one that there may be. dashes: see `near_key`."""
        top, *steps = key.split(".")
        if top == "model" and steps and steps[0] not in _OF_THE_MODEL:
            known = [".".join([f"{dashes}model.{one}", *steps[1:]]) for one in _OF_THE_MODEL]
            ends = (one for one in self.known if one.startswith("model.") and one.endswith(f".{steps[-1]}"))
            known += [f"{dashes}{one}" for one in ends]
            return did_you_mean(f"{dashes}{key}", known) or f" Under model there is {cut_list(_OF_THE_MODEL)}."
        for part in (one for one in self.whole if key.startswith(f"{one}.")):
            option = f"{part}.{key.removeprefix(f'{part}.').partition('.')[0]}"
            if option not in self.known:
                there = sorted(one.removeprefix(f"{part}.") for one in self.known if one.startswith(f"{part}."))
                near = near_key(option, self.known, dashes)
                other = self._elsewhere(option.rpartition(".")[2], dashes)
                if near and other:
                    other = f" Or{other.removeprefix(' Did you mean')}"
                return f"{near}{other} Under {part} there is {cut_list(there, 40, 600)}."
        return ""

    def _elsewhere(self, name: str, dashes: str) -> str:
        """The keys that end in a name: one that is in another section, or that is none's."""
        found = sorted(one for one in self.known if one.endswith(f".{name}")) if name != "name" else []
        found = [name] * (name in TOP and name not in GROUPS) or found
        return f" Did you mean {cut_list([shown(f'{dashes}{one}') for one in found])}?" if found else ""


_OF_THE_MODEL = (*MODEL_PARTS, "mixers", "d_model", "tie_embeddings")


def _keys(raw: Mapping[str, Any], overrides: list[str]) -> _Keys:
    """The keys of a configuration, as far as sources tell them. raw: what its file holds."""
    keys = _Keys(set(), set())
    words = {key: text for key, _, text in (word[2:].partition("=") for word in overrides)}
    words |= {word[2:]: after for word, after in itertools.pairwise(overrides) if word.startswith("--")}

    def written(key: str) -> Any:
        holder: Any = raw
        for step in key.split("."):
            holder = holder.get(step) if isinstance(holder, Mapping) else None
        return holder

    targets: dict[str, str | None] = dict(SECTIONS)
    kinds = {key.removesuffix(".name"): kind for key, kind in _NAMED.items()}
    mixers = written("model.mixers")
    among = {of[1] for word in words if (of := _MIXERS.match(word)) is not None}
    among |= set(mixers) if isinstance(mixers, Mapping) else set()
    kinds |= {f"model.mixers.{name}": "mixers" for name in among}
    for part, kind in kinds.items():
        last = part.rpartition(".")[2]
        name = words.get(f"{part}.name") or written(f"{part}.name") or MODEL_PARTS.get(last, last)
        targets[part] = catalog()[kind].entry(name).target if name in catalog()[kind] else None
    for part, target in targets.items():
        if (found := None if target is None else arguments_in(target)) is not None:
            keys.known.update(f"{part}.{name}" for name in (found if part == "data" else found - PROVIDED))
            keys.whole.add(part)
            keys.known.update([f"{part}.name"] if part in kinds else [])
    return keys


_MIXERS = re.compile(r"model\.mixers\.([^.]+)\.")
