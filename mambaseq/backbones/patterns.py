"""The mixers of a stack's layers: one for all, or a repeating pattern of several, with MLPs in between.

A pattern is a list of names, `[mamba, mamba, mamba, attention]`: layer i has the mixer of entry i modulo its length
(Jamba, arXiv:2403.19887, has one attention in eight). A name with a star, `attention*`, is *shared*: all of its layers
use one mixer with one set of weights, each with its own norm and state (Zamba, arXiv:2405.16712, shares its only
attention block). The MLP after a shared mixer is shared as well. `s4+mlp` is a block of two: s4, and the mixer `mlp` in
a residual layer of its own behind it (SaShiMi, arXiv:2202.09729); it counts as one layer.

A name is that of a registered mixer, or one that the model's description gives to a registered mixer with options of
its own: `mixers: {inside: {name: mamba, complex: true}}`. So a stack may have one mixer in two variants.
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
    """An entry of a pattern: the mixer's name, whether its layers share their weights, and the name of the mixer that
    is written behind it, None for none."""

    name: str
    shared: bool
    behind: str | None = None


def read_pattern(pattern: Sequence[str], key: str = "pattern") -> list[Entry]:
    """The entries of a pattern. key: its name, for messages. Raises ConfigError for an invalid pattern or entry."""
    if not pattern or not isinstance(pattern, list | tuple) or not all(map(_is_entry, pattern)):
        raise ConfigError(
            f"{key} must be a list of mixer names, like [mamba, mamba, attention] or [s4+mlp], not {shown(pattern)}. "
            "Leave it out for layers of one mixer."
        )
    entries = []
    for text in pattern:
        name, _, behind = text.removesuffix("*").partition("+")
        entries.append(Entry(name, text.endswith("*"), behind or None))
    return entries


def _is_entry(text: Any) -> bool:
    parts = text.removesuffix("*").split("+") if isinstance(text, str) else []
    return 1 <= len(parts) <= 2 and all(part.strip("*") for part in parts)


def read_tiers(tiers: Any, count: int | None = None) -> list[list[Entry]]:
    """The entries of a pattern for each resolution of time. count: how many there must be, None for any.

    Raises ConfigError for anything else, or an invalid pattern.
    """
    if not isinstance(tiers, list | tuple) or not tiers or (count is not None and len(tiers) != count):
        number = "" if count is None else f"{count} patterns, one for "
        raise ConfigError(
            f"tiers must be a list of {number or 'patterns, one for '}each resolution of time, the finest first, like "
            f"[[mamba], [mamba], [s4+mlp]], not {shown(tiers)}. Leave it out for the same in all."
        )
    return [read_pattern(pattern, f"tiers[{number}]") for number, pattern in enumerate(tiers)]


def companion_of(kind: Any, entry: Entry | None, entries: list[Entry], mlp: bool | None) -> str | None:
    """The name of the mixer that follows one of this class; None for none.

    entry: its own in the pattern, None without a pattern. mlp: True or False for all mixers with none written behind
        them; None as their class says, unless the pattern contains that mixer itself.
    """
    if entry is not None and entry.behind is not None:
        return entry.behind
    companion: str | None = getattr(kind, "companion", None) if mlp is None else MLP if mlp else None
    if companion == (None if entry is None else entry.name):
        return None
    return None if mlp is None and any(other.name == companion for other in entries) else companion


def mixer_names(
    pattern: list[str] | None,
    mixer: str,
    mlp: bool | None,
    kind_of: Callable[[str], Any],
    tiers: list[list[str]] | None = None,
) -> list[str]:
    """The names of all mixers of a backbone, each once. mixer: the name of the model's own. kind_of: gives the class of
    a name (raises ConfigError for an unknown one). tiers: a pattern for each resolution, in place of `pattern`."""
    patterns = [[] if pattern is None else read_pattern(pattern)] if tiers is None else read_tiers(tiers)
    names: list[str] = []
    companions: list[str | None] = []
    for entries in patterns:
        for entry in entries or [Entry(mixer, False)]:
            names.append(entry.name)
            companions.append(companion_of(kind_of(entry.name), entry, entries, mlp))
    return list(dict.fromkeys([*names, *(name for name in companions if name is not None)]))


def make_mixers(
    make_mixer: MakeMixer,
    n_layers: int,
    pattern: list[str] | None = None,
    mlp: bool | None = None,
    d_model: int | None = None,
    first: int = 0,
    total: int | None = None,
    begin: int = 0,
) -> list[Mixer]:
    """The mixers of the layers `first` to `first + n_layers - 1` in order, each followed by its MLP if it has one. A
    shared mixer is in the list once for each layer.

    d_model: their width, None for the model's own. total: layers over which the pattern goes, None for n_layers. begin:
        the layer at which it begins. Raises ConfigError for an invalid pattern, one with more layers than there are,
        and for less than one layer.
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
    shared: dict[Entry, list[Mixer]] = {}
    for layer in range(first, first + n_layers):
        entry = entries[(layer - begin) % len(entries)] if entries else None
        if entry is not None and entry.shared and entry in shared:
            mixers += shared[entry]
            continue
        made = [make_mixer(layer, **width) if entry is None else make_mixer(layer, name=entry.name, **width)]
        companion = companion_of(type(made[0]), entry, entries, mlp)
        if companion is not None:
            made.append(make_mixer(layer, name=companion, **width))
        if entry is not None and entry.shared:
            shared[entry] = made
        mixers += made
    return mixers


def scale_residual_(mixers: list[Mixer]) -> None:
    """GPT-2's rule for a whole backbone: scale what is written to the residual stream by 1 / sqrt(number of writes). A
    shared mixer is scaled once."""
    for mixer in dict.fromkeys(mixers):
        mixer.scale_residual_(len(mixers) ** -0.5)
