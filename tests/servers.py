"""A server of a small model in a thread, and what it is asked. Needs the extra serve."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import uvicorn

from mambaseq.checkpoints import load_model
from mambaseq.serving import Engine, PrefixCache
from mambaseq.web.app import make_app
from mambaseq.web.doors import LOOPBACK
from mambaseq.web.service import Service


class Server:
    """A server in a thread; what it is asked."""

    def __init__(self, run: Path, key: str | None = None, hosts: Collection[str] | None = LOOPBACK) -> None:
        loaded = load_model(run)
        self.engine = Engine(loaded.model, slots=2, queue=1, longest=20_000, cache=PrefixCache(8, 2**20))
        self.service = Service("tiny", loaded, self.engine)
        app = make_app(self.service, key, drain=5, hosts=hosts)
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None))
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        until(lambda: self.uvicorn.started)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)

    def send(self, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        return send(self.port, path, body, **headers)

    def ask(self, status: int = 200, /, **body: Any) -> dict[str, Any]:
        answer = self.send(path_of(body), body)
        told: dict[str, Any] = json.loads(answer.read())
        assert answer.status == status, told
        return told

    def events(self, **body: Any) -> list[Any]:
        answer = self.send(path_of(body), {**body, "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = answer.read().decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


def path_of(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def send(port: int, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    text = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    connection.request("GET" if body is None else "POST", path, text, headers)
    return connection.getresponse()


def until(holds: Any) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)
