"""`mambaseq data`: data sets that can be fetched."""

from __future__ import annotations

import sys

from mambaseq.cli.arguments import Arguments


def run(argv: list[str], command: str) -> int:
    parser = Arguments(prog="mambaseq data", description="Data sets that can be fetched and verified.")
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
