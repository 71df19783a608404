"""The work of `mambaseq predict`."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mambaseq.atomic import atomic_file
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.cli.devices import choose_device
from mambaseq.cli.loading import condition_ids, fitting_options
from mambaseq.data.cache import locate
from mambaseq.data.records import Record
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError
from mambaseq.heads.regression import RegressionHead

COLUMNS = ("file", "record", "start", "stop")
Row = tuple[int, int, list]  # start, stop, values


def predict(
    checkpoint: str | Path,
    inputs: list[Path],
    out: Path,
    *,
    reader: str | None = None,
    condition: str | None = None,
    window: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
) -> int:
    """Write predictions for every record of the inputs; returns the number of rows.

    condition: name of the one condition that every record is taken under, for conditional models.
    Raises UserError for a run, setting, file or record that cannot be used; nothing is written then.
    """
    for option, value in (("--batch-size", batch_size), ("--window", window)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} must be at least 1, not {value}.")
    for path in inputs:  # before the first is worked on
        files = [path] if path.exists() else locate(path)
        # of a folder only the reader knows which files it takes; an older table in it is none
        inside = path.is_dir() and path.resolve() in out.resolve().parents and out.suffix.lower() != ".csv"
        if out.exists() and (inside or any(file.samefile(out) for file in files)):
            raise ConfigError(f"--out {out} is one of the inputs and would be overwritten. Give another name.")
    place = choose_device(device)
    loaded = load_model(checkpoint, place)
    given = condition_ids(loaded, condition)
    if len(given) > 1:
        raise ConfigError(f"Records are predicted under one condition, not under {condition!r}. Run once for each.")
    chosen = torch.tensor(given, device=place) if given else None
    least = getattr(loaded.model.encoder, "min_length", 1)
    if window is not None and window < least:
        raise ConfigError(
            f"--window must be at least {least} for this model, not {window}: it reads that many at once."
        )
    span = window or loaded.card.length
    rows = 0
    with atomic_file(out, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for path, record in _records(loaded, checkpoint, inputs, reader):
            if loaded.model.head.per_token:
                results = _likelihood(loaded, record, chosen)
            else:
                results = _windows(loaded, record, span or max(len(record), 1), batch_size, chosen, path)
            for start, stop, values in results:
                if rows == 0:
                    writer.writerow([*COLUMNS, *_columns(loaded, len(values))])
                writer.writerow([str(path), record.name, start, stop, *values])
                rows += 1
        if rows == 0:
            raise DataError(
                f"No record of {', '.join(map(str, inputs))} is long enough to predict on; nothing was written."
            )
    return rows


def _records(
    loaded: LoadedModel, checkpoint: str | Path, inputs: list[Path], reader: str | None
) -> Iterator[tuple[Path, Record]]:
    name = reader or loaded.card.reader
    if name is None:
        raise ConfigError(f"The model at {checkpoint} names no reader; give one with --reader.")
    read = catalog()["readers"].get(name)
    own = name == loaded.card.reader
    options = fitting_options("reader", name, read, loaded.card.reader_options, own)
    other = f"The reader {name!r} does not go with this model"
    remedy = f"Use the model's own reader{f' ({loaded.card.reader!r})' if loaded.card.reader else ''}."
    for path in inputs:
        try:
            for record in tqdm(read(path, loaded.tokenizer, **options), desc=path.name, unit="record"):
                if record.ids is None and loaded.tokenizer is not None:
                    raise ConfigError(f"{other}: its record {record.name!r} of {path} is a signal. {remedy}")
                yield path, record
        except (TypeError, ValueError, AttributeError) as error:
            if own:
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(f"{other}: {path} cannot be made into its tokens ({reason}). {remedy}") from error


def _names(loaded: LoadedModel) -> list[str]:
    """The classes; empty for a regression."""
    return [] if isinstance(loaded.model.head, RegressionHead) else loaded.card.class_names


def _columns(loaded: LoadedModel, count: int) -> list[str]:
    if loaded.model.head.per_token:
        return ["tokens", "bits_per_token"]
    if names := _names(loaded):
        return ["predicted", *names]
    return ["value"] if count == 1 else [f"value_{number}" for number in range(1, count + 1)]


def _tensor(record: Record, device: torch.device) -> torch.Tensor:
    values = record.signal if record.ids is None else record.ids.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _windows(
    loaded: LoadedModel, record: Record, window: int, batch_size: int, condition: torch.Tensor | None, path: Path
) -> Iterator[Row]:
    """Tiles of `window` tokens; a shorter record, or what is left of a longer one, is a window of its own length."""
    model, names = loaded.model, _names(loaded)
    sequence = _tensor(record, next(model.parameters()).device)
    length = len(sequence)
    if length == 0:
        raise DataError(f"{path}: the record {record.name!r} is empty. Remove it.")
    full = length // window * window
    batches = [
        range(first, min(first + batch_size * window, full), window) for first in range(0, full, batch_size * window)
    ]
    if full < length:
        batches.append(range(full, length, window))  # alone, so that it needs no padding
    for starts in batches:
        batch = torch.stack([sequence[start : start + window] for start in starts])
        with torch.no_grad():
            output = model(batch, condition=None if condition is None else condition.expand(len(batch))).logits
        for start, row in zip(starts, (output.softmax(-1) if names else output).cpu(), strict=True):
            values = [f"{value:.6f}" if names else f"{value:.6g}" for value in row.tolist()]
            yield start, min(start + window, length), [names[int(row.argmax())], *values] if names else values


def _likelihood(
    loaded: LoadedModel, record: Record, condition: torch.Tensor | None, chunk: int = 8192
) -> Iterator[Row]:
    """The whole record in chunks, the state passed on, so that memory does not grow with it.

    Tokens that `record.scored` leaves out are read and not counted.
    """
    model = loaded.model
    sequence = _tensor(record, next(model.parameters()).device)
    labels = sequence
    if record.scored is not None:
        labels = sequence.masked_fill(
            ~torch.from_numpy(np.asarray(record.scored, dtype=bool)).to(sequence.device), -100
        )
    n = len(sequence) - 1
    if n < 1:
        return
    state, total, count = None, 0.0, 0
    with torch.no_grad():
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            inputs, targets = sequence[None, start:stop], labels[None, start + 1 : stop + 1]
            output = model(inputs, targets, condition=condition, state=state, return_state=True)
            state = output.state
            if (scored := int((targets != -100).sum())) > 0:
                total += float(output.loss) * scored
                count += scored
    yield 0, n + 1, [count, f"{total / count / math.log(2):.6f}" if count else ""]
