"""Seeded mutations: of bytes, of lines, of trees of plain values (YAML, JSON), and of what stands at a path."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

CANARY = "fuzz_canary"
SECRET = "fuzz-secret"

_WHOLE = (0, 1, -1, 2, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 1, 2**63, 2**64)
_NAMES = (
    "mamba",
    "attention",
    "mlp",
    "unet",
    "bidirectional",
    "reverse_complement",
    "lm",
    "classification",
    "regression",
    "tokens",
    "signal",
    "rc_tokens",
    "dna/kmer",
    "dna/base",
    "dna/fasta",
    "text/text",
    "text/bytes",
    "text/hf",
    "audio/audio",
    "audio/wav",
    "audio/mulaw",
    "audio/clips",
    "ecg/csv",
    "dna/genome",
    "dna/species",
    "text/corpus",
    "text/documents",
    "synthetic/selective_copying",
    "accuracy",
    "bits_per_token",
)
_IMPORTS = (
    "os:system",
    "subprocess:Popen",
    "timeit:timeit",
    f"{CANARY}:run",
    f"{CANARY}.run",
    "os.system",
    "builtins:eval",
    "pickle:loads",
    "torch:load",
    f"{CANARY}:",
    ":run",
    f"lightning.pytorch.callbacks:{CANARY}",
)
_TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "..",
    "../../x",
    "/",
    "/etc/passwd",
    "/dev/zero",
    ".",
    "~",
    "*",
    "[",
    "\n",
    "\r\n",
    "\t",
    "é",
    "\u202e\u0301",
    "\ud7ff",
    "\U0001f9ec",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e-999",
    "null",
    "true",
    "=1+1",
    "@x",
    "\x1b[31mred",
    "%s%n",
    "{0}",
    "$HOME",
    "x" * 300,
    "x" * 100_000,
    f"https://me:{SECRET}@localhost:1/x",
    "file:///etc/passwd",
    "fetched:../x/y",
    "mambaseq:../x",
    "mambaseq:data/none",
    "os:x",
)


def span(rng: random.Random, size: int, most: int = 64) -> tuple[int, int]:
    """Begin and end of a stretch of a sequence; early places more often than late ones, since headers are there."""
    start = rng.randrange(size + 1) if rng.random() < 0.6 else rng.randrange(min(size, 96) + 1)
    return start, min(size, start + rng.randint(1, most))


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """Other bytes: one to four of flipped bits, deletions, insertions, copies, cuts, and numbers that lie."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start, stop = span(rng, len(out))
        kind = rng.randrange(11)
        if kind <= 2 and out:
            out[min(start, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del out[start:stop]
        elif kind == 4:
            out[start:start] = rng.randbytes(rng.randint(1, 32))
        elif kind == 5:
            out[start:start] = out[start:stop] * rng.choice((1, 2, 50))
        elif kind == 6:
            del out[start:]
        elif kind == 7:
            width, order = rng.choice((("H", 2), ("I", 4), ("Q", 8))), rng.choice("<>")
            number = rng.choice(_WHOLE) % 2 ** (8 * width[1])
            out[start : start + width[1]] = struct.pack(order + width[0], number)
        elif kind == 8:
            out[start:stop] = bytes(stop - start)
        elif kind == 9:
            other = span(rng, len(out))
            out[start:stop] = out[slice(*other)]
        else:
            out += rng.choice((b"\n", b"\0" * 100, b"\xff", bytes(out[:200])))
    return bytes(out)


def of_lines(rng: random.Random, text: str) -> str:
    """Another text: lines left out, doubled, swapped, joined, with what does not belong there; other line ends."""
    lines = text.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines)) if lines else 0
        other = rng.randrange(len(lines)) if lines else 0
        kind = rng.randrange(9)
        if kind == 0:
            del lines[at : at + rng.choice((1, 1, 5, 10_000))]
        elif kind == 1:
            lines[at:at] = lines[at : at + 3]
        elif kind == 2 and lines:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3 and lines:
            lines[at] = lines[at].rstrip("\n")
        elif kind == 4:
            lines.insert(at, rng.choice(_TEXTS) + rng.choice(("\n", "", "\r", "\x85", "\u2028")))
        elif kind == 5 and lines:
            place = rng.randrange(len(lines[at]) + 1)
            lines[at] = (
                lines[at][:place]
                + rng.choice((*_TEXTS, ">", ";", ",", '"', "@", "-", "*", "N", "\ufeff"))
                + lines[at][place:]
            )
        elif kind == 6:
            end = rng.choice(("\r\n", "\r", "\n\n", "\n \n", "\v"))
            lines = [line.rstrip("\n") + end for line in lines]
        elif kind == 7 and lines:
            lines[at] = lines[at].swapcase() if rng.random() < 0.5 else lines[at][::-1]
        elif lines:
            words = lines[at].split(",")
            words[rng.randrange(len(words))] = str(number(rng))
            lines[at] = ",".join(words)
    return "".join(lines)


def encoded(rng: random.Random, text: str) -> bytes:
    """A text as bytes, sometimes not in UTF-8."""
    coding = rng.choice(("utf-8",) * 8 + ("utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-32-be"))
    return text.encode(coding, "surrogatepass" if coding.startswith("utf") else "replace")


def number(rng: random.Random) -> float | int:
    if rng.random() < 0.6:
        return rng.choice(_WHOLE)
    return rng.choice((float("nan"), float("inf"), float("-inf"), 1e300, 1e-320, -0.5, 0.5, 1.5, 1e30, -0.0))


def value(rng: random.Random, old: Any, canary: str) -> Any:
    """Another value for a key: of another type, an extreme number, a name or path that should not be used."""
    kind = rng.randrange(14)
    if kind <= 2:
        return number(rng)
    if kind == 3:
        return rng.choice((None, True, False, [], {}, [None], [[]], {"": None}, {"a": {"b": []}}))
    if kind == 4:
        return rng.choice(_TEXTS)
    if kind == 5:
        return rng.choice(_IMPORTS)
    if kind == 6:
        return rng.choice(_NAMES)
    if kind == 7:
        return {"class_path": rng.choice(_IMPORTS).replace(":", "."), "init_args": {"x": f"touch {canary}"}}
    if kind == 8:
        return {"name": rng.choice(_IMPORTS), "command": f"touch {canary}", "args": [f"touch {canary}"]}
    if kind == 9:
        return [old] if rng.random() < 0.5 else {"a": old}
    if kind == 10:
        return str(old) if rng.random() < 0.5 else f"touch {canary}"
    if kind == 11 and isinstance(old, int | float) and not isinstance(old, bool):
        return rng.choice((-old, old + 1, old * 1000, old / 3, float(old), -old - 1, str(old)))
    if kind == 12 and isinstance(old, list):
        return rng.choice((old + old, old[::-1], old[1:], [*old, None], old * 200))
    if kind == 13:
        deep: Any = old
        for _ in range(rng.choice((3, 60, 400))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return number(rng)


def _places(tree: Any, path: tuple = ()) -> list[tuple]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, inner in list(children)[:60]:
        found += [(*path, key), *_places(inner, (*path, key))]
    return found


def of_tree(
    rng: random.Random, tree: Any, canary: str, only: Callable[[tuple], bool] | None = None
) -> tuple[Any, set[str]]:
    """Another tree of plain values, and the keys that were touched. only: which places may be."""
    tree = copy.deepcopy(tree)
    touched: set[str] = set()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [place for place in _places(tree) if only is None or only(place)]
        if not places:
            break
        *way, key = rng.choice(places)
        holder = tree
        for step in way:
            holder = holder[step]
        touched |= {str(step) for step in (*way, key) if not isinstance(step, int)}
        kind = rng.randrange(10)
        if kind <= 5 or isinstance(holder, list):
            holder[key] = value(rng, holder[key], canary)
            touched |= set(map(str, holder[key])) if isinstance(holder[key], dict) else set()
        elif kind == 6:
            del holder[key]
        elif kind == 7:
            new = rng.choice((f"{key}s", str(key)[:-1], str(key).upper(), rng.choice(_TEXTS), 5, None, True))
            holder[new] = holder.pop(key)
            touched.add(str(new))
        elif kind == 8:
            new = rng.choice(("extra", "class_path", "name", "__class__", *_TEXTS))
            holder[new] = value(rng, None, canary)
            touched.add(new)
        else:
            *other_way, other = rng.choice(places)
            source = tree
            try:
                for step in other_way:
                    source = source[step]
                holder[key] = copy.deepcopy(source[other])
            except (KeyError, IndexError, TypeError):
                pass
    return tree, touched


def dotted(tree: Any) -> set[str]:
    """The keys of a tree of settings that are no section, as they are named: `data.length`."""
    places = [place for place in _places(tree) if all(isinstance(step, str) for step in place)]
    return {".".join(place) for place in places if len(place) > 1}


def yaml_text(rng: random.Random, tree: Any, canary: str) -> tuple[bytes, set[str]]:
    """A YAML file of a mutated tree, or one that is strange as YAML."""
    if rng.random() < 0.75:
        tree, touched = of_tree(rng, tree, canary)
        try:
            return yaml.safe_dump(tree).encode("utf-8", "surrogatepass"), touched
        except (yaml.YAMLError, RecursionError):
            return json.dumps(tree, default=str).encode(), touched
    text = yaml.safe_dump(tree)
    keys = list(tree) if isinstance(tree, dict) else []
    strange = (
        lambda: f"self: &x [*x]\n{text}",
        lambda: f"me: &x {{me: *x}}\n{text}",
        lambda: (
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
            + text
        ),
        lambda: f"{text}\nx: !!python/object/apply:os.system ['touch {canary}']\n",
        lambda: f"{text}\nx: !!python/name:{CANARY}.run\n",
        lambda: f"{text}\nx: " + "[" * rng.choice((50, 5000, 100_000)),
        lambda: f"{text}\nx: " + "{a: " * rng.choice((50, 5000)),
        lambda: f"{text}---\n{text}",
        lambda: f"{text}\n{text}",
        lambda: text.replace(": ", ":\t", 3),
        lambda: f"<<: {{seed: 3}}\n{text}",
        lambda: text.replace("\n", "\r", 2),
        lambda: f"%YAML 9.9\n---\n{text}",
        lambda: "",
        lambda: "- a\n- b\n",
        lambda: "5\n",
        lambda: f"? [a, b]\n: c\n{text}",
        lambda: "\ufeff" + text,
        lambda: f"x: 2001-13-45\ny: 0x{'f' * 5000}\n{text}",
        lambda: f"x: {'9' * 5000}\n{text}",
    )
    if rng.random() < 0.5:
        return rng.choice(strange)().encode(), {"x", "self", "me", *keys}
    return (of_bytes(rng, text.encode()) if rng.random() < 0.5 else encoded(rng, of_lines(rng, text))), set(keys)


def json_text(rng: random.Random, tree: Any, canary: str) -> tuple[bytes, set[str]]:
    """A JSON file of a mutated tree, or one that is strange as JSON."""
    if rng.random() < 0.75:
        tree, touched = of_tree(rng, tree, canary)
        return json.dumps(tree, default=str).encode("utf-8", "surrogatepass"), touched
    text = json.dumps(tree)
    strange = (
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "null",
        "5",
        '"x"',
        "",
        text + text,
        text[: rng.randrange(len(text) + 1)],
        text.replace("1", "1e999"),
        text.replace("0", "NaN"),
        text.replace("1", "9" * 5000),
        "\ufeff" + text,
        text.replace('"', "'"),
        '{"a": 1, "a": 2}',
        text.replace(": ", ": \\u0000"),
        text.replace("{", '{"\\ud800": 1, ', 1),
    )
    if rng.random() < 0.5:
        return rng.choice(strange).encode(), set(tree) if isinstance(tree, dict) else set()
    return (of_bytes(rng, text.encode()) if rng.random() < 0.5 else encoded(rng, of_lines(rng, text))), set()


def of_path(rng: random.Random, path: Path, elsewhere: Path) -> None:
    """Something else at a path than a good file. elsewhere: a file outside of the case's folder."""
    kind = rng.randrange(9)
    if kind == 0:
        path.write_bytes(b"")
    elif kind == 1:
        path.unlink()
    elif kind == 2:
        path.unlink()
        path.mkdir()
    elif kind == 3:
        path.unlink()
        path.symlink_to(path.name)
    elif kind == 4:
        path.unlink()
        path.symlink_to(path.parent / "nothing")
    elif kind == 5:
        path.unlink()
        path.symlink_to(elsewhere)
    elif kind == 6:
        path.chmod(rng.choice((0, 0o222, 0o444)))
    elif kind == 7:
        shutil.move(path, path.with_name("aside"))
        path.symlink_to("aside")
    else:
        moved = path.with_name("aside")
        shutil.move(path, moved)
        os.link(moved, path)
