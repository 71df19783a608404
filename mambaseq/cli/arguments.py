"""The parser of a command's options, whose refusals are paragraphs as all others are."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mambaseq.errors import ConfigError


class Arguments(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises ConfigError for what it cannot use, and prints nothing itself."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.rstrip('.')}. `{self.prog} --help` lists the options.")
