"""`mambaseq fit`: train a model from a configuration, or go on with a run."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from mambaseq.cli.arguments import Arguments
from mambaseq.cli.imports import add_allow_import
from mambaseq.errors import ConfigError
from mambaseq.reporting.runs import RunFolder, rank

if TYPE_CHECKING:
    from mambaseq.cli.config import RunConfig

# settings of a model that are not in its weights' meaning: how it is computed, and what regularizes its training
CHANGEABLE = {"backend", "checkpoint", "chunk_length", "cuda_graph", "dropout", "label_smoothing"}


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq fit",
        description="Train a model. Everything else on the command line is --key value, over the configuration; "
        "`mambaseq fit --config NAME --help` lists the keys.",
        add_help=not any(argument.partition("=")[0] == "--config" for argument in argv),
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a name from `mambaseq list configs`, or a YAML file")
    parser.add_argument("--out", help="folder of the run; runs/NAME when left out")
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with an interrupted run, exactly where its last checkpoint is"
    )
    add_allow_import(parser)
    parser.add_argument(
        "--allow-changed-data", action="store_true", help="with --resume: go on though files of the data changed"
    )
    arguments, overrides = parser.parse_known_args(argv)
    if (arguments.config is None) == (arguments.resume is None):
        raise ConfigError("Give either --config NAME_OR_FILE to begin a run or --resume RUN to go on with one.")
    if arguments.resume is not None:
        if arguments.out is not None:
            raise ConfigError("--resume goes on in the run's own folder; leave --out away.")
        folder = RunFolder(arguments.resume).require()
        allowed = arguments.allow_changed_data
        return fit(str(folder.config), folder, overrides, resume=True, allow_changed_data=allowed)
    if arguments.allow_changed_data:
        raise ConfigError("--allow-changed-data is for --resume; a run that begins takes its data as they are.")
    out = arguments.out or f"runs/{arguments.config.replace('/', '-').removesuffix('.yaml')}"
    return fit(arguments.config, RunFolder(out), overrides)


def fit(
    config: str,
    folder: RunFolder,
    overrides: list[str],
    *,
    resume: bool = False,
    progress: bool = True,
    allow_changed_data: bool = False,
) -> int:
    """Train; returns 0, 1 when the run diverged, or 130 when it was interrupted and can be resumed.

    The run's folder is this process's as long as it trains.
    Raises UserError for anything the user has to mend.
    """
    from mambaseq.cli.config import parse_config

    folder.check_place(begins=not resume)
    settings = parse_config(config, overrides)  # what is refused leaves no folder behind
    with folder.locked():
        return _fit(config, settings, folder, overrides, resume, progress, allow_changed_data)


def _fit(
    config: str,
    settings: RunConfig,
    folder: RunFolder,
    overrides: list[str],
    resume: bool,
    progress: bool,
    allow_changed_data: bool,
) -> int:
    from mambaseq.cli.config import changed_model_settings

    if not resume and folder.last.exists() and rank() == 0:
        raise ConfigError(
            f"{folder.path} already holds a run. Go on with it (`mambaseq fit --resume {folder.path}`), or give "
            f"another --out, or remove it."
        )

    changed = changed_model_settings(config, settings.settings) if resume and overrides else []
    if changed := [key for key in changed if key.rpartition(".")[2] not in CHANGEABLE]:
        raise ConfigError(
            f"The model of a run cannot change, and {', '.join(changed)} would change that of {folder.path}. Leave it "
            f"away, or begin another run: mambaseq fit --config {folder.config} --out ANOTHER --key value."
        )

    from mambaseq.cli.training import train

    with warnings.catch_warnings():
        _quiet()
        return train(settings, folder, resume=resume, progress=progress, allow_changed_data=allow_changed_data)


def _quiet() -> None:
    """Lightning's advice that does not apply here."""
    for message in (
        ".*does not have many workers.*",
        ".*ended before the epoch ended and your dataloader is not resumable.*",  # ours is: see PositionedBatchSampler
        ".*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*treespec, LeafSpec.*",
        ".*isinstance.treespec.*",
        ".*GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", message=message)
