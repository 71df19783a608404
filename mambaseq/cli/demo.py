"""`mambaseq demo`: every domain's demo run on the shipped data, and one report."""

from __future__ import annotations

import sys
from pathlib import Path

from mambaseq.arguments import Arguments
from mambaseq.importing import uncollected


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq demo",
        description="Train each domain's demo configuration on the shipped data, test it, and write report.html.",
    )
    parser.add_argument(
        "--out", default="runs/demo", help="folder of the runs and the report; an older one is replaced"
    )
    parser.add_argument("--domains", nargs="*", help="only these domains")
    parser.add_argument("--steps", type=int, help="fewer optimizer steps, to try it out")
    parser.add_argument(
        "--redraw", action="store_true", help="train nothing: write report.html of the runs in --out anew"
    )
    arguments = parser.parse_args(argv)
    with uncollected(for_good=True):
        from mambaseq.runs.demo import demo

    outcome = demo(Path(arguments.out), arguments.domains, arguments.steps, arguments.redraw)
    print(outcome.message, file=sys.stderr if outcome.code else sys.stdout, flush=True)
    return outcome.code
