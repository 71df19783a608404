"""A client of the server that `serving.py` measures."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.parse
from typing import Any, NamedTuple

from mambaseq.atomic import json_text


class Got(NamedTuple):
    """An answer: its status, text, the numbers of tokens of prompt, known and new, and the seconds until the first
    piece and the end."""

    status: int
    text: str
    prompt: int
    known: int
    new: int
    first: float
    last: float


class Site:
    """A server, asked as a client would: a connection for each request."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self._key = f"Authorization: Bearer {key}\r\n" if key else ""

    async def _open(self, path: str, body: bytes | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 24)
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{self._key}"
        sent = b"" if body is None else body
        head += f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        writer.write(head.encode() + sent)
        await writer.drain()
        found = await reader.readuntil(b"\r\n\r\n")
        return reader, writer, int(found.split(b" ", 2)[1])

    async def get(self, path: str) -> str:
        reader, writer, _ = await self._open(path, None)
        told = (await reader.read()).decode()
        writer.close()
        return told

    async def metrics(self) -> dict[str, float]:
        told = await self.get("/metrics")
        return {name: float(value) for name, value in re.findall(r"^mambaseq_(\w+) (\S+)$", told, re.MULTILINE)}

    async def ask(self, body: dict[str, Any] | bytes, leave_after: int | None = None) -> Got:
        """Ask for a completion. leave_after: pieces of a stream after which the connection is closed."""
        begun = time.perf_counter()
        stream = isinstance(body, dict) and body.setdefault("stream", True)
        if stream and isinstance(body, dict):
            body["stream_options"] = {"include_usage": True}
        sent = body if isinstance(body, bytes) else json_text(body).encode()
        reader, writer, status = await self._open("/v1/completions", sent)
        first, pieces, words, usage = 0.0, 0, "", {}
        try:
            if status != 200 or not stream:
                told = json.loads(await reader.read())
                if status == 200:
                    words, usage = "".join(one["text"] for one in told["choices"]), told["usage"]
                first = time.perf_counter() - begun
            while status == 200 and stream:
                line = await reader.readline()
                if not line:
                    raise ConnectionError("the stream ended early")
                if not line.startswith(b"data: "):  # sizes of chunks, and empty lines
                    continue
                if line.startswith(b"data: [DONE]"):
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    raise ConnectionError(event["error"]["message"])
                first = first or time.perf_counter() - begun
                usage = event.get("usage") or usage
                words += "".join(one["text"] for one in event["choices"])
                pieces += 1
                if leave_after is not None and pieces >= leave_after:
                    break
        finally:
            writer.close()
        known = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        numbers = usage.get("prompt_tokens", 0), known, usage.get("completion_tokens", 0)
        return Got(status, words, *numbers, first, time.perf_counter() - begun)
