"""The parser of a command's options, for the core's commands and those of domains. Its errors are paragraphs like all
others."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from mambaseq.errors import ConfigError, cut_list


class Arguments(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises ConfigError for what it cannot use, instead of printing and exiting."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like argparse's. Words that are left over are quoted in the error, so that blanks and control characters can
        be seen."""
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            words = cut_list([text if text.isprintable() and text.strip() else repr(text) for text in left])
            raise ConfigError(
                f"{words} on the command line is not used: there is no such option, and all inputs are given. "
                f"`{self.prog} --help` lists the options (unrecognized arguments)."
            )
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.rstrip('.')}. `{self.prog} --help` lists the options.")
