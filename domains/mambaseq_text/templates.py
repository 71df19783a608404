"""Chat templates: a conversation as the text that a model was trained on, by the template beside its tokenizer."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mambaseq.errors import DataError, UserError, cut, did_you_mean, shown
from mambaseq.limits import CHAT_CHARACTERS, YAML_BYTES
from mambaseq.plain import read_json
from mambaseq_text.sandbox import Sandbox
from mambaseq_text.sandbox_work import Refused, Work, working

FILE, CONFIG, MAP = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
_REMEDY = "Mend the template, or leave it out and write the prompts yourself."

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class ChatTemplate:
    """Writes conversations as text.

    The template is one for transformers' `apply_chat_template`. It comes with a model, so from others: it runs in
    a sandbox, where it reaches neither files nor Python's insides. It has the methods, filters and tests that published
    templates use. What it writes and holds is bounded, and all its work together: see `mambaseq_text.sandbox`.

    Args:
        source: the template's text.
        tokens: the special tokens that it may write, by name, such as `{"bos_token": "<s>"}`.
        name: what messages call it, such as its file.

    Raises DataError for a template that is none.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, name: str = "The chat template") -> None:
        self.source, self.tokens, self.name = source, dict(tokens or {}), name
        self._mark = secrets.token_hex(8)  # cannot stand in a message
        environment = Sandbox()
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        try:
            self._template = environment.bounded(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{name}, line {error.lineno}: {cut(error.message, 200)}. {_REMEDY}") from error
        except (RecursionError, MemoryError, SyntaxError, TypeError, ValueError) as error:
            raise DataError(f"{name} cannot be used: {cut(error, 200)}. {_REMEDY}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, self.tokens, self.name)

    @classmethod
    def beside(cls, tokenizer: Path, file: Path | None = None) -> ChatTemplate | None:
        """The template in the folder of a tokenizer.json: the file chat_template.jinja, or `chat_template` in its
        tokenizer_config.json; of several there, that named default. None where there is none. file: one to use instead.

        Raises DataError for a damaged template, UserError for another damaged file.
        """
        folder = tokenizer.parent
        named = [read_json(path) for path in (folder / CONFIG, folder / MAP) if path.is_file()]
        tokens = {
            key: text
            for one in named
            for key, value in one.items()
            if key.endswith("_token") and (text := _token(value)) is not None
        }
        if file is not None and not file.is_file():
            raise DataError(f"There is no chat template {shown(file, 300)}. Check its path.")
        if (path := file or folder / FILE).is_file():
            YAML_BYTES.check(path.stat().st_size, str(path))
            try:
                return cls(path.read_text(encoding="utf-8"), tokens, str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} cannot be read as text in UTF-8: {cut(error, 200)}. {_REMEDY}") from error
        for one in named:
            given = one.get("chat_template")
            if isinstance(given, list):  # several, with names
                found = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
                given = found.get("default")
            if isinstance(given, str) and given:
                return cls(given, tokens, f"chat_template in {folder / CONFIG}")
        return None

    def render(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = True, **more: Any) -> str:
        """The text of a conversation: of messages `{"role": ..., "content": ...}`. It may begin with the token bos, so
        it is encoded without a further one.

        reply: whether an answer is to follow: the text ends with what stands before one. more: further variables.

        Raises UserError for messages that the template refuses, or that it cannot write, or whose text is too long.
        """
        return self.marked(messages, reply=reply, **more)[0]

    def check_roles(self, roles: Sequence[str]) -> None:
        """Raise DataError for a role that is none of the usual ones, nor one that the template names: most templates
        write any word as a role, and the model has learned only those."""
        for number, role in enumerate(roles, start=1):
            if role not in ROLES and f"'{role}'" not in self.source and f'"{role}"' not in self.source:
                raise DataError(
                    f"Message {number} has the role {shown(role)}.{did_you_mean(role, ROLES)} Roles are "
                    f"{', '.join(ROLES)}, and others that the chat template names."
                )

    def marked(
        self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False, **more: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text as `render` gives it, and where in it what the template marks as an answer begins and ends
        (`{% generation %}`, which most templates lack), in characters."""
        given = {"tools": None, "documents": None, **self.tokens, **more}
        messages = [dict(one) for one in messages]
        pieces, length = [], 0
        try:
            with working(_marks([messages, given] if "generation" in self.source else [])) as work:
                for piece in self._template.generate(messages=messages, add_generation_prompt=reply, **given):
                    pieces.append(piece)
                    CHAT_CHARACTERS.check(length := length + len(piece), f"{self.name} with these messages")
            return _spans("".join(pieces), work)
        except UserError:
            raise
        except Refused as error:
            raise UserError(f"{self.name} refuses these messages: {cut(error, 300)}") from error
        except Exception as error:  # whatever a template may do wrong
            told = f"{type(error).__name__}: {cut(error, 200)}"
            raise UserError(f"{self.name} cannot write these messages ({told}). Use others, or no template.") from error

    def after_an_answer(self) -> str:
        """What the template writes behind an answer, such as the token that ends a turn; "" where it cannot be told."""
        probe = f"answer {self._mark}"
        asked = {"role": "user", "content": "question"}
        try:
            text = self.render([asked, {"role": "assistant", "content": probe}], reply=False)
        except UserError:
            return ""
        return text.rpartition(probe)[2] if probe in text else ""


def _spans(text: str, work: Work) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and where they stood. Each mark is one character, so none is ever cut up."""
    if not work.answers:
        return text, []
    begin, end = work.marks
    found: list[str] = []
    spans, length, left = [], 0, work.answers
    before, *rest = text.split(begin)
    for piece in (before, *rest):
        if found:
            answer, closed, piece = piece.partition(end)
            spans.append((length, length := length + len(answer)))
            found.append(answer)
            left -= 1 if closed else left + 1
        if end in piece or left < 0:
            break
        found.append(piece)
        length += len(piece)
    else:
        if not left:
            return "".join(found), spans
    raise Refused("it cuts up, repeats or drops what it marks as an answer by {% generation %}")


def _marks(given: Any) -> tuple[str, str]:
    """Two characters that stand for nothing, and do not stand in what is given."""
    told = repr(given)  # writes such characters as \\ufdd0
    for first in range(0xFDD0, 0xFDF0, 2):
        if not any(f"\\u{one:x}" in told for one in (first, first + 1)):
            return chr(first), chr(first + 1)
    raise Refused("they hold all the characters that mark an answer")


def _token(written: Any) -> str | None:
    """A token in a file of a tokenizer: its text, or an object with it as `content`."""
    text = written.get("content") if isinstance(written, dict) else written
    return text if isinstance(text, str) and text else None


def _refuse(message: Any) -> None:
    raise Refused(str(message)[:1000] if isinstance(message, str) else shown(message))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(str(form)[:100])


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, whose contents are texts: a list of `{"type": "text", "text": ...}` is joined.

    Raises DataError, which names the message, for what is none.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f'messages must be a list of {{"role": ..., "content": ...}}, not {shown(messages)}.')
    found = []
    for number, one in enumerate(messages, start=1):
        if not isinstance(one, dict) or not isinstance(one.get("role"), str) or not one["role"]:
            raise DataError(f"Message {number} must be an object with a role, such as user, and is {shown(one)}.")
        content = one.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise DataError(f"The content of message {number} must be text, not {shown(content)}.")
        found.append({**one, "content": content})
    return found
