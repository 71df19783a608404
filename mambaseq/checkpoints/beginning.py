"""Starting a model with the weights of another, by name, where they mean the same."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambaseq.atomic import json_text
from mambaseq.checkpoints.card import ModelCard
from mambaseq.checkpoints.export import LoadedModel, has_model, load_model, weights
from mambaseq.checkpoints.stored import weights_in
from mambaseq.checkpoints.upstream import load_upstream
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, cut, cut_list, shown
from mambaseq.models import SequenceModel
from mambaseq.models.modules import further_names
from mambaseq.resources import located
from mambaseq.specs import NOT_IN_WEIGHTS, PARTS, arguments_of

_MOST = 6  # names in a message
_PADDING = 128  # the most rows that published vocabularies are padded with, to a multiple that suits a GPU


@dataclasses.dataclass
class Beginning:
    """What became of the tensors when a model started with another's weights.

    taken: names of tensors taken from the source. grown: those of a vocabulary whose first rows were taken.
    new: those that stay initialised. left: those of the source without a place in the model.
    notes: the reasons, a phrase each.
    """

    taken: list[str]
    grown: list[str]
    new: list[str]
    left: list[str]
    notes: list[str]

    def told(self, source: str) -> str:
        """It in one line."""
        count = len(self.taken) + len(self.grown)
        parts = [f"{count} of {count + len(self.new)} tensors come from {source}", *self.notes]
        if self.new:
            parts.append(f"new: {cut_list(_modules(self.new), _MOST)}")
        if self.left:
            parts.append(f"not used: {cut_list(_modules(self.left), _MOST)}")
        return "; ".join(parts)


def load_source(path: str | Path, tokenizer: Tokenizer | None = None) -> tuple[LoadedModel, bool]:
    """The model to start from: a run's, an exported one, or a published Mamba or Mamba-2 (a folder
    with `config.json` and weights, see `load_upstream`); and whether it is a published one.

    tokenizer: of the new model. If its files are next to published weights, they are read as the source's tokenizer.
    Raises UserError if there is no model, or it is damaged.
    """
    folder = located(path)
    if has_model(folder) or not (folder / "config.json").is_file():
        loaded = load_model(folder)
        # one that was imported without a tokenizer is still what was published: rows without a token pad it
        bare = tokenizer is not None and loaded.card.tokenizer is None and loaded.card.task == "next_token"
        return loaded, bare
    model = load_upstream(folder)
    assert model.spec is not None
    theirs = None if tokenizer is None else _tokenizer_in(folder, tokenizer)
    return LoadedModel(model, ModelCard(model.spec, task="next_token"), theirs, weights_in(folder)), True


def _tokenizer_in(folder: Path, like: Tokenizer) -> Tokenizer | None:
    """The tokenizer of this kind in a folder; None if its files are missing or of another kind."""
    with tempfile.TemporaryDirectory() as temporary:
        options = like.save_files(Path(temporary))
        files = [path.relative_to(temporary) for path in Path(temporary).rglob("*") if path.is_file()]
    if not files or not all((folder / name).is_file() for name in files):
        return None
    try:
        return type(like).load_files(folder, options)
    except UserError:
        return None


def begin_from(
    model: SequenceModel,
    loaded: LoadedModel,
    card: ModelCard,
    tokenizer: Tokenizer | None = None,
    *,
    published: bool = False,
    other_tokenizer: bool = False,
) -> Beginning:
    """Copy the weights of another model into an initialised one, by name.

    A head or an encoder of another kind or other shapes stays initialised, and so do parts for other classes,
    conditions or values. If the vocabulary is larger than the source's, ids in both take its rows; the mask token, the
    last id of a vocabulary that has one, takes the source's mask token only. Layers of the backbone that the source
    does not have stay initialised.

    card, tokenizer: of the new model; they are compared with the source's.
    other_tokenizer: whether ids may mean something else to the source's tokenizer. Then rows are taken of ids that
        surely mean the same alone, and weights of encoder and head that belong to all ids stay initialised.
    published: the source's vocabulary may be padded with rows without a token, which are left out. So are those of an
        imported model, whose tokenizer makes fewer ids.
    Raises ConfigError that names the tensors, if the backbone's do not fit those of the same names, or none fits; and
    one that names both tokenizers, if weights would be taken for ids that mean something else, unless they may.
    """
    own, theirs = weights(model), weights(loaded.model)
    theirs |= {name: theirs[earlier] for name, earlier in further_names(loaded.model).items() if earlier in theirs}
    source = f"the model at {loaded.source.parent}"
    others, notes = _others(model, loaded, card)
    known = loaded.tokenizer.vocab_size if not published and loaded.tokenizer is not None else None
    ids = _compared(loaded.tokenizer, tokenizer)
    misused = False  # whether weights would be those of other ids
    found = Beginning([], [], [], [], notes)
    values: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, tensor in own.items():
        part, given = name.partition(".")[0], theirs.get(name)
        if given is None or name.startswith(others):
            found.new.append(name)
        elif _is_vocabulary(name, tensor, given, model, loaded.model):
            misused |= bool(ids.other)
            masked = loaded.card.task == "masked", card.task == "masked"
            rows = (
                _sure_rows(tensor, given, masked, ids) if ids.other else _rows(tensor, given, masked, published, known)
            )
            if rows is None:
                found.new.append(name)
                continue
            values[name], whole = rows
            (found.taken if whole else found.grown).append(name)
        elif given.shape == tensor.shape and ids.other and _is_of_ids(name, card):
            misused = True
            found.new.append(name)
        elif given.shape == tensor.shape:
            found.taken.append(name)
            values[name] = given.to(tensor)
        elif part == "backbone":
            wrong.append(f"{name} is {tuple(given.shape)} there and {tuple(tensor.shape)} here")
        else:
            found.new.append(name)
    if wrong:
        raise ConfigError(
            f"finetune.init_from: {source} has another backbone: {cut_list(wrong, 3, separator='; ')}. "
            + _remedy(loaded.card.spec, card.spec)
        )
    if not any(theirs[name].dim() > 1 for name in found.taken if name.startswith("backbone.")):
        raise ConfigError(
            f"finetune.init_from: nothing in the backbone of {source} fits; its mixer is "
            f"{shown(loaded.card.spec['mixer']['name'])} in {shown(loaded.card.spec['backbone']['name'])}, this one's "
            f"{shown(card.spec['mixer']['name'])} in {shown(card.spec['backbone']['name'])}. "
            + _remedy(loaded.card.spec, card.spec)
        )
    if misused and not other_tokenizer:
        raise ConfigError(f"finetune.init_from: {source} {_other_tokenizer(loaded, card, tokenizer, ids.other)}")
    used = {*found.taken, *found.grown}
    found.left = [name for name in weights(loaded.model) if name not in used]
    _note_vocabulary(found, loaded, card, published)
    if misused:
        told = f"{ids.shared - len(ids.unsure):,} of {ids.shared:,} ids surely mean the same"
        found.notes.append(f"{told}; what belongs to others is initialised")
    _note_channels(found, loaded.card, card)
    _note_options(found, loaded.card.spec, card.spec)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in values:
                tensor.copy_(values[name])
    return found


def _remedy(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What to do where backbones do not fit: the settings that the source's description has and this one has not."""
    differing = [] if theirs["d_model"] == ours["d_model"] else [("d_model", theirs["d_model"])]
    for part in ("backbone", "mixer"):
        former, now = (_with_defaults(part, spec[part]) for spec in (theirs, ours))
        if former["name"] != now["name"]:  # the others of ours mean nothing to it
            now = _with_defaults(part, {"name": former["name"]})
            differing.append((f"{part}.name", former["name"]))
        differing += [
            (f"{part}.{key}", value)
            for key, value in former.items()
            if key != "name" and key not in (*_TOLD, *NOT_IN_WEIGHTS) and now.get(key) != value
        ]
    for name, options in theirs.get("mixers", {}).items():
        now = ours.get("mixers", {}).get(name, {})
        differing += [(f"mixers.{name}.{key}", value) for key, value in options.items() if now.get(key) != value]
    words = [f"--model.{key} {_word(value)}" for key, value in differing]
    given = cut(" ".join(words), 400) if words else "d_model, backbone, mixer"
    return f"Give model the settings that it was trained with ({given}), or begin without it (--finetune.init_from '')."


def _with_defaults(part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a backbone or a mixer with the defaults of its class."""
    made = arguments_of(catalog()[f"{part}s"].get(options["name"]))
    defaults = {key: one.default for key, one in made.items() if one.default is not inspect.Parameter.empty}
    return defaults | dict(options)


def _word(value: Any) -> str:
    """A value as a command line takes it."""
    return shlex.quote(value if isinstance(value, str) else json_text(value))


def _others(model: SequenceModel, loaded: LoadedModel, card: ModelCard) -> tuple[tuple[str, ...], list[str]]:
    """Prefixes of names of tensors that mean something else than the source's of the same names, and why."""
    names, notes = [], []
    for part in ("encoder", "head"):
        ours, other = getattr(model, part), getattr(loaded.model, part)
        if not isinstance(ours, type(other)) and not isinstance(other, type(ours)):
            names.append(f"{part}.")
            kinds = (shown(spec[part]["name"]) for spec in (loaded.card.spec, card.spec))
            notes.append(f"the {part} differs, {' -> '.join(kinds)}")
            continue
        # what each output is, if a head says it: an equal shape may mean other steps, channels or levels
        former, now = (list(one.columns()) if hasattr(one, "columns") else None for one in (other, ours))
        if former != now:
            names.append(f"{part}.")
            notes.append(f"the {part} predicts other values, {cut_list(former or [], 3)} -> {cut_list(now or [], 3)}")
    for what, prefix, former, now in (
        ("classes", "head.", loaded.card.class_names, card.class_names),
        ("conditions", "encoder.condition.", _conditions(loaded.card), _conditions(card)),
    ):
        if former and now and former != now:
            names.append(prefix)
            notes.append(f"the {what} differ, {cut_list(former, 3)} -> {cut_list(now, 3)}")
    return tuple(names), notes


def _conditions(card: ModelCard) -> list[str]:
    """What each row of a model's conditions is for."""
    if not card.conditions:
        return card.condition_names
    single = len(card.conditions) == 1
    return [
        name if single else f"{one['name']}={name}" for one in card.conditions for name in one.get("names", ("number",))
    ]


def _is_vocabulary(name: str, ours: Tensor, theirs: Tensor, model: SequenceModel, source: SequenceModel) -> bool:
    """Whether the rows of both tensors belong to ids."""
    part = name.partition(".")[0]
    if part not in ("encoder", "head") or name.startswith("encoder.condition."):
        return False
    sizes = [(one.spec or {}).get(part, {}).get("vocab_size") for one in (model, source)]
    return (
        ours.dim() == theirs.dim() > 0
        and ours.shape[1:] == theirs.shape[1:]
        and sizes == [ours.shape[0], theirs.shape[0]]
    )


def _sure_rows(
    ours: Tensor, theirs: Tensor, masked: tuple[bool, bool], ids: _Compared
) -> tuple[Tensor, Literal[False]] | None:
    """A vocabulary's rows with those of the source whose ids surely mean the same, and False: not all come from there;
    None if there is none. masked: see `_rows`."""
    there = range(min(ids.shared, len(ours), len(theirs)))
    if not (same := sorted(set(there).difference(ids.unsure))):
        return None
    rows = ours.clone()
    rows[same] = theirs.to(ours)[same]
    if all(masked):
        rows[-1] = theirs[-1].to(ours)
    return rows, False


def _rows(
    ours: Tensor, theirs: Tensor, masked: tuple[bool, bool], published: bool, known: int | None = None
) -> tuple[Tensor, bool] | None:
    """A vocabulary's rows with those of the source, and whether all rows come from there; None if the source has ids
    that the model lacks. masked: whether source and model have masked tokens; the mask token is then the last id.
    known: the number of ids that the source's tokenizer makes.
    """
    before, after = len(theirs) - masked[0], len(ours) - masked[1]
    if known is not None and known <= after < before and before - known < _PADDING:
        before = known
    if before > after and not (published and before - after < _PADDING):
        return None
    given, rows = theirs.to(ours), ours.clone()
    shared = min(before, after)
    rows[:shared] = given[:shared]
    if all(masked):
        rows[-1] = given[-1]
    return rows, after <= before and (masked[0] or not masked[1])


def _note_vocabulary(found: Beginning, loaded: LoadedModel, card: ModelCard, published: bool) -> None:
    before, now = (
        None if (size := one.spec["encoder"].get("vocab_size")) is None else size - (one.task == "masked")
        for one in (loaded.card, card)
    )
    if before is not None and now is not None and before != now:
        if found.grown and now > before:
            found.notes.append(f"the vocabulary grew from {before} to {now} ids; the new ones are initialised")
        else:
            found.notes.append(f"the vocabulary has {now} ids, not {before}")
    if found.grown and card.task == "masked" and loaded.card.task != "masked":
        found.notes.append("the mask token is initialised")
    of_ids = any(not name.startswith("backbone.") for name in (*found.taken, *found.grown))
    if of_ids and published and loaded.tokenizer is None:
        found.notes.append("there is no tokenizer of this run's kind next to its weights, and rows belong to ids")


def _note_channels(found: Beginning, former: ModelCard, now: ModelCard) -> None:
    """Say which channels are read, where a reader is told their names and weights of other channels were taken."""
    before, after = (one.reader_options.get("columns") for one in (former, now))
    taken = any(not name.startswith("backbone.") for name in found.taken)
    if taken and isinstance(before, list) and isinstance(after, list) and before != after:
        found.notes.append(f"the channels are others, {cut_list(before, 3)} -> {cut_list(after, 3)}")


def _note_options(found: Beginning, former: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Note options of taken parts that differ although their tensors fit."""
    taken = {name.partition(".")[0] for name in (*found.taken, *found.grown)}
    changed = [
        f"{part}.{key} {shown(former[part][key], 20)} -> {shown(value, 20)}"
        for part in PARTS
        if (part if part != "mixer" else "backbone") in taken
        for key, value in now[part].items()
        if key in former[part] and key not in _TOLD and key not in NOT_IN_WEIGHTS and former[part][key] != value
    ]
    if changed:
        found.notes.append(f"settings differ: {cut_list(changed, _MOST)}")


# options of a part that show in its tensors, its names or the vocabulary
_TOLD = {
    "vocab_size",
    "n_codes",
    "n_channels",
    "n_classes",
    "n_conditions",
    "condition_sizes",
    "n_layers",
    "complement",
}


def differing_ids(one: Tokenizer, other: Tokenizer) -> tuple[int, int, int]:
    """How many of the ids that two tokenizers share mean something else, of how many, and the first of them (-1 for
    none)."""
    found = _compared(one, other)
    return len(found.other), found.shared, found.other[0] if found.other else -1


class _Compared(NamedTuple):
    """The ids that two tokenizers share. shared: how many. other: those that mean something else. unsure: those and all
    that may, since their meaning is that of several: bytes that are no text alone, marks that leave none."""

    shared: int
    other: list[int]
    unsure: list[int]


def _compared(one: Tokenizer | None, other: Tokenizer | None) -> _Compared:
    """Nothing is compared where one is not known."""
    if one is None or other is None:
        return _Compared(0, [], [])
    count = min(one.vocab_size, other.vocab_size)
    theirs, ours = ([_meaning(number, of) for number in range(count)] for of in (one, other))
    several = {meaning for of in (theirs, ours) for meaning, times in Counter(of).items() if times > 1}
    differ = [number for number in range(count) if theirs[number] != ours[number]]
    unsure = [number for number in range(count) if theirs[number] != ours[number] or ours[number] in several]
    return _Compared(count, differ, unsure)


def _meaning(number: int, tokenizer: Tokenizer) -> Any:
    """What an id stands for alone, as far as its tokenizer can say: text, or a tuple of numbers."""
    try:
        found = tokenizer.decode(np.array([number]))
        meaning = found if isinstance(found, str) else tuple(np.ravel(np.asarray(found)).tolist())
        hash(meaning)
    except Exception:  # an id that has no meaning alone, by a plugin's tokenizer
        return None
    return meaning


def _is_of_ids(name: str, card: ModelCard) -> bool:
    """Whether a tensor outside of the backbone belongs to all ids together, as filters over them do."""
    part = name.partition(".")[0]
    if part == "head":
        return "vocab_size" in card.spec["head"]
    return part == "encoder" and not name.startswith("encoder.condition.")


def _other_tokenizer(loaded: LoadedModel, card: ModelCard, tokenizer: Tokenizer | None, changed: list[int]) -> str:
    """What is said of a source whose ids mean something else."""
    told, meanings = [], []
    for one, described in ((loaded.tokenizer, loaded.card.tokenizer), (tokenizer, card.tokenizer)):
        assert one is not None  # since they were compared
        name = (described or card.tokenizer or {}).get("name", type(one).__name__)
        told.append(f"{name} with {shown(one.options, 160)}")
        meanings.append(shown(_meaning(changed[0], one), 30))
    return (
        f"was trained with the tokenizer {told[0]}, and these data have {told[1]}: {len(changed):,} ids mean something "
        f"else, the first, {changed[0]}, is {meanings[0]} there and {meanings[1]} here. Give data the settings that "
        "make the former, or set finetune.other_tokenizer to true: rows of ids that mean the same are then taken, and "
        "others initialised."
    )


def _modules(names: list[str]) -> list[str]:
    """The modules of some tensors, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
