"""Chat templates: a conversation as the text that a model was trained on, by the template beside its tokenizer."""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from mambaseq.errors import DataError, UserError, cut, shown
from mambaseq.limits import CHAT_CHARACTERS, YAML_BYTES
from mambaseq.plain import read_json

FILE, CONFIG, MAP = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
_REMEDY = "Mend the template, or leave it out and write the prompts yourself."


class ChatTemplate:
    """Writes conversations as text.

    The template is one for transformers' `apply_chat_template`. It comes with a model, so from others: it runs in
    Jinja's sandbox, where it reaches neither files nor Python's insides, and what it writes is bounded.

    Args:
        source: the template's text.
        tokens: the special tokens that it may write, by name, such as `{"bos_token": "<s>"}`.
        name: what messages call it, such as its file.

    Raises DataError for a template that is none.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, name: str = "The chat template") -> None:
        self.source, self.tokens, self.name = source, dict(tokens or {}), name
        self._mark = secrets.token_hex(8)  # cannot stand in a message
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, loopcontrols])
        environment.filters["tojson"] = _json
        environment.filters["joined by a template"] = _joined
        environment.filters.pop("center")
        environment.globals.update(raise_exception=_refuse, strftime_now=_now, mark_of_answers=self._mark)
        try:
            tree = _Bounded().visit(environment.parse(source))
            self._template = jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)
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

    def marked(
        self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False, **more: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text as `render` gives it, and where in it what the template marks as an answer begins and ends
        (`{% generation %}`, which most templates lack), in characters."""
        given = {"tools": None, "documents": None, **self.tokens, **more}
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=[dict(one) for one in messages], add_generation_prompt=reply, **given
            ):
                pieces.append(piece)
                CHAT_CHARACTERS.check(length := length + len(piece), f"{self.name} with these messages")
        except UserError:
            raise
        except _Refused as error:
            raise UserError(f"{self.name} refuses these messages: {cut(error, 300)}") from error
        except Exception as error:  # whatever a template may do wrong
            told = f"{type(error).__name__}: {cut(error, 200)}"
            raise UserError(f"{self.name} cannot write these messages ({told}). Use others, or no template.") from error
        return _spans("".join(pieces), self._mark)

    def after_an_answer(self) -> str:
        """What the template writes behind an answer, such as the token that ends a turn; "" where it cannot be told."""
        probe = f"answer {self._mark}"
        asked = {"role": "user", "content": "question"}
        try:
            text = self.render([asked, {"role": "assistant", "content": probe}], reply=False)
        except UserError:
            return ""
        return text.rpartition(probe)[2] if probe in text else ""


class _Refused(jinja2.TemplateError):
    """What a template says of messages that it does not take."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose operators make nothing large."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(one) for one in (left, right) if isinstance(one, str | list | tuple)]
        numbers = [abs(one) for one in (left, right) if isinstance(one, int)]
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise _Refused("it uses powers, or % with a text, which are not needed here")
        if sizes and numbers:
            _check(sizes[0] * numbers[0])
        else:
            _check(sum(sizes))
        return super().call_binop(context, operator, left, right)


def _check(length: int) -> None:
    CHAT_CHARACTERS.check(length, "A text that a chat template makes")


class _Bounded(NodeTransformer):
    """Texts are laid together (`~`) within bounds."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = [self.visit(one) for one in node.nodes]
        return nodes.Filter(nodes.List(parts), "joined by a template", [], [], None, None, lineno=node.lineno)


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check(sum(map(len, texts)))
    return "".join(texts)


class _Answers(Extension):
    """`{% generation %} ... {% endgeneration %}` around what a model is to learn."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = nodes.Name("mark_of_answers", "load")
        made = nodes.CallBlock(self.call_method("_marked", [mark]), [], [], body)
        made.set_lineno(line)
        return made

    def _marked(self, mark: str, caller: Any) -> str:
        return f"\0{mark}[{caller()}\0{mark}]"


def _spans(text: str, mark: str) -> tuple[str, list[tuple[int, int]]]:
    first, *rest = text.split(f"\0{mark}")
    found, length, begun = [first], len(first), 0
    spans = []
    for piece in rest:
        if piece[0] == "[":
            begun = length
        else:
            spans.append((begun, length))
        found.append(piece[1:])
        length += len(piece) - 1
    return "".join(found), spans


def _token(written: Any) -> str | None:
    """A token in a file of a tokenizer: its text, or an object with it as `content`."""
    text = written.get("content") if isinstance(written, dict) else written
    return text if isinstance(text, str) and text else None


def _json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **more: Any) -> str:
    if isinstance(indent, int) and indent > 16:
        raise _Refused("it indents JSON by more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, allow_nan=False, **more)


def _refuse(message: Any) -> None:
    raise _Refused(str(message))


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
