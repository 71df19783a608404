"""What `predict` and `generate` share: the device, the condition, and readers and writers that fit the model."""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mambaseq.checkpoints import LoadedModel
from mambaseq.data.records import Record
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, cut, cut_list, did_you_mean, folded, shown, under_key

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LISTED = 12


def condition_ids(loaded: LoadedModel, condition: str | Sequence[str] | None) -> list[int]:
    """Ids of condition names (numbers where the model's conditions have no names).

    condition: one name or several with commas, or a sequence of such. A name that holds commas itself is found before
        it is taken for several.

    Raises ConfigError for unknown ones, or where one is needed.
    """
    count = loaded.card.spec["encoder"].get("n_conditions", 0)
    names = (loaded.card.condition_names or [str(number) for number in range(count)]) if count else []
    if len(names) != count:
        raise ConfigError(
            f"The model at {loaded.source} has {count} conditions and its description names {len(names)}. Export it "
            f"again."
        )
    if condition is None:
        if names:
            raise ConfigError(f"This model is conditional; say on what with --condition: {_listed(names)}.")
        return []
    # accents may be typed or stored as characters of their own
    names = [unicodedata.normalize("NFC", name) for name in names]
    given = [unicodedata.normalize("NFC", one) for one in ([condition] if isinstance(condition, str) else condition)]
    return [names.index(name) for one in given for name in _split(one, names)]


def _split(given: str, names: list[str]) -> list[str]:
    """The names in a text with commas, the longest that fits first."""
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
            raise ConfigError(f"No condition is named {shown(parts[0].strip())}.{_near(parts[0].strip(), names)}")
    return found


def _near(given: str, names: list[str]) -> str:
    """What could be meant: names with all the given words in them (digits may be written as words), else a similar
    one."""
    if not names:
        return " The model is not conditional; leave --condition out."
    wanted = set(_words(given))
    fitting = [name for name in names if wanted and wanted <= set(_words(name))]
    fitting = fitting or [name for name in names if given and given.lower() in name.lower()]
    if fitting:
        if len(fitting) == 1:
            return f" Did you mean {shown(fitting[0])}?"
        return f" Did you mean one of these: {_listed(fitting)}?"
    return f"{did_you_mean(given, names)} The model knows: {_listed(names)}."


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", folded(text))
    return [str(_DIGITS.index(word)) if word in _DIGITS else word.lstrip("0") or "0" for word in words]


def _listed(names: list[str]) -> str:
    """Names for a message, not more than a few; in quotes where they hold commas."""
    return cut_list((shown(name) if "," in name else name for name in names), _LISTED)


def _check_options(kind: str, name: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise ConfigError for options in a model.json that its own reader or writer does not take: unknown ones, or
    values of another kind than its annotations of plain values say."""
    parameters = inspect.signature(function, eval_str=True).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key, value in options.items():
        if key not in parameters:
            raise ConfigError(
                f"model.json: {kind}_options.{cut(key)} is no option of the {kind} {shown(name)}."
                f"{did_you_mean(str(key), parameters)} Export the model again."
            )
        wanted = parameters[key].annotation
        fits = value in get_args(wanted) if get_origin(wanted) is Literal else True
        if wanted in (str, bool, int, float):
            fits = type(value) is wanted or (wanted is float and type(value) is int)
        if not fits:
            raise ConfigError(
                f"model.json: {kind}_options.{key} of the {kind} {shown(name)} cannot be {shown(value)}; it is "
                f"{getattr(wanted, '__name__', wanted)}. Export the model again."
            )


def fitting_options(
    kind: str, name: str, function: Callable[..., Any], options: dict[str, Any], own: bool
) -> dict[str, Any]:
    """What of the options saved with a model goes to its reader or writer.

    own: whether it is the model's own, which takes all of them; another one is given those that it knows.
    Raises ConfigError when it needs more.
    """
    parameters = inspect.signature(function).parameters
    if own:
        _check_options(kind, name, function, options)
    else:
        options = {key: value for key, value in options.items() if key in parameters}
    needed = [
        key
        for key, parameter in list(parameters.items())[3 if kind == "writer" else 2 :]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and key not in options
    ]
    if needed:
        raise ConfigError(
            f"The {kind} {shown(name)} needs {', '.join(needed)}, which {kind}_options in this "
            f"model's model.json do not have. Use its own {kind}."
        )
    return options


def records_of(
    read: Callable[..., Iterable[Record]], path: Path, tokenizer: Tokenizer | None, options: dict[str, Any]
) -> Iterator[Record]:
    """The reader's records; a reader that is no generator reads, and fails, when the first is asked for. A refusal of
    its options says where they stand."""
    with under_key("reader_options", options, "model.json", ConfigError):
        yield from read(path, tokenizer, **options)
