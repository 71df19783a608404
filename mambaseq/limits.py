"""Limits on what a file may ask of this machine. A small file can ask for much: 1 MB of gzip may hold 1 GB of zeros."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from mambaseq.errors import ConfigError, UserError, shown


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit with a name; the environment variable of that name raises it.

    variable: name of the environment variable. default: the limit without it. unit: for messages ("bytes").
    """

    variable: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The limit in force. Raises ConfigError if the variable is not a whole number of at least 1."""
        text = os.environ.get(self.variable)
        if text is None:
            return self.default
        if not text.strip().isdecimal() or int(text) < 1:
            raise ConfigError(f"The variable {self.variable} must be a whole number of at least 1, not {shown(text)}.")
        return int(text)

    def check(self, amount: float, subject: str) -> None:
        """Raise UserError that names subject, limit and variable if `amount` is above the limit.

        subject: what asks for it: file and record, or key.
        """
        if amount > (limit := self.value):
            raise UserError(
                f"{subject} asks for {_shown(amount)} {self.unit}; the limit is {limit:,}. If this is intended, set "
                f"the variable {self.variable} to a higher number."
            )


def _shown(amount: float) -> str:
    text = f"{amount:,}" if isinstance(amount, int) else f"{amount:,.0f}"
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


UNPACKED_RATIO = Limit("MAMBASEQ_MAX_UNPACKED_RATIO", 200, "bytes for each byte of the packed file")
"""For files of more than `UNRATED` bytes unpacked. Genomes and text pack to a third or a tenth."""

UNRATED = 64 * 2**20


def check_unpacked(unpacked: int, packed: int, subject: str) -> None:
    """Raise UserError if a file of `packed` bytes that unpacks to `unpacked` bytes looks like a bomb: more than
    `UNRATED`, and more than `UNPACKED_RATIO` times its size. Call it while unpacking too: a file may lie about its
    size.

    subject: file and record.
    """
    if unpacked > UNRATED:
        UNPACKED_RATIO.check(unpacked / max(packed, 1), subject)


def check_setting(key: str, value: float, least: float, most: float) -> None:
    """Raise ConfigError unless `least <= value <= most`; NaN is refused."""
    if not least <= value <= most:
        raise ConfigError(f"{key} must be {least:,} to {most:,}; it is {value}.")


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ConfigError unless the value is a whole number of at least `least` and at most `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        bound = f" and at most {most}" if most is not None else ""
        kind = "" if whole else "a whole number of "
        raise ConfigError(f"{name} must be {kind}at least {least}{bound}, not {shown(value, 40)}.")


def check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Raise ConfigError unless the value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}; it is {shown(value)}.")


SEEDS = (0, 2**63 - 1)
EPOCH = (1, 2**40)
"""For endless sets: the items that make an epoch."""
WINDOW = Limit("MAMBASEQ_MAX_LENGTH", 2**28, "tokens in one sequence")
SAMPLES = Limit("MAMBASEQ_MAX_SAMPLES", 2**32, "samples of sound")
"""In one file, all channels together: 12 hours of stereo at 48 kHz."""
DOCUMENT_BYTES = Limit("MAMBASEQ_MAX_DOCUMENT_BYTES", 2**26, "bytes in one document")

AUDITED = Limit("MAMBASEQ_MAX_AUDITED", 2**26, "tokens of a set that are audited")
"""Of a set whose items are read for it into memory; files of genomes are read where they lie."""
AUDITED_WORDS = Limit("MAMBASEQ_MAX_AUDITED_WORDS", 2**23, "words that an audit compares")
"""All splits together, about 70 bytes of memory each. Of more words a share is compared."""

TABLE_BYTES = Limit("MAMBASEQ_MAX_TABLE_BYTES", 2**28, "bytes of a table")

YAML_BYTES = Limit("MAMBASEQ_MAX_YAML_BYTES", 4 * 2**20, "bytes of YAML")
INDEX_BYTES = Limit("MAMBASEQ_MAX_INDEX_BYTES", 64 * 2**20, "bytes of an index of weights")
YAML_NODES = Limit("MAMBASEQ_MAX_YAML_NODES", 100_000, "values of YAML, aliases counted each time")
PARAMETERS = Limit("MAMBASEQ_MAX_PARAMETERS", 20_000_000_000, "parameters")
TOKEN_IDS = Limit("MAMBASEQ_MAX_TOKEN_IDS", 16_777_216, "token ids")
LAYERS = Limit("MAMBASEQ_MAX_LAYERS", 2_000, "layers")
STATE = Limit("MAMBASEQ_MAX_STATE", 2_048, "states of a channel whose full matrix is computed with")

WORKERS = Limit("MAMBASEQ_MAX_WORKERS", 256, "processes that load data")
DEVICES = Limit("MAMBASEQ_MAX_DEVICES", 256, "devices, each with a process of its own")
TRIALS = Limit("MAMBASEQ_MAX_TRIALS", 10_000, "runs of a sweep")
BATCH = Limit("MAMBASEQ_MAX_BATCH", 65_536, "windows at once")
REQUEST_BYTES = Limit("MAMBASEQ_MAX_REQUEST_BYTES", 4 * 2**20, "bytes of a request to the server")
CHAT_CHARACTERS = Limit("MAMBASEQ_MAX_CHAT_CHARACTERS", 4 * 2**20, "characters")
GENERATED = Limit("MAMBASEQ_MAX_GENERATED", 100_000_000, "generated tokens, all samples together")
SEQUENCES = Limit("MAMBASEQ_MAX_SEQUENCES", 1_000_000, "sequences that are generated")
UNPACKED_BYTES = Limit("MAMBASEQ_MAX_UNPACKED_BYTES", 500 * 10**9, "bytes of unpacked files")
ARCHIVE_MEMBERS = Limit("MAMBASEQ_MAX_ARCHIVE_MEMBERS", 500_000, "files and folders")
DOWNLOADED_BYTES = Limit("MAMBASEQ_MAX_DOWNLOADED_BYTES", 500 * 10**9, "bytes of a file to download")
HUB_FILES = Limit("MAMBASEQ_MAX_HUB_FILES", 1_000, "files of a model to download")
