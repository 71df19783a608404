"""What a FASTA header says besides the name: fields, words, and `key=value`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mambaseq.data.records import Refuse, raised
from mambaseq.errors import ConfigError, DataError, did_you_mean, shown
from mambaseq_dna.files.faults import Faults
from mambaseq_dna.files.parsing import fasta_pieces, usable
from mambaseq_dna.files.tables import Row
from mambaseq_dna.tokenizer import BaseTokenizer

_PLACE = re.compile(r"(field|word):(-?\d+)")
_KEY = re.compile(r"(?:^|[\s;|\[])([\w.-]+)=([^\s;|\]]*)")


class HeaderField:
    """Where in a header a value is: `field:2`, the second of the fields that `|` divides the header into; `word:1`, the
    first word behind the name; or a key, such as `label`, of `label=VALUE`. Negative numbers count from the end.

    Raises ConfigError for the number 0.
    """

    def __init__(self, text: str) -> None:
        self.text, self.key = text, ""
        if not text:
            raise ConfigError("An empty text is no place in a header. Name a key, or field:2, or word:1.")
        found = _PLACE.fullmatch(text)
        if found is None:
            self.key = text
            return
        self.kind, number = found[1], int(found[2])
        if not number:
            raise ConfigError(f"{shown(text)} is no place in a header: fields and words are counted from 1.")
        self.index = number - 1 if number > 0 else number

    def of(self, name: str, description: str, where: str) -> str:
        """The value. Raises DataError, with `where`, for a header that has none."""
        if self.key:
            found = dict(_KEY.findall(f"{name} {description}"))
            if self.key in found:
                return found[self.key]
            hint = did_you_mean(self.key, found) or (
                " If the label is a part of the name, as in >name|label, set data.label to field:2; if it is the first "
                "word behind the name, to word:1."
            )
            raise DataError(f"{where}: the header has no {shown(self.key + '=', 40)}.{hint}")
        parts = f"{name} {description}".strip().split("|") if self.kind == "field" else description.split()
        try:
            return parts[self.index].strip()
        except IndexError:
            raise DataError(
                f"{where}: the header {shown(f'{name} {description}'.strip())} has {len(parts)} {self.kind}(s), so "
                f"that there is no {self.text}. Correct the header, or name another place."
            ) from None


def header_keys(path: Path) -> list[str]:
    """The keys, of `key=value`, in a FASTA file's first header. Raises DataError as `fasta_pieces`."""
    for name, description, _ in fasta_pieces(path, BaseTokenizer("keep").table):
        return [key for key, _ in _KEY.findall(f"{name} {description}")]
    return []


def fasta_rows(path: Path, fields: Sequence[str] = (), refuse: Refuse = raised) -> Iterator[Row]:
    """The records of a FASTA file, in order, with what their headers hold at `fields` (see `HeaderField`).

    refuse: called for a record that cannot be used; the others are read.
    Raises DataError as `fasta_pieces` and `HeaderField.of`; headers are told together (`Faults`).
    """
    places = [HeaderField(field) for field in fields]
    number, name, values = 0, "", ()
    faults, known = Faults(refuse), True
    pieces: list[bytes] = []
    for begins, description, ids in fasta_pieces(path, BaseTokenizer("keep").table, refuse):
        if begins is not None:
            if known and usable(pieces) and not faults.count:
                yield Row(number, name, _joined(pieces), values)
            number, name, pieces = number + 1, begins, []
            record, known = f"record {shown(begins)}", True
            try:
                values = tuple(place.of(begins, description, f"{path}, {record}") for place in places)  # type: ignore[assignment]
            except DataError as error:
                faults.add(record, error)
                known = False
        pieces.append(ids)
    faults.check()
    if known and usable(pieces):
        yield Row(number, name, _joined(pieces), values)


def _joined(pieces: list[bytes]) -> np.ndarray:
    return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), dtype=np.uint8)
