"""The conditions that a model knows, by which names and numbers become ids and rows."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mambaseq.checkpoints import LoadedModel
from mambaseq.conditions import (
    NOT_GIVEN,
    Condition,
    composed,
    in_order,
    listed,
    names_of,
    number,
    parts_of,
    row,
    single,
    values_of,
)
from mambaseq.errors import ConfigError, cut, did_you_mean, folded, shown

logger = logging.getLogger(__name__)

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Given = str | Mapping[str, object]
"""Conditions as a user says them: `"7"`, `"digit=7 speaker=theo age=31.5"`, or a mapping of such names."""

Asked = Given | Sequence[Given] | Sequence[Sequence[str]]
"""All that is asked for: one, several, or the words of each as --condition gives them."""


def not_conditional(option: str) -> str:
    """What is said to an option that names conditions, of a model without any."""
    return (
        f"The model is not conditional; leave {option} out, or train one that is: for sounds with data.condition, and "
        "with data.pattern, which says where in the files' names it is."
    )


def in_words(given: Given | Sequence[str]) -> Any:
    """What one --condition gives, as one text: `["digit=7", "speaker=Ann,", "Bo"]` is `"digit=7 speaker=Ann, Bo"`."""
    return given if isinstance(given, str | Mapping) else " ".join(given)


class Known:
    """The conditions of a model, by which names and numbers become ids and rows.

    all: in the order of rows. Raises ConfigError for a description that is not whole.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.source = loaded.source
        encoder, card = loaded.card.spec["encoder"], loaded.card
        self._dropped = bool(encoder.get("condition_dropout"))
        self._odd: set[str] = set()  # conditions with numbers that were told to be out of range
        count = encoder.get("n_conditions", 0)
        sizes = encoder.get("condition_sizes") or ([count] if count else [])
        means, stds = (encoder.get(f"condition_{of}") or [] for of in ("means", "stds"))
        made = [Condition.from_plain(one) for one in card.conditions]
        if not made and len(sizes) == 1 and not means:
            made = [Condition("", tuple(card.condition_names or map(str, range(count))))]
        elif not made:  # a model that was saved without its data's names
            made = [Condition(f"condition_{i}", tuple(map(str, range(size)))) for i, size in enumerate(sizes, start=1)]
            made += [
                Condition(f"number_{i}", low=mean - 2 * std, high=mean + 2 * std, mean=mean, std=std)
                for i, (mean, std) in enumerate(zip(means, stds, strict=True), start=1)
            ]
        self.all = in_order(made)
        found = [len(one.names) for one in self.all if not one.is_number]
        if found != sizes or len(self.all) != len(sizes) + len(means):
            raise ConfigError(
                f"The model at {loaded.source} has {count} conditions, but its description names {sum(found)}"
                f"{'' if single(self.all) else f' ({listed(self.all)})'}. Export it again."
            )
        self.names = [[composed(name) for name in one.names] for one in self.all]

    def may_lack(self, condition: Condition) -> bool:
        """Whether the model has learned to do without it."""
        return condition.missing or self._dropped

    def examples(self, most: int) -> list[str]:
        """Some that the model knows, as `rows` takes them: of several, as many as the one with most names has."""
        counts = [len(names) for names in self.names if names]
        values = [(one.names or (f"{one.mean:.4g}",)) for one in self.all]
        if single(self.all):
            return list(values[0][:most])
        return [
            " ".join(f"{one.name}={of[i % len(of)]}" for one, of in zip(self.all, values, strict=True))
            for i in range(min(max(counts, default=1), most))
        ]

    def rows(self, given: Given) -> list[int] | list[tuple[int, ...]]:
        """Ids or rows of what is given: every combination of the values between commas.

        Raises ConfigError that names the condition for a name that is unknown, a number that is none, and a condition
        that the model needs.
        """
        values = self._values(given)
        found: list[list[Any]] = []
        for place, condition in enumerate(self.all):
            text = values.get(condition.name)
            if text is None or (text == "" and "" not in self.names[place]):
                if not self.may_lack(condition):
                    raise ConfigError(
                        f"This model needs {condition.name or 'a condition'} as well. Give one with --condition: "
                        f"{values_of(condition)}."
                    )
                found.append([None])
            elif condition.is_number:
                found.append([self.number(condition, part.strip()) for part in text.split(",")])
            else:
                found.append([self.names[place].index(name) for name in self._split(place, text)])
        return [self.row(one) for one in itertools.product(*found)]  # type: ignore[return-value]

    def row(self, values: Sequence[Any]) -> int | tuple[int, ...]:
        """An id or a row. values: of each condition an id, a number, or None."""
        if single(self.all):
            return NOT_GIVEN if values[0] is None else values[0]
        count = sum(not one.is_number for one in self.all)
        return row(values[:count], values[count:])

    def checked(self, given: int | tuple[int, ...]) -> int | tuple[int, ...]:
        """An id or a row that may be somebody else's. Raises ConfigError for one that the model does not know."""
        counts = [len(one.names) for one in self.all if not one.is_number]
        ids = [given] if isinstance(given, int) else list(given)
        if not self.all or isinstance(given, int) != single(self.all) or len(ids) != len(self.all):
            is_ = "no condition" if not self.all else "an id" if single(self.all) else f"a row of {len(self.all)}"
            raise ConfigError(f"The model at {self.source} has {is_}.")
        for one, which, count in zip(self.all, ids, counts, strict=False):
            if not NOT_GIVEN <= which < count or (which == NOT_GIVEN and not self.may_lack(one)):
                raise ConfigError(f"{one.name or 'the condition'} has {count} names in the model, counted from 0.")
        return given

    def number(self, condition: Condition, given: object) -> float:
        """A number that a user gives; one that training has not seen the like of is told. Raises ConfigError."""
        whole = isinstance(given, int | float) and not isinstance(given, bool)
        found = number(str(given) if whole or isinstance(given, str) else "")
        if found is None:
            raise ConfigError(
                f"{condition.name} is a number, not {shown(given)}. Give one such as {condition.mean:.4g}; training "
                f"had {condition.low:g} to {condition.high:g}."
            )
        if not condition.low <= found <= condition.high and condition.name not in self._odd:
            self._odd.add(condition.name)
            logger.warning(
                "%s=%g is outside of what training had, %g to %g: the model has to guess.",
                condition.name, found, condition.low, condition.high,
            )  # fmt: skip
        return found

    def unknown(self, place: int, given: str) -> str:
        """The message for a name that a condition does not have."""
        if not self.all:
            return f"No condition is named {shown(given)}. {not_conditional('--condition')}"
        name = self.all[place].name
        if other := re.search(r"(?:^|\s)([^\s=]+)=", given):
            names = [one.name for one in self.all if one.name]
            near = did_you_mean(other[1], names)
            return f"No condition is called {shown(other[1])}.{near} They are: {listed(self.all)}."
        what = f"The condition {name} knows no" if name else "No condition is named"
        return f"{what} {shown(given)}.{_near(given, self.names[place])}"

    def _values(self, given: Given) -> dict[str, str]:
        """What is given of each condition, as text."""
        names = [one.name for one in self.all]
        if isinstance(given, Mapping):
            told = {composed(str(key)): "" if value is None else str(value) for key, value in given.items()}
            for key in told:
                if key not in names:
                    raise ConfigError(self.unknown(0, f"{key}="))
            return {key: composed(value) for key, value in told.items()}
        text = composed(given)
        if len(self.all) == 1 and text in self.names[0]:
            return {names[0]: text}
        before, values = parts_of(text, names)
        if before or not values:
            if len(self.all) <= 1 and not values:
                return {names[0] if names else "": before}
            if "=" in before:
                raise ConfigError(self.unknown(0, before))
            raise ConfigError(
                f"--condition {shown(before or text)} does not say which condition that is. Write "
                f"{' '.join(f'{name}=...' for name in names[:6])}; there are: {listed(self.all)}."
            )
        return values

    def _split(self, place: int, given: str) -> list[str]:
        """The names in a text with commas; longer names are tried first."""
        names = self.names[place]
        if given in names:
            return [given]
        parts, found = given.split(","), []
        while parts:
            for end in range(len(parts), 0, -1):
                if (name := ",".join(parts[:end]).strip()) in names:
                    found.append(name)
                    parts = parts[end:]
                    break
            else:
                raise ConfigError(self.unknown(place, parts[0].strip()))
        return found


def condition_ids(
    loaded: LoadedModel, condition: Asked | None, by_columns: bool = False
) -> list[int] | list[tuple[int, ...]]:
    """What a user asks for, as ids, or rows for a model of several conditions or of numbers (see
    `mambaseq.conditions`); none where nothing is asked for and the model can do without.

    condition: what all conditions are: one name, or `digit=7 speaker=theo age=31.5`, or a mapping; several values with
    commas, or a sequence of these, or of their words. A name that itself holds commas is found first.
    by_columns: whether records may have conditions of their own instead, which a message then says.

    Raises ConfigError for unknown names, and where a condition is needed.
    """
    known = Known(loaded)
    if condition is None:
        needed = [one for one in known.all if not known.may_lack(one)]
        if needed:
            raise ConfigError(
                f"This model needs a condition. Give one with --condition: {listed(needed)}."
                f"{_own_told(needed) if by_columns else ''}"
            )
        return []
    every = [condition] if isinstance(condition, str | Mapping) else [in_words(one) for one in condition]
    if not known.all:
        raise ConfigError(known.unknown(0, str(every[0]) if every else ""))
    return [one for given in every for one in known.rows(given)]  # type: ignore[return-value]


def _own_told(needed: Sequence[Condition]) -> str:
    names = " and ".join(cut(one.name, 60) for one in needed[:4] if one.name)
    called = f"called {names}, which is used unasked, or one named" if names else "named"
    return (
        f" Or give each record its own: a manifest, jsonl or parquet has a column {called} with --condition-column; "
        "other files have a table beside them (--condition-table)."
    )


def _near(given: str, names: list[str]) -> str:
    """A hint at what could be meant: names that hold all the given words (digits may be written as words), or a similar
    name."""
    wanted = set(_words(given))
    fitting = [name for name in names if wanted and wanted <= set(_words(name))]
    fitting = fitting or [name for name in names if given and given.lower() in name.lower()]
    if fitting:
        if len(fitting) == 1:
            return f" Did you mean {shown(fitting[0])}?"
        return f" Did you mean one of these: {names_of(fitting)}?"
    return f"{did_you_mean(given, names)} The model knows: {names_of(names)}."


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", folded(text))
    return [str(_DIGITS.index(word)) if word in _DIGITS else word.lstrip("0") or "0" for word in words]
