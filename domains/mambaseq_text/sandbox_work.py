"""What a render of a chat template has done, in bytes, and how much it may do; see `mambaseq_text.sandbox`."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

import jinja2
from jinja2.runtime import Undefined

from mambaseq.limits import CHAT_CHARACTERS

STEP, HELD, WRITTEN, PASSES = 512, 128, 8, 64
DEPTH = 100
PIECES = 2**18
"""Pieces that a text is split into, and characters of one that is taken apart."""
SHORT = 256
"""Characters of what is stripped off, or of a name."""

_Holding = list | tuple | dict | KeysView | ValuesView | ItemsView


class Refused(jinja2.TemplateError):
    """What a template says of messages that it does not take, or what it may not do."""


class Work:
    """What one render has done, and the marks around its answers."""

    def __init__(self, marks: tuple[str, str]) -> None:
        self.longest = CHAT_CHARACTERS.value
        self.left = PASSES * self.longest
        self.marks, self.answers = marks, 0


current: ContextVar[Work] = ContextVar("work of a chat template")  # nothing is computed while a template is compiled


@contextmanager
def working(marks: tuple[str, str]) -> Iterator[Work]:
    """For one render: what it does is counted. marks: one character each, before and behind an answer."""
    work = Work(marks)
    token = current.set(work)
    try:
        yield work
    finally:
        current.reset(token)


def spend(amount: int) -> None:
    """Count so many bytes. Raises Refused where a render has done too much."""
    work = current.get()
    work.left -= max(amount, 0)
    if work.left < 0:
        raise Refused("it does more work than the text of a conversation needs")


def check(length: int) -> None:
    """Raise UserError for a text of so many characters that is too long."""
    if length > current.get().longest:
        CHAT_CHARACTERS.check(length, "A text that a chat template makes")


def weigh(value: Any) -> None:
    """Count all that a value holds. Refuses what is large, or nested deep, or cannot stand in a text."""
    spend(STEP // 8)
    total, read, level = 0, 0, [value]
    for _ in range(DEPTH):
        deeper: list[Any] = []
        spend(HELD * (len(level) - 1))
        for one in level:
            if isinstance(one, str):
                total += len(one)
                read += one.__sizeof__()
            elif isinstance(one, _Holding):
                total += len(one)
                check(total + len(deeper))
                deeper.extend(one)
                if isinstance(one, dict):
                    deeper.extend(one.values())
            elif isinstance(one, int):
                if one.bit_length() > 64:
                    raise Refused("it uses whole numbers of more than 64 bits")
            elif one is not None and not isinstance(one, float | range | Undefined):
                raise Refused(f"it uses a {type(one).__name__} as a text or a list would be")
        check(total)
        if not deeper:
            spend(read)
            return
        level = deeper
    raise Refused(f"it nests lists more than {DEPTH} deep")


def weighed(value: Any) -> Any:
    """The value, counted as `weigh` does."""
    weigh(value)
    return value


def compared(value: Any) -> Any:
    """The value, counted where comparing it takes time."""
    if isinstance(value, str | list | tuple | dict | int):
        weigh(value)
    return value


def taken(count: int) -> int:
    """A charge, as an expression that is true."""
    spend(count)
    return 1


def copied(value: Any) -> Any:
    """The value, counted by the memory of a copy of itself alone."""
    spend(STEP // 8 + (value.__sizeof__() if isinstance(value, str | list | tuple) else 0))
    return value


def as_text(value: Any) -> str:
    """What a template writes of a value, within bounds."""
    weigh(value)
    made = str(value)
    check(len(made))
    return made


def items_of(value: Any) -> Any:
    """What a filter goes through, counted; a generator as a list."""
    if isinstance(value, GeneratorType):
        made = []
        for one in value:
            made.append(one)
            if len(made) > PIECES:
                raise Refused(f"it makes a list of more than {PIECES:,}")
            spend(STEP)
        return made
    if isinstance(value, str) and len(value) > PIECES:
        raise Refused(f"it takes a text of more than {PIECES:,} characters apart")
    if isinstance(value, str | range | _Holding):
        spend(STEP * len(value))
    return value
