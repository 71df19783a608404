"""Chats over HTTP: the template writes the prompt, and its mark ends the answer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

from servers import Server

from mambaseq.web.completions import parse

TALK = [{"role": "user", "content": "the end?"}]
WRITTEN = "<|im_start|>user\nthe end?<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_is_the_completion_of_what_its_template_writes(talking: Server) -> None:
    settings = {"temperature": 1.5, "seed": 4, "max_tokens": 60}
    told = talking.ask(messages=TALK, n=2, **settings)
    assert (told["object"], told["id"][:9]) == ("chat.completion", "chatcmpl-")
    text = talking.ask(prompt=WRITTEN, n=2, **settings)
    for one, other in zip(told["choices"], text["choices"], strict=True):
        assert one["message"]["role"] == "assistant"
        assert other["text"].startswith(one["message"]["content"])  # which the mark may have ended before
    *events, last = talking.events(messages=TALK, **settings, stream_options={"include_usage": True})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [event["choices"][0]["delta"]["content"] for event in events]
    assert "".join(pieces) == told["choices"][0]["message"]["content"]
    assert last["usage"]["prompt_tokens"] == text["usage"]["prompt_tokens"]


def test_the_mark_behind_an_answer_ends_it_and_it_has_what_room_is_left(talking: Server) -> None:
    tokenizer: Any = talking.service.tokenizer
    asked = parse({"messages": TALK}, talking.service, chat=True).requests[0]
    assert asked.prompt.tolist() == tokenizer.encode(WRITTEN).tolist()
    assert asked.stop_ids == {tokenizer.encode(mark)[0] for mark in ("<|im_end|>", "<|endoftext|>")}
    assert asked.max_new_tokens == 512
    long = [{"role": "user", "content": "~" * 19_800}]
    asked = parse({"messages": long}, talking.service, chat=True).requests[0]
    assert 19_800 < len(asked.prompt) == 20_000 - asked.max_new_tokens


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages must be a list"),
        (
            {"messages": [{"role": "nobody", "content": "a"}]},
            "chat_template in tokenizer_config.json refuses these messages: There is no nobody",
        ),
        (
            {"messages": [*TALK, {"role": "wizard", "content": "a"}]},
            "Message 2 has the role 'wizard'. Roles are system",
        ),
        ({"messages": [{"role": "User", "content": "a"}]}, "Did you mean 'user'?"),
        ({"messages": [{"role": "user", "content": 5}]}, "must be text"),
        ({"messages": TALK, "prompt": "a"}, "no parameter 'prompt'"),
        ({"messages": TALK, "tools": [{}]}, "tools cannot be"),
        ({"messages": TALK, "logprobs": True}, "logprobs"),
        ({"messages": TALK, "max_completion_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "a" * 30_000}]}, "more than the 20,000"),
    ],
)
def test_chats_that_cannot_be_used_are_refused(talking: Server, body: dict[str, Any], message: str) -> None:
    assert message in talking.ask(400, **body)["error"]["message"]


def test_what_the_page_says_of_chats_works(talking: Server) -> None:
    page = (Path(__file__).parents[2] / "docs" / "text" / "serving.md").read_text(encoding="utf-8")
    body = re.search(r"chat/completions -H \S+ \S+ -d '(\{.*?\})'\n", page, re.DOTALL)
    assert body is not None
    assert 0 < talking.ask(**json.loads(body[1]))["usage"]["completion_tokens"] <= 60


def test_without_a_template_the_remedy_is_named(server: Server) -> None:
    assert "/v1/completions" in server.ask(400, messages=TALK)["error"]["message"]
    assert json.loads(server.send("/v1/models").read())["data"][0]["chats"] is False


def test_a_damaged_template_refuses_chats_alone(talker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(talker, folder)
    (folder / "chat_template.jinja").write_text("{% for")
    served = Server(folder)
    try:
        told = served.ask(400, messages=TALK)["error"]["message"]
        assert told.startswith("chat_template.jinja, line 1")  # and not in which folder
        assert str(folder / "chat_template.jinja") in served.service.damaged
        assert served.ask(prompt="the", max_tokens=2)["usage"]["completion_tokens"] == 2
    finally:
        served.close()
