"""`mambaseq doctor`: which backend each op would use on this machine, whether it is right, and how fast it is."""

from __future__ import annotations

from mambaseq.arguments import Arguments
from mambaseq.importing import uncollected


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq doctor",
        description="For each op, list its backends: which one would run here and why the others would not, their "
        "errors against the reference in float64 (relative RMS, outputs and gradients), and their speeds.",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    arguments = parser.parse_args(argv)
    with uncollected(for_good=True):
        from mambaseq.benchmarking.diagnosis import diagnose

    return diagnose(arguments.device)
