"""What is continued: the records of files, a text, or the start of a sequence."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mambaseq import limits
from mambaseq.checkpoints import LoadedModel
from mambaseq.conditions import as_written
from mambaseq.data.cache import locate
from mambaseq.data.records import Record, columns_of
from mambaseq.data.refusals import Refused
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError, UserError, cut, cut_list, did_you_mean, shown
from mambaseq.generation.prompts import Row
from mambaseq.runs.conditions import Conditions
from mambaseq.runs.continuing import Prompt, Under
from mambaseq.runs.loading import columns_given, fitting_options, records_of

# What the names of files end with that prompts may be in, of all modalities.
_ENDINGS: tuple[str, ...] = (
    ".txt",
    ".text",
    ".md",
    ".html",
    ".pdf",
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".parquet",
    ".yaml",
)
_ENDINGS += (".gz", ".xz", ".zst", ".bz2", ".zip", ".fa", ".fasta", ".fna", ".2bit", ".wav", ".flac", ".mp3", ".npy")

# Under which key of a row a prompt is, if nothing else is said: the first that there is.
_KEYS = ("text", "prompt")


class NoSuchRecord(ConfigError):
    """A prompt's file has fewer records than the number of the one that is asked for."""


class _Found(NamedTuple):
    """A record of a prompt. file: by which it is read again, as record `number`."""

    record: Record
    file: str
    number: int


def _prompt_records(
    loaded: LoadedModel, reader: str, sources: Sequence[Path], conditions: Conditions, only: int | None
) -> Iterator[_Found]:
    """The records of a prompt's files, from the model's reader; only: that of one number. Raises ConfigError where
    there is none, or an empty one, and DataError at the end for all that cannot be read."""
    read = catalog()["readers"].get(reader)
    options = fitting_options("reader", reader, read, loaded.card.reader_options, own=True)
    if "spool" in inspect.signature(read).parameters:  # long ones are read from a temporary file, piece by piece
        options = {**options, "spool": True}
    refused = Refused("prompts")
    if only is None and "refuse" in inspect.signature(read).parameters:
        options = {**options, "refuse": lambda error: refused(_as_of_prompts(error))}
    count = 0
    for path in sources:
        columns = columns_given(reader, read, conditions.fields(path))
        columns |= _column_of_prompts(read, path, options)
        records = _told_as_prompts(records_of(read, path, loaded.tokenizer, {**options, **columns}))
        for number, record in enumerate(records):
            count += 1
            if only is not None and number != only:
                continue
            if not len(record):
                raise ConfigError(
                    f"The prompt file {path} has an empty record, {shown(record.name, 300)}, and a prompt has at "
                    f"least one {'step' if loaded.tokenizer is None else 'token'}. Remove it."
                )
            if conditions.by_record:
                condition = conditions.of(record, record.source or str(path), path)
                record = dataclasses.replace(record, condition=condition)
            alone = record.source and record.alone is not None
            yield _Found(record, record.source, record.alone or 0) if alone else _Found(record, str(path), number)
            limits.SEQUENCES.check(count, f"The prompt {path}")
            if only is not None:
                return
    refused.check(count)
    if only is not None:
        raise NoSuchRecord(f"{cut_list(map(str, sources), 3)} has {count} record(s), counted from 0.")
    if not count:
        raise ConfigError(
            f"The prompt {cut_list(map(str, sources), 3)} holds no record. Give another one, or the prompt itself."
        )


def _told_as_prompts(records: Iterator[Record]) -> Iterator[Record]:
    """The records, with errors in the words of prompts."""
    try:
        yield from records
    except DataError as error:
        if (told := _as_of_prompts(error)) is error:
            raise
        raise told from error


def _as_of_prompts(error: UserError) -> UserError:
    """An error of a reader, which tells a bad row in the words of training data, whose settings a prompt's file has
    not."""
    if (line := getattr(error, "line", None)) is None:
        return error
    return DataError(
        f"The prompt file {getattr(error, 'file', '')}, line or row {line}, {error.reason}. Correct or remove it, or "
        "name the column with the prompts, of .jsonl: --prompts FILE --prompts-key NAME."
    ).about(error.place, error.reason)


def _column_of_prompts(read: Callable[..., Any], path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The option of a reader of rows by which the texts are in the column `prompt`, where the one that it reads is not
    there. Raises DataError, which names the option of `generate` for another column, where neither is."""
    parameter = inspect.signature(read).parameters.get("field")
    there = columns_of(read, path) if parameter is not None and path.is_file() else ()
    if parameter is None or not there:
        return {}
    field = options.get("field", parameter.default)
    if as_written([field], there)[field] in there:
        return {}
    if _KEYS[1] in there:
        return {"field": _KEYS[1]}
    raise DataError(
        f"{path} has no field {shown(field)}, nor {shown(_KEYS[1])}. It has: {cut_list(map(shown, there), 8)}. Name "
        "the one with the prompts, of .jsonl: --prompts FILE --prompts-key NAME."
    )


def _under(record: Record, conditions: Conditions) -> Sequence[Under]:
    """The conditions of a prompt."""
    return [record.condition] if conditions.by_record else conditions.each or [None]


def signals(
    loaded: LoadedModel, prompt: str | None, sources: Sequence[Path], conditions: Conditions, only: int | None = None
) -> list[Prompt]:
    """`(length, channels)` float32 for every record of a prompt's files. only: that of one number. Raises ConfigError
    for a file that the model's reader does not read as signals with its channels."""
    card, channels = loaded.card, loaded.card.spec["encoder"].get("n_channels")
    if card.reader is None:
        raise ConfigError(f"The model at {loaded.source.parent} names no reader, so no prompt can be read.")
    if not sources:
        raise ConfigError(
            f"There is no file {shown(prompt, 300)} (--prompt), and a signal is read from a file. Check the path."
        )
    found = []
    for record, file, number in _prompt_records(loaded, card.reader, sources, conditions, only):
        signal = record.signal
        if signal is None or signal.ndim != 2 or (channels is not None and signal.shape[1] != channels):
            kind = "ids" if signal is None else f"a signal {signal.shape}"
            raise ConfigError(
                f"The record {shown(record.name, 300)} of {prompt} is {kind}, but the model reads (length, "
                f"{channels}). Give a file with its channels."
            )
        found.append(_prompt(signal.astype(np.float32), record, file, number, conditions))
    return found


def _prompt(values: Row, record: Record, file: str, number: int, conditions: Conditions) -> Prompt:
    under, source = _under(record, conditions), record.source or None
    return Prompt(values, under, name=record.name, number=number, file=file, source=source)


def ids_of(
    loaded: LoadedModel, prompt: str | None, sources: Sequence[Path], conditions: Conditions, only: int | None = None
) -> list[Prompt]:
    """Ids `(length,)` of each prompt: every record of its files, or the text itself. only: the record of one number.

    Raises UserError for a prompt, a file or a record that cannot be used, NoSuchRecord for a number that is not there.
    """
    card = loaded.card
    if sources:
        assert card.reader is not None
        found = []
        for record, file, number in _prompt_records(loaded, card.reader, sources, conditions, only):
            ids = record.ids if record.spooled is None else record.spooled
            assert ids is not None  # from a reader that has a tokenizer
            found.append(_prompt(ids, record, file, number, conditions))
        return found
    if conditions.by_record:
        raise ConfigError(
            "--condition-column is of the records of a file, and --prompt is none. Say on what with --condition."
        )
    if prompt is None:
        return [Prompt(np.asarray(card.start_ids, dtype=np.int64), conditions.each or [None])]
    if not prompt:
        raise ConfigError(
            "--prompt is empty, and a prompt has at least one token. Leave it out to begin without one; a variable of "
            "the shell that is not set is empty."
        )
    assert loaded.tokenizer is not None
    _check_is_no_file(loaded, prompt)
    try:
        ids = loaded.tokenizer.encode(prompt)
    except UserError as error:
        raise ConfigError(
            f"--prompt {shown(prompt)} is not a file, and cannot be used as the prompt itself. {error}"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"There is no file {shown(prompt, 300)} (--prompt), and it is no text that this model's tokenizer reads. "
            "Check the path."
        ) from error
    return [Prompt(ids, conditions.each or [None])]


def ids_of_texts(
    loaded: LoadedModel, texts: Sequence[tuple[str, str]], conditions: Conditions, source: str | None = None
) -> list[Prompt]:
    """Ids of each text; texts: where each is from, and itself. source: the file that they are in.

    Raises ConfigError for none, for one without tokens, and for one that the model's tokenizer does not read."""
    if not texts:
        raise ConfigError("There is no prompt to continue. Give one text at least.")
    if loaded.tokenizer is None:
        raise ConfigError(f"The model at {loaded.source.parent} continues signals, not texts. Give --prompt FILE.")
    if conditions.by_record:
        raise ConfigError(
            "--condition-column is of the records of a file that the model's reader reads. Give it by --prompt."
        )
    limits.SEQUENCES.check(len(texts), "The list of prompts")
    found = []
    for number, (where, text) in enumerate(texts):
        try:
            ids = loaded.tokenizer.encode(text)
        except (UserError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{where}: {shown(text)} cannot be read by this model's tokenizer ({cut(error, 200)}). Correct it."
            ) from error
        if not len(ids):
            raise ConfigError(f"{where} is empty, and a prompt has at least one token. Remove it.")
        found.append(Prompt(ids, conditions.each or [None], name=where, number=number, source=source))
    return found


def texts_of(path: Path, key: str | None) -> list[tuple[str, str]]:
    """The prompts in a file, each with where it stands: a line each, without its end; of .jsonl what an object in each
    line has under the key, or under "text", where that is missing under "prompt". Raises DataError that names the file
    and the line."""
    rows = path.suffix.lower() in (".jsonl", ".ndjson")
    if key is not None and not rows:
        raise ConfigError(f"--prompts-key is of a .jsonl file, and {shown(path)} is none. Leave it out.")
    found, number = [], 0
    try:
        with path.open("rb") as file:
            while line := file.readline(limits.DOCUMENT_BYTES.value + 1):
                number += 1
                where = f"{path}, line {number}"
                limits.DOCUMENT_BYTES.check(len(line), where)
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
                if not rows:
                    found.append((where, text))
                elif text.strip():
                    found.append((where, _under_key(text, _KEYS if key is None else (key,), where)))
                limits.SEQUENCES.check(len(found), f"The file of prompts {path}")
    except OSError as error:
        raise DataError(
            f"The file of prompts {shown(path)} cannot be read: {error.strerror}. Check --prompts."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}, is not UTF-8 at byte {error.start:,}. Convert the file, for example with iconv."
        ) from error
    if not found:
        raise DataError(f"The file of prompts {path} is empty. Write a prompt in each line.")
    return found


def _under_key(line: str, keys: tuple[str, ...], where: str) -> str:
    """The text in a line of jsonl, under the first of the keys that it has."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}, is not JSON ({cut(error, 100)}). Each line must be one whole JSON object."
        ) from error
    key = next((one for one in keys if isinstance(row, dict) and one in row), None)
    if key is None or not isinstance(row[key], str):
        has = f"an object with {cut_list(row, 8)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(
            f"{where}, has no text under {' or '.join(map(shown, keys))}; it is {has}. Name the key with "
            "--prompts-key, or correct it."
        )
    return str(row[key])


def sources_of(loaded: LoadedModel, prompt: str | None) -> list[Path]:
    """What a prompt names, as the inputs of `predict` do: a file, a folder, or the files of a pattern or resource; []
    for what is text, or nothing.

    What the model's tokenizer reads as text is a folder only with a slash, and a pattern only if it is one word with a
    slash or a dot, and files fit it. Raises DataError for a resource that is not there.
    """
    if prompt is None or not prompt.strip() or loaded.card.reader is None:
        return []
    if is_file(prompt):
        return [Path(prompt)]
    text = _is_text(loaded, prompt)
    if _is_folder(prompt) and (not text or ("/" in prompt and prompt.strip("./"))):
        return [Path(prompt)]
    if prompt.startswith(("mambaseq:", "fetched:")) and not text:
        return locate(prompt)
    if text and (re.search(r"\s", prompt) or not (re.search(r"[*?\[]", prompt) and re.search(r"[/.]", prompt))):
        return []
    with contextlib.suppress(DataError):
        return locate(prompt)
    return []


def _check_is_no_file(loaded: LoadedModel, prompt: str) -> None:
    """Raise ConfigError for what seems to be the name of a file that is not there, or that nobody reads: one word with
    an ending of such files, or in a folder that is there, or a name like that of a file there."""
    path, remedy = Path(prompt), "To continue these words themselves, give --prompt-text (in Python a list of texts)."
    if is_file(prompt):  # which would be in `sources`
        raise ConfigError(
            f"The prompt {shown(prompt)} is a file, and the model at {loaded.source.parent} names no reader for it. "
            f"Give --prompts with a file of prompts, one in each line. {remedy}"
        )
    ending, one_word = path.suffix.lower() in _ENDINGS, re.fullmatch(r"[\w./\\~+@:=,%*?\[\]-]+", prompt)
    if not (ending or (one_word and _is_in_a_folder(prompt))) or not _is_text(loaded, prompt):
        return
    near = did_you_mean(path.name, _names_beside(path))
    if one_word or near:
        raise ConfigError(f"There is no file {shown(prompt, 300)} (--prompt).{near} Check the path. {remedy}")


def _is_in_a_folder(word: str) -> bool:
    """Whether a word with separators begins with a folder that is there; "and/or" and "C/C=C/C" seldom do. Homes and
    resources are asked for by name."""
    if "/" not in word and os.sep not in word:
        return False
    return word.startswith(("~", "mambaseq:", "fetched:")) or _is_folder(
        word.replace(os.sep, "/").partition("/")[0] or "/"
    )


def _names_beside(path: Path) -> list[str]:
    """Names in a path's folder, some thousand at most."""
    try:
        return [one.name for one in itertools.islice(path.parent.iterdir(), 2000)]
    except (OSError, ValueError):
        return []


def _is_text(loaded: LoadedModel, prompt: str) -> bool:
    try:
        return loaded.tokenizer is not None and loaded.tokenizer.encode(prompt).ndim == 1
    except (UserError, TypeError, ValueError):
        return False


def _is_folder(prompt: str) -> bool:
    try:
        return Path(prompt).is_dir()
    except OSError:  # too long for a name
        return False


def is_file(prompt: str) -> bool:
    """Whether a prompt is the name of a file that is there."""
    try:
        return Path(prompt).is_file()
    except OSError:  # too long for a file's name
        return False
