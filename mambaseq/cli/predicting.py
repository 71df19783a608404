"""The work of `mambaseq predict`."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.data.atomic import atomic_file
from mambaseq.data.records import Record
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError

COLUMNS = ("file", "record", "start", "stop")


def predict(
    checkpoint: str | Path,
    inputs: list[Path],
    out: Path,
    *,
    reader: str | None = None,
    window: int = 0,
    batch_size: int = 16,
    device: str | None = None,
) -> int:
    """Write predictions for every record of the inputs; returns the number of rows.

    Raises UserError for a run, file or record that cannot be used; nothing is written then.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(checkpoint, device)
    name = reader or loaded.card.reader
    if name is None:
        raise ConfigError(f"The model at {checkpoint} names no reader; give one with --reader.")
    read = catalog()["readers"].get(name)
    per_token = loaded.model.head.per_token
    columns = ["tokens", "bits_per_token"] if per_token else ["predicted", *loaded.card.class_names]
    rows = 0
    with atomic_file(out, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *columns])
        for path in inputs:
            for record in tqdm(
                read(path, loaded.tokenizer, **loaded.card.reader_options), desc=path.name, unit="record"
            ):
                if per_token:
                    results = _likelihood(loaded, record)
                else:
                    results = _labels(loaded, record, window or loaded.card.length, batch_size, path)
                for start, stop, values in results:
                    writer.writerow([str(path), record.name, start, stop, *values])
                    rows += 1
        if rows == 0:
            raise DataError(
                f"No record of {', '.join(map(str, inputs))} is long enough to predict on; nothing was written."
            )
    return rows


def _tensor(record: Record, device: torch.device) -> torch.Tensor:
    values = record.signal if record.ids is None else record.ids.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _labels(
    loaded: LoadedModel, record: Record, window: int, batch_size: int, path: Path
) -> Iterator[tuple[int, int, list]]:
    """Tiles of `window` tokens; a shorter record, or what is left of a longer one, is a window of its own length."""
    model, names = loaded.model, loaded.card.class_names
    sequence = _tensor(record, next(model.parameters()).device)
    length = len(sequence)
    if length == 0:
        raise DataError(f"{path}: the record {record.name!r} is empty. Remove it.")
    starts = list(range(0, max(length - window, 0) + 1, window))
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        batch = torch.stack([sequence[start : start + window] for start in chosen])
        with torch.no_grad():
            probabilities = model(batch).logits.softmax(-1).cpu()
        for start, row in zip(chosen, probabilities, strict=True):
            yield start, min(start + window, length), [names[int(row.argmax())], *(f"{p:.6f}" for p in row.tolist())]


def _likelihood(loaded: LoadedModel, record: Record, chunk: int = 8192) -> Iterator[tuple[int, int, list]]:
    """The whole record in chunks, the state passed on, so that memory does not grow with it."""
    model = loaded.model
    sequence = _tensor(record, next(model.parameters()).device)
    n = len(sequence) - 1
    if n < 1:
        return
    state, total = None, 0.0
    with torch.no_grad():
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            inputs, targets = sequence[None, start:stop], sequence[None, start + 1 : stop + 1]
            output = model(inputs, targets, state=state, return_state=True)
            state = output.state
            total += float(output.loss) * (stop - start)
    yield 0, n + 1, [n, f"{total / n / math.log(2):.6f}"]
