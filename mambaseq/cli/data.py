"""`mambaseq data`: data sets that can be fetched, and the audit of a run's data."""

from __future__ import annotations

import sys

from mambaseq.arguments import Arguments
from mambaseq.cli.arguments import asks_for_help, check_overrides, print_keys
from mambaseq.cli.imports import add_allow_import
from mambaseq.errors import ConfigError, shown
from mambaseq.importing import uncollected
from mambaseq.runs.naming import config_of, resolve_config

_TABLES = (".csv", ".tsv", ".tab", ".parquet", ".fa", ".fasta", ".fna")  # files of data, not configurations


def run(argv: list[str], command: str) -> int:
    if argv[:1] == ["audit"]:
        return _audit(argv[1:])
    parser = Arguments(
        prog="mambaseq data", description="Data sets that can be fetched and verified, and the audit of a run's data."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for action, text in (
        ("list", "names, licences, and which are here already"),
        ("info", "files, addresses, checksums of one"),
        ("fetch", "download one (continues an interrupted download) and verify it"),
    ):
        sub = actions.add_parser(action, help=text)
        if action != "list":
            sub.add_argument("name", help="a name from `mambaseq data list`, or a manifest of your own (.yaml)")
        sub.add_argument(
            "--cache",
            metavar="FOLDER",
            help="folder of fetched data; $MAMBASEQ_CACHE or the user's cache folder when left out. Runs look in those "
            "two only: set MAMBASEQ_CACHE to this folder when you train",
        )
    actions.add_parser("audit", help="look for leaks and shortcuts in a configuration's data: audit CONFIG")
    arguments = parser.parse_args(argv)
    from mambaseq.data.fetch import fetch
    from mambaseq.data.manifest import manifest, manifests
    from mambaseq.resources import cache_dir

    if arguments.action == "list":
        for found in manifests().values():
            here = "  (fetched)" if found.is_fetched(arguments.cache) else ""
            print(f"{found.name:<20} {found.summary}  [{found.licence}]{here}")
    elif arguments.action == "info":
        found = manifest(arguments.name)
        print(f"{found.name}: {found.summary}\nlicence: {found.licence}\nhomepage: {found.homepage}")
        print(f"folder: {found.folder(arguments.cache)}")
        print("once fetched, name a file in a configuration by what follows `use`; * and ? may be used")
        for file in found.files:
            size = "" if file.size is None else f"  {file.size:,} bytes"
            print(f"  {file.name}{size}\n    {file.url}\n    {file.checksum or 'no checksum: ' + file.checksum_note}")
            inside = f"{file.unpacked_name}/PATH, where PATH is a path inside the archive" if file.unpack else file.name
            print(f"    use fetched:{found.name}/{inside}")
    else:
        print(fetch(arguments.name, arguments.cache))
        folder = cache_dir(arguments.cache).resolve()
        if folder != cache_dir().resolve():
            print(f"Set MAMBASEQ_CACHE={folder} when you train: runs look for fetched data there.", file=sys.stderr)
    return 0


def _audit(argv: list[str]) -> int:
    parser = Arguments(
        prog="mambaseq data audit",
        description="Look for leaks (copies and shared words between splits or classes) and shortcuts (properties that "
        "tell classes) in the data of a run. Further options, --key value, override the configuration; `mambaseq data "
        "audit CONFIG --help` lists the keys.",
        add_help=not any(not argument.startswith("-") for argument in argv),
    )
    parser.add_argument("config", metavar="CONFIG", help="a name from `mambaseq list configs`, a YAML file, or a run")
    parser.add_argument(
        "--out", metavar="FILE", action="append", default=[], help="write FILE.json or FILE.html; twice for both"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a leak or a shortcut is found")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="share of held-out windows that may have more than half of their words in another split (default: 0.02)",
    )
    add_allow_import(parser)
    arguments, overrides = parser.parse_known_args(argv)
    config = config_of(arguments.config)
    if config.lower().removesuffix(".gz").endswith(_TABLES):
        raise ConfigError(
            f"{shown(config, 200)} is no configuration. A file of labelled sequences is audited as the data of one: "
            f"mambaseq data audit dna/labelled --data.files {config[:200]}, with --data.sequence and --data.label for "
            "its columns."
        )
    resolve_config(config)
    if asks_for_help(overrides):
        return print_keys(parser, config, overrides)
    check_overrides(parser, overrides, arguments.config, config)
    with uncollected(for_good=True):
        from mambaseq.auditing.text import lines
        from mambaseq.runs.audit import audit

    found = audit(arguments.config, overrides, out=arguments.out, tolerance=arguments.tolerance)
    for line in lines(found):
        print(line)
    return int(arguments.strict and not found.clean)
