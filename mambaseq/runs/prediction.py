"""Prediction: a model applied to files of its own kind."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mambaseq import limits
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.data.cache import locate
from mambaseq.data.records import Record, columns_of, rest_left_out
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError, UserError, shown
from mambaseq.outputs import is_stream, output_target
from mambaseq.runs.answers import CHUNK, NOTHING_SCORED, Answer, Found, NotFinite, Span
from mambaseq.runs.columns import Frame
from mambaseq.runs.conditions import Conditions
from mambaseq.runs.devices import choose_device, memory_told
from mambaseq.runs.embeddings import Embeddings, Pool
from mambaseq.runs.known import Asked
from mambaseq.runs.loading import check_reads_text, columns_given, fitting_options, records_of, regions_given
from mambaseq.runs.meaning import answer_of
from mambaseq.runs.overlaps import Merge, Merger
from mambaseq.runs.strands import BothStrands
from mambaseq.runs.tables import Block, Table, known_ending, named, partial_path, table

_GATHERED = 2**14  # windows; see `Answer.gathered`
_NAMED = 20  # bad records that are named singly
_PADDING = 64  # positions of a batch that may be padding, however few are not
_PADDED = 4  # not padding, for each that is

Bad = Callable[[UserError], None]


class Predictions(NamedTuple):
    """rows: number written. without: how many of them have no prediction, by the note that says why. bad: a message for
    each file and record that was left out (`skip_bad`). table: a `pandas.DataFrame`, if no file was asked for. files:
    those that were written. told: how much is in them, in the words of the format. unit: what it calls rows."""

    rows: int
    without: dict[str, int]
    bad: list[str]
    table: Any = None
    files: list[Path] = []  # noqa: RUF012 - never changed
    told: str = ""
    unit: str = "rows"


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
    condition: Asked | None = None,
    condition_column: str | None = None,
    condition_table: str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    merge: Merge = "mean",
    both_strands: bool = False,
    regions: Sequence[str | Path] = (),
    columns: Sequence[str] = (),
    batch_size: int = 16,
    device: str | None = None,
    dtype: str | None = None,
    skip_bad: bool = False,
) -> Predictions:
    """Write predictions for every record of the inputs.

    out: the file; its ending says the format (`mambaseq.runs.tables`). None returns a table.
    what: "answers" of the head, bits of all "tokens" of a language model, or "embeddings", by pool and layer
        (`mambaseq.runs.embeddings`).
    condition: for conditional models, the one condition of all records (see `mambaseq.runs.conditions`); or
        condition_column and condition_table give each record its own, as the columns of a table of records do if
        nothing is said: see `mambaseq.runs.conditions.Conditions`.
    window: tokens read by themselves; None takes the length of training (whole records for language models, and for
        labels of positions from a causal model).
    stride: from the start of a window to that of the next. The last window of a record is then a complete one, and
        answers for positions are merged where windows overlap. None: windows end to end, the last one shorter.
    merge: of overlapping windows: their "mean", or weighed by how near a position is to its window's "centre"
        (`mambaseq.runs.overlaps`).
    both_strands: the mean of both strands of DNA (`mambaseq.runs.strands`).
    regions: parts of the records, in the words of the reader: `chr1:1,001-2,000` or a BED file for dna/fasta.
    columns: those to write, by name; () for all.
    batch_size: windows read together; of shorter windows, as many as make the same number of tokens;
        on a CPU no more than 2^15 tokens. Those of about one length are padded to one and read together; no answer
        depends on padding (where encoder or backbone would see it, only windows of one length are).
    dtype: of the weights: see `mambaseq.checkpoints.load_model`.
    skip_bad: continue after a file that cannot be read and after a record whose prediction is not finite.

    Raises UserError for a run, setting, file or record that cannot be used. Rows finished before are kept at
    `mambaseq.runs.tables.partial_path(out)`, and an older file at `out` stays.
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
    loaded = load_model(checkpoint, place, dtype)
    own = reader or loaded.card.reader
    there = {} if own is None else {str(file): columns_of(catalog()["readers"].get(own), file) for file in files}
    conditions = Conditions(loaded, condition, condition_column, condition_table, there)
    if len(conditions.each) > 1:
        raise ConfigError(
            f"Records are predicted under one condition, not under {len(conditions.each)} (--condition). Run once for "
            f"each, or name a column that has one a record (--condition-column)."
        )
    if what == "embeddings":
        answer: Answer = Embeddings(loaded, window, pool, layer)
    else:
        answer = answer_of(loaded, window, each_token=what == "tokens")
    if both_strands:
        answer = BothStrands(answer, loaded)
    if stride is not None:
        answer.overlap(_at_least_one("--stride", stride))
    merger = Merger(merge)
    if window is not None and window < answer.least:
        raise ConfigError(
            f"--window must be at least {answer.least} for this model, not {window}: it reads that many at once."
        )
    bad: list[str] = []

    def refuse(error: UserError) -> None:
        """Raise the error of a file or record, or note it."""
        if not skip_bad:
            error.args = (f"{error} --skip-bad leaves out what cannot be used and goes on.",)
            raise error
        bad.append(str(error))

    name = _reader(loaded, checkpoint, reader)
    home, kept = name.partition("/")[0], [columns] if isinstance(columns, str) else columns
    with table(out, home, kept) as (rows, written), torch.no_grad(), memory_told("--batch-size, or --window"):
        records = _records(
            loaded, files, name, conditions, [regions] if isinstance(regions, str | Path) else regions, refuse, skip_bad
        )
        last: Record | None = None
        for file, record, found in _merged(answer, _found(answer, records, batch_size, refuse), merger):
            if record is not last:
                if record.totals and (last is None or record.totals is not last.totals):
                    rows.sequences(file, record.totals)
                rows.sequence(file, record.name, record.start + len(record) if record.total is None else record.total)
                last = record
            if isinstance(found, Span):
                rows.add(file, record.name, record.start + found.start, record.start + found.stop, None, found.note)
                continue
            cells = answer.cells(found.values)
            rows.begin(answer.columns)
            first, stop = record.start + found.start, record.start + found.stop
            note = answer.unknown if found.known is not None else ""
            rows.put(file, record.name, Block(first, stop, found.step, cells, found.known, note, answer.each))
        _check_any(rows, inputs, bad)
    frame = rows.frame() if isinstance(rows, Frame) else None
    return Predictions(rows.rows, dict(rows.notes), bad, frame, written, rows.told(), rows.unit)


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{option} must be at least 1, not {value}.")
    return value


def _files(inputs: list[Path]) -> list[Path]:
    """The files to read. A folder stays as it is: only the reader knows which files it takes. Raises DataError."""
    return [file for path in inputs for file in ([path] if _exists(path) else locate(path))]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or in a folder without permission: `locate` reports it
        return False


def _check_not_overwritten(out: Path, inputs: list[Path], files: list[Path]) -> None:
    target = output_target(out)
    if is_stream(out):
        return
    folders = [path.resolve() for path in inputs if path.is_dir()]
    # an older table in a folder of inputs is not an input
    inside = not known_ending(out) and any(folder in target.resolve().parents for folder in folders)
    for written in (target, partial_path(target)):
        if written.exists() and (inside or any(file.samefile(written) for file in files)):
            raise ConfigError(f"--out {out} is an input and would be overwritten. Give another name.")


def _check_any(rows: Table, inputs: list[Path], bad: list[str]) -> None:
    if rows.predicted:
        return
    named = ", ".join(map(str, inputs[:5])) + (f" and {len(inputs) - 5} more" if len(inputs) > 5 else "")
    why = _reasons(rows.notes)
    why += [f"{len(bad):,} bad, the first: {bad[0]}"] if bad else []
    longer = rows.notes and NOTHING_SCORED not in rows.notes
    remedy = "Give longer records." if longer else "Mend what there is, or give something else."
    raise DataError(
        f"Nothing in {named} can be predicted on, so nothing was written: {'; '.join(why) or 'no record'}. {remedy}"
    )


def _reasons(notes: Mapping[str, int]) -> list[str]:
    """The notes of rows without a prediction, for a message: how many have each, unless all have one."""
    return [note if len(notes) == 1 else f"{note} ({count:,})" for note, count in list(notes.items())[:5]]


def _reader(loaded: LoadedModel, checkpoint: str | Path, reader: str | None) -> str:
    check_reads_text(loaded)
    name = reader or loaded.card.reader
    if name is None:
        raise ConfigError(f"The model at {checkpoint} names no reader; give one with --reader.")
    return name


def _records(
    loaded: LoadedModel,
    files: list[Path],
    name: str,
    conditions: Conditions,
    regions: Sequence[str | Path],
    refuse: Bad,
    goes_on: bool,
) -> Iterator[tuple[str, Record]]:
    """Each record, with its condition, and the file it is in. name: of the reader. goes_on: whether `refuse` returns,
    so that readers that can go on with what comes after."""
    read = catalog()["readers"].get(name)
    own = name == loaded.card.reader
    options = fitting_options("reader", name, read, loaded.card.reader_options, own)
    options = {**options, **regions_given(name, read, regions)}
    options = {key: value for key, value in options.items() if key != "refuse"}
    passes_over = "refuse" in inspect.signature(read).parameters
    if passes_over and goes_on:
        options["refuse"] = refuse
    more = passes_over or len(files) > 1  # which is read without what is bad
    other = f"The reader {shown(name)} does not fit this model"
    remedy = f"Use the model's own reader{f' ({shown(loaded.card.reader)})' if loaded.card.reader else ''}."
    for path in files:
        with tqdm(desc=path.name, unit="record", mininterval=0.5) as bar:
            columns = columns_given(name, read, conditions.fields(path))
            records = records_of(read, path, loaded.tokenizer, {**options, **columns})
            begun = False
            while True:
                try:
                    record = next(records, None)
                    if record is None:
                        break
                    _check_fits(loaded, record, path, other, remedy)
                except ConfigError:
                    raise
                except UserError as error:
                    if not (goes_on or begun or more):
                        raise
                    refuse(rest_left_out(error, path) if goes_on and begun else error)
                    break
                except OSError as error:
                    reason = error.strerror or str(error)
                    refuse(DataError(f"{path} cannot be read: {reason}. Check the file and its permissions."))
                    break
                except (TypeError, ValueError, AttributeError) as error:
                    if own:
                        raise
                    reason = " ".join(str(error).split()).rstrip(".")
                    raise ConfigError(f"{other}: {path} cannot be turned into tokens ({reason}). {remedy}") from error
                begun = True
                bar.update()
                file = record.source or str(path)
                try:
                    record = dataclasses.replace(record, condition=conditions.of(record, file, path))
                except DataError as error:
                    refuse(error)
                    continue
                yield file, record


def _check_fits(loaded: LoadedModel, record: Record, path: Path, other: str, remedy: str) -> None:
    """Raise ConfigError for a record of a kind that the model does not read."""
    encoder = loaded.card.spec["encoder"]
    if record.ids is None:
        if loaded.tokenizer is not None:
            raise ConfigError(f"{other}: its record {shown(record.name, 300)} of {path} is a signal. {remedy}")
        channels = encoder.get("n_channels")
        shape = () if record.signal is None else record.signal.shape
        if channels is not None and shape[1:] != (channels,):
            raise ConfigError(
                f"{other}: its record {shown(record.name, 300)} of {path} is a signal of shape {shape}, but the model "
                f"reads (length, {channels}). {remedy}"
            )
        return
    size = encoder.get("vocab_size") or (loaded.tokenizer.vocab_size if loaded.tokenizer is not None else None)
    if size is not None and len(record) and not 0 <= int(record.ids.min()) <= int(record.ids.max()) < size:
        raise ConfigError(
            f"{other}: its record {shown(record.name, 300)} of {path} has ids from {record.ids.min()} to "
            f"{record.ids.max()}, but the model knows 0 to {size - 1}. {remedy}"
        )


class _Piece(NamedTuple):
    file: str
    record: Record
    span: Span


def _merged(
    answer: Answer, pieces: Iterator[tuple[_Piece, Found | None]], merger: Merger
) -> Iterator[tuple[str, Record, Found | Span]]:
    """What is found, in order, for each position once; or a span without an answer, whose note says why."""
    overlapping = answer.each and answer.stride is not None
    last: _Piece | None = None
    try:
        for piece, found in pieces:
            if overlapping and last is not None and last.span is not piece.span:
                here = piece.span.start if piece.record is last.record else None
                for merged in merger.before(here):
                    yield last.file, last.record, merged
            last = piece
            if found is None:
                yield piece.file, piece.record, piece.span
            elif overlapping:
                merger.add(found, piece.span)
            else:
                yield piece.file, piece.record, found
    except UserError:
        if last is not None:
            for merged in merger.before():
                yield last.file, last.record, merged
        raise
    if last is not None:
        for merged in merger.before():
            yield last.file, last.record, merged


def _found(
    answer: Answer, records: Iterator[tuple[str, Record]], batch_size: int, refuse: Bad
) -> Iterator[tuple[_Piece, Found | None]]:
    """What is found for each window, in the order of the records; None if there is no answer, and the span's note says
    why. When a file cannot be read, gathered windows are finished before the error is raised."""
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


def _finished(
    answer: Answer, gathered: list[_Piece], batch_size: int, refuse: Bad
) -> Iterator[tuple[_Piece, Found | None]]:
    for piece, found in zip(gathered, _batched(answer, gathered, batch_size), strict=True):
        if piece.span.note:
            yield piece, None
            continue
        try:
            if isinstance(found, NotFinite):
                raise found
            for one in answer.parts(piece.record, piece.span) if found is None else (found,):
                yield piece, one
        except NotFinite:
            refuse(_not_finite(answer, piece))
            yield piece._replace(span=piece.span._replace(note="the prediction is not a finite number")), None


def _batched(answer: Answer, gathered: list[_Piece], batch_size: int) -> list[Found | NotFinite | None]:
    """What is found for each piece; None for pieces that are read in parts, or not at all."""
    found: list[Found | NotFinite | None] = [None] * len(gathered)
    spans = {number: piece.span for number, piece in enumerate(gathered)}
    lengths = {n: span.stop - span.start for n, span in spans.items() if not span.note and not answer.long(span)}
    for some in _together(answer, lengths, batch_size):
        answers = answer.answers([(gathered[number].record, gathered[number].span) for number in some])
        for number, one in zip(some, answers, strict=True):
            found[number] = one
    return found


def _together(answer: Answer, lengths: dict[int, int], batch_size: int) -> Iterator[list[int]]:
    """The numbers of spans that are read as a batch, by the lengths of all, the shortest first: those of about one
    length, or of one where they cannot be padded."""
    window = answer.window or CHUNK
    some: list[int] = []
    real = 0
    for number in sorted(lengths, key=lengths.__getitem__):
        length = lengths[number]
        most = max(batch_size, batch_size * window // length) if length < window else batch_size
        most = max(min(most, answer.at_once // length), 1)
        padding = max(_PADDING, real // _PADDED) if answer.pads else 0
        if some and (len(some) >= most or len(some) * length - real > padding):
            yield some
            some, real = [], 0
        some.append(number)
        real += length
    if some:
        yield some


def _not_finite(answer: Answer, piece: _Piece) -> UserError:
    """Why a prediction is not finite. The weights are finite, or they would not have been loaded."""
    signal, span = piece.record.signal, piece.span
    where = f"{piece.file}, record {shown(piece.record.name, 300)}, {span.start:,} to {span.stop:,}"
    if signal is not None and not np.isfinite(signal[span.start : span.stop]).all():
        return DataError(f"{where}: the signal holds values that are not finite numbers. Fill or cut them out.")
    return DataError(
        f"{where}: the prediction is not a finite number, because the model's computation overflows. Look for extreme "
        "values in the record, or leave it out."
    )


def report(found: Predictions, out: Path) -> None:
    """Print what was written and what was not; on standard error if the table itself went to standard output."""
    for message in found.bad[:_NAMED]:
        print(f"mambaseq predict: left out: {message}", file=sys.stderr)
    if len(found.bad) > _NAMED:
        print(f"mambaseq predict: left out: {len(found.bad) - _NAMED:,} more", file=sys.stderr)
    if found.without:
        why = "; ".join(_reasons(found.without))
        number = sum(found.without.values())
        print(
            f"mambaseq predict: {number:,} of {found.rows:,} {found.unit} {'has' if number == 1 else 'have'} no "
            f"prediction: {why}.",
            file=sys.stderr,
        )
    what = "file or record" if len(found.bad) == 1 else "files or records"
    left = f", {len(found.bad):,} {what} left out" if found.bad else ""
    print(f"{found.told} in {named(found.files or [out])}{left}", file=sys.stderr if is_stream(out) else sys.stdout)
