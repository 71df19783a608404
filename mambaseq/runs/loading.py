"""What `predict` and `generate` share: readers and writers that fit the model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mambaseq.checkpoints import LoadedModel
from mambaseq.data.records import Record
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, cut, cut_list, did_you_mean, shown, under_key


def _check_options(kind: str, name: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise ConfigError for options in a model.json that its own reader or writer does not take: unknown ones, or
    values of another type than annotated."""
    parameters = inspect.signature(function, eval_str=True).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key, value in options.items():
        if key not in parameters:
            raise ConfigError(
                f"model.json: {kind}_options.{cut(key)} is not an option of the {kind} "
                f"{shown(name)}.{did_you_mean(str(key), parameters)} Export the model again."
            )
        wanted = parameters[key].annotation
        fits = value in get_args(wanted) if get_origin(wanted) is Literal else True
        if wanted in (str, bool, int, float):
            fits = type(value) is wanted or (wanted is float and type(value) is int)
        if not fits:
            raise ConfigError(
                f"model.json: {kind}_options.{key} of the {kind} {shown(name)} cannot be {shown(value)}; it is "
                f"{getattr(wanted, '__name__', wanted)}. Export the model again."
            )


def check_reads_text(loaded: LoadedModel) -> None:
    """Raise ConfigError for a language model of tokens that has no tokenizer: an imported one that came without."""
    if loaded.tokenizer is None and loaded.card.task == "next_token" and loaded.card.reader is None:
        raise ConfigError(
            f"The model at {loaded.source.parent} has no tokenizer, so it reads and continues no text. Import it again "
            "with --tokenizer FILE (a tokenizer.json), or give ids in Python (mambaseq.generate)."
        )


def fitting_options(
    kind: str, name: str, function: Callable[..., Any], options: dict[str, Any], own: bool
) -> dict[str, Any]:
    """Those of the options saved with a model that go to a reader or writer.

    own: it is the model's own, which takes all of them; another one gets those that it knows.
    Raises ConfigError when it needs more.
    """
    parameters = inspect.signature(function).parameters
    if own:
        _check_options(kind, name, function, options)
    else:
        options = {key: value for key, value in options.items() if key in parameters}
    needed = [
        key
        for key, parameter in list(parameters.items())[3 if kind == "writer" else 2 :]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and key not in options
    ]
    if needed:
        raise ConfigError(
            f"The {kind} {shown(name)} needs {', '.join(needed)}, which {kind}_options in this "
            f"model's model.json do not have. Use its own {kind}."
        )
    return options


def writer_of(loaded: LoadedModel, writer: str | None) -> tuple[str, Any, dict[str, Any]] | None:
    """The name, function and options of a model's writer, or of the named one; None where there is none."""
    card = loaded.card
    if (name := writer or card.writer) is None:
        return None
    write = catalog()["writers"].get(name)
    return name, write, fitting_options("writer", name, write, card.writer_options, own=name == card.writer)


@contextlib.contextmanager
def own_or_told(loaded: LoadedModel, name: str) -> Iterator[None]:
    """Raise ConfigError where a writer that is not the model's own fails on what the model generates."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        if name == loaded.card.writer:
            raise
        raise ConfigError(
            f"The writer {shown(name)} cannot write what this model generates "
            f"({' '.join(str(error).split()).rstrip('.')})."
            f"{f' Use its own writer ({shown(loaded.card.writer)}).' if loaded.card.writer else ''}"
        ) from error


def records_of(
    read: Callable[..., Iterable[Record]], path: Path, tokenizer: Tokenizer | None, options: dict[str, Any]
) -> Iterator[Record]:
    """The reader's records. A reader that is not a generator reads, and may fail, when the first record is asked for.
    If it refuses its options, the error says where they are set."""
    with under_key("reader_options", options, "model.json", ConfigError):
        yield from read(path, tokenizer, **options)


def columns_given(kind: str, read: Callable[..., Any], fields: list[str]) -> dict[str, Any]:
    """The option by which a reader is asked for columns of what it reads. kind: the reader, for the message.

    Raises ConfigError for a reader that has none.
    """
    if not fields:
        return {}
    if "fields" not in inspect.signature(read).parameters:
        raise ConfigError(
            f"The reader {shown(kind)} reads no columns, so that there is no {shown(fields[0])} (--condition-column). "
            f"Give a table that has a row for each record: --condition-table FILE.csv, with a column record or file."
        )
    return {"fields": fields}


def regions_given(kind: str, read: Callable[..., Any], regions: Sequence[str | Path]) -> dict[str, Any]:
    """The option by which a reader is asked for parts of its records. kind: the reader, for the message.

    Raises ConfigError for a reader that has none.
    """
    if not regions:
        return {}
    if "regions" not in inspect.signature(read).parameters:
        others = [
            entry.name
            for entry in catalog()["readers"]
            if entry.name != kind and "regions" in inspect.signature(catalog()["readers"].get(entry.name)).parameters
        ]
        remedy = f" Readers that do (--reader): {cut_list(others)}." if others else ""
        raise ConfigError(f"The reader {shown(kind)} reads whole records only, no regions of them (--region).{remedy}")
    return {"regions": [str(region) for region in regions]}
