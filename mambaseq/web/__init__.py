"""The server: completions of a model over HTTP."""

from __future__ import annotations

from mambaseq.web.server import serve

__all__ = ["serve"]
