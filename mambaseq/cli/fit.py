"""`mambaseq fit`: train a model from a configuration, or resume a run."""

from __future__ import annotations

import itertools
import os
import sys

from mambaseq.arguments import Arguments
from mambaseq.cli.ahead import count_others, started, taken_by_lightning
from mambaseq.cli.arguments import asks_for_help, check_overrides, print_keys, refuse_words
from mambaseq.cli.imports import add_allow_import
from mambaseq.errors import ConfigError, cut_list, shown, under_key
from mambaseq.importing import uncollected
from mambaseq.reporting.runs import RunFolder, default_folder, rank
from mambaseq.resources import located, model_folder
from mambaseq.runs.naming import check_files, resolve_config
from mambaseq.runs.settings import read_settings
from mambaseq.stopping import told_of_sigterm
from mambaseq.waiting import Phases, process_began


def check_init_from(source: str) -> None:
    """Raise UserError for a folder with neither a model of ours nor a published one."""
    if not os.path.isfile(located(source) / "config.json"):  # noqa: PTH113 - Path's raises for some names
        with under_key("finetune.init_from", {}):
            model_folder(source)


def run(argv: list[str], command: str) -> int:
    with told_of_sigterm(lambda: "mambaseq fit: ended by SIGTERM before the run began." if rank() == 0 else ""):
        return _run(argv)


def _run(argv: list[str]) -> int:
    phases = Phases(process_began())
    parser = Arguments(
        prog="mambaseq fit",
        description="Train a model. Further options, --key value, override the configuration; `mambaseq fit --config "
        "NAME --help` lists the keys.",
        add_help=not any(argument.partition("=")[0] in ("--config", "--resume") for argument in argv),
    )
    parser.add_argument("--config", help="a name from `mambaseq list configs`, or a YAML file")
    parser.add_argument("--out", help="folder of the run; runs/NAME when left out")
    parser.add_argument("--resume", metavar="RUN", help="continue a run exactly from its last checkpoint")
    parser.add_argument(
        "--init-from",
        metavar="RUN",
        help="start with the weights of another run, of an exported model, or of a published Mamba (the folder with "
        "its config.json and weights); they are matched by name",
    )
    add_allow_import(parser)
    parser.add_argument(
        "--allow-changed-data", action="store_true", help="with --resume: continue although files of the data changed"
    )
    arguments, overrides = parser.parse_known_args(argv)
    refuse_words(argv, overrides, "--config", parser.prog)
    _refuse_several(argv)
    if asks_for_help(overrides):
        return print_keys(parser, arguments.config or str(RunFolder(arguments.resume).require().config), overrides)
    if (arguments.config is None) == (arguments.resume is None):
        check_overrides(parser, overrides, "--config NAME", None)
        raise ConfigError("Give either --config NAME_OR_FILE to start a run or --resume RUN to continue one.")
    if arguments.resume is not None:
        if arguments.out is not None:
            raise ConfigError("--resume continues in the run's own folder; do not give --out.")
        if arguments.init_from is not None:
            raise ConfigError("--init-from is for a new run; a resumed one has its own weights.")
        folder = RunFolder(arguments.resume).require()
        config = str(folder.config)
    else:
        if arguments.allow_changed_data:
            raise ConfigError("--allow-changed-data is for --resume; a new run takes its data as they are.")
        folder, config = RunFolder(arguments.out or default_folder(arguments.config)), arguments.config
    if arguments.init_from is not None:
        check_init_from(arguments.init_from)
        overrides = [*overrides, f"--finetune.init_from={arguments.init_from}"]
    resolve_config(config)
    check_overrides(parser, overrides, f"--config {config}", config)
    folder.check_place(begins=arguments.resume is None)  # before anything slow is imported
    raw = read_settings(resolve_config(config))
    if arguments.resume is None:
        if folder.last.exists():
            with folder.locked():  # what another process trains is told as that
                folder.check_new()
        check_files(raw, overrides)
        if rank() == 0 and (others := folder.others()):
            told = cut_list(map(shown, others), 3, 200)
            print(f"mambaseq: {folder.path} holds {told}; the run is written beside that.", file=sys.stderr)
    resume, changed = arguments.resume is not None, arguments.allow_changed_data
    is_whole = sys.argv[1:] == ["fit", *argv]  # not called within a program, which Lightning would start again
    with started(count_others(raw, overrides) if is_whole else 0) as processes:
        with uncollected(for_good=True):
            from mambaseq.runs.training import fit
        phases.end("imports")
        with taken_by_lightning(processes):
            outcome = fit(config, folder, overrides, resume=resume, allow_changed_data=changed, phases=phases)
    if outcome.message and rank() == 0:
        print(outcome.message, file=sys.stderr if outcome.code else sys.stdout, flush=True)
    # an outcome that all processes share; what started them kills the first at another's nonzero code, at its last page
    return outcome.code if rank() == 0 else 0


def _refuse_several(argv: list[str]) -> None:
    """Raise ConfigError for more than one configuration: the last alone would count."""
    named = [after for word, after in itertools.pairwise(argv) if word == "--config"]
    named += [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if len(named) > 1:
        raise ConfigError(
            f"--config is given {'twice' if len(named) == 2 else f'{len(named)} times'}, and a run has one. To lay one "
            f"over another, name both in a YAML file of your own, what counts last: base: [{cut_list(named, 4)}]."
        )
