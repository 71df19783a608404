"""`mambaseq new domain NAME`: write the package of a new domain."""

from __future__ import annotations

from pathlib import Path

from mambaseq.arguments import Arguments


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq new",
        description="Write the package of a new domain. It installs, trains and passes its tests; change it into "
        "yours.",
    )
    parser.add_argument("what", choices=("domain",), help="what to write: a domain")
    parser.add_argument("name", metavar="NAME", help="the domain's name: small letters, digits and _")
    parser.add_argument("--out", metavar="FOLDER", help="where; mambaseq-NAME when left out. Nothing is overwritten")
    arguments = parser.parse_args(argv)
    from mambaseq.scaffold import new_domain

    folder = new_domain(arguments.name, None if arguments.out is None else Path(arguments.out))
    print(f"{folder}: the package mambaseq-{arguments.name}. Next: pip install -e {folder}")
    print(f"Then: mambaseq fit --config {arguments.name}/waves; mambaseq check {arguments.name}")
    return 0
