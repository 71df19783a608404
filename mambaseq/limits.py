"""What a file may ask of this machine, at most. A small file can ask for much: 1 MB of gzip for 1 GB of zeros."""

from __future__ import annotations

import dataclasses
import os

from mambaseq.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit with a name; the environment variable of that name raises it.

    variable: name of the environment variable. default: the limit without it. unit: of what, for messages ("bytes").
    """

    variable: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The limit in force. Raises ConfigError when the variable is no whole number of at least 1."""
        text = os.environ.get(self.variable)
        if text is None:
            return self.default
        if not text.strip().isdecimal() or int(text) < 1:
            raise ConfigError(f"The variable {self.variable} must be a whole number of at least 1, not {text[:40]!r}.")
        return int(text)

    def check(self, amount: float, subject: str) -> None:
        """Raise UserError that names subject, limit and variable when `amount` is over the limit.

        subject: what asks for so much: file and record, or key.
        """
        if amount > (limit := self.value):
            raise UserError(
                f"{subject} asks for {amount:,.0f} {self.unit}; the limit is {limit:,}. If this is meant, set the "
                f"variable {self.variable} to a higher number."
            )


UNPACKED_RATIO = Limit("MAMBASEQ_MAX_UNPACKED_RATIO", 200, "bytes for each byte of the packed file")
"""Applies to what is larger than `UNRATED` bytes once unpacked: genomes and text pack to a third or a tenth."""

UNRATED = 64 * 2**20

YAML_BYTES = Limit("MAMBASEQ_MAX_YAML_BYTES", 4 * 2**20, "bytes of YAML")
YAML_NODES = Limit("MAMBASEQ_MAX_YAML_NODES", 100_000, "values of YAML, aliases counted each time")
PARAMETERS = Limit("MAMBASEQ_MAX_PARAMETERS", 20_000_000_000, "parameters")
LAYERS = Limit("MAMBASEQ_MAX_LAYERS", 2_000, "layers")
