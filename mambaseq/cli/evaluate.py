"""`mambaseq validate` and `mambaseq test`: a run's metrics on its validation or test set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambaseq.arguments import Arguments
from mambaseq.cli.arguments import asks_for_help, print_keys, refuse_words
from mambaseq.cli.imports import add_allow_import
from mambaseq.importing import uncollected
from mambaseq.reporting.runs import RunFolder


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog=f"mambaseq {command}",
        description="Evaluate a run; --key value overrides its configuration (--data.length 4096), and `mambaseq "
        f"{command} --checkpoint RUN --help` lists the keys.",
        add_help=not any(argument.partition("=")[0] == "--checkpoint" for argument in argv),
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="fit the dataset's baselines to the run's training set as well, and measure them on the same records",
    )
    add_allow_import(parser)
    arguments, overrides = parser.parse_known_args(argv)
    refuse_words(argv, overrides, "--checkpoint", parser.prog)
    if asks_for_help(overrides):
        return print_keys(parser, str(RunFolder(arguments.checkpoint).require().config), overrides)
    with uncollected(for_good=True):
        from mambaseq.runs.evaluation import evaluate

    results = evaluate(RunFolder(arguments.checkpoint), command, overrides, baselines=arguments.baselines)
    print(told(results))
    return 0


def told(results: Mapping[str, Any]) -> str:
    """What an evaluation found, as lines: a metric each with its 95% interval, and tables of baselines."""
    lines, notes = [], []
    for name, value in results.items():
        place, _, word = name.rpartition("/")
        if isinstance(value, float):
            of = results.get(f"{place}/intervals", {}).get("metrics", {}).get(word)
            between = "" if of is None else f"  [{of[0]:.4f}, {of[1]:.4f}]"
            lines.append(f"{name:<24} {value:.4f}{between}")
        elif word == "intervals":
            few = value.get("too_few_groups", 0)
            told = f", whose {few} group(s) are too few to draw whole" if few else ""
            notes.append(f"[95% intervals over {value['draws']:,} draws of the {value['count']:,} {value['of']}{told}]")
        elif word == "baselines":
            notes += [f"\n{place}: baselines on the same records, {value['metric']}", *_table(results, place, value)]
    return "\n".join([*lines, *notes])


def _table(results: Mapping[str, Any], place: str, found: Mapping[str, Any]) -> list[str]:
    metric = found["metric"]
    own = {
        "name": "this run",
        "metrics": {metric: results[f"{place}/{metric}"]},
        "intervals": results.get(f"{place}/intervals", {}).get("metrics", {}),
    }
    wide = max(len(row["name"]) for row in [own, *found["rows"]])
    lines = []
    for row in [own, *found["rows"]]:
        value, between = row["metrics"].get(metric), row.get("intervals", {}).get(metric)
        numbers = "" if value is None else f"{value:.4f}"
        numbers += "" if between is None else f"  [{between[0]:.4f}, {between[1]:.4f}]"
        lines.append(f"  {row['name']:<{wide}}  {numbers:<24}  {row.get('note', '')}".rstrip())
    return [*lines, found["verdict"]]
