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

from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from mambaseq_text.sandbox_filters import FILTERS, MAPPING_METHODS, TESTS, TEXT_METHODS, method
from mambaseq_text.sandbox_work import SHORT, STEP, WRITTEN, Refused, as_text, check, compared, copied, current, spend


@pass_context  # with it Jinja writes nothing while it compiles
def _written(context: Any, value: Any) -> str:
    text = as_text(value)
    spend(WRITTEN * len(text))
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
        spend(STEP)
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            for name in ("_loop_vars", "_block_vars"):  # Jinja's own, for what takes a context
                kwargs.pop(name, None)
            return method(called.__name__, owner, args, kwargs)
        if isinstance(owner, LoopContext):
            for one in args:
                compared(one)
        made = super().call(context, called, *args, **kwargs)
        return compared(made) if called is dict else made

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise Refused("it uses powers, or % with a text, which are not needed here")
        sizes = [len(one) for one in (left, right) if isinstance(one, str | list | tuple)]
        numbers = [abs(one) for one in (left, right) if isinstance(one, int)]
        check(sizes[0] * numbers[0] if sizes and numbers else sum(sizes))
        made = super().call_binop(context, operator, left, right)
        return compared(made) if isinstance(made, int | tuple) else copied(made)


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
        sides: list[nodes.Compare | nodes.Operand] = [node, *node.ops]
        for one in sides:
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
        work = current.get()
        work.answers += 1
        return caller().join(work.marks)
