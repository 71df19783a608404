"""The parser of the options of this domain's commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mambaseq.errors import ConfigError


class Options(argparse.ArgumentParser):
    """Raises ConfigError for what it cannot use, which the command line tells in a paragraph. No option is
    abbreviated."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.rstrip('.')}. `{self.prog} --help` lists the options.")
