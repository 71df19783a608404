"""A sandbox for chat templates: what published ones need, within bounds of memory and work.

Jinja's own sandbox keeps a template from files and from Python's insides. This one keeps it from large work too:

- Only the methods, filters and tests named below are there. None writes a form such as `%300000000d`.
- No text that a template makes is longer than the limit `MAMBASEQ_MAX_CHAT_CHARACTERS`. Lists and objects count with
  all that they hold, and are nested no deeper than 100.
- All that a render does is counted, in bytes: a text that is read or made counts its memory, a written character 8, an
  item of a list that is gone through 128, and a step 512: a pass of a loop, or a call. 64 times the limit above is the
  most: half a million steps, which take a few seconds, or 256 MB of texts.
- Whole numbers have 64 bits.

Not bounded: the time to compile a template, which grows with its text. Its size is bounded where it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import filters, nodes, tests
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from mambaseq.limits import CHAT_CHARACTERS

STEP, HELD, WRITTEN, PASSES = 512, 128, 8, 64
DEPTH = 100
PIECES = 2**18
"""Pieces that a text is split into, and characters of one that is taken apart."""
SHORT = 256
"""Characters of what is stripped off, or of a name."""

_METHODS = (
    "capitalize count endswith find isalnum isalpha isdigit islower isspace isupper join lower lstrip removeprefix "
    "removesuffix replace rsplit rstrip split startswith strip title upper"
)
TEXT_METHODS = frozenset(_METHODS.split())
MAPPING_METHODS = frozenset({"get", "items", "keys", "values"})
_Holding = list | tuple | dict | KeysView | ValuesView | ItemsView


class Refused(jinja2.TemplateError):
    """What a template says of messages that it does not take, or what it may not do."""


class Work:
    """What one render has done, and the marks around its answers."""

    def __init__(self, marks: tuple[str, str]) -> None:
        self.longest = CHAT_CHARACTERS.value
        self.left = PASSES * self.longest
        self.marks, self.answers = marks, 0


_work: ContextVar[Work] = ContextVar("work of a chat template")  # nothing is computed while a template is compiled


@contextmanager
def working(marks: tuple[str, str]) -> Iterator[Work]:
    """For one render: what it does is counted. marks: one character each, before and behind an answer."""
    work = Work(marks)
    token = _work.set(work)
    try:
        yield work
    finally:
        _work.reset(token)


def _spend(amount: int) -> None:
    work = _work.get()
    work.left -= max(amount, 0)
    if work.left < 0:
        raise Refused("it does more work than the text of a conversation needs")


def _check(length: int) -> None:
    if length > _work.get().longest:
        CHAT_CHARACTERS.check(length, "A text that a chat template makes")


def _weigh(value: Any) -> None:
    """Count all that a value holds. Refuses what is large, or nested deep, or cannot stand in a text."""
    _spend(STEP // 8)
    total, read, level = 0, 0, [value]
    for _ in range(DEPTH):
        deeper: list[Any] = []
        _spend(HELD * (len(level) - 1))
        for one in level:
            if isinstance(one, str):
                total += len(one)
                read += one.__sizeof__()
            elif isinstance(one, _Holding):
                total += len(one)
                _check(total + len(deeper))
                deeper.extend(one)
                if isinstance(one, dict):
                    deeper.extend(one.values())
            elif isinstance(one, int):
                if one.bit_length() > 64:
                    raise Refused("it uses whole numbers of more than 64 bits")
            elif one is not None and not isinstance(one, float | range | Undefined):
                raise Refused(f"it uses a {type(one).__name__} as a text or a list would be")
        _check(total)
        if not deeper:
            _spend(read)
            return
        level = deeper
    raise Refused(f"it nests lists more than {DEPTH} deep")


def _weighed(value: Any) -> Any:
    _weigh(value)
    return value


def _compared(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict | int):
        _weigh(value)
    return value


def _taken(count: int) -> int:
    """A charge, as an expression that is true."""
    _spend(count)
    return 1


def _copied(value: Any) -> Any:
    _spend(STEP // 8 + (value.__sizeof__() if isinstance(value, str | list | tuple) else 0))
    return value


def _text(value: Any) -> str:
    _weigh(value)
    made = str(value)
    _check(len(made))
    return made


def _items(value: Any) -> Any:
    """What a filter goes through, counted; a generator as a list."""
    if isinstance(value, GeneratorType):
        made = []
        for one in value:
            made.append(one)
            if len(made) > PIECES:
                raise Refused(f"it makes a list of more than {PIECES:,}")
            _spend(STEP)
        return made
    if isinstance(value, str) and len(value) > PIECES:
        raise Refused(f"it takes a text of more than {PIECES:,} characters apart")
    if isinstance(value, str | range | _Holding):
        _spend(STEP * len(value))
    return value


def _joined(parts: Iterable[Any], between: str = "", get: Callable[[Any], Any] | None = None) -> str:
    texts = [_text(part if get is None else get(part)) for part in _items(parts)]
    _check(sum(map(len, texts)) + len(between) * len(texts))
    return _copied(between.join(texts))


@jinja2.pass_environment
def _join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None and len(str(attribute)) > SHORT:
        raise Refused("it joins by a long attribute")
    get = None if attribute is None else filters.make_attrgetter(environment, attribute)
    return _joined(value, _text(d), get)


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old) if count < 0 else min(count, text.count(old))
    _check(len(text) + found * max(len(new) - len(old), 0))
    _spend(len(text))
    return _copied(text.replace(old, new, count))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    return _replaced(_text(value), _text(old), _text(new), -1 if count is None else count)


def _split(text: str, name: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    most = PIECES if maxsplit < 0 else min(maxsplit, PIECES)
    if name == "rsplit" and len(sep or "") > SHORT:
        raise Refused("it splits a text from its end at a long one")
    made: list[str] = getattr(text, name)(sep, most)
    if len(made) > PIECES:
        raise Refused(f"it splits a text into more than {PIECES:,} pieces")
    return made


def _method(name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A method of a text, within bounds."""
    _spend(text.__sizeof__())
    for one in (*args, *kwargs.values()):
        if not isinstance(one, GeneratorType):
            _weigh(one)
    if name == "replace":
        return _replaced(text, *args, **kwargs)
    if name == "join":
        (parts,) = args
        _weigh(parts := list(_items(parts)))
        _check(sum(map(len, parts)) + len(text) * len(parts))
        return _copied(text.join(parts))
    if name in ("split", "rsplit"):
        return _weighed(_split(text, name, *args, **kwargs))
    if name in ("strip", "lstrip", "rstrip") and args and len(args[0] or "") > SHORT:
        raise Refused("it strips a long list of characters")
    if name == "title":
        _items(text)
    return _compared(getattr(text, name)(*args, **kwargs))


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
    _weigh(value)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, allow_nan=False
    )
    pieces, length = [], 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        _check(length := length + len(piece))
    return _copied("".join(pieces))


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if (width if isinstance(width, int) else len(width)) > 16:
        raise Refused("it indents a text by more than 16")
    return _copied(filters.do_indent(_items(_text(value)), width, first, blank))


def _of_text(made: Callable[..., Any]) -> Callable[..., Any]:
    def one(value: Any, *args: Any, **kwargs: Any) -> Any:
        return _weighed(made(_text(value), *args, **kwargs))

    return one


def _trim(value: Any, chars: str | None = None) -> str:
    if len(chars or "") > SHORT:
        raise Refused("it strips a long list of characters")
    return _text(value).strip(chars)


def _number(value: Any, *args: Any, **kwargs: Any) -> Any:
    return _weighed(filters.do_int(_compared(value), *args, **kwargs))


def _listed(value: Any) -> list[Any]:
    return _weighed(list(_items(value)))


def _through(made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that goes through a list with the name of another filter, of a test or of an attribute."""

    @pass_context
    def one(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        for name in (*args[:1], kwargs.get("attribute", "")):
            if isinstance(name, str) and len(name) > SHORT:
                raise Refused("it maps by a long name")
        return made(context, _items(value), *args, **kwargs)

    return one


def _ordered(made: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_environment
    def one(environment: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        _weigh(value := _items(value))
        for name in kwargs.values():
            _weigh(name)
        return made(environment, value, *args, **kwargs)

    return one


@jinja2.pass_environment
def _sorted(environment: Any, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False) -> Any:
    _weigh(value)
    return filters.do_dictsort(value, case_sensitive, by, reverse)  # type: ignore[arg-type]


def _reversed(value: Any) -> Any:
    return _copied(value[::-1]) if isinstance(value, str) else _listed(value)[::-1]


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
    "safe": _text,
    "sort": _ordered(filters.do_sort),
    "string": _text,
    "title": _of_text(lambda text: filters.do_title(_items(text))),
    "tojson": _json,
    "trim": _trim,
    "unique": _ordered(filters.do_unique),
    "a charge": _taken,
    "a copy": _copied,
    "compared": _compared,
    "joined by a template": _joined,
    "weighed": _weighed,
}


def _weighing(made: Callable[..., Any]) -> Callable[..., Any]:
    def one(value: Any, *args: Any) -> Any:
        for each in (value, *args):
            _compared(each)
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


@pass_context  # with it Jinja writes nothing while it compiles
def _written(context: Any, value: Any) -> str:
    text = _text(value)
    _spend(WRITTEN * len(text))
    return text


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a short list of what may be used, whose work is counted."""

    intercepted_binops = frozenset(["+", "-", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, finalize=_written, extensions=[Answers, loopcontrols], optimized=False
        )
        self.filters = FILTERS.copy()
        self.tests = TESTS.copy()
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name)

    def bounded(self, source: str) -> jinja2.Template:
        """The template of a text. Raises what Jinja raises."""
        tree = _Bounded().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.globals)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in TEXT_METHODS
        if isinstance(obj, dict):
            return attr in MAPPING_METHODS
        return isinstance(obj, Namespace | LoopContext) and not attr.startswith("_")

    def wrap_str_format(self, value: Any) -> None:
        return None  # format is no method that may be used

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        _spend(STEP)
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            for name in ("_loop_vars", "_block_vars"):  # Jinja's own, for what takes a context
                kwargs.pop(name, None)
            return _method(called.__name__, owner, args, kwargs)
        if isinstance(owner, LoopContext):
            for one in args:
                _compared(one)
        made = super().call(context, called, *args, **kwargs)
        return _compared(made) if called is dict else made

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise Refused("it uses powers, or % with a text, which are not needed here")
        sizes = [len(one) for one in (left, right) if isinstance(one, str | list | tuple)]
        numbers = [abs(one) for one in (left, right) if isinstance(one, int)]
        _check(sizes[0] * numbers[0] if sizes and numbers else sum(sizes))
        made = super().call_binop(context, operator, left, right)
        return _compared(made) if isinstance(made, int | tuple) else _copied(made)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Bounded(NodeTransformer):
    """What a template does beside calls and filters is counted too: passes of loops, comparisons, lists, slices and
    the text between its tags. Texts are laid together (`~`) within bounds."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _filtered(
            nodes.List([self.visit(one) for one in node.nodes], lineno=node.lineno), "joined by a template"
        )

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_charge(STEP, node.lineno), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_charge(STEP, node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        length = sum(len(one.data) for one in node.nodes if isinstance(one, nodes.TemplateData))
        return [nodes.ExprStmt(_charge(WRITTEN * length, node.lineno), lineno=node.lineno), node]

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        compared: list[nodes.Compare | nodes.Operand] = [node, *node.ops]
        for one in compared:
            if not (isinstance(one.expr, nodes.Const) and len(str(one.expr.value)) <= SHORT):
                one.expr = _filtered(one.expr, "compared")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "a copy") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "weighed")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "weighed")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "weighed") if node.ctx == "load" else node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape is not needed here", node.lineno)


def _charge(amount: int, line: int) -> nodes.Filter:
    return _filtered(nodes.Const(amount, lineno=line), "a charge")


class Answers(Extension):
    """`{% generation %} ... {% endgeneration %}` around what a model is to learn."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        made = nodes.CallBlock(self.call_method("_marked"), [], [], body)
        made.set_lineno(line)
        return made

    def _marked(self, caller: Any) -> str:
        work = _work.get()
        work.answers += 1
        return caller().join(work.marks)
