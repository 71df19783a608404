"""`mambaseq sweep`: runs of several settings, by one YAML."""

from __future__ import annotations

from mambaseq.arguments import Arguments
from mambaseq.cli.imports import add_allow_import
from mambaseq.cli.runs import print_table
from mambaseq.importing import uncollected
from mambaseq.runs.naming import check_settings, resolve_config
from mambaseq.runs.trials import read_plan


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq sweep",
        description="Train a run for each of several settings, one after the other. The YAML has config (a name or a "
        "file), and grid (keys, each with a list of values) or search (keys, each with {low, high, log, step} or a "
        "list to choose from; with trials, their number). Optional are settings (for all trials), seeds (a run "
        "each), and metric and mode (min or max), which choose the best. The same command continues an interrupted "
        "sweep. At the end the runs are listed, and FOLDER/best.yaml has the best settings.",
    )
    parser.add_argument("plan", metavar="SWEEP.yaml", help="what is tried")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the runs; runs/NAME of the file when left out")
    add_allow_import(parser)
    arguments = parser.parse_args(argv)
    plan = read_plan(arguments.plan)  # before anything slow is imported
    resolve_config(plan.config)
    for settings in plan.first_values():
        check_settings({**plan.settings, **settings}, plan.config, plan.source)
    with uncollected(for_good=True):
        from mambaseq.runs.sweep import sweep

    found = sweep(arguments.plan, out=arguments.out)
    print_table(found.table(), found.metric)
    for trial in found.trials:
        if trial.score is None:
            print(f"trial {trial.number + 1} {trial.status}: {trial.message}")
    print(f"The best settings are in {found.config}: mambaseq fit --config {found.config} --out RUN")
    return 0
