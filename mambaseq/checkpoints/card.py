"""`model.json`: what a model's weights do not say. It is written in a fixed order and read strictly, since it may come
from anybody."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any

from mambaseq.atomic import json_text
from mambaseq.conditions import Condition
from mambaseq.data.purpose import TASKS
from mambaseq.errors import ConfigError, UserError, cut_list, did_you_mean, shown
from mambaseq.generation.sampling import NEUTRAL, check_settings
from mambaseq.plain import read_json
from mambaseq.specs import check_spec, fits

FORMAT = 1


@dataclasses.dataclass
class ModelCard:
    """What a model's weights do not say: how to build it, and what it was trained on.

    spec: see `mambaseq.models.build_model`. tokenizer: `{"name", "options"}` or None. reader, writer: registered names.
    condition_names: of a model with one condition of names. conditions: of all (see `mambaseq.conditions.Condition`);
        empty where nobody named them.
    strand_classes: the number that each class or value has on the other strand of DNA; empty where it is the same.
    generation: the run's defaults for `mambaseq generate`. step: optimizer steps that made the weights, None if
        unknown.
    sha256: checksums of the files next to the description, by name; empty in an older version.
    task: what the model was trained for (see `mambaseq.data.purpose.TASKS`); None if the description does not say.
    """

    spec: dict[str, Any]
    tokenizer: dict[str, Any] | None = None
    class_names: list[str] = dataclasses.field(default_factory=list)
    condition_names: list[str] = dataclasses.field(default_factory=list)
    conditions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    strand_classes: list[int] = dataclasses.field(default_factory=list)
    length: int = 0
    start_ids: list[int] = dataclasses.field(default_factory=lambda: [0])
    reader: str | None = None
    writer: str | None = None
    reader_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    writer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: int | None = None
    task: str | None = None
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The text of model.json: equal cards give equal texts, in whatever order their options are."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json_text({"format": FORMAT, **_sorted(fields, top=True)}, indent=2, ensure_ascii=False) + "\n"


def _sorted(value: Any, top: bool = False) -> Any:
    """Mappings sorted by key, a part's name before its options; the card's own fields in their order."""
    if isinstance(value, dict):
        order = list(value) if top else sorted(value, key=lambda key: (key != "name", str(key)))
        return {key: _sorted(value[key]) for key in order}
    if isinstance(value, list | tuple):
        return [_sorted(inner) for inner in value]
    return value


def read_card(path: Path) -> ModelCard:
    """The card in a model.json. Raises UserError that names file and key, for one that this version cannot have
    written."""
    remedy = "Export the model again."
    fields = read_json(path, remedy)
    version = fields.pop("format", None)
    if version != FORMAT:
        raise UserError(
            f"{path} has format {shown(version)}; this mambaseq reads format {FORMAT}. Install the matching one."
        )
    hints = typing.get_type_hints(ModelCard)
    for key, value in fields.items():
        if key not in hints:
            raise UserError(f"{path}: there is no key {shown(key)}.{did_you_mean(key[:80], hints)} {remedy}")
        if not fits(value, hints[key]):
            raise UserError(f"{path}: {key} cannot be {shown(value)}. {remedy}")
    if "spec" not in fields:
        raise UserError(f"{path} does not describe a model: it has no spec. {remedy}")
    card = ModelCard(**fields)
    try:
        check_spec(card.spec)
        _check(card)
    except ConfigError as error:
        raise UserError(f"{path}: {error} {remedy}") from error
    return card


def _check(card: ModelCard) -> None:
    if card.length < 0:
        raise ConfigError(f"length must be at least 0, not {card.length}.")
    if card.step is not None and card.step < 0:
        raise ConfigError(f"step must be at least 0, not {card.step}.")
    if card.task is not None and card.task not in TASKS:
        raise ConfigError(f"task is {shown(card.task)}; it is one of: {', '.join(TASKS)}.")
    vocabulary = card.spec["encoder"].get("vocab_size")
    top = vocabulary if isinstance(vocabulary, int) else math.inf
    if not card.start_ids or not all(0 <= number < top for number in card.start_ids):
        raise ConfigError(f"start_ids must be ids of the vocabulary, not {shown(card.start_ids)}.")
    swapped = card.strand_classes
    if any(not 0 <= one < len(swapped) or swapped[one] != number for number, one in enumerate(swapped)):
        raise ConfigError(f"strand_classes must pair numbers with each other, not {shown(swapped)}.")
    tokenizer = card.tokenizer
    if tokenizer is not None and (
        tokenizer.keys() != {"name", "options"}
        or not isinstance(tokenizer["name"], str)
        or not isinstance(tokenizer["options"], dict)
    ):
        raise ConfigError(f"tokenizer must hold a name and options, not {shown(tokenizer)}.")
    for one in card.conditions:
        Condition.from_plain(one)
    check_generation(card.generation)
    for name, digest in card.sha256.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ConfigError(f"sha256 must hold checksums of files beside it, not {shown({name: digest})}.")


def check_generation(settings: dict[str, Any]) -> None:
    """Raise ConfigError for defaults of `mambaseq generate` that do not exist or are out of range."""
    known = {"max_new_tokens": 0, "temperature": 1.0, **NEUTRAL}
    if unknown := settings.keys() - known.keys():
        raise ConfigError(f"generation has no {cut_list(sorted(unknown))}; it has {cut_list(known)}.")
    given = {**known, **settings}
    count = given.pop("max_new_tokens")
    if not fits(count, int) or count < 0:
        raise ConfigError(f"generation.max_new_tokens must be a whole number of at least 0, not {shown(count)}.")
    try:
        check_settings(**given)
    except ConfigError as error:
        raise ConfigError(f"generation.{error}") from error
