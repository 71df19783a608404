"""Plain values from files that others may have written: YAML and JSON, within bounds of size, depth and time.

The result consists of dict (with text keys), list, str, int, float, bool and None, and shares nothing: changing one
place changes no other.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambaseq.errors import UserError, shown
from mambaseq.limits import YAML_BYTES, YAML_NODES, Limit

DEPTH = 100
"""The most mappings and lists inside each other: parsers and printers recurse at each level."""

_DIGITS = 400  # of a number: the time to convert grows with the square of the digits
_SHOWN = 200  # characters of a parser's own message

# those of YAML 1.1 without base 60 (1:30 is text, like dates) and without base 8 (010 would be 8), and with 1e-3
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)",
    "tag:yaml.org,2002:float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|"
    r"[0-9][0-9_]*[eE][-+]?[0-9]+)|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


def read_yaml(path: str | Path, remedy: str = "") -> dict[str, Any]:
    """The mapping in a YAML file.

    remedy: a sentence at the end of every message.
    Raises UserError that names the file, and the line if there is one, for what is not a file, not YAML or not a
    mapping, for a key that is there twice, a value that is not plain, or a limit that is exceeded: `limits.YAML_BYTES`,
    `limits.YAML_NODES` (aliases are counted each time they expand) or `DEPTH`.
    """
    path = Path(path)
    return _mapping(parse_yaml(_text(path, YAML_BYTES, remedy), str(path), remedy), str(path), remedy)


def read_json(path: str | Path, remedy: str = "", limit: Limit = YAML_BYTES) -> dict[str, Any]:
    """The object in a JSON file; see `read_yaml`. NaN and infinite numbers are refused too.

    limit: on the bytes of the file.
    """
    path = Path(path)
    return parse_json(_text(path, limit, remedy), str(path), remedy)


def parse_json(text: str, source: str, remedy: str = "") -> dict[str, Any]:
    """The object in a text of JSON. source: what messages name. remedy: their last words; see `read_json`, whose errors
    these are."""
    _check_json(text, source, remedy)
    try:
        loaded = _unshared(json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_int=_whole))
    except json.JSONDecodeError as error:
        raise _refused(source, error.lineno, f"is not valid JSON: {error.msg}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise _refused(source, None, f"cannot be used: {error}", remedy) from error
    return _mapping(loaded, source, remedy)


def parse_yaml(text: str, source: str, remedy: str = "") -> Any:
    """The value of a YAML text. source: what messages call it. remedy: their last words. The limits and errors are
    those of `read_yaml`."""
    import yaml

    YAML_BYTES.check(len(text.encode("utf-8", "surrogatepass")), source)
    loader = _loader()
    try:
        _check_yaml(text, source, remedy, loader)
        return _unshared(yaml.load(text, loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
        line = None if mark is None else mark.line + 1
        raise _refused(source, line, f"is not valid YAML: {problem}", remedy) from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # wrong text after a handwritten tag can raise any of them
        raise _refused(source, None, f"is not valid YAML: {error}", remedy) from error


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML that `parse_yaml`, like readers of YAML 1.1, reads back as the same values."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    _add_numbers(Dumper)
    return yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def _refused(source: str, line: int | None, problem: str, remedy: str) -> UserError:
    if len(problem) > _SHOWN:
        problem = f"{problem[: _SHOWN - 1]}…"
    place = source if line is None else f"{source}, line {line},"
    return UserError(f"{place} {problem.rstrip('.')}.{f' {remedy}' if remedy else ''}")


def _text(path: Path, limit: Limit, remedy: str) -> str:
    try:
        if not path.is_file():  # reading a pipe would wait
            raise _refused(str(path), None, "is not a file" if path.exists() else "does not exist", remedy)
        limit.check(path.stat().st_size, str(path))
        content = path.read_bytes()
    except OSError as error:
        raise _refused(str(path), None, f"cannot be read: {error.strerror or error}", remedy) from error
    except ValueError as error:  # a name with a NUL
        raise _refused(repr(str(path)), None, f"is not a file name: {error}", remedy) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _refused(str(path), line, "is not text in UTF-8; save it in that encoding", remedy) from error


def _mapping(loaded: Any, source: str, remedy: str) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        found = "nothing" if loaded is None else f"one {type(loaded).__name__}"
        raise _refused(source, None, f"holds {found} instead of names and values", remedy)
    return loaded


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {str(key)[:40]} is not text; write it in quotes")
        return {key: _unshared(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unshared(inner) for inner in value]
    if isinstance(value, str):
        value.encode()  # raises ValueError for surrogate halves, which cannot be written
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"a value is a {type(value).__name__}, not plain text, a number, true, false, null, or a list")


def _loader() -> Any:
    """A loader of plain values only, with `_NUMBERS` for numbers."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    def short(node: Any) -> Any:
        # a handwritten tag brings any text here; in YAML 1.1, colons mean base 60
        if len(str(node.value)) > _DIGITS or ":" in str(node.value):
            problem = f"{shown(str(node.value))} is not a number, or has more than {_DIGITS} digits"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    kept = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in kept]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    _add_numbers(Loader)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: loader.construct_yaml_int(short(node)))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: loader.construct_yaml_float(short(node)))
    return Loader


def _add_numbers(kind: Any) -> None:
    for tag, pattern in _NUMBERS.items():
        kind.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), list("-+.0123456789"))


@dataclasses.dataclass
class _Open:
    """A mapping or list that is still open: its anchor, the values in it so far, their depth, and its keys."""

    anchor: str | None
    mapping: bool
    values: int = 1
    depth: int = 1
    children: int = 0
    keys: set[str] = dataclasses.field(default_factory=set)


def _check_yaml(text: str, source: str, remedy: str, loader: Any) -> None:
    """Check the parser's events before anything is made; this takes no memory and no recursion."""
    import yaml

    known: dict[str, tuple[int, int]] = {}  # the number of values and the depth behind each anchor
    stack: list[_Open] = []
    total = 0
    for event in yaml.parse(text, loader):
        line = 1 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            done = stack.pop()
            values, depth = done.values, done.depth
            anchor = done.anchor
        elif isinstance(event, yaml.NodeEvent):
            values, depth, anchor = 1, 0, event.anchor
            if stack:
                _check_key(event, stack[-1], source, line, remedy)
            if isinstance(event, yaml.AliasEvent):
                if anchor not in known:
                    problem = f"refers to {shown(anchor)}, which is not complete before"
                    raise _refused(source, line, problem, remedy)
                (values, depth), anchor = known[anchor], None
            elif isinstance(event, yaml.CollectionStartEvent):
                known.pop(anchor or "", None)
                stack.append(_Open(anchor, isinstance(event, yaml.MappingStartEvent)))
                if len(stack) > DEPTH:
                    raise _refused(
                        source, line, f"has more than {DEPTH} mappings and lists inside of each other", remedy
                    )
                total += 1
                continue
            total += values
        else:
            continue
        if anchor is not None:
            known[anchor] = (values, depth)
        if stack:
            stack[-1].values += values
            stack[-1].depth = max(stack[-1].depth, depth + 1)
            if len(stack) + depth > DEPTH:
                raise _refused(source, line, f"has more than {DEPTH} mappings and lists inside of each other", remedy)
        YAML_NODES.check(total, f"{source}, line {line},")


def _check_key(event: Any, inside: _Open, source: str, line: int, remedy: str) -> None:
    import yaml

    inside.children += 1
    if not inside.mapping or inside.children % 2 == 0 or not isinstance(event, yaml.ScalarEvent):
        return
    if event.value in inside.keys:
        raise _refused(source, line, f"has the key {shown(event.value)} a second time", remedy)
    inside.keys.add(event.value)


# outside quoted text: opening and closing brackets, and what Python reads as numbers
_JSON = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\Z)|[\[\]{}]|\bNaN\b|-?\bInfinity\b', re.DOTALL)


def _check_json(text: str, source: str, remedy: str) -> None:
    depth = 0
    for found in _JSON.finditer(text):
        token = found[0]
        if token in "]}":
            depth -= 1
        elif token in "[{":
            depth += 1
        problem = f"has more than {DEPTH} objects and lists inside of each other" if depth > DEPTH else ""
        if token in ("NaN", "Infinity", "-Infinity"):
            problem = f"has the number {token}, which JSON does not have"
        if problem:
            raise _refused(source, text.count("\n", 0, found.start()) + 1, problem, remedy)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return made


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text[:_DIGITS])):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"the number {text[:40]}… has more than {_DIGITS} digits")
    return int(text)


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; an empty mapping is a value.

    >>> flatten({"data": {"name": "x", "files": {}}})
    {'data.name': 'x', 'data.files': {}}
    """
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    inner = [flatten(part, f"{key}.{name}" if key else str(name)) for name, part in value.items()]
    return {name: leaf for part in inner for name, leaf in part.items()}
