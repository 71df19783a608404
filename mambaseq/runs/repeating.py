"""Results made again by the settings that stand beside them."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mambaseq.arguments import DTYPES
from mambaseq.checkpoints import LoadedModel
from mambaseq.conditions import told
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, cut, did_you_mean, shown
from mambaseq.generation.guidance import check_guidance
from mambaseq.generation.sampling import check_settings
from mambaseq.plain import read_json
from mambaseq.runs.continuing import Under
from mambaseq.runs.known import Known

FORMAT = 1
LATER = ("min_p", "repetition_penalty", "presence_penalty")
"""Settings that not every file of settings has."""


class Written(NamedTuple):
    """What the settings beside a result say that is held against the model and the prompt. path: their file."""

    path: Path
    sha256: str
    condition: str | None
    ids: Under
    prompt_tokens: int
    writer_options: dict[str, Any]

    def check_model(self, loaded: LoadedModel) -> None:
        """Raise UserError unless the model is the one that they name, and knows the condition."""
        check_same(loaded.source, self.sha256, self.path)
        known = Known(loaded)
        said = None
        try:
            said = None if self.ids is None else told(known.all, known.checked(self.ids))
        except ConfigError as error:
            raise _wrong(self.path, "condition_ids", self.ids, cut(error)) from error
        if said != self.condition:
            why = f"condition_ids are {shown(said)} in this model"
            raise _wrong(self.path, "condition", self.condition, why)

    def wrong(self, key: str, value: Any, why: str) -> UserError:
        """The error of a value that does not fit."""
        return _wrong(self.path, key, value, why)

    def check_result(self, prompt_tokens: int, writer_options: Mapping[str, Any]) -> None:
        """Raise UserError if prompt and writer are not those that they name."""
        if prompt_tokens != self.prompt_tokens:
            raise _wrong(self.path, "prompt_tokens", self.prompt_tokens, f"the prompt has {prompt_tokens:,} tokens")
        if dict(writer_options) != self.writer_options:
            why = f"the model's writer has {shown(dict(writer_options))}"
            raise _wrong(self.path, "writer_options", self.writer_options, why)


def _wrong(path: Path, key: str, value: Any, why: str) -> UserError:
    return UserError(f"{path}: {key} is {shown(value)}, but {why.rstrip('.')}. Give the .json as it was.")


def repeated(path: Path, checkpoint: str | Path | None) -> dict[str, Any]:
    """The options of `generate_to` by which the result beside this file of settings was made. checkpoint: where the
    model is now.

    Raises UserError for a file that is none, that names the key for a value that no result has, and where the prompt is
    not the one that it names.
    """
    found = read_json(path, "Give the .json beside a result of mambaseq generate.")
    if found.get("format") != FORMAT or not isinstance(found.get("checkpoint"), str):
        raise UserError(f"{path} has no settings of a result that this mambaseq knows. Give the .json beside one.")
    _check_kinds(path, "", found, _KINDS)
    if (prompt := found["prompt"]) is not None:
        _check_kinds(path, "prompt.", prompt, _TEXT if "text" in prompt else _FILE)
    drawn = {name: found[name] for name in ("temperature", "top_k", "top_p", *LATER) if name in found}
    try:
        check_settings(**drawn)
        check_guidance(found["guidance"])
    except ConfigError as error:
        raise UserError(f"{path}: {error} Give the .json as it was.") from error
    if found["writer"] is not None and found["writer"] not in catalog()["writers"]:
        raise _wrong(path, "writer", found["writer"], f"there is no such writer here.{_near_writer(found['writer'])}")
    ids = tuple(found["condition_ids"]) if isinstance(found["condition_ids"], list) else found["condition_ids"]
    options = {
        "checkpoint": Path(checkpoint or found["checkpoint"]),
        "exactly": [ids],
        "first_sample": found["sample"],
        **{key: found[key] for key in ("seed", "guidance", "max_new_tokens", "writer")},
        "dtype": found.get("dtype"),
        **drawn,
    }
    if prompt is not None and "text" in prompt:
        options["prompt"] = prompt["text"]
    elif prompt is not None:
        options |= {"prompt": prompt["file"], "record": prompt["record"]}
        for name, digest in (("file", "sha256"), ("source", "source_sha256")):
            if digest in prompt:  # a folder has none
                check_same(Path(prompt[name]), prompt[digest], path)
    told_of = (found[key] for key in ("sha256", "condition", "prompt_tokens", "writer_options"))
    sha256, condition, tokens, writer_options = told_of
    options["again"] = Written(path, sha256, condition, ids, tokens, writer_options)
    if found["device"] != "cpu" and not torch.cuda.is_available():
        print(
            f"mambaseq: {path} was made on a GPU; a CPU rounds in another way, and may go on differently.",
            file=sys.stderr,
        )
    return options


def _near_writer(name: str) -> str:
    return did_you_mean(name, [entry.name for entry in catalog()["writers"]])


def _whole(least: int, most: int) -> Callable[[Any], str]:
    def wrong(value: Any) -> str:
        whole = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return "" if whole else f"it is a whole number from {least:,} to {most:,}"

    return wrong


def _one_of(known: Sequence[str]) -> Callable[[Any], str]:
    return lambda value: "" if value in known else f"it is {', '.join(known)}"


def _number(value: Any) -> str:
    return "" if isinstance(value, int | float) and not isinstance(value, bool) else "it is a number"


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and "\0" not in value else "it is a text"


def _digest(value: Any) -> str:
    whole = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return "" if whole else "it is a SHA-256, 64 digits from 0 to f"


def _ids(value: Any) -> str:
    several = value if isinstance(value, list) else [value]
    whole = all(isinstance(one, int) and not isinstance(one, bool) and -(2**63) <= one < 2**63 for one in several)
    return "" if whole else "it is a whole number, or a list of them"


def _truth(value: Any) -> str:
    return "" if isinstance(value, bool) else "it is true or false"


def _object(value: Any) -> str:
    return "" if isinstance(value, dict) else "it holds names and values"


def _or_null(wrong: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "" if value is None else (why := wrong(value)) and f"{why}, or null"


_COUNT = _whole(0, 2**63 - 1)
_KINDS: dict[str, Callable[[Any], str]] = {
    "format": _whole(FORMAT, FORMAT),
    "mambaseq": _text,
    "result": _text,
    "checkpoint": _text,
    "weights": _text,
    "sha256": _digest,
    "prompt": _or_null(_object),
    "prompt_tokens": _COUNT,
    "condition": _or_null(_text),
    "condition_ids": _or_null(_ids),
    "sample": _whole(0, 2**31 - 1),
    "seed": _COUNT,
    "temperature": _number,
    "top_k": _COUNT,
    "top_p": _number,
    **dict.fromkeys(LATER, _number),
    "guidance": _number,
    "max_new_tokens": _whole(1, 2**63 - 1),
    "new_tokens": _COUNT,
    "complete": _truth,
    "writer": _or_null(_text),
    "writer_options": _object,
    "device": _text,
    "dtype": _one_of(DTYPES),
    "real_time": _or_null(_number),
}
_TEXT: dict[str, Callable[[Any], str]] = {"text": _text}
_FILE: dict[str, Callable[[Any], str]] = {
    "file": _text,
    "sha256": _digest,
    "record": _COUNT,
    "name": _text,
    "source": _text,
    "source_sha256": _digest,
}
_NOT_ALWAYS = (*LATER, "result", "name", "source", "dtype")


def _check_kinds(path: Path, under: str, found: dict[str, Any], kinds: Mapping[str, Callable[[Any], str]]) -> None:
    """Raise UserError for a key that is unknown or missing, and for a value of another kind. under: before each key."""
    for key, value in found.items():
        if key not in kinds:
            raise UserError(
                f"{path}: {under}{cut(key)} is no setting of a result.{did_you_mean(key, kinds)} Give the .json as it "
                "was."
            )
        if why := kinds[key](value):
            raise _wrong(path, f"{under}{key}", value, why)
    needed = [key for key in kinds if key not in _NOT_ALWAYS and key != "source_sha256"]
    if under and Path(str(found.get("file", "file"))).is_dir():
        needed.remove("sha256")
    needed += ["source_sha256"] if "source" in found else []
    for key in needed:
        if key not in found:
            raise UserError(f"{path}: {under}{key} is missing. Give the .json as it was.")


def check_same(place: Path, digest: str, path: Path) -> None:
    """Raise UserError unless a file has the checksum that the settings in `path` name."""
    if not place.is_file():
        raise UserError(f"{path} names {shown(str(place))}, which is not there. Put it back.")
    with place.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise UserError(f"{place} is another file than {path} names: its SHA-256 differs. Give that one.")


def check_alone(given: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError for settings beside --repeat, whose file has them."""
    if given:
        name = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{name} is among the settings of --repeat {path}. Leave one of them out.")
