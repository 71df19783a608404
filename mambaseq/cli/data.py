"""`mambaseq data`: data sets that can be fetched."""

from __future__ import annotations

import argparse


def run(argv: list[str], command: str) -> int:
    parser = argparse.ArgumentParser(prog="mambaseq data", description="Data sets that can be fetched and verified.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="names, sizes, licences")
    info = actions.add_parser("info", help="files, addresses, checksums of one")
    info.add_argument("name")
    fetch = actions.add_parser("fetch", help="download one (goes on where an earlier try stopped) and verify it")
    fetch.add_argument("name")
    fetch.add_argument("--cache", help="folder to keep it in; $MAMBASEQ_CACHE, or the user's cache folder, when left out")
    arguments = parser.parse_args(argv)
    from mambaseq.data import fetch as fetching

    if arguments.action == "list":
        print(fetching.describe_all())
    elif arguments.action == "info":
        print(fetching.describe(arguments.name))
    else:
        for path in fetching.fetch(arguments.name, arguments.cache):
            print(path)
    return 0
