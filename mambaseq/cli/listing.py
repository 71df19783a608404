"""`mambaseq list`: what can be named in a configuration, and which package brought it. Imports neither torch nor
lightning."""

from __future__ import annotations

import sys

from mambaseq.arguments import Arguments
from mambaseq.domain import KINDS, catalog, not_installed
from mambaseq.errors import UserError, cut_list, did_you_mean, shown

SHOWN = ("domains", *KINDS)


def run(argv: list[str], command: str) -> int:
    parser = Arguments(prog="mambaseq list", description="What can be named in a configuration.")
    parser.add_argument("kind", nargs="?", help=f"one of {', '.join(SHOWN)}; all of them when left out")
    kind = parser.parse_args(argv).kind
    if kind is not None and kind not in SHOWN:
        near = not_installed(kind) or did_you_mean(kind, SHOWN)
        raise UserError(f"There is no kind {shown(kind)} to list.{near} Kinds: {cut_list(SHOWN)}.")
    names = catalog()
    for listed in SHOWN if kind is None else (kind,):
        if listed == "domains":
            rows = [(domain.name, domain.summary, origin) for domain, origin in names.domains.values()]
        else:
            rows = [(entry.name, entry.summary, entry.origin) for entry in names[listed]]
        if rows or kind is not None:
            _print(listed, rows)
    for point, reason in names.broken.items():
        print(f"broken plugin: {point}\n    {reason}", file=sys.stderr)
    return 0


def _print(kind: str, rows: list[tuple[str, str, str]]) -> None:
    print(f"{kind}:")
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, summary, origin in sorted(rows):
        print(f"  {name:<{width}}  {summary}  [{origin}]")
    print()
