"""Who may ask: the names by which the server is called, and the pages that may call it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from typing import Any

from fastapi.responses import JSONResponse

from mambaseq.errors import shown

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Doors:
    """Refuses, with 403, requests that a page elsewhere may have made in the browser of someone who can reach the
    server: those whose Host is none of the server's names (a foreign name may lead to this machine, too), and those
    whose Origin is another page's.

    hosts: the names, without ports; None for any. addresses: whether any IP address is one, too.
    """

    def __init__(self, app: Any, hosts: Collection[str] | None = LOOPBACK, addresses: bool = False) -> None:
        self._app, self._addresses = app, addresses
        self._hosts = None if hosts is None else frozenset(name_of(host) for host in hosts) - {""}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        problem = self._problem(scope["headers"]) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
            return
        told = {"message": problem, "type": "permission_error", "param": None, "code": 403}
        await JSONResponse({"error": told}, 403)(scope, receive, send)

    def _problem(self, headers: list[tuple[bytes, bytes]]) -> str | None:
        found = {name: value.decode("latin-1") for name, value in headers if name in (b"host", b"origin")}
        host, origin = found.get(b"host", ""), found.get(b"origin")
        if not self._is_ours(name_of(host)):
            return f"The server is not called {shown(host)}. Start it with --allow-host NAME to be."
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return f"Pages of {shown(origin)} may not ask. Use the page of the server itself, or no browser."
        return None

    def _is_ours(self, name: str) -> bool:
        return self._hosts is None or name in self._hosts or (self._addresses and _is_address(name))


def names(host: str, allowed: Collection[str] = (), has_key: bool = False) -> tuple[set[str] | None, bool]:
    """By what a server that listens at `host` may be called: `hosts` and `addresses` of `Doors`.

    One that others reach is called by any name if it asks for a key, which a foreign page does not have. Without one it
    is called by the machine's own name and by IP addresses, which no foreign name can take the place of.

    allowed: names that were given for it, which beside those of loopback and `host` are then the only ones.
    """
    known = {*LOOPBACK, *allowed}
    if is_loopback(host):
        return known, False
    known.add(host)
    if allowed:
        return known, False
    own = socket.gethostname()
    return (None, False) if has_key else ({*known, own, own.partition(".")[0]}, True)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(name: str) -> bool:
    try:
        if name.startswith("["):
            ipaddress.IPv6Address(name[1:-1])
        else:
            ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True


def name_of(host: str) -> str:
    """The name in a Host header, without the port.

    >>> name_of("Localhost:8000"), name_of("[::1]:8000"), name_of("::1")
    ('localhost', '[::1]', '[::1]')
    """
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    if host.count(":") > 1:  # an address without brackets
        return f"[{host}]"
    return host.partition(":")[0].rstrip(".")
