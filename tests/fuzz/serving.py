"""A server on this machine for `mambaseq data fetch`."""

from __future__ import annotations

import dataclasses
import http.server
import threading
from pathlib import Path


@dataclasses.dataclass
class Site:
    """files: what it serves, by name; cases add theirs."""

    port: int
    files: dict[str, bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def serve(folder: Path) -> Site:
    """Serve the files of a folder until the process ends."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path[1:])
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return Site(server.server_port, files)
