"""The mixers of a stack's layers: one for all, or a repeating pattern of several, with MLPs in between.

A pattern is a list of names, `[mamba, mamba, mamba, attention]`: layer i has the mixer of entry i modulo its length
(Jamba, arXiv:2403.19887, has one attention in eight). A name with a star, `attention*`, is *shared*: all of its layers
use one mixer with one set of weights, each with its own norm and state (Zamba, arXiv:2405.16712, shares its only
attention block). The MLP after a shared mixer is shared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mambaseq.errors import ConfigError, shown
from mambaseq.mixers.base import Mixer

# (layer, name=, d_model=) → a new mixer. Name and width are left out wherever they are the model's own: a
# stack of one mixer calls it with the layer only.
MakeMixer = Callable[..., Mixer]

MLP = "mlp"


class Entry(NamedTuple):
    """An entry of a pattern: the mixer's name, and whether its layers share their weights."""

    name: str
    shared: bool


def read_pattern(pattern: Sequence[str]) -> list[Entry]:
    """The entries of a pattern. Raises ConfigError for an invalid pattern or entry."""
    if (
        not pattern
        or not isinstance(pattern, list | tuple)
        or not all(isinstance(text, str) and text.strip("*") for text in pattern)
    ):
        raise ConfigError(
            f"pattern must be a list of mixer names, like [mamba, mamba, attention], not {shown(pattern)}. Leave it "
            "out for layers of one mixer."
        )
    return [Entry(text.removesuffix("*"), text.endswith("*")) for text in pattern]


def companion_of(kind: Any, name: str | None, entries: list[Entry], mlp: bool | None) -> str | None:
    """The name of the mixer that follows one of this class; None for none.

    mlp: True or False for all mixers; None as their class says, unless the pattern contains that mixer itself.
    """
    companion: str | None = getattr(kind, "companion", None) if mlp is None else MLP if mlp else None
    if companion == name or (mlp is None and any(entry.name == companion for entry in entries)):
        return None
    return companion


def mixer_names(pattern: list[str] | None, mixer: str, mlp: bool | None, kind_of: Callable[[str], Any]) -> list[str]:
    """The names of all mixers of a stack, each once. mixer: the name of the model's own. kind_of: gives the class of a
    name (raises ConfigError for an unknown one)."""
    entries = [] if pattern is None else read_pattern(pattern)
    names = [entry.name for entry in entries] or [mixer]
    companions = [companion_of(kind_of(name), name, entries, mlp) for name in names]
    return list(dict.fromkeys([*names, *(name for name in companions if name is not None)]))


def make_mixers(
    make_mixer: MakeMixer,
    n_layers: int,
    pattern: list[str] | None = None,
    mlp: bool | None = None,
    d_model: int | None = None,
    first: int = 0,
    total: int | None = None,
) -> list[Mixer]:
    """The mixers of the layers `first` to `first + n_layers - 1` in order, each followed by its MLP if it has one. A
    shared mixer is in the list once for each layer.

    d_model: their width, None for the model's own. total: layers of the whole backbone, None for n_layers. Raises
        ConfigError for an invalid pattern, one with more layers than there are, and for less than one layer.
    """
    if n_layers < 1:
        raise ConfigError(f"n_layers must be at least 1, not {n_layers}.")
    entries = [] if pattern is None else read_pattern(pattern)
    total = n_layers if total is None else total
    if len(entries) > total:
        raise ConfigError(
            f"pattern names {len(entries)} layers, but the backbone has {total}, so the last would be left out. Raise "
            "n_layers, or shorten the pattern."
        )
    width = {} if d_model is None else {"d_model": d_model}
    mixers: list[Mixer] = []
    shared: dict[str, list[Mixer]] = {}
    for layer in range(first, first + n_layers):
        entry = entries[layer % len(entries)] if entries else None
        if entry is not None and entry.shared and entry.name in shared:
            mixers += shared[entry.name]
            continue
        made = [make_mixer(layer, **width) if entry is None else make_mixer(layer, name=entry.name, **width)]
        companion = companion_of(type(made[0]), None if entry is None else entry.name, entries, mlp)
        if companion is not None:
            made.append(make_mixer(layer, name=companion, **width))
        if entry is not None and entry.shared:
            shared[entry.name] = made
        mixers += made
    return mixers


def scale_residual_(mixers: list[Mixer]) -> None:
    """GPT-2's rule for a whole backbone: scale what is written to the residual stream by 1 / sqrt(number of writes). A
    shared mixer is scaled once."""
    for mixer in dict.fromkeys(mixers):
        mixer.scale_residual_(len(mixers) ** -0.5)
