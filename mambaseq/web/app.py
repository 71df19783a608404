"""The routes: completions and chats as OpenAI's API has them, a page to type into, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from mambaseq import plain
from mambaseq.atomic import json_text
from mambaseq.errors import UserError, cut, paragraph, shown
from mambaseq.limits import REQUEST_BYTES
from mambaseq.serving import Closed, Full, Ticket
from mambaseq.web import completions
from mambaseq.web.completions import Completion, NoModel
from mambaseq.web.doors import LOOPBACK, Doors
from mambaseq.web.metrics import metrics
from mambaseq.web.page import make_page
from mambaseq.web.service import Asked, Service

_ADDRESSES = "/v1/completions, /v1/chat/completions, /v1/models, /health, /metrics or /"


class Refused(Exception):
    """An answer with an error in the form that clients of the API know."""

    def __init__(self, status: int, message: object, kind: str = "invalid_request_error", **headers: str) -> None:
        super().__init__(str(message))
        self.status, self.kind, self.headers = status, kind, headers

    def body(self) -> dict[str, Any]:
        return {"error": {"message": paragraph(self), "type": self.kind, "param": None, "code": self.status}}


def make_app(
    service: Service,
    key: str | None = None,
    drain: float = 30.0,
    hosts: Collection[str] | None = LOOPBACK,
    addresses: bool = False,
) -> FastAPI:
    """The application; its lifespan starts the engine's thread, and answers at its end what was asked, for at most
    `drain` seconds. key: what requests but those for /health and the page must bring. hosts, addresses: names by
    which the server may be called (see `Doors`)."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.draining = True
        await asyncio.to_thread(service.worker.close, drain)

    app = FastAPI(title="mambaseq", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Doors, hosts=hosts, addresses=addresses)
    page, page_headers = make_page()

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse(error.body(), error.status, headers=error.headers)

    async def unknown(request: Request, error: Exception) -> Response:
        """Addresses and methods that there are not, as all else is refused."""
        assert isinstance(error, HTTPException)
        asked, headers = f"{cut(request.method, 20)} {shown(request.url.path)}", dict(error.headers or {})
        if error.status_code == 405:
            takes = headers.pop("Allow", headers.pop("allow", "POST"))
            headers["Allow"] = ", ".join(sorted(takes.split(", ")))  # which the framework tells in any order
            message = f"There is no {asked}; this address takes {headers['Allow']}."
        elif error.status_code == 404:
            message = f"There is no {asked}. Ask {_ADDRESSES}."
        else:
            message = f"{asked}: {error.detail}"
        return JSONResponse(Refused(error.status_code, message).body(), error.status_code, headers=headers)

    async def failed(request: Request, error: Exception) -> Response:
        """A fault of ours, which is logged."""
        return JSONResponse(Refused(500, "The request failed in the server.", "server_error").body(), 500)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, failed)

    def shows_key(request: Request) -> bool:
        """Whether there is a key, and the request brings it."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return key is not None and scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), key.encode())

    def check_key(request: Request) -> None:
        if key is not None and not shows_key(request):
            told = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, "Bring the key: Authorization: Bearer KEY.", "authentication_error", **told)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def show_page() -> Response:
        return HTMLResponse(page, headers=page_headers)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health(request: Request) -> Response:
        engine, problem = service.engine, service.problem
        told: dict[str, Any] = {"status": "ok", "active": engine.active, "waiting": engine.waiting}
        if problem is not None:
            told |= {"status": "ending" if service.draining else "failed", "reason": problem}
        elif engine.fault is not None:  # until a computation goes well again
            # what an exception says may name files, which is not for everyone
            why = engine.fault if shows_key(request) else engine.fault.kind
            told |= {"status": "failed", "reason": f"The last computation failed: {why}"}
        return JSONResponse(told, 200 if told["status"] == "ok" else 503)

    @app.get("/metrics")
    async def tell_metrics(request: Request) -> Response:
        check_key(request)
        return PlainTextResponse(metrics(service), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [model_card()]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        check_key(request)
        if name != service.name:
            raise Refused(404, NoModel.of(name, service.name))
        return JSONResponse(model_card())

    def model_card() -> dict[str, Any]:
        engine = service.engine
        told = {"id": service.name, "object": "model", "created": service.begun, "owned_by": "mambaseq"}
        # beside the API's own: what the page shows
        return told | {"chats": service.chats, "state_bytes": engine.slots.bytes_each, "longest": engine.longest}

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, True)

    async def answer(request: Request, chat: bool) -> Response:
        check_key(request)
        if (problem := service.problem) is not None:
            raise Refused(503, problem, "server_error")
        body = await _body(request)
        try:
            # a long text takes a while
            completion = await asyncio.to_thread(completions.parse, body, service, chat)
            asked = service.ask(completion.requests, completion.stop, completion.stream)
        except NoModel as error:
            raise Refused(404, error) from error
        except Closed as error:
            raise Refused(503, error, "server_error") from error
        except Full as error:
            raise Refused(429, error, "rate_limit_error", **{"Retry-After": "1"}) from error
        except UserError as error:
            raise Refused(400, service.told(error)) from error
        if completion.stream:
            return _Stream(service, completion, asked)
        return await _unless_gone(request.receive, _whole(service, completion, asked), asked)

    return app


async def _body(request: Request) -> dict[str, Any]:
    """The object in a request's body. Other types of content are refused: a page elsewhere cannot send this one without
    being allowed to."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Send JSON: Content-Type: application/json.")
    read = bytearray()
    async for piece in request.stream():
        read += piece
        if len(read) > (most := REQUEST_BYTES.value):
            raise Refused(413, f"The request has more than {most:,} bytes. Send fewer.", Connection="close")
    try:
        return plain.parse_json(read.decode("utf-8"), "The request")
    except UnicodeDecodeError as error:
        raise Refused(400, f"The request is not UTF-8 at byte {error.start:,}.") from error
    except UserError as error:
        raise Refused(400, error) from error


def _failure(service: Service, ticket: Ticket) -> Refused | None:
    """The error of an answer that did not end by itself."""
    if ticket.finished == "failed":
        told = service.told(ticket.error) if isinstance(ticket.error, UserError) else "The answer failed in the server."
        return Refused(500, told, "server_error")
    if ticket.finished == "cancelled":
        return Refused(503, "The server ended before the answer did. Ask again.", "server_error")
    return None


async def _whole(service: Service, completion: Completion, asked: Asked) -> Response:
    texts, left = ["" for _ in asked.tickets], len(asked.tickets)
    while left:
        piece = await asked.pieces.get()
        texts[piece.number] += asked.text(piece)
        if piece.ended:
            left -= 1
            if (failure := _failure(service, asked.tickets[piece.number])) is not None:
                raise failure
    return JSONResponse(completions.whole(completion, service, texts, asked.tickets))


async def _unless_gone(
    receive: Callable[[], Awaitable[Any]], work: Awaitable[Response | None], asked: Asked
) -> Response:
    """Do the work unless the client goes away; its slots are free at the next step, whatever happened."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        return (doing.result() if doing.done() else None) or Response(status_code=499)
    finally:
        asked.cancel()
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


class _Stream(Response):
    """Server-sent events: the pieces of all answers as they come, an error if there is one, and [DONE]."""

    def __init__(self, service: Service, completion: Completion, asked: Asked) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._service, self._completion, self._asked = service, completion, asked

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def work() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for events in self._events():
                told = "".join(f"data: {data}\n\n" for data in events).encode()
                await send({"type": "http.response.body", "body": told, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        with contextlib.suppress(OSError):  # the client went away
            await _unless_gone(receive, work(), self._asked)

    async def _events(self) -> AsyncIterator[list[str]]:
        """Events that are sent together."""
        tickets, completion, service = self._asked.tickets, self._completion, self._service
        begun = [completions.first(completion, service, index) for index in range(len(tickets))]
        if told := [json_text(one) for one in begun if one is not None]:
            yield told
        left = len(tickets)
        while left:
            told = []
            for index, text, ended in await self._pieces():
                ticket = tickets[index] if ended else None
                left -= ended
                if ticket is not None and (failure := _failure(service, ticket)) is not None:
                    yield [*told, json_text(failure.body())]
                    return
                if text or ended:
                    part = completions.part(completion, service, index, text, ticket, tickets)
                    told.append(json.dumps(part, allow_nan=False))  # there are many, and all in them is plain
            if told:
                yield told
        yield [*([json_text(completions.last(completion, service, tickets))] if completion.usage else []), "[DONE]"]

    async def _pieces(self) -> list[tuple[int, str, bool]]:
        """What is there, and at least one: the pieces of an answer that came meanwhile are one."""
        merged: dict[int, tuple[int, str, bool]] = {}
        piece = await self._asked.pieces.get()
        while True:
            _, before, _ = merged.get(piece.number, (0, "", False))
            merged[piece.number] = piece.number, before + self._asked.text(piece), piece.ended
            if self._asked.pieces.empty():
                return list(merged.values())
            piece = self._asked.pieces.get_nowait()
