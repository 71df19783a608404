"""`mambaseq validate` and `mambaseq test`: a run's metrics on its validation or test set."""

from __future__ import annotations

import warnings
from typing import Any

from mambaseq.cli.arguments import Arguments
from mambaseq.cli.imports import add_allow_import
from mambaseq.errors import ConfigError
from mambaseq.reporting.runs import RunFolder


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog=f"mambaseq {command}",
        description="Evaluate a run; --key value overrides its configuration (--data.length 4096).",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of the run")
    add_allow_import(parser)
    arguments, overrides = parser.parse_known_args(argv)
    results = evaluate(RunFolder(arguments.checkpoint), command, overrides)
    for name, value in results.items():
        if isinstance(value, float):
            print(f"{name:<24} {value:.4f}")
    return 0


def evaluate(folder: RunFolder, command: str, overrides: list[str], *, progress: bool = True) -> dict[str, Any]:
    """Metrics of the run's exported weights on its "validate" or "test" set; merged into results.json.

    Raises UserError when there is no such set, run or model, or when the overrides ask for another model.
    """
    from mambaseq.cli.config import changed_model_settings, parse_config
    from mambaseq.cli.fit import _quiet

    folder.require()
    settings = parse_config(str(folder.config), overrides)
    if overrides and (changed := changed_model_settings(str(folder.config), settings.settings)):
        raise ConfigError(
            f"{', '.join(changed)} cannot be set here: {command} evaluates the model that was trained. Leave it away, "
            f"or train another model with `mambaseq fit`."
        )
    from mambaseq.cli.testing import evaluate_run

    with warnings.catch_warnings():
        _quiet()
        return evaluate_run(settings, folder, command, progress)
