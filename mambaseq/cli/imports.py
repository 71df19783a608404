"""`--allow-import`: which packages the names in a configuration or model may be import paths of."""

from __future__ import annotations

import argparse
from typing import Any

from mambaseq.registry import allow_imports


class _Allow(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        allow_imports(values)


def add_allow_import(parser: argparse.ArgumentParser) -> None:
    """Give a command the option. It takes effect while the command line is read; `main` takes it back at the end."""
    parser.add_argument(
        "--allow-import",
        action=_Allow,
        default=argparse.SUPPRESS,
        metavar="PREFIX",
        help="let names in the configuration or model be import paths (package.module:Class) below this package, which "
        "then runs; may be given several times. Without it names are looked up among what is registered, and nothing "
        "else is imported",
    )
