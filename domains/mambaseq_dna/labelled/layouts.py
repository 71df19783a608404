"""Which files of which kind hold labelled sequences, and which split a file's or folder's name says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mambaseq.data.cache import locate
from mambaseq.errors import ConfigError, DataError, cut_list, shown
from mambaseq_dna.files.fields import PACKED, ending
from mambaseq_dna.split_intervals import SPLIT_WORDS

Format = Literal["auto", "table", "fasta", "bed", "gff"]

_ENDINGS = {
    "table": (".csv", ".tsv", ".tab", ".txt", ".parquet", ".pq"),
    "fasta": (".fa", ".fasta", ".fna", ".ffn", ".fas", ".frn"),
    "bed": (".bed", ".narrowpeak", ".broadpeak"),
    "gff": (".gff", ".gff3", ".gtf"),
}
_OF_A_CLASS = (".txt", *_ENDINGS["fasta"])
_SPLIT = re.compile(r"(train|training|dev|valid|validation|val|eval|test)(?=$|[._-])", re.IGNORECASE)


class Part(NamedTuple):
    """A file, or a folder of files, with labelled sequences.

    kind: `table`, `fasta`, `bed`, `gff`, or `folder`: a folder whose files are of one class. split: the split that it
        belongs to, if that is said. label: the class of a folder.
    """

    path: Path
    kind: str
    split: str | None = None
    label: str = ""


def kind_of(path: Path, layout: Format = "auto", remedy: str = "Set data.format, or rename it.") -> str:
    """The kind of a file, by its ending if `layout` does not say it. Raises DataError for an unknown ending; remedy:
    what it advises."""
    if layout != "auto":
        return layout
    for kind, endings in _ENDINGS.items():
        if ending(path) in endings:
            return kind
    known = ", ".join(one for endings in _ENDINGS.values() for one in endings)
    raise DataError(
        f"{shown(path, 300)}: its ending does not say what it is. Known are {known}, also packed "
        f"({', '.join(PACKED)}). {remedy}"
    )


def parts_of(
    names: str | Sequence[str],
    layout: Format = "auto",
    split: str | None = None,
    remedy: str = "Name the files, or set data.format.",
) -> list[Part]:
    """The parts that names of files, patterns and folders stand for, in order.

    A folder holds files or folders whose names begin with a split's (`train.csv`, `dev.csv`, `test.csv`; `train/`,
    `test/`), or a folder for each class, or files. split: what all of them are, if the setting says it. remedy: for a
    folder with nothing to read.
    Raises DataError for a name without files, and for a folder with nothing to read.
    """
    found: list[Part] = []
    for name in [names] if isinstance(names, str) else names:
        folder = _folder(name)
        if folder is not None:
            inside = list(_inside(folder, layout, split))
            if not inside:
                raise DataError(
                    f"{shown(folder, 300)} is a folder without labelled sequences: it has neither files of known "
                    f"endings, nor folders for classes. {remedy}"
                )
            found += inside
        else:
            found += [Part(path, kind_of(path, layout), split) for path in locate(name)]
    if not found:
        raise ConfigError("data.files names nothing. Give a file, a pattern, a folder, or a list of them.")
    return list(dict.fromkeys(found))


def _folder(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, or of a user that does not exist: `locate` says it
        return None


def _inside(folder: Path, layout: Format, split: str | None) -> Iterator[Part]:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    by_split = [(path, found) for path in entries if (found := _SPLIT.match(path.name))]
    for path, found in by_split:
        own = split or SPLIT_WORDS[found.group(1).lower()]
        if path.is_dir():
            yield from _inside(path, layout, own)
        elif _is_known(path, layout):
            yield Part(path, kind_of(path, layout), own)
    if by_split:
        return
    folders = [path for path in entries if path.is_dir()]
    for path in folders:
        if not class_files(path):
            raise DataError(
                f"{shown(path, 300)} is taken for the folder of a class, but holds no file with one of the endings "
                f"{cut_list(_OF_A_CLASS)}. Remove it, or name the files in data.files."
            )
        yield Part(path, "folder", split, path.name)
    if not folders:
        yield from (Part(path, kind_of(path, layout), split) for path in entries if _is_known(path, layout))


def _is_known(path: Path, layout: Format) -> bool:
    if layout != "auto":
        return True
    return any(ending(path) in endings for endings in _ENDINGS.values()) and "readme" not in path.name.lower()


def class_files(folder: Path) -> list[Path]:
    """The files of the folder of a class, sorted: text with a sequence, or FASTA."""
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and ending(path) in _OF_A_CLASS and path.is_file()
    )
