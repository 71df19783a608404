"""The server on loopback: OpenAI's completions, streams, limits, going away, ending."""

from __future__ import annotations

import ast
import asyncio
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mambaseq.cli.main import main
from mambaseq.errors import ConfigError
from mambaseq.runs.generation import generate_from

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

from servers import Server, send, until

NAN = float("nan")


def test_a_completion_is_what_generate_gives(server: Server, run: Path) -> None:
    settings = {"temperature": 0.8, "top_k": 40, "seed": 3}
    made = generate_from(run, prompt="Thé day", max_new_tokens=30, samples=2, **settings).sequences
    told = server.ask(model="tiny", prompt="Thé day", max_tokens=30, n=2, **settings)
    assert ["Thé day" + choice["text"] for choice in told["choices"]] == made
    assert [choice["finish_reason"] for choice in told["choices"]] == ["length"] * 2
    assert (told["object"], told["model"]) == ("text_completion", "tiny")
    assert told["usage"] | {"prompt_tokens_details": 0} == {
        "prompt_tokens": 8,
        "completion_tokens": 60,
        "total_tokens": 68,
        "prompt_tokens_details": 0,
    }
    again = server.ask(prompt=list("Thé day".encode()), max_tokens=30, n=2, **settings)
    assert again["choices"] == told["choices"]
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 16 - 8}
    settings["stream_options"] = {"include_usage": True}
    *events, last = server.events(prompt=["Thé day", "b"], max_tokens=30, **settings)
    text = "".join(one["choices"][0]["text"] for one in events if one["choices"][0]["index"] == 0)
    assert "Thé day" + text == made[0]
    assert [one["choices"][0]["finish_reason"] for one in events].count("length") == 2
    assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], 9)


def test_an_answer_ends_before_a_stop_string(server: Server) -> None:
    whole = server.ask(prompt="a", max_tokens=60, temperature=1, seed=1)["choices"][0]["text"]
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    told = server.ask(prompt="a", max_tokens=60, seed=1, stop=["never there", stop])
    assert (told["choices"][0]["text"], told["choices"][0]["finish_reason"]) == (expected, "stop")
    assert told["usage"]["completion_tokens"] < 60
    events = server.events(prompt="a", max_tokens=60, seed=1, stop=stop)
    assert "".join(one["choices"][0]["text"] for one in events) == expected
    assert server.ask(max_tokens=1)["usage"]["prompt_tokens"] == 1  # the start of a text


def test_several_at_once_are_each_what_generate_gives_with_penalties_and_stops(server: Server, run: Path) -> None:
    prompts = ["a", "Thé day", "b c"]
    settings = {"temperature": 0.9, "seed": 2, "repetition_penalty": 1.2, "presence_penalty": 0.4}
    whole = server.ask(prompt=prompts[1], max_tokens=50, **settings)["choices"][0]["text"]
    stop = [whole[10:12], "never there"]
    made = generate_from(run, prompt=prompts, max_new_tokens=50, stop=stop, **settings).sequences
    told = server.ask(prompt=prompts, max_tokens=50, stop=stop, **settings)["choices"]
    assert [prompt + one["text"] for prompt, one in zip(prompts, told, strict=True)] == made
    assert told[1]["text"] == whole[: whole.index(stop[0])]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "a" * 20_000}, 400, "more than the 20,000"),
        ({"prompt": ""}, 400, "at least one token"),
        ({"prompt": [5, 256]}, 400, "lacks"),
        ({"prompt": [True]}, 400, "token ids"),
        ({"prompt": {}}, 400, "prompt must be"),
        ({"prompt": ["a"] * 4}, 400, "more answers than the 3"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "20"}, 400, "max_tokens must be a whole number of at least 1, not '20'."),
        ({"temperature": NAN}, 400, "NaN"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temprature": 1}, 400, "Did you mean 'temperature'"),
        ({"seed": 2**63}, 400, "seed"),
        ({"n": 10**30}, 400, "more answers"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": 5}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"logprobs": 5}, 400, "logprobs cannot be 5 here. Leave it out, or give null."),
        ({"echo": True}, 400, "Leave it out, or give false."),
        ({"model": "gpt"}, 404, "no model 'gpt'"),
        (b"{", 400, "JSON"),
        (b"[" * 10_000, 400, "inside of each other"),
        (b"[]", 400, "names and values"),
        (b"\xff", 400, "UTF-8"),
        (b'"' + b"a" * 5_000_000, 413, "bytes"),
    ],
)
def test_requests_that_cannot_be_used_are_refused(server: Server, body: Any, status: int, message: str) -> None:
    answer = server.send("/v1/completions", body)
    told = json.loads(answer.read())["error"]
    assert (answer.status, told["code"]) == (status, status), told
    assert message in told["message"]
    assert len(told["message"]) < 1000
    assert not server.engine.busy


def test_other_pages_cannot_ask(server: Server) -> None:
    answer = server.send("/v1/completions", b"{}", **{"Content-Type": "text/plain"})
    assert answer.status == 415


def test_who_goes_away_frees_the_slot_and_a_flood_is_refused(server: Server) -> None:
    def sent(**body: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        told = json.dumps({"prompt": "a", "max_tokens": 19_000, **body})
        connection.request("POST", "/v1/completions", told, {"Content-Type": "application/json"})
        return connection

    connections = [sent(stream=True), sent(), sent(stream=True)]
    until(lambda: server.engine.active == 2 and server.engine.waiting == 1)
    refused = server.send("/v1/completions", {"prompt": "a"})
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert json.loads(refused.read())["error"]["type"] == "rate_limit_error"
    cancelled = server.engine.counts.cancelled
    for connection in connections:
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    until(lambda: not server.engine.busy)
    assert server.engine.counts.cancelled == cancelled + 3
    assert server.ask(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_what_the_page_shows_works(server: Server, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "text" / "serving.md").read_text(encoding="utf-8")
    body = re.search(r"-d '(\{.*?\})'\n", page, re.DOTALL)
    assert body is not None
    assert 0 < server.ask(**json.loads(body[1]))["usage"]["completion_tokens"] <= 20
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    exec(code[1].replace("runs/text", str(run)), {})
    assert len(set(ast.literal_eval(capsys.readouterr().out))) == 4


def test_models_health_and_metrics(server: Server) -> None:
    assert [one["id"] for one in json.loads(server.send("/v1/models").read())["data"]] == ["tiny"]
    assert json.loads(server.send("/health").read()) == {"status": "ok", "active": 0, "waiting": 0}
    text = server.send("/metrics").read().decode()
    values = dict(re.findall(r"^mambaseq_(\w+) (\S+)$", text, re.MULTILINE))
    assert int(values["new_tokens_total"]) == server.engine.counts.new_tokens > 0
    assert int(values["state_bytes"]) == server.engine.slots.bytes_each
    assert int(values["cache_bytes"]) == server.engine.cache.bytes  # type: ignore[union-attr]
    lines = text.splitlines()
    assert len(values) * 3 == len(lines)
    assert all(re.match(r"# (HELP|TYPE) mambaseq_\w+ .+|mambaseq_\w+ [0-9.e+-]+$", line) for line in lines)


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/nothing", 404, ["no GET '/v1/nothing'", "/v1/completions"]),
        ("POST", "/v1/" + "a" * 5000, 404, ["no POST '/v1/aaa"]),
        ("GET", "/v1/models/other", 404, ["no model 'other'", "'tiny'"]),
        ("GET", "/v1/completions", 405, ["no GET '/v1/completions'", "takes POST"]),
        ("DELETE", "/metrics", 405, ["takes GET"]),
        ("DELETE", "/health", 405, ["takes GET, HEAD"]),
    ],
)
def test_unknown_addresses_and_methods_are_refused_as_all_else_is(
    server: Server, method: str, path: str, status: int, words: list[str]
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path)
    answer = connection.getresponse()
    told = json.loads(answer.read())["error"]
    assert (answer.status, told["code"], told["type"]) == (status, status, "invalid_request_error")
    assert all(word in told["message"] for word in words), told
    assert len(told["message"]) < 1000
    if status == 405:
        assert answer.headers["allow"] in words[-1]


@pytest.mark.parametrize("path", ["/", "/health"])
def test_a_head_is_a_get_without_its_body(server: Server, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("HEAD", path)
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"")
    whole = server.send(path)
    assert answer.headers["content-type"] == whole.headers["content-type"]
    assert int(answer.headers["content-length"]) == len(whole.read()) > 0


def test_without_a_prompt_a_text_is_begun(server: Server, run: Path) -> None:
    made = generate_from(run, max_new_tokens=20, seed=4).sequences[0]  # without the line's end that it starts from
    for body in ({}, {"prompt": None}):
        told = server.ask(max_tokens=20, seed=4, **body)
        assert told["choices"][0]["text"] == made
        assert told["usage"]["prompt_tokens"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_tells_of_what_has_failed_and_nobody_waits_for_an_engine_that_has_ended(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(run)
    forward = server.engine.model.backbone.forward

    def health() -> tuple[int, dict[str, Any]]:
        answer = server.send("/health")
        return answer.status, json.loads(answer.read())

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    try:
        assert json.loads(server.send("/v1/models/tiny").read())["id"] == "tiny"
        monkeypatch.setattr("mambaseq.serving.worker._PATIENCE", 0.01)
        monkeypatch.setattr(server.engine.model.backbone, "forward", broken)
        answer = server.send("/v1/completions", {"prompt": "a"})
        assert (answer.status, json.loads(answer.read())["error"]["type"]) == (500, "server_error")
        status, told = health()
        assert (status, told["status"]) == (503, "failed")
        assert told["reason"] == "The last computation failed: RuntimeError"
        assert str(server.engine.fault) == "RuntimeError: CUDA error: an illegal memory access"
        monkeypatch.setattr(server.engine.model.backbone, "forward", forward)
        until(lambda: health()[0] == 200)  # a token is tried now and then, so it is back without a request
        assert server.ask(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2

        monkeypatch.setattr(server.engine, "step", lambda: sys.exit(1))
        server.engine.wake()
        until(lambda: not server.service.worker.alive)
        status, told = health()
        assert (status, told["status"], told["active"]) == (503, "failed", 0)
        assert "ended by SystemExit" in told["reason"]
        monkeypatch.setattr(type(server.service), "problem", None)  # the thread ends behind the look
        answer = server.send("/v1/completions", {"prompt": "a"})
        assert (answer.status, answer.read().decode().count("ended by SystemExit")) == (503, 1)
        assert server.engine.waiting == 0
    finally:
        server.close()


def test_a_key_is_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    served = Server(run, "sesame")
    try:
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/models", None), ("/metrics", None)):
            for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "sesame"}):
                assert served.send(path, body, **headers).status == 401
            assert served.send(path, body, Authorization="Bearer sesame").status == 200
        assert served.send("/health").status == served.send("/").status == 200
        monkeypatch.setattr(served.engine, "probe", lambda: None)
        for _ in range(2):
            served.engine.failed(RuntimeError("cannot open /home/ann/secret\nand more"))
        told = "The last computation failed: RuntimeError"
        for key, reason in (("no", told), ("sesame", f"{told}: cannot open /home/ann/secret")):
            answer = served.send("/health", Authorization=f"Bearer {key}")
            assert (answer.status, json.loads(answer.read())["reason"]) == (503, reason)
        assert caplog.text.count("RuntimeError: cannot open /home/ann/secret\nand more") == 1
    finally:
        served.close()


def test_sigterm_answers_what_was_asked_and_ends(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAMBASEQ_API_KEY", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers: list[dict[str, Any]] = []

    def client() -> None:
        def is_up() -> bool:
            try:
                return send(port, "/health").status == 200
            except OSError:
                return False

        try:
            until(is_up)
            asking = [threading.Thread(target=ask) for _ in range(3)]  # one more than slots
            for one in asking:
                one.start()
            until(lambda: accepted() == 3)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def accepted() -> int:
        text = send(port, "/metrics").read().decode()
        names = "requests_active", "requests_waiting", "requests_answered_total"
        return sum(int(re.search(rf"^mambaseq_{name} (\d+)$", text, re.MULTILINE)[1]) for name in names)  # type: ignore[index]

    def ask() -> None:
        answers.append(json.loads(send(port, "/v1/completions", {"prompt": "a", "max_tokens": 600}).read()))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=client)
    thread.start()
    assert main(["serve", "--checkpoint", str(run), "--port", str(port), "--slots", "2"]) == 0
    thread.join()
    until(lambda: len(answers) == 3)
    assert [one["usage"]["completion_tokens"] for one in answers] == [600] * 3
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("signals", "drain"), [([signal.SIGTERM], 0), ([signal.SIGINT] * 2, 600)])
def test_what_has_not_ended_in_time_is_told_so_and_no_traceback_is_logged(
    run: Path, signals: list[int], drain: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAMBASEQ_API_KEY", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers: list[tuple[int, str]] = []

    def ask(stream: bool) -> None:
        body = {"prompt": "a", "max_tokens": 500_000, "stream": stream}
        answer = send(port, "/v1/completions", body)
        answers.append((answer.status, answer.read().decode()))

    def client() -> None:
        def active() -> int:
            try:
                return int(json.loads(send(port, "/health").read())["active"])
            except OSError:
                return -1

        try:
            until(lambda: active() == 0)
            for one in asking:
                one.start()
            until(lambda: active() == 2)
        finally:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.5)

    asking = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    thread = threading.Thread(target=client)
    thread.start()
    begin = time.monotonic()
    options = ("--port", str(port), "--drain", str(drain), "--longest", "600000")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        assert main(["serve", "--checkpoint", str(run), *options]) == (0 if drain == 0 else 130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 30
    for one in [thread, *asking]:
        one.join(30)
    (whole, error), (stream, events) = sorted(answers, reverse=True)
    told = "The server ended before the answer did"
    assert (whole, stream) == (503, 200)
    assert told in error
    assert told in events.rstrip().split("\n\n")[-1]
    logged = capsys.readouterr().err
    assert "Shutting down" in logged
    assert "Traceback" not in logged


@pytest.mark.parametrize(("options", "dtype"), [((), torch.float32), (("--dtype", "bf16"), torch.bfloat16)])
def test_weights_in_16_bits_are_asked_for(
    run: Path, options: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.dtype] = []

    def engine(model: torch.nn.Module, **_: Any) -> None:
        found.extend(parameter.dtype for parameter in model.parameters())
        raise ConfigError("That will do.")

    monkeypatch.setattr("mambaseq.web.server.Engine", engine)
    assert main(["serve", "--checkpoint", str(run), "--port", "0", *options]) == 2
    assert found
    assert {*found} == {dtype}


def test_what_is_missing_or_wrong_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*options: str) -> str:
        assert main(["serve", "--checkpoint", str(run), *options]) == 2
        return capsys.readouterr().err

    assert "--port" in told("--port", "70000")
    assert "slots" in told("--slots", "0")
    audio = told("--checkpoint", "mambaseq:data/models/digits", "--device", "cpu", "--slots", "0")  # before the engine
    assert "is one of audio, and serve takes models of text. Use it by `mambaseq generate" in audio
    assert "key" in told("--api-key", "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = told("--port", port)
        assert "cannot be listened at (Address already in use). Stop what uses it" in error
        assert "prepared" not in error  # told before a model is loaded, which may take minutes
        assert "cannot be listened at (" in told("--host", "no-such-host.invalid")
        for key in ("clé", "sesame\n", " sesame", "se\tsame"):
            error = told("--port", port, "--api-key", key)
            assert "ASCII" in error
            assert key.strip() not in error
        monkeypatch.setenv("MAMBASEQ_API_KEY", "clé")
        assert "MAMBASEQ_API_KEY" in told("--port", port)
        monkeypatch.delenv("MAMBASEQ_API_KEY")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'mambaseq[serve]'" in told()


def test_foreign_names_and_pages_are_refused(server: Server, run: Path) -> None:
    own = f"127.0.0.1:{server.port}"
    for headers, status in (
        ({"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": f"evil.example:{server.port}"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": own, "Origin": "http://evil.example"}, 403),
        ({"Host": own, "Origin": "null"}, 403),
        ({"Host": own, "Origin": f"http://127.0.0.1:{server.port + 1}"}, 403),
    ):
        for path, body in (("/v1/completions", {"prompt": "a", "max_tokens": 1}), ("/", None), ("/metrics", None)):
            answer = server.send(path, body, **headers)
            told = answer.read().decode()
            assert answer.status == status, (headers, told)
            assert status == 200 or "--allow-host" in told or "may not ask" in told
            assert "access-control-allow-origin" not in answer.headers
    for hosts, status in (({"localhost", "Gpu.Example"}, 200), (None, 200), ({"other"}, 403)):
        served = Server(run, hosts=hosts)
        try:
            assert served.send("/health", Host="gpu.example:8000").status == status
        finally:
            served.close()


OWN = ["localhost:8000", "[::1]", "127.0.0.1"]
ADDRESSES = ["192.168.0.7:8000", "[fe80::1]:8000", "10.0.0.1"]
FOREIGN = ["evil.example:8000", "10.0.0.1.evil.example", "0x7f.1", "[10.0.0.1", ""]
MACHINE = ["gpu.example:8000", "GPU"]


@pytest.mark.parametrize(
    ("options", "answered", "refused"),
    [
        ((), OWN, ADDRESSES + FOREIGN + MACHINE),
        (("--host", "0.0.0.0"), OWN + ADDRESSES + MACHINE, FOREIGN),
        (("--host", "::"), OWN + ADDRESSES + MACHINE, FOREIGN),
        (("--host", "inner.example"), ["inner.example", *OWN, *ADDRESSES, *MACHINE], FOREIGN),
        (("--host", "0.0.0.0", "--api-key", "k"), OWN + ADDRESSES + MACHINE + FOREIGN, []),
        (("--host", "0.0.0.0", "--allow-host", "Given"), ["given:1", *OWN], ADDRESSES + FOREIGN + MACHINE),
        (("--host", "0.0.0.0", "--allow-host", "Given", "--api-key", "k"), ["given", *OWN], ADDRESSES + FOREIGN),
    ],
)
def test_no_foreign_name_leads_to_a_server_without_a_key(
    run: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], answered: list[str], refused: list[str]
) -> None:
    import uvicorn

    apps: list[Any] = []
    machine = "Gpu.example"
    monkeypatch.delenv("MAMBASEQ_API_KEY", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: machine)
    monkeypatch.setattr("mambaseq.web.server._check_address", lambda *_: None)  # there is no inner.example
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: apps.append(self.config.app))
    assert main(["serve", "--checkpoint", str(run), *options]) == 0

    async def status(host: str) -> int:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"host", host.encode())]
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers}
        await apps[0](scope, None, send)
        return int(sent[0]["status"])

    for hosts, expected in ((answered, 200), (refused, 403)):
        for host in hosts:
            assert asyncio.run(status(host)) == expected, host


def test_too_little_memory_for_what_is_prepared_is_told(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("mambaseq.serving.Engine.warm_up", refused)
    assert main(["serve", "--checkpoint", str(run), "--port", "0"]) == 2
    assert "There is not enough memory: CUDA out of memory" in (told := capsys.readouterr().err)
    assert "Lower --slots or --part." in told
