"""Methods of texts, filters and tests of chat templates, within bounds; see `mambaseq_text.sandbox`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import filters, tests
from jinja2.runtime import Undefined
from jinja2.utils import pass_context

from mambaseq_text.sandbox_work import (
    PIECES,
    SHORT,
    Refused,
    as_text,
    check,
    compared,
    copied,
    items_of,
    spend,
    taken,
    weigh,
    weighed,
)

_METHODS = (
    "capitalize count endswith find isalnum isalpha isdigit islower isspace isupper join lower lstrip removeprefix "
    "removesuffix replace rsplit rstrip split startswith strip title upper"
)
TEXT_METHODS = frozenset(_METHODS.split())
MAPPING_METHODS = frozenset({"get", "items", "keys", "values"})


def _joined(parts: Iterable[Any], between: str = "", get: Callable[[Any], Any] | None = None) -> str:
    texts = [as_text(part if get is None else get(part)) for part in items_of(parts)]
    check(sum(map(len, texts)) + len(between) * len(texts))
    return copied(between.join(texts))


@jinja2.pass_environment
def _join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None and len(str(attribute)) > SHORT:
        raise Refused("it joins by a long attribute")
    get = None if attribute is None else filters.make_attrgetter(environment, attribute)
    return _joined(value, as_text(d), get)


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old) if count < 0 else min(count, text.count(old))
    check(len(text) + found * max(len(new) - len(old), 0))
    spend(len(text))
    return copied(text.replace(old, new, count))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    return _replaced(as_text(value), as_text(old), as_text(new), -1 if count is None else count)


def _split(text: str, name: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    most = PIECES if maxsplit < 0 else min(maxsplit, PIECES)
    if name == "rsplit" and len(sep or "") > SHORT:
        raise Refused("it splits a text from its end at a long one")
    made: list[str] = getattr(text, name)(sep, most)
    if len(made) > PIECES:
        raise Refused(f"it splits a text into more than {PIECES:,} pieces")
    return made


def method(name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A method of a text, within bounds."""
    spend(text.__sizeof__())
    for one in (*args, *kwargs.values()):
        if not isinstance(one, GeneratorType):
            weigh(one)
    if name == "replace":
        return _replaced(text, *args, **kwargs)
    if name == "join":
        (parts,) = args
        weigh(parts := list(items_of(parts)))
        check(sum(map(len, parts)) + len(text) * len(parts))
        return copied(text.join(parts))
    if name in ("split", "rsplit"):
        return weighed(_split(text, name, *args, **kwargs))
    if name in ("strip", "lstrip", "rstrip") and args and len(args[0] or "") > SHORT:
        raise Refused("it strips a long list of characters")
    if name == "title":
        items_of(text)
    return compared(getattr(text, name)(*args, **kwargs))


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if (isinstance(indent, int) and indent > 16) or (isinstance(indent, str) and len(indent) > 16):
        raise Refused("it indents JSON by more than 16")
    if separators is not None and max(map(len, separators)) > 4:
        raise Refused("it writes JSON with long separators")
    if isinstance(value, Undefined):
        raise Refused("it writes as JSON what is not there")
    weigh(value)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, allow_nan=False
    )
    pieces, length = [], 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        check(length := length + len(piece))
    return copied("".join(pieces))


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if (width if isinstance(width, int) else len(width)) > 16:
        raise Refused("it indents a text by more than 16")
    return copied(filters.do_indent(items_of(as_text(value)), width, first, blank))


def _of_text(made: Callable[..., Any]) -> Callable[..., Any]:
    def one(value: Any, *args: Any, **kwargs: Any) -> Any:
        return weighed(made(as_text(value), *args, **kwargs))

    return one


def _trim(value: Any, chars: str | None = None) -> str:
    if len(chars or "") > SHORT:
        raise Refused("it strips a long list of characters")
    return as_text(value).strip(chars)


def _number(value: Any, *args: Any, **kwargs: Any) -> Any:
    return weighed(filters.do_int(compared(value), *args, **kwargs))


def _listed(value: Any) -> list[Any]:
    return weighed(list(items_of(value)))


def _through(made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that goes through a list with the name of another filter, of a test or of an attribute."""

    @pass_context
    def one(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        for name in (*args[:1], kwargs.get("attribute", "")):
            if isinstance(name, str) and len(name) > SHORT:
                raise Refused("it maps by a long name")
        return made(context, items_of(value), *args, **kwargs)

    return one


def _ordered(made: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_environment
    def one(environment: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        weigh(value := items_of(value))
        for name in kwargs.values():
            weigh(name)
        return made(environment, value, *args, **kwargs)

    return one


@jinja2.pass_environment
def _sorted(environment: Any, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False) -> Any:
    weigh(value)
    return filters.do_dictsort(value, case_sensitive, by, reverse)  # type: ignore[arg-type]


def _reversed(value: Any) -> Any:
    return copied(value[::-1]) if isinstance(value, str) else _listed(value)[::-1]


FILTERS: dict[str, Callable[..., Any]] = {
    **{name: filters.FILTERS[name] for name in ("count", "d", "default", "first", "items", "last", "length")},
    **{name: _of_text(getattr(str, name)) for name in ("capitalize", "lower", "upper")},
    **{name: _through(filters.FILTERS[name]) for name in ("map", "reject", "rejectattr", "select", "selectattr")},
    "dictsort": _sorted,
    "float": _of_text(filters.do_float),
    "indent": _indent,
    "int": _number,
    "join": _join,
    "list": _listed,
    "replace": _replace,
    "reverse": _reversed,
    "safe": as_text,
    "sort": _ordered(filters.do_sort),
    "string": as_text,
    "title": _of_text(lambda text: filters.do_title(items_of(text))),
    "tojson": _json,
    "trim": _trim,
    "unique": _ordered(filters.do_unique),
    "a charge": taken,
    "a copy": copied,
    "compared": compared,
    "joined by a template": _joined,
    "weighed": weighed,
}


def _weighing(made: Callable[..., Any]) -> Callable[..., Any]:
    def one(value: Any, *args: Any) -> Any:
        for each in (value, *args):
            compared(each)
        return made(value, *args)

    return one


def _of_number(made: Callable[..., Any]) -> Callable[..., Any]:
    def one(value: Any, *args: Any) -> Any:
        if not isinstance(value, int | float):
            raise Refused("it asks of what is no number whether it is even or odd")
        return made(value, *args)

    return one


_PLAIN = "boolean defined false float integer iterable mapping none number sameas sequence string true undefined"
_NUMBERS = "divisibleby even odd"
_COMPARING = "eq equalto ne gt greaterthan ge lt lessthan le in == != > >= < <="
_tests: Any = tests.TESTS
TESTS: dict[str, Any] = {
    **{name: _tests[name] for name in _PLAIN.split()},
    **{name: _of_number(_tests[name]) for name in _NUMBERS.split()},
    **{name: _weighing(_tests[name]) for name in _COMPARING.split()},
}
