"""How the reference shows docstrings: what they say of arguments and fields, `name: text`, is made a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes|Examples?|Raises|Returns|Yields):$")


def as_list(text: str, known: set[str]) -> str:
    """A docstring whose `name: text` of known names, at a line's or a sentence's begin, stand in a list.

    >>> as_list("Add.\\n\\na: one. b, c: two\\n    others.", {"a", "b", "c"})
    'Add.\\n\\n- `a`: one.\\n- `b`, `c`: two others.'
    """
    if not known:
        return text
    names = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    item = re.compile(rf"(?:^|(?<=[.;)] ))((?:{names})(?:, (?:{names}))*): ", re.MULTILINE)
    paragraphs, inside = [], False
    for paragraph in text.split("\n\n"):
        inside = (inside and paragraph.startswith(" ")) or bool(_SECTION.match(paragraph.partition("\n")[0]))
        before, *parts = item.split(paragraph)
        if inside or not parts or paragraph.startswith((" ", ">>>", "- ")):
            paragraphs.append(paragraph)
            continue
        if before.strip():
            paragraphs.append(before.rstrip())
        parts[-1], *raises = re.split(r"\s(?=Raises )", parts[-1], maxsplit=1)
        listed = zip(parts[::2], parts[1::2], strict=True)
        paragraphs.append(
            "\n".join(f"- {', '.join(f'`{one}`' for one in k.split(', '))}: {' '.join(v.split())}" for k, v in listed)
        )
        paragraphs += raises
    return "\n\n".join(paragraphs)


class Lists(griffe.Extension):
    """Docstrings of functions and classes, with lists."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = as_list(func.docstring.value, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring is not None:
            made = cls.members.get("__init__")
            given = {parameter.name for parameter in made.parameters} if isinstance(made, griffe.Function) else set()
            cls.docstring.value = as_list(cls.docstring.value, given | set(cls.members))
