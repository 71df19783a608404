"""What the readers of published models share: settings of a config.json, tensors by their names, and ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseq.checkpoints.export import assign_weights
from mambaseq.checkpoints.stored import REMEDY_OF_WEIGHTS, promised
from mambaseq.errors import ConfigError, UserError, cut_list, shown
from mambaseq.limits import LAYERS
from mambaseq.models import SequenceModel, build_empty, build_model
from mambaseq.models.modules import further_names

REMEDY = "Download the whole folder again, from one place."

# the character tokenizer of both: 0 [CLS], 1 [SEP], 2 [BOS], 3 [MASK], 4 [PAD], 5 [RESERVED], 6 [UNK], then the bases
_IDS = 12
_BASES = [7, 8, 9, 10, 11]  # A C G T N, the order of dna/base
MASK = 3

_LARGEST = 2**31 - 1


class Settings:
    """A config.json whose values are taken by name and checked. Errors are UserErrors that name file and key."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values, self.path, self.prefix = values, path, prefix

    def wrong(self, key: str, told: str) -> UserError:
        return UserError(f"{self.path}: {self.prefix}{key} {told}. {REMEDY}")

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number. Without a default it must be there."""
        value = self.values.get(key, default)
        if value is None and key not in self.values:
            raise UserError(f"{self.path} has no {self.prefix}{key}, which this kind of model needs. {REMEDY}")
        if type(value) is not int or not least <= value <= _LARGEST:
            raise self.wrong(key, f"must be a whole number from {least} to {_LARGEST:,}, not {shown(value)}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number above 0."""
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e9:
            raise self.wrong(key, f"must be a number above 0, not {shown(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, f"must be true or false, not {shown(value)}")
        return value

    def only(self, key: str, known: Any, why: str = "only that can be loaded") -> None:
        """Raise UserError unless the value is `known`, or missing."""
        value = self.values.get(key, known)
        if type(value) is not type(known) or value != known:
            raise self.wrong(key, f"is {shown(value)}, not {shown(known)}: {why}")

    def under(self, key: str) -> Settings:
        """The settings under a key; none if it is null or missing."""
        value = self.values.get(key)
        if not isinstance(value, dict | None):
            raise self.wrong(key, f"must hold settings, not {shown(value)}")
        return Settings(value or {}, self.path, f"{self.prefix}{key}.")

    def layers(self, key: str) -> int:
        count = self.whole(key)
        LAYERS.check(count, f"{self.path}: {key}")
        return count

    def vocabulary(self) -> int:
        """The number of ids, padded. Raises UserError for other ids than those of the character tokenizer."""
        size, multiple = self.whole("vocab_size"), self.whole("pad_vocab_size_multiple", 8)
        padded = -(-size // multiple) * multiple
        if not _IDS <= size <= padded < _IDS + 1024:
            raise self.wrong(
                "vocab_size",
                f"is {size} (padded: {padded}), but the published character tokenizer has {_IDS} ids (7 special ones, "
                "then A C G T N), so it is unknown which ids are bases",
            )
        return padded


def order_of_ids(size: int, masked: bool) -> list[int]:
    """Their id for each of ours: the bases first, as in dna/base, the mask token last if there is one, the others in
    their order between."""
    others = [number for number in range(size) if number not in _BASES and not (masked and number == MASK)]
    return [*_BASES, *others, *([MASK] if masked else [])]


@dataclasses.dataclass
class Imported:
    """A published model as one of ours.

    kind: what it is. task: what it was trained for, as in a model's card. length: tokens that it reads at once, 0 if
    the folder does not say. notes: what differs from what a user may expect.
    """

    kind: str
    model: SequenceModel
    task: str
    length: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)


class Tensors:
    """A folder's tensors, taken one by one by their published names.

    Raises UserError that names file and tensor for one that is missing or has another shape than `shape`, and at the
    end for those that nobody took.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        self.tensors, self.source = dict(tensors), source
        self.left = set(tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.tensors:
            there = [known for known in self.tensors if known.rpartition(".")[2] == name.rpartition(".")[2]]
            told = f" It has {cut_list(there, 2)}." if there else ""
            where = promised(self.source).get(name, self.source)  # a part, by the index
            raise UserError(f"{where} has no tensor {shown(name)}, which the config.json asks for.{told} {REMEDY}")
        self.left.discard(name)
        tensor = self.tensors[name]
        if tensor.is_complex():
            raise UserError(f"{self.source}: {shown(name)} holds complex numbers, which no such model has. {REMEDY}")
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{self.source}: {shown(name)} is {tuple(tensor.shape)}, but by the config.json it is {shape}. {REMEDY}"
            )
        return tensor

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return self.take(name, shape) if name in self.tensors else None

    def one_of(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        """Take a tensor that is one in the model: it is there under one or several of its names.

        Raises UserError too if it is not the same under all of them.
        """
        there = [name for name in names if name in self.tensors] or names[:1]
        tensor = self.take(there[0], shape)
        for name in there[1:]:
            if not torch.equal(self.take(name, shape), tensor):
                raise UserError(
                    f"{self.source}: {shown(name)} and {shown(there[0])} differ, but the config.json makes them one "
                    f"tensor, so it is unclear which one counts. {REMEDY}"
                )
        return tensor

    def finish(self) -> None:
        if self.left:
            raise UserError(
                f"{self.source} has tensors that its config.json does not speak of: {cut_list(sorted(self.left), 3)}. "
                "Only the language models themselves are imported, not classifiers made of them."
            )


def built(spec: dict[str, Any], tensors: Mapping[str, Tensor], path: Path, source: Path) -> SequenceModel:
    """The model of a description with these weights, in eval mode. They are compared before memory is taken."""
    try:
        with torch.device("meta"):
            meta = build_model(spec)
            expected = {name: tuple(tensor.shape) for name, tensor in meta.state_dict().items()}
            further = set(further_names(meta))
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in further}
        if given != expected:
            differs = sorted(n for n in given.keys() | expected.keys() if given.get(n) != expected.get(n))
            raise ConfigError(f"Its weights do not fit: {cut_list(differs, 3)}.")
        model = build_empty(spec)
    except ConfigError as error:
        raise UserError(f"{path} does not describe a model that can be built. {error}") from error
    assign_weights(model, tensors, [tensors], source, None, remedy=REMEDY_OF_WEIGHTS)
    return model.eval()
