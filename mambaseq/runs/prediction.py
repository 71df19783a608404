"""Prediction: a model applied to files of its own kind."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mambaseq import limits
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.data.cache import locate
from mambaseq.data.records import Record
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError, UserError, shown
from mambaseq.outputs import is_stream, output_target
from mambaseq.runs.answers import CHUNK, Answer, NotFinite, Row, Span, answer_of
from mambaseq.runs.conditions import Conditions
from mambaseq.runs.devices import choose_device, memory_told
from mambaseq.runs.embeddings import Embeddings, Pool
from mambaseq.runs.loading import columns_given, fitting_options, records_of
from mambaseq.runs.tables import ENDINGS, Frame, Table, partial_path, table

_GATHERED = 2**14  # windows; see `Answer.gathered`
_NAMED = 20  # bad records that are named one by one

Bad = Callable[[UserError], None]


class Predictions(NamedTuple):
    """rows: written. without: those of them that have no prediction, by the note that says why. bad: files and records
    that were left out, as messages (`skip_bad`). table: a `pandas.DataFrame`, where no file was asked for."""

    rows: int
    without: dict[str, int]
    bad: list[str]
    table: Any = None


What = Literal["answers", "tokens", "embeddings"]


def predict(
    checkpoint: str | Path,
    inputs: list[Path],
    out: Path | None,
    *,
    what: What = "answers",
    pool: Pool = "mean",
    layer: int | None = None,
    reader: str | None = None,
    condition: str | Sequence[str] | None = None,
    condition_column: str | None = None,
    condition_table: str | Path | None = None,
    window: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    skip_bad: bool = False,
) -> Predictions:
    """Write predictions for every record of the inputs.

    out: the file, of the kind that its ending says (`mambaseq.runs.tables`); None returns a table.
    what: "answers" of the head, bits of all "tokens" of a language model, or "embeddings", by pool and layer
        (`mambaseq.runs.embeddings`).
    condition: name of the one condition that every record is taken under, for conditional models; or of each record
        its own, by condition_column and condition_table: see `mambaseq.runs.conditions.Conditions`.
    window: tokens that are read by themselves; as in training when None (whole records for models of the next token,
        and for labels of positions by a causal model).
    batch_size: windows that are read together; of shorter ones, as many as have the same number of tokens.
    skip_bad: go on behind a file that cannot be read and a record whose prediction is not finite.

    Raises UserError for a run, setting, file or record that cannot be used. What was finished before is kept at
    `mambaseq.runs.tables.partial_path(out)`, and what stood at `out` stays.
    """
    limits.BATCH.check(_at_least_one("--batch-size", batch_size), "--batch-size")
    if window is not None:
        _at_least_one("--window", window)
    files = _files(inputs)
    if out is not None:
        _check_not_overwritten(out, inputs, files)
    if what not in ("answers", "tokens", "embeddings"):
        raise ConfigError(f"What is predicted is answers, tokens or embeddings, not {shown(what)}.")
    if what != "embeddings" and (pool != "mean" or layer is not None):
        raise ConfigError("--pool and --layer are for --what embeddings.")
    place = choose_device(device)
    loaded = load_model(checkpoint, place)
    conditions = Conditions(loaded, condition, condition_column, condition_table)
    if len(conditions.each) > 1:
        raise ConfigError(
            f"Records are predicted under one condition, not under {len(conditions.each)} (--condition). Run once for "
            f"each, or name a column that has one a record (--condition-column)."
        )
    if what == "embeddings":
        answer: Answer = Embeddings(loaded, window, pool, layer)
    else:
        answer = answer_of(loaded, window, each_token=what == "tokens")
    if window is not None and window < answer.least:
        raise ConfigError(
            f"--window must be at least {answer.least} for this model, not {window}: it reads that many at once."
        )
    bad: list[str] = []

    def refuse(error: UserError) -> None:
        """Raise what is wrong with a file or a record, or note it."""
        if not skip_bad:
            raise error
        bad.append(str(error))

    with table(out) as rows, torch.no_grad(), memory_told("--batch-size, or --window"):
        records = _records(loaded, checkpoint, files, reader, conditions, refuse)
        for file, name, row in _rows(answer, records, batch_size, refuse):
            if row.values is not None:
                rows.begin(answer.columns)
            rows.add(file, name, row.start, row.stop, row.values, row.note)
        _check_any(rows, inputs, bad)
    return Predictions(rows.rows, dict(rows.notes), bad, rows.frame() if isinstance(rows, Frame) else None)


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{option} must be at least 1, not {value}.")
    return value


def _files(inputs: list[Path]) -> list[Path]:
    """What there is to read; of a folder only the reader knows which files it takes. Raises DataError."""
    return [file for path in inputs for file in ([path] if _exists(path) else locate(path))]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long, or in a folder that may not be looked into: `locate` says so
        return False


def _check_not_overwritten(out: Path, inputs: list[Path], files: list[Path]) -> None:
    target = output_target(out)
    if is_stream(out):
        return
    folders = [path.resolve() for path in inputs if path.is_dir()]
    # an older table in a folder of inputs is none of them
    inside = out.suffix.lower() not in ENDINGS and any(folder in target.resolve().parents for folder in folders)
    for written in (target, partial_path(target)):
        if written.exists() and (inside or any(file.samefile(written) for file in files)):
            raise ConfigError(f"--out {out} is one of the inputs and would be overwritten. Give another name.")


def _check_any(rows: Table, inputs: list[Path], bad: list[str]) -> None:
    if rows.predicted:
        return
    named = ", ".join(map(str, inputs[:5])) + (f" and {len(inputs) - 5} more" if len(inputs) > 5 else "")
    why = [f"{count:,} {note}" for note, count in list(rows.notes.items())[:5]]
    why += [f"{len(bad):,} bad, the first: {bad[0]}"] if bad else []
    raise DataError(
        f"Nothing in {named} can be predicted on ({'; '.join(why) or 'no record'}); nothing was written. Give longer "
        f"records."
    )


def _records(
    loaded: LoadedModel,
    checkpoint: str | Path,
    files: list[Path],
    reader: str | None,
    conditions: Conditions,
    refuse: Bad,
) -> Iterator[tuple[str, Record]]:
    """Each record, with its condition, and the file it is in."""
    name = reader or loaded.card.reader
    if name is None:
        raise ConfigError(f"The model at {checkpoint} names no reader; give one with --reader.")
    read = catalog()["readers"].get(name)
    own = name == loaded.card.reader
    options = fitting_options("reader", name, read, loaded.card.reader_options, own)
    options = {**options, **columns_given(name, read, conditions.fields)}
    other = f"The reader {shown(name)} does not go with this model"
    remedy = f"Use the model's own reader{f' ({shown(loaded.card.reader)})' if loaded.card.reader else ''}."
    for path in files:
        with tqdm(desc=path.name, unit="record", mininterval=0.5) as bar:
            records = records_of(read, path, loaded.tokenizer, options)
            while True:
                try:
                    record = next(records, None)
                    if record is None:
                        break
                    _check_fits(loaded, record, path, other, remedy)
                except ConfigError:
                    raise
                except UserError as error:
                    refuse(error)
                    break
                except OSError as error:
                    reason = error.strerror or str(error)
                    refuse(DataError(f"{path} cannot be read: {reason}. Check the file and its permissions."))
                    break
                except (TypeError, ValueError, AttributeError) as error:
                    if own:
                        raise
                    reason = " ".join(str(error).split()).rstrip(".")
                    raise ConfigError(f"{other}: {path} cannot be made into its tokens ({reason}). {remedy}") from error
                bar.update()
                file = record.source or str(path)
                try:
                    record = dataclasses.replace(record, condition=conditions.of(record, file))
                except DataError as error:
                    refuse(error)
                    continue
                yield file, record


def _check_fits(loaded: LoadedModel, record: Record, path: Path, other: str, remedy: str) -> None:
    """Raise ConfigError where a record is not of the kind that the model reads."""
    encoder = loaded.card.spec["encoder"]
    if record.ids is None:
        if loaded.tokenizer is not None:
            raise ConfigError(f"{other}: its record {shown(record.name, 300)} of {path} is a signal. {remedy}")
        channels = encoder.get("n_channels")
        shape = () if record.signal is None else record.signal.shape
        if channels is not None and shape[1:] != (channels,):
            raise ConfigError(
                f"{other}: its record {shown(record.name, 300)} of {path} is a signal of shape {shape}, and the model "
                f"reads (length, {channels}). {remedy}"
            )
        return
    size = encoder.get("vocab_size") or (loaded.tokenizer.vocab_size if loaded.tokenizer is not None else None)
    if size is not None and len(record) and not 0 <= int(record.ids.min()) <= int(record.ids.max()) < size:
        raise ConfigError(
            f"{other}: its record {shown(record.name, 300)} of {path} has ids from {record.ids.min()} to "
            f"{record.ids.max()}, and the model knows 0 to {size - 1}. {remedy}"
        )


class _Piece(NamedTuple):
    file: str
    record: Record
    span: Span


def _rows(
    answer: Answer, records: Iterator[tuple[str, Record]], batch_size: int, refuse: Bad
) -> Iterator[tuple[str, str, Row]]:
    """File, record's name and row, in the order of the records. What was gathered when a file cannot be read is
    finished before the error is raised."""
    gathered: list[_Piece] = []
    tokens = 0
    try:
        for file, record in records:
            for span in answer.spans(record):
                gathered.append(_Piece(file, record, span))
                tokens += span.stop - span.start
                if tokens >= answer.gathered or len(gathered) >= _GATHERED:
                    yield from _finished(answer, gathered, batch_size, refuse)
                    gathered, tokens = [], 0
    except UserError:
        yield from _finished(answer, gathered, batch_size, refuse)
        raise
    yield from _finished(answer, gathered, batch_size, refuse)


def _finished(answer: Answer, gathered: list[_Piece], batch_size: int, refuse: Bad) -> Iterator[tuple[str, str, Row]]:
    rows = _batched(answer, gathered, batch_size)
    for piece, found in zip(gathered, rows, strict=True):
        file, record, span = piece
        if span.note:
            yield file, record.name, Row(span.start, span.stop, None, span.note)
            continue
        try:
            if isinstance(found, NotFinite):
                raise found
            for row in answer.parts(record, span) if found is None else found:
                yield file, record.name, row
        except NotFinite:
            refuse(_not_finite(answer, piece))
            yield file, record.name, Row(span.start, span.stop, None, "the prediction is not a finite number")


def _batched(answer: Answer, gathered: list[_Piece], batch_size: int) -> list[list[Row] | NotFinite | None]:
    """The rows of each piece; None for those that are read part by part, or not at all. Spans of one length are read
    together, so that nothing is padded and a record's prediction does not depend on its neighbours."""
    rows: list[list[Row] | NotFinite | None] = [None] * len(gathered)
    by_length: dict[int, list[int]] = {}
    for number, (_, _, span) in enumerate(gathered):
        if not span.note and not answer.long(span):
            by_length.setdefault(span.stop - span.start, []).append(number)
    window = answer.window or CHUNK
    for length, numbers in by_length.items():
        at_once = max(batch_size, batch_size * window // length) if length < window else batch_size
        for first in range(0, len(numbers), at_once):
            some = numbers[first : first + at_once]
            found = answer.rows([(gathered[number].record, gathered[number].span) for number in some])
            for number, one in zip(some, found, strict=True):
                rows[number] = one
    return rows


def _not_finite(answer: Answer, piece: _Piece) -> UserError:
    """Why a prediction is no number. The weights are numbers, or they would not have been loaded."""
    signal, span = piece.record.signal, piece.span
    where = f"{piece.file}, record {shown(piece.record.name, 300)}, {span.start:,} to {span.stop:,}"
    if signal is not None and not np.isfinite(signal[span.start : span.stop]).all():
        return DataError(f"{where}: the signal holds values that are not finite numbers. Fill or cut them out.")
    return DataError(
        f"{where}: the prediction is not a finite number, since what the model computes overflows. Look for values "
        f"out of all proportion in the record, or leave it out."
    )


def report(found: Predictions, out: Path) -> None:
    """Say what was written, and what was not; on standard error where the table itself went to standard output."""
    for message in found.bad[:_NAMED]:
        print(f"mambaseq predict: left out: {message}", file=sys.stderr)
    if len(found.bad) > _NAMED:
        print(f"mambaseq predict: left out: {len(found.bad) - _NAMED:,} more", file=sys.stderr)
    if found.without:
        why = "; ".join(f"{count:,} {note}" for note, count in list(found.without.items())[:5])
        number = sum(found.without.values())
        print(f"mambaseq predict: {number:,} of {found.rows:,} rows have no prediction: {why}.", file=sys.stderr)
    left = f", {len(found.bad):,} files or records left out" if found.bad else ""
    print(f"{found.rows} rows in {out}{left}", file=sys.stderr if is_stream(out) else sys.stdout)
