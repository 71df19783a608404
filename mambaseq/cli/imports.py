"""`--allow-import`: packages that names in a configuration or model may be imported from."""

from __future__ import annotations

import argparse
from typing import Any

from mambaseq.registry import allow_imports


class _Allow(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        allow_imports(values)


def add_allow_import(parser: argparse._ActionsContainer) -> None:
    """Add the option to a command. It takes effect while the command line is read; `main` undoes it at the end."""
    parser.add_argument(
        "--allow-import",
        action=_Allow,
        default=argparse.SUPPRESS,
        metavar="PREFIX",
        help="allow import paths (package.module:Class) from this package as names in the configuration or model; "
        "the package's code then runs. May be given several times. Without it only registered names are allowed",
    )
