"""`mambaseq reproduce NAME`: repeat a published result and compare the paper's figures with ours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mambaseq.arguments import Arguments
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.importing import uncollected


def resolve(name: str) -> str:
    """The full name of a recipe, given as such or as the part after the slash. Raises ConfigError for one that is
    unknown, or not unique."""
    names = [entry.name for entry in catalog()["recipes"]]
    found = [full for full in names if name in (full, full.rpartition("/")[2])]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"Several recipes are named {shown(name)}: {', '.join(found)}. Give the full name.")
    short = [full.rpartition("/")[2] for full in names]
    raise ConfigError(
        f"No recipe is named {shown(name)}.{did_you_mean(name, [*names, *short])} Known: {', '.join(names) or 'none'}."
    )


def run(argv: list[str], command: str) -> int:
    recipes = catalog()["recipes"]
    width = max((len(entry.name) for entry in recipes), default=0)
    parser = Arguments(
        prog="mambaseq reproduce",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Repeat a published result: train, print the paper's figures next to ours, and write report.json\n"
        "and report.md (part.json and part.md with --only or --seed). Start an interrupted run again to continue it:\n"
        "finished trainings are kept, and at most 15 seconds of the last one are lost.\n"
        "docs/reproduction.md has the reports, with what each took.\n\n"
        + "\n".join(f"  {entry.name:<{width}}  {entry.summary}" for entry in recipes),
    )
    parser.add_argument("recipe", metavar="NAME", help="a recipe, with or without its domain")
    parser.add_argument(
        "--scale",
        choices=("full", "small", "tiny"),
        default=None,
        help="full: the reported results, on a GPU; small: sized for a CPU; tiny: seconds, to see that all runs, and "
        "nothing is learned. When left out, full on a GPU, else small",
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seeds", type=int, default=None, metavar="N", help="number of seeds; the default is the recipe's own"
    )
    seeds.add_argument(
        "--seed", type=int, nargs="+", default=None, metavar="N", help="only these seeds, for instance one on each GPU"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="LINE",
        help="only these lines of the table, or columns if the recipe has a choice of them; in some 'finished', which "
        "trains nothing. A name that it has not is refused with all that it has, before anything is trained",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="default: runs/reproduce/NAME-SCALE. Processes with different --only or --seed can share one; run it "
        "last without them to collect",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="files that a recipe needs and the project may not ship; a recipe that misses one says which, and where "
        "it comes from",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        metavar="N",
        help="of training of each contender, for recipes that give them equal time",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        metavar="N",
        help="of training of each contender, for recipes that leave it open",
    )
    arguments = parser.parse_args(argv)
    if arguments.minutes is not None and not 0 < arguments.minutes <= 10_000:
        raise ConfigError(f"--minutes must be above 0 and at most 10,000, not {arguments.minutes:g}.")
    if arguments.steps is not None and not 1 <= arguments.steps < 2**31:
        raise ConfigError(f"--steps must be at least 1 and below 2^31, not {arguments.steps}.")
    if arguments.seeds is not None and arguments.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, not {arguments.seeds}.")
    for seed in arguments.seed or []:
        if not 0 <= seed < 2**32:
            raise ConfigError(f"--seed must be at least 0 and below 2^32, not {seed}.")
    numbers = list(range(arguments.seeds)) if arguments.seeds else sorted(set(arguments.seed or [])) or None
    name = resolve(arguments.recipe)

    with uncollected(for_good=True):
        from mambaseq.reproduction.reproduce import reproduce
        from mambaseq.runs.devices import choose_device

    device = choose_device(arguments.device)
    scale: Any = arguments.scale or ("full" if device.type == "cuda" else "small")
    folder = arguments.out or Path("runs") / "reproduce" / f"{name.rpartition('/')[2]}-{scale}"
    part = bool(arguments.only or arguments.seed)
    given = (arguments.data, arguments.minutes, arguments.steps)
    return reproduce(name, device, scale, numbers, arguments.only, part, folder, *given)
