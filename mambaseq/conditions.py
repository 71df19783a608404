"""What sequences are conditioned on: several conditions at once, names (a speaker) as well as numbers (an age).

Of a model with one condition of names, a sequence's condition is an id. Otherwise it is a row of whole numbers: an id
for each condition of names, -1 where it is not given, then the bits of a float64 for each number, those of NaN where it
is not given. So it is one tensor of int64 that no lower precision rounds.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mambaseq.errors import ConfigError, DataError, cut, cut_list, did_you_mean, shown

NOT_GIVEN = -1
LARGEST = 1e30  # a number of a condition, and the least spread that is told from none is its inverse


@dataclasses.dataclass(frozen=True)
class Condition:
    """One of the things that sequences are conditioned on.

    name: such as `speaker`; "" where nobody named it. names: of its values, by id; () for a number.
    low, high, mean, std: of a number, over the training sequences that have it.
    missing: whether training sequences lack it, so that a model has learned to do without.
    """

    name: str
    names: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 0.0
    missing: bool = False

    @property
    def is_number(self) -> bool:
        return not self.names

    def plain(self) -> dict[str, Any]:
        """The condition as it is saved with a model."""
        given = {**dataclasses.asdict(self), "names": list(self.names)}
        of = ("low", "high", "mean", "std") if self.is_number else ("names",)
        return {"name": self.name, "missing": self.missing, **{key: given[key] for key in of}}

    @classmethod
    def from_plain(cls, given: Mapping[str, Any]) -> Condition:
        """The inverse of `plain`. Raises ConfigError for what `plain` cannot have made."""
        names = given.get("names", [])
        whole = given.keys() <= _FIELDS and "name" in given and isinstance(names, list)
        made = cls(**{**given, "names": tuple(names)}) if whole else None
        numbers = () if made is None else (made.low, made.high, made.mean, made.std)
        if (
            made is None
            or not isinstance(made.name, str)
            or not isinstance(made.missing, bool)
            or not all(isinstance(name, str) for name in made.names)
            or not all(isinstance(one, float | int) and abs(one) <= LARGEST for one in numbers)
            or (made.is_number and not (made.std > 0 and made.low <= made.high))
        ):
            raise ConfigError(
                f"conditions must hold names, or low, high, mean and std of a number, not {shown(given)}."
            )
        return made


_FIELDS = {field.name for field in dataclasses.fields(Condition)}


def composed(text: str) -> str:
    """Letters with accents as one character: keyboards, editors and file systems may make two of one."""
    return unicodedata.normalize("NFC", text)


def as_written(names: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Each name as it is written in a file, whose accents may be written in another way; names that the file does not
    have stay as they are."""
    known = {composed(str(one)): one for one in there}
    known |= {one: one for one in there}
    return {name: known.get(name, known.get(composed(name), name)) for name in names}


def row(ids: Iterable[int | None], numbers: Iterable[float | None] = ()) -> tuple[int, ...]:
    """A sequence's condition: ids in the order of the conditions of names, then numbers; None is not given.

    >>> row([3, None]), row([], [31.5]) != row([], [None])
    ((3, -1), True)
    """
    bits = (struct.unpack("<q", struct.pack("<d", math.nan if one is None else one))[0] for one in numbers)
    return (*(NOT_GIVEN if one is None else one for one in ids), *bits)


NO_NUMBER = row([], [None])[0]


def numbers_in(bits: Iterable[int]) -> list[float | None]:
    """The numbers in the last part of a `row`."""
    found = (struct.unpack("<d", struct.pack("<q", one))[0] for one in bits)
    return [None if math.isnan(one) else one for one in found]


def in_order(conditions: Iterable[Condition]) -> list[Condition]:
    """Conditions as rows have them: names before numbers."""
    return sorted(conditions, key=lambda one: one.is_number)


def single(conditions: Sequence[Condition]) -> bool:
    """Whether a sequence's condition is an id alone."""
    return len(conditions) == 1 and not conditions[0].is_number


def encoder_options(conditions: Sequence[Condition]) -> dict[str, Any]:
    """The arguments of an encoder, besides `n_conditions`, that several conditions and numbers need."""
    if not conditions or single(conditions):
        return {}
    numbers = [one for one in conditions if one.is_number]
    return {
        "condition_sizes": [len(one.names) for one in conditions if not one.is_number],
        "condition_means": [one.mean for one in numbers],
        "condition_stds": [one.std for one in numbers],
    }


def told(conditions: Sequence[Condition], given: int | Sequence[int]) -> str:
    """A condition as it is asked for: the name, or `digit=7 speaker=theo age=31.5`; what is not given is left out.

    given: an id or a row.
    """
    if isinstance(given, int):
        return "" if given == NOT_GIVEN else conditions[0].names[given]
    ordered = in_order(conditions)
    count = sum(not one.is_number for one in ordered)
    values: list[str | None] = [
        None if which == NOT_GIVEN else one.names[which]
        for one, which in zip(ordered[:count], given[:count], strict=True)
    ]
    values += [None if one is None else f"{one:.10g}" for one in numbers_in(given[count:])]
    return " ".join(f"{one.name}={value}" for one, value in zip(ordered, values, strict=True) if value is not None)


def number(text: str) -> float | None:
    """The number that a text is; None for anything else, and for one that is not finite or above `LARGEST`."""
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        return None
    return value if abs(value) <= LARGEST else None


def of_names(name: str, values: Sequence[str], training: Iterable[int]) -> Condition:
    """A condition of names. values: of all sequences, "" where one has none. training: which of them train.

    Raises DataError if no training sequence has one.
    """
    seen = {values[i] for i in training}
    if not seen - {""}:
        raise DataError(f"{name} is empty for all training sequences. Fill it in, or leave it out of the conditions.")
    return Condition(name, tuple(sorted(seen - {""}, key=_natural)), missing="" in seen)


def _natural(text: str) -> tuple[int, str]:
    return (int(text) if text.isdecimal() and len(text) < 300 else 0, text)


def of_numbers(name: str, values: Sequence[str], training: Iterable[int], places: Sequence[object]) -> Condition:
    """A condition that is a number, with the mean and deviation of the training sequences.

    values, training: see `of_names`. places: what each sequence is called in messages. Raises DataError for a text that
    is no number, and for numbers that are all equal.
    """
    found = {}
    for i, text in enumerate(values):
        if text:
            value = number(text)
            if value is None:
                point = text.replace(",", ".", 1)
                near = f" Write {point}." if "," in text and number(point) is not None else ""
                raise DataError(
                    f"{places[i]}: {name} is {shown(text)}, which is no number.{near} Give one such as 31.5, or leave "
                    f"it empty where it is unknown."
                )
            found[i] = value
    training = list(training)
    known = [found[i] for i in training if i in found]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    mean = math.fsum(known) / max(len(known), 1)
    std = math.sqrt(math.fsum((one - mean) ** 2 for one in known) / max(len(known), 1))
    if not std > 1 / LARGEST:
        has = f"is {low:g} for all training sequences" if known else "has no training sequence"
        raise DataError(f"{name} {has}, so nothing can be learned from it. Leave it out of the conditions.")
    return Condition(name, low=low, high=high, mean=mean, std=std, missing=len(known) < len(training))


def rows(
    conditions: Sequence[Condition],
    values: Mapping[str, Sequence[str]],
    splits: Mapping[str, Sequence[int]],
    places: Sequence[object],
) -> list[tuple[int, ...]]:
    """The row of each sequence in a split; () for others.

    values: of each condition, by name; "" where a sequence has none. splits: which sequences are for "train" and other
    sets. places: what each sequence is called in messages.
    Raises DataError for what no training sequence has: a name, or the lack of one.
    """
    ordered = in_order(conditions)
    ids = {one.name: {name: place for place, name in enumerate(one.names)} for one in ordered}
    found: list[tuple[int, ...]] = [()] * len(places)
    for i in (i for members in splits.values() for i in members):
        for one in ordered:
            value = values[one.name][i]
            if not value and not one.missing:
                raise DataError(
                    f"{places[i]} has no {one.name}, and no training sequence lacks it. Fill it in, or leave it out of "
                    f"the conditions."
                )
            if value and not one.is_number and value not in ids[one.name]:
                raise DataError(
                    f"{places[i]} has the {one.name} {shown(value)}, which no training sequence has."
                    f"{did_you_mean(value, one.names)} Add such sequences for training, or change the conditions or "
                    f"the split."
                )
        given = {one.name: values[one.name][i] for one in ordered}
        found[i] = row(
            (ids[one.name][given[one.name]] if given[one.name] else None for one in ordered if not one.is_number),
            (number(given[one.name]) if given[one.name] else None for one in ordered if one.is_number),
        )
    return found


def parts_of(text: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """`digit=7 speaker=Ann, Bo` to the value of each name, and what stands before the first. Values may hold blanks and
    commas.

    >>> parts_of("7 speaker=Ann, Bo", ["digit", "speaker"])
    ('7', {'speaker': 'Ann, Bo'})

    Raises ConfigError for a name that is given twice.
    """
    known = "|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True)))
    if not known:
        return text.strip(), {}
    before, *found = re.split(rf"(?:^|(?<=[\s,]))({known})\s*=", text)
    given: dict[str, str] = {}
    for name, value in zip(found[::2], found[1::2], strict=True):
        if name in given:
            raise ConfigError(f"--condition {shown(text)} gives {name} twice. Several values stand between commas.")
        given[name] = value.strip().removesuffix(",").strip()
    return before.strip().removesuffix(",").strip(), given


def listed(conditions: Sequence[Condition]) -> str:
    """Conditions and their values, for a message."""
    few = conditions[:4]
    texts = [values_of(one, 300 // len(few)) for one in few]
    more = f" and {len(conditions) - len(few)} more" if len(conditions) > len(few) else ""
    return "; ".join(texts) + more


def values_of(condition: Condition, characters: int = 300) -> str:
    """A condition and its values, for a message; names that hold commas in quotes."""
    known = f"{condition.low:g} to {condition.high:g}"
    known = known if condition.is_number else names_of(condition.names, characters)
    return f"{cut(condition.name)}={known}" if condition.name else known


def names_of(names: Iterable[str], characters: int = 300) -> str:
    """A few names, for a message; in quotes where they hold commas."""
    return cut_list((shown(name) if "," in name else name for name in names), 12, characters)
