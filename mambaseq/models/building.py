"""Models of plain descriptions."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mambaseq.backbones.graphed import CudaGraph
from mambaseq.backbones.patterns import mixer_names
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, cut_list, did_you_mean, shown
from mambaseq.mixers.base import Mixer
from mambaseq.models.model import SequenceModel
from mambaseq.specs import (
    PARTS,
    arguments_of,
    check_layers,
    check_options,
    check_size,
    check_spec,
    largest_setting,
    registered,
)


def causal_lm(
    vocab_size: int,
    d_model: int,
    n_layers: int,
    mixer: str = "mamba",
    *,
    n_conditions: int = 0,
    tie_embeddings: bool = True,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    checkpoint: bool = False,
    chunk_length: int | None = None,
    cuda_graph: CudaGraph = "auto",
    pattern: list[str] | None = None,
    mlp: bool | None = None,
    mixers: dict[str, dict[str, Any]] | None = None,
    **mixer_options: Any,
) -> SequenceModel:
    """The usual language model over tokens: embedding, residual stack (see `ResidualStack`), tied head.

    mixer: its name; options of it are arguments like others (mixer_options). mixers: options of the other mixers in the
        pattern, and of the MLP.

    Raises what `build_model` raises.

    >>> model = causal_lm(vocab_size=256, d_model=64, n_layers=2, mixer="mamba3", d_state=32)
    >>> model(torch.zeros(1, 8, dtype=torch.long)).logits.shape
    torch.Size([1, 8, 256])
    """
    if not isinstance(mixer, str):
        raise ConfigError(
            f"mixer must be a name, not {shown(mixer)}. Its options stand beside it: mixer='mamba3', d_state=32."
        )
    return build_model(
        {
            "d_model": d_model,
            "tie_embeddings": tie_embeddings,
            "encoder": {"name": "tokens", "vocab_size": vocab_size, "n_conditions": n_conditions},
            "backbone": {
                "name": "residual",
                "n_layers": n_layers,
                "norm_eps": norm_eps,
                "dropout": dropout,
                "checkpoint": checkpoint,
                "chunk_length": chunk_length,
                "cuda_graph": cuda_graph,
                "pattern": pattern,
                "mlp": mlp,
            },
            "mixer": {"name": mixer, **mixer_options},
            "mixers": mixers or {},
            "head": {"name": "lm", "vocab_size": vocab_size},
        }
    )


def build_model(spec: dict[str, Any]) -> SequenceModel:
    """The model for a plain description: `d_model`, `tie_embeddings`, and `encoder`, `backbone`, `mixer`, `head`, each
    `{"name": ..., **options}` with names that `Registry.get` takes; if the backbone has several mixers, also `mixers`,
    `{name: options}` of the others. A `name` among these options is that of the registered mixer, where the backbone's
    pattern calls it something else.

    It is first made on the meta device, without memory, so that one that is too large is refused before it takes any.
    Raises ConfigError for an incomplete description, a name that does not exist, options that a part does not take or
    of the wrong type, and options of mixers that the backbone does not have; UserError for more layers or parameters
    than `mambaseq.limits` allows.
    """
    check_spec(spec)
    _check_mixers(spec)
    if torch.get_default_device().type != "meta":  # where tensors take no memory
        check_size(*_sized(spec, lambda made: [_build(spec, made)]), _largest(spec))
    model = _build(spec)
    model.spec = spec
    return model


def build_empty(spec: dict[str, Any]) -> SequenceModel:
    """The model of `build_model`, for whom gives it weights at once: its parameters are on the meta device, where they
    take no memory and have no values; its buffers are whole. A model with a part that needs values of its parameters
    while it is made is built as `build_model` does.

    Raises what `build_model` raises.
    """
    here = threading.get_ident()

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return None  # as it is
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(empty)
    try:
        model = build_model(spec)
        if not any(buffer.is_meta for buffer in model.buffers()):
            return model
    except ConfigError:  # which is raised again, unless it is about values
        pass
    finally:
        handle.remove()
    return build_model(spec)


def check_parts(spec: dict[str, Any], but: Container[str]) -> None:
    """Raise what `build_model` would raise for the parts of a description alone. They are made on the meta device, as
    `build_model` does first: it takes no memory, and no random numbers.

    but: those of encoder, backbone and head that still lack something, such as what the data give.
    """
    check_spec(spec)
    _check_mixers(spec)

    def make(made: _Made) -> list[nn.Module]:
        parts = [] if "backbone" in but else [_backbone(spec, made)]
        return [*parts, *(_part(spec, kind) for kind in ("encoder", "head") if kind not in but)]

    check_size(*_sized(spec, make), _largest(spec), "The model without what the data give")


def count_parameters(spec: dict[str, Any]) -> int:
    """The number of parameters of a description's model, without making it; a tied weight counts once.

    Raises what `build_model` raises for a model that cannot be made, or with more layers than `mambaseq.limits` allows.
    """
    check_spec(spec)
    _check_mixers(spec)
    return _sized(spec, lambda made: [_build(spec, made)])[0]


def for_any_machine(spec: dict[str, Any]) -> dict[str, Any]:
    """A description without the `backend` of parts whose default is None, the fastest there is: one that was named for
    the machine of a training may not run elsewhere, and all give the same results."""

    def chosen(kind: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
        if "backend" not in options:
            return options
        try:
            backend = arguments_of(catalog()[f"{kind}s"].get(name)).get("backend")
        except ConfigError:  # a plugin's that is not there (any more)
            return options
        if backend is None or backend.default is not None:
            return options
        return {key: value for key, value in options.items() if key != "backend"}

    found = spec | {part: chosen(part, spec[part]["name"], spec[part]) for part in PARTS if part in spec}
    if given := spec.get("mixers"):
        found["mixers"] = {name: chosen("mixer", registered(name, given), options) for name, options in given.items()}
    return found


_Made = dict[tuple[str, int], list[Mixer]]
"""Mixers by name and width: one that is there is used again."""


def _sized(spec: dict[str, Any], make: Callable[[_Made], list[nn.Module]]) -> tuple[int, int]:
    """The parameters of what `make` makes of a description, and the bytes of all its tensors. Equal mixers are made
    once."""
    made: _Made = {}
    try:
        with torch.device("meta"):
            parts = [*make(made), *(mixer for alike in made.values() for mixer in alike[1:])]
    except ConfigError as error:
        if isinstance(error.__cause__, RuntimeError | OverflowError | TypeError) and "overflow" in str(error).lower():
            raise ConfigError(
                f"The model ({_largest(spec)}) has more numbers than 64 bits can count. {error}"
            ) from error
        raise
    sizes: dict[int, tuple[int, int]] = {}
    for part in parts:
        if id(part) not in sizes:
            bytes_ = {id(tensor): tensor.nbytes for tensor in (*part.parameters(), *part.buffers())}
            sizes[id(part)] = sum(tensor.numel() for tensor in part.parameters()), sum(bytes_.values())
    found = [sizes[id(part)] for part in parts]
    return sum(count for count, _ in found), sum(size for _, size in found)


def _largest(spec: dict[str, Any]) -> str:
    return largest_setting(spec, lambda kind, name: catalog()[f"{kind}s"].get(name))


def _build(spec: dict[str, Any], made: _Made | None = None) -> SequenceModel:
    """made: see `_Made`; None where each mixer is one of its own."""
    backbone = _backbone(spec, made)
    return SequenceModel(
        _part(spec, "encoder"), backbone, _part(spec, "head"), tie_embeddings=spec.get("tie_embeddings", False)
    )


def _part(spec: dict[str, Any], kind: str) -> Any:
    """The encoder or the head."""
    return _make(kind, f"model.{kind}", spec[kind], spec["d_model"])


def _backbone(spec: dict[str, Any], made: _Made | None) -> Any:
    """made: as for `_build`."""
    own: str = spec["mixer"]["name"]
    count = 0

    def make_mixer(layer: int, name: str | None = None, d_model: int = spec["d_model"]) -> Mixer:
        nonlocal count
        count += 1
        check_layers(count)
        name = own if name is None else name
        options = spec["mixer"] if name == own else (spec.get("mixers") or {}).get(name, {})
        key = "model.mixer" if name == own else f"model.mixers.{name}"
        alike = [] if made is None else made.setdefault((name, d_model), [])
        alike.append(alike[0] if alike else _make("mixer", key, {"name": name, **options}, d_model))
        return alike[-1]

    return _make("backbone", "model.backbone", spec["backbone"], make_mixer)


def _make(kind: str, key: str, settings: dict[str, Any], *args: Any) -> Any:
    """A part of a model: settings are its name and options, which stand under `key` in a configuration."""
    options, name = {key: value for key, value in settings.items() if key != "name"}, settings["name"]
    part = catalog()[f"{kind}s"].get(name, f"model.{kind}.name")
    check_options(kind, name, part, options, len(args))
    try:
        return part(*args, **options)
    except ConfigError as error:
        error.args = (_under(key, part, options, str(error)),)
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # including too deep and too large models
        reason = " ".join(str(error).split()).partition(" Exception raised from")[0][:300]
        width = {"d_model": args[0]} if args and isinstance(args[0], int) else {}
        raise ConfigError(
            f"The {kind} {shown(name)} cannot be made from {shown(width | options)}: {reason}."
        ) from error


def _under(key: str, part: Any, options: dict[str, Any], message: str) -> str:
    """A part's message with the whole key of the option that it is about in front: of those that it names, the first
    whose value is not the default. Without one, the key of the model's width if it names that, or else the part's.

    key: of the part.
    """
    if message.startswith("model."):
        return message
    places = {name: re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message) for name in ("d_model", *options)}
    named = sorted((place.start(), name) for name, place in places.items() if place is not None)
    usual = {name: parameter.default for name, parameter in arguments_of(part).items()}
    for _, name in named:
        if name in options and (name not in usual or options[name] != usual[name]):
            default = usual.get(name, inspect.Parameter.empty)
            told = "" if default in (None, inspect.Parameter.empty) else f" Its default is {shown(default)}."
            return f"{key}.{name}: {message}{told}"
    return f"{'model.d_model' if places['d_model'] else key}: {message}"


def _check_mixers(spec: dict[str, Any]) -> None:
    """Raise ConfigError for options of mixers that the backbone does not have, and for options of the model's own mixer
    in the wrong place."""
    given, backbone = spec.get("mixers") or {}, spec["backbone"]
    mlp, tiers = backbone.get("mlp"), backbone.get("tiers")
    names = mixer_names(
        backbone.get("pattern"),
        spec["mixer"]["name"],
        mlp if isinstance(mlp, bool) else None,
        lambda name: catalog()["mixers"].get(registered(name, given)),
        tiers if isinstance(tiers, list) else None,  # another's may mean something else
    )
    check_mixer_options(given, spec["mixer"]["name"], names)


def check_mixer_options(given: Iterable[str], mixer: str, names: list[str]) -> None:
    """Raise ConfigError for names in `model.mixers` that are not those of the backbone's mixers (`names`), or that are
    the model's own mixer (`mixer`)."""
    for name in given:
        if name == mixer:
            raise ConfigError(
                f"The options of {shown(name)} are under model.mixer and model.mixers. Keep model.mixer's."
            )
        if name not in names:
            raise ConfigError(
                f"model.mixers has options for {shown(name)}, which is not a mixer of this "
                f"backbone.{did_you_mean(name[:80], names)} Its mixers: {cut_list(names)}; model.backbone.pattern "
                "(or a unet's tiers) names others."
            )
