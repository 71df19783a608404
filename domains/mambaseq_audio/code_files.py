"""Files of codes: `.npy`, read without trusting them, and written."""

from __future__ import annotations

import io
import threading
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mambaseq.data.records import Record, Refuse, raised, with_columns
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, DataError, UserError, did_you_mean, shown
from mambaseq.limits import SAMPLES, check_choice
from mambaseq.outputs import is_stream, numbered, output_file, writes
from mambaseq_audio.codes import MOST_BOOKS, CodeFrames
from mambaseq_audio.recordings import Recording, all_recordings, manifest_columns

SUFFIXES = frozenset((".npy",))

# what NumPy raises for a header that is none
DAMAGED = (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError, OverflowError)

# Python 3.11's parser, by which NumPy reads a header, may fail where threads use it at once
_PARSING = threading.Lock()

Layout = Literal["frames_books", "books_frames"]
"""Which axis of a file's array comes first. EnCodec, DAC and Mimi give `(batch, books, frames)`: save one of a batch as
`books_frames`."""
LAYOUTS: tuple[str, ...] = get_args(Layout)


def code_recordings(*names: str | Path) -> list[Recording]:
    """The files of codes that names stand for; see `mambaseq_audio.recordings.all_recordings`. Raises DataError for a
    manifest with parts of files."""
    found = all_recordings(names, SUFFIXES, "file of codes", ".npy")
    for one in found:
        if one.is_part:
            raise DataError(f"{one}: start and end are seconds of sound, and codes have none. Cut the file instead.")
    return found


def header(one: Recording) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether it is in Fortran's order, type, and the place of the first number of a `.npy` file. Raises
    DataError that names the file."""
    path = one.path
    if not path.is_file():
        raise DataError(f"{one}: there is no such file of codes. Check the path.")
    try:
        with path.open("rb") as file, _PARSING:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read:
                raise ValueError(f"its format is {version[0]}.{version[1]}")
            shape, fortran, dtype = read[version](file)
            start = file.tell()
    except (*DAMAGED, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(
            f"{path} is no .npy file that can be read ({shown(reason, 120)}): it is empty, damaged or of another kind. "
            "Save the codes again with numpy.save, or leave it out."
        ) from error
    return shape, fortran, dtype, start


def read_frames(one: Recording, layout: Layout, books: int | None, codes: int | None) -> np.ndarray:
    """The codes of a file, `(frames, books)`, of the file's type; see `read_codes`. None checks less."""
    shape, fortran, dtype, start = header(one)
    path = one.path
    again = "Save the codes again with numpy.save, or leave it out"
    if dtype.hasobject:
        raise DataError(f"{path} holds pickled Python objects, which could run anything; they are not read. {again}.")
    if dtype.kind not in "iu":
        raise DataError(f"{path} holds {dtype}, but codes are whole numbers. Save them as int64 or uint16.")
    if len(shape) != 2:
        raise DataError(
            f"{path} has the shape {shape}, but two axes are wanted, frames and books. Save one stream a file, without "
            "the axis of the batch, such as codes[0]."
        )
    frames, found = shape if layout == "frames_books" else shape[::-1]
    if not frames or not found:
        raise DataError(f"{path} has the shape {shape}, so it holds no code. {again}.")
    SAMPLES.check(frames * found, str(path))
    size, wanted = path.stat().st_size, start + frames * found * dtype.itemsize
    if size != wanted:
        how = "is cut short" if size < wanted else "has something after its end"
        raise DataError(f"{path} {how}: it has {size:,} bytes, and {wanted:,} by its header. {again}.")
    if found != (books or found) or found > MOST_BOOKS:
        other = LAYOUTS[1 - LAYOUTS.index(layout)]
        count = f"{books:,} are wanted" if books else f"{MOST_BOOKS} are the most"
        turned = f"; with data.layout: {other} it has {frames:,}" if shape[0] != shape[1] else ""
        raise DataError(
            f"{path} has {found:,} book(s), read as {layout}, but {count}{turned}. All files must have as many books "
            "(data.books)."
        )
    order: Literal["C", "F"] = "F" if fortran else "C"
    array = np.array(np.memmap(path, dtype, "r", start, shape, order))
    array = array if layout == "frames_books" else array.T
    bad = np.zeros(0) if codes is None else np.argwhere((array < 0) | (array >= codes))
    if codes is not None and len(bad):
        frame, book = bad[0].tolist()
        raise DataError(
            f"{path} has the code {int(array[frame, book])} in book {book} of frame {frame:,}, but codes are 0 to "
            f"{codes - 1} (data.vocabulary). Correct the number of codes of a book, or leave the file out."
        )
    return np.ascontiguousarray(array)


@with_columns(manifest_columns)
def read_codes(
    path: str | Path,
    tokenizer: Tokenizer | None,
    *,
    layout: Layout = "frames_books",
    fields: Sequence[str] = (),
    refuse: Refuse = raised,
) -> Iterator[Record]:
    """Records of a file of codes, a folder of them, a pattern or a manifest, `(rows, books)` ids each.

    layout: which axis of the arrays comes first. fields: columns of the manifest that records are to have. refuse:
        called for a file that cannot be used.
    Raises DataError that names the file, for one that is missing, no `.npy` file, pickled, cut short or empty, whose
    numbers are not whole, or that has another number of books or codes out of range; UserError for more numbers than
    `limits.SAMPLES`. Raises ConfigError for a tokenizer of something else.
    """
    check_choice("layout", layout, LAYOUTS)
    if not isinstance(tokenizer, CodeFrames):
        raise ConfigError("Codes are read for a model of codes (audio/codes), and this one is of something else.")
    for one in code_recordings(path):
        missing = next((field for field in fields if field not in one.fields), None)
        try:
            if missing is not None:
                raise DataError(
                    f"{one}: there is no column {shown(missing)}.{did_you_mean(missing, one.fields)} Give a manifest "
                    "that has it, or a table for --condition-table."
                )
            ids = tokenizer.encode(read_frames(one, layout, tokenizer.books, tokenizer.codes))
        except ConfigError:
            raise
        except UserError as error:
            refuse(error.about(one))
            continue
        columns = {field: one.fields[field] for field in fields}
        yield Record(one.name, ids=ids, source=str(one.path), alone=0, place=one.place, fields=columns)


def _check_codes(begun: np.ndarray, tokenizer: Tokenizer | None, layout: Layout = "frames_books") -> None:
    """Raise ConfigError for another layout, and for a model of something else than codes."""
    check_choice("layout", layout, LAYOUTS)
    if not isinstance(tokenizer, CodeFrames):
        raise ConfigError("Codes are written for a model of codes (audio/codes), and this one is of something else.")


@writes("Codes are", ".npy", folder=True, takes=_check_codes)
def write_codes(
    path: str | Path, sequences: Sequence[np.ndarray], tokenizer: Tokenizer, *, layout: Layout = "frames_books"
) -> list[Path]:
    """Write sequences of ids as codes, int64 `.npy`, each file completely or not at all. Returns the files written.

    One sequence goes to `path` itself; several to `NAME-000.npy`, `NAME-001.npy`, ... next to it. A path without a
    suffix is a folder that gets `000.npy`, `001.npy`, ...
    Raises ConfigError for another suffix; UserError if the disk is full or the place is not writable.
    """
    path = Path(path)
    _check_codes(np.zeros(0), tokenizer, layout)
    assert isinstance(tokenizer, CodeFrames)
    if path.suffix or (not path.is_dir() and is_stream(path)):
        files = numbered(path, len(sequences))
    else:
        digits = max(3, len(str(len(sequences) - 1)))
        files = [path / f"{number:0{digits}d}.npy" for number in range(len(sequences))]
    for file, ids in zip(files, sequences, strict=True):
        frames = tokenizer.decode(np.asarray(ids))
        with output_file(file) as target:
            array = np.ascontiguousarray(frames if layout == "frames_books" else frames.T)
            whole = io.BytesIO()  # NumPy asks a file for its position, which a pipe has not
            np.lib.format.write_array(whole, array, version=(1, 0), allow_pickle=False)
            target.write(whole.getbuffer())
    return files
