"""Serving a run: its model, the engine, and the process that listens."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambaseq.checkpoints import load_model
from mambaseq.errors import ConfigError, paragraph
from mambaseq.limits import check_whole
from mambaseq.runs.devices import choose_device, memory_told
from mambaseq.serving import Engine, PrefixCache
from mambaseq.web.service import Service, check_serves

if TYPE_CHECKING:
    import uvicorn

# Seconds after which a thread lets others run: the engine takes the interpreter back after each of its many short calls
# of PyTorch, and waits so long where the event loop is busy. Python's are 0.005.
_SWITCH = 0.0002

# Seconds that answers which did not end in time have for telling so to those who wait for them.
_TELLING = 5


def serve(
    checkpoint: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    slots: int = 16,
    queue: int = 64,
    longest: int = 65_536,
    part: int | None = None,
    cache_every: int = 256,
    cache_mb: int = 1024,
    drain: int = 30,
    allow_host: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    warm_up: bool = True,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then answer what was asked already, for at most `drain` seconds or until
    the next Ctrl-C; what has not ended by then ends with an error.

    slots, queue, longest, part: see `mambaseq.serving.Engine`. cache_every, cache_mb: tokens between two kept states of
    prompts, and MiB of all of them; see `mambaseq.serving.PrefixCache`. name: of the model in requests. api_key: None
    takes the variable MAMBASEQ_API_KEY, and where there is none, nobody needs one. allow_host: names by which the
    server may be called, beside localhost (see `mambaseq.web.doors.names`). dtype: of the weights: float32, bfloat16 or
    float16; None is float32. States stay in float32. warm_up: compile and capture what requests will need before the
    first, for at most about two minutes; else they wait for it.

    Raises ConfigError where fastapi or uvicorn is missing, a number is out of range, no request can bring the key, the
    model cannot be served, or the address cannot be listened at.
    """
    check_web()
    import uvicorn

    from mambaseq.web.app import make_app
    from mambaseq.web.doors import is_loopback, names

    check_whole("--port", port, 0, 65_535)
    check_whole("--drain", drain, 0, 86_400)
    check_whole("--cache-mb", cache_mb, 0, 2**20)
    key = os.environ.get("MAMBASEQ_API_KEY") if api_key is None else api_key
    if key == "":
        raise ConfigError("The key that requests must bring is empty. Give another --api-key, or none.")
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError(
            "The key that requests must bring has characters that no header can hold as they are: letters beyond "
            "ASCII, line ends, or spaces around it. Give an --api-key (or MAMBASEQ_API_KEY) of ASCII letters, digits "
            "and signs."
        )
    _check_address(host, port)
    cache = PrefixCache(cache_every, cache_mb * 2**20) if cache_mb else None
    with memory_told("--slots"):
        loaded = load_model(checkpoint, choose_device(device), dtype)
        check_serves(loaded)
        engine = Engine(loaded.model, slots=slots, queue=queue, part=part, longest=longest, cache=cache)
    service = Service(name or Path(checkpoint).resolve().name, loaded, engine)
    if service.damaged:
        print(f"mambaseq serve: no chats, since {paragraph(service.damaged)}", file=sys.stderr)
    if not is_loopback(host) and key is None:
        print(f"mambaseq serve: anyone who reaches {host} may ask; --api-key KEY asks for a key.", file=sys.stderr)
    if warm_up:
        with memory_told("--slots or --part"):
            print(f"mambaseq serve: {engine.warm_up()}", file=sys.stderr, flush=True)
    sys.setswitchinterval(_SWITCH)
    settings: dict[str, Any] = {"log_level": "info", "access_log": False, "server_header": False}
    app = make_app(service, key, drain, *names(host, allow_host, key is not None))
    config = uvicorn.Config(app, host, port, lifespan="on", timeout_graceful_shutdown=drain + _TELLING, **settings)
    # uvicorn raises the signal again when it has ended, which is for us to have done
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _server(config, service, drain).run()
    except SystemExit as error:
        raise _taken(host, port) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _server(config: uvicorn.Config, service: Service, drain: float) -> uvicorn.Server:
    """A server that ends what still runs after `drain` seconds, or at a second Ctrl-C, by an error that clients read:
    uvicorn cancels the tasks that send, and logs each as a fault of the application."""
    import uvicorn

    class Ending(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            hurry = asyncio.create_task(self._hurry())
            await super().shutdown(sockets)
            if self.force_exit:  # uvicorn has waited for nothing, and lets the lifespan be cancelled with a traceback
                await hurry
                if self.server_state.tasks:
                    await asyncio.wait([*self.server_state.tasks], timeout=_TELLING)
                await self.lifespan.shutdown()
            hurry.cancel()

        async def _hurry(self) -> None:
            now = asyncio.get_running_loop().time
            end = now() + drain
            while now() < end and not self.force_exit:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(service.worker.close)

    return Ending(config)


def _check_address(host: str, port: int) -> None:
    """Raise ConfigError where the address cannot be listened at: loading and preparing a model take long."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _taken(host, port, error) from error
    errors: list[OSError] = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(address)
        except OSError as error:
            errors.append(error)
    # a name may have an address of a kind that this machine lacks, beside one that it has
    if wrong := [error for error in errors if error.errno in (errno.EADDRINUSE, errno.EACCES)] or (
        errors if len(errors) == len(found) else []
    ):
        raise _taken(host, port, wrong[0]) from wrong[0]


def _taken(host: str, port: int, error: OSError | None = None) -> ConfigError:
    why = f" ({error.strerror})" if error is not None and error.strerror else ""
    return ConfigError(
        f"{host}:{port} cannot be listened at{why}. Stop what uses it, or give another --port or --host."
    )


def check_web() -> None:
    """Raise ConfigError where what the server needs is missing."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"serve needs the packages fastapi and uvicorn, and they cannot be imported ({str(error)[:100]}). Install "
            "them: pip install 'mambaseq[serve]'."
        ) from error
