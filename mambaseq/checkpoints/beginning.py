"""A model that begins with the weights of another: by name, where they mean the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from mambaseq.checkpoints.card import ModelCard
from mambaseq.checkpoints.export import LoadedModel, weights
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, cut_list, shown
from mambaseq.models import SequenceModel, further_names

_MOST = 6  # names in a message
_COMPARED = 4096  # ids of two tokenizers


@dataclasses.dataclass
class Beginning:
    """What became of the tensors when a model began with another's.

    taken: names of those that the model has from there. grown: those of a vocabulary, whose first rows are.
    new: those that are as initialised. left: those of the source that the model has no place for.
    notes: why, one phrase each.
    """

    taken: list[str]
    grown: list[str]
    new: list[str]
    left: list[str]
    notes: list[str]

    def told(self, source: str) -> str:
        """It in one line."""
        count = len(self.taken) + len(self.grown)
        parts = [f"{count} of {count + len(self.new)} tensors are those of {source}", *self.notes]
        if self.new:
            parts.append(f"new: {cut_list(_modules(self.new), _MOST)}")
        if self.left:
            parts.append(f"not used: {cut_list(_modules(self.left), _MOST)}")
        return "; ".join(parts)


def begin_from(
    model: SequenceModel, loaded: LoadedModel, card: ModelCard, tokenizer: Tokenizer | None = None
) -> Beginning:
    """Give a model, as initialised, the weights of another one, by name.

    A head or an encoder of another kind, or of other shapes, stays as it was initialised, and so does what is for other
    classes or conditions. Where the vocabulary is larger than the source's, ids that both have take over its rows.
    Layers of the backbone that the source does not have stay as they were.

    card, tokenizer: what the model is for; they are compared with the source's.
    Raises ConfigError, naming the tensors, where the backbone has others under the same names, or none fits.
    """
    own, theirs = weights(model), weights(loaded.model)
    theirs |= {name: theirs[earlier] for name, earlier in further_names(loaded.model).items() if earlier in theirs}
    source = f"the model at {loaded.source.parent}"
    others, notes = _others(model, loaded, card)
    found = Beginning([], [], [], [], notes)
    values: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, tensor in own.items():
        part, given = name.partition(".")[0], theirs.get(name)
        if given is None or name.startswith(others):
            found.new.append(name)
        elif given.shape == tensor.shape:
            found.taken.append(name)
            values[name] = given.to(tensor)
        elif _is_vocabulary(part, tensor, given, model, loaded.model):
            found.grown.append(name)
            values[name] = torch.cat([given.to(tensor), tensor[len(given) :]])
        elif loaded.card.task == "masked" and _is_vocabulary(part, given, tensor, loaded.model, model, most=1):
            found.taken.append(name)  # of all tokens but the mask token, which is the last
            values[name] = given[:-1].to(tensor)
        elif part == "backbone":
            wrong.append(f"{name} is {tuple(given.shape)} there and {tuple(tensor.shape)} here")
        else:
            found.new.append(name)
    if wrong:
        raise ConfigError(
            f"finetune.init_from: {source} has a backbone that is not this one: {cut_list(wrong, 3, separator='; ')}. "
            f"Give model the settings that it was trained with (d_model, backbone, mixer), or leave it away."
        )
    if not any(theirs[name].dim() > 1 for name in found.taken if name.startswith("backbone.")):
        raise ConfigError(
            f"finetune.init_from: nothing of the backbone of {source} fits; its mixer is "
            f"{shown(loaded.card.spec['mixer']['name'])} in {shown(loaded.card.spec['backbone']['name'])}, this one's "
            f"{shown(card.spec['mixer']['name'])} in {shown(card.spec['backbone']['name'])}. Give model the settings "
            f"that it was trained with, or leave it away."
        )
    used = {*found.taken, *found.grown}
    found.left = [name for name in weights(loaded.model) if name not in used]
    _note_vocabulary(found, loaded, card, tokenizer)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in values:
                tensor.copy_(values[name])
    return found


def _others(model: SequenceModel, loaded: LoadedModel, card: ModelCard) -> tuple[tuple[str, ...], list[str]]:
    """Beginnings of the names of tensors that mean something else than the source's of the same names, and why."""
    names, notes = [], []
    for part in ("encoder", "head"):
        ours, other = getattr(model, part), getattr(loaded.model, part)
        if not isinstance(ours, type(other)) and not isinstance(other, type(ours)):
            names.append(f"{part}.")
            kinds = (shown(spec[part]["name"]) for spec in (loaded.card.spec, card.spec))
            notes.append(f"the {part} is another, {' -> '.join(kinds)}")
    for what, prefix, former, now in (
        ("classes", "head.", loaded.card.class_names, card.class_names),
        ("conditions", "encoder.condition.", loaded.card.condition_names, card.condition_names),
    ):
        if former and now and former != now:
            names.append(prefix)
            notes.append(f"the {what} are others, {cut_list(former, 3)} -> {cut_list(now, 3)}")
    return tuple(names), notes


def _is_vocabulary(
    part: str, ours: Tensor, theirs: Tensor, model: SequenceModel, source: SequenceModel, most: int | None = None
) -> bool:
    """Whether the rows of both are those of ids, of which there are more in the first (`most` more at most)."""
    if part not in ("encoder", "head") or ours.shape[1:] != theirs.shape[1:] or ours.dim() != theirs.dim():
        return False
    sizes = [(one.spec or {}).get(part, {}).get("vocab_size") for one in (model, source)]
    more = ours.shape[0] - theirs.shape[0]
    return sizes == [ours.shape[0], theirs.shape[0]] and more > 0 and (most is None or more <= most)


def _note_vocabulary(found: Beginning, loaded: LoadedModel, card: ModelCard, tokenizer: Tokenizer | None) -> None:
    before, now = (spec["encoder"].get("vocab_size") for spec in (loaded.card.spec, card.spec))
    if found.grown:
        found.notes.append(f"the vocabulary grew from {before} to {now} ids, of which the new ones are as initialised")
    elif before != now and not (before is None or now is None):
        found.notes.append(f"the vocabulary has {now} ids, not {before}")
    by_id = any(not name.startswith("backbone.") for name in (*found.taken, *found.grown))
    if by_id and loaded.tokenizer is not None and tokenizer is not None:
        count = min(loaded.tokenizer.vocab_size, tokenizer.vocab_size, _COMPARED)
        if other := [i for i in range(count) if not _same(i, loaded.tokenizer, tokenizer)]:
            found.notes.append(
                f"the tokenizers differ: {len(other):,} of {count:,} ids stand for something else (the first is "
                f"{other[0]}), and rows go by the id"
            )


def _same(number: int, one: Tokenizer, other: Tokenizer) -> bool:
    """Whether an id stands for the same in two tokenizers, as far as each can say what it stands for."""
    found = []
    for tokenizer in (one, other):
        try:
            found.append(tokenizer.decode(np.array([number])))
        except Exception:  # an id that stands for nothing alone, in a plugin's words
            found.append(None)
    return bool(np.array_equal(found[0], found[1]))


def _modules(names: list[str]) -> list[str]:
    """The modules of some tensors, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
