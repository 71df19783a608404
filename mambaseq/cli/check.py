"""`mambaseq check`: test a domain against the laws."""

from __future__ import annotations

from mambaseq.arguments import Arguments
from mambaseq.importing import uncollected


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq check",
        description="Test a domain against the laws: its encoders, mixers, backbones, heads, metrics, data sets, "
        "readers, writers, reports, optimizers, callbacks, and a few steps of each configuration. Exits with 1 when "
        "something fails.",
    )
    parser.add_argument("name", metavar="NAME", help="a domain, as `mambaseq list domains` shows it")
    name = parser.parse_args(argv).name
    with uncollected(for_good=True):
        from mambaseq.checking import check

    found = check(name, lambda finding: print(finding, flush=True))
    failed, skipped = (sum(one.state == state for one in found) for state in ("fails", "not checked"))
    held = len(found) - failed - skipped
    print(f"{name}: {held} held, {failed} failed, {skipped} not checked")
    return 1 if failed else 0
