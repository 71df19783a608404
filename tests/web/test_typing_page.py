"""The page in a real browser: typing, streaming, stopping, chatting, and what it shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import browsers
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

from servers import Server, until

CTRL = 2


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    program = browsers.found()
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    opened = browsers.Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser: browsers.Browser) -> Iterator[browsers.Browser]:
    browser.events.clear()
    browser.resize(1000, 800)
    yield browser
    told = [json.dumps(one) for one in browser.events if one["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    # what is refused is told by browsers, too; the policy of the page and its script are to give them nothing to tell
    assert not [one for one in told if '"info"' not in one and "with a status of 40" not in one]


def shown(page: browsers.Browser, name: str) -> str:
    return str(page.run(f"document.getElementById('{name}').innerText"))


def set_to(page: browsers.Browser, name: str, value: object) -> None:
    page.run(f"document.getElementById('{name}').value = '{value}'")


def ended(page: browsers.Browser, words: str) -> None:
    page.until(f"document.getElementById('status').textContent.startsWith('{words}')")


def test_a_prompt_is_typed_and_its_answer_streams_until_it_is_stopped(server: Server, page: browsers.Browser) -> None:
    page.open(f"http://127.0.0.1:{server.port}/")
    page.until("document.title === 'tiny'")
    assert page.run("document.activeElement.id") == "prompt"
    set_to(page, "max_tokens", 30)
    set_to(page, "seed", 3)
    page.type("Thé <b>day</b>")
    page.press("Enter", 13, CTRL)
    ended(page, "Ended at the most")
    asked = {"prompt": "Thé <b>day</b>", "max_tokens": 30, "temperature": 0.8, "top_p": 0.95, "seed": 3}
    expected = asked["prompt"] + server.ask(**asked)["choices"][0]["text"]  # type: ignore[operator]
    assert page.run("document.getElementById('out').textContent") == expected
    assert (shown(page, "count"), shown(page, "read").split("\n")[0]) == ("30", "15 tokens")
    assert shown(page, "speed").endswith(" tokens/s")
    assert f"{server.engine.slots.bytes_each:,} bytes" in shown(page, "state")
    page.run("document.getElementById('status').textContent = ''")
    page.run("document.getElementById('form').requestSubmit()")
    ended(page, "Ended at the most")
    assert shown(page, "read") == "15 tokens\n15 known, not read again"
    assert int(shown(page, "cache").split("\n")[0]) > 0

    set_to(page, "max_tokens", 19_000)
    set_to(page, "seed", "")
    cancelled = server.engine.counts.cancelled
    for stop in (lambda: page.press("Escape", 27), lambda: page.run("document.getElementById('stop').click()")):
        page.run("document.getElementById('form').requestSubmit()")
        page.until("Number(document.getElementById('count').textContent) > 30", 60)
        stop()
        ended(page, "Stopped")
        until(lambda: not server.engine.busy)
    assert server.engine.counts.cancelled == cancelled + 2

    set_to(page, "max_tokens", 30_000)
    page.run("document.getElementById('form').requestSubmit()")
    page.until("!document.getElementById('problem').hidden")
    assert "more than the 20,000" in shown(page, "problem")
    assert page.run("document.getElementById('modes').hidden") is True
    for width in (320, 600, 1000):
        page.resize(width, 700, dark=width == 600)
        assert page.run("document.documentElement.scrollWidth") <= width


def test_chats_go_on_where_there_is_a_template(talking: Server, page: browsers.Browser) -> None:
    page.open(f"http://127.0.0.1:{talking.port}/")
    page.until("!document.getElementById('modes').hidden")
    page.press("Tab", 9, 8)  # back to the choice, whose next one an arrow takes
    assert page.run("document.activeElement.name") == "mode"
    page.press("ArrowRight", 39)
    set_to(page, "seed", 1)
    page.run("document.getElementById('prompt').focus()")
    turns = []
    for words in ("the end?", "and the day?"):
        page.type(words)
        page.run("document.getElementById('status').textContent = ''")
        page.press("Enter", 13, CTRL)
        ended(page, "Ended")
        page.until("!document.getElementById('go').disabled")
        turns.append({"role": "user", "content": words})
        told = talking.ask(messages=turns, temperature=0.8, top_p=0.95, seed=1, max_tokens=200)
        turns.append(told["choices"][0]["message"])
    texts = page.run("[...document.querySelectorAll('.turn')].map((one) => one.textContent)")
    assert texts == [turn["content"] for turn in turns]
    assert page.run("document.getElementById('prompt').value") == ""
    page.run("document.getElementById('new').click()")
    assert page.run("document.querySelectorAll('.turn').length") == 0


def test_a_key_is_asked_for_and_used(run: Path, page: browsers.Browser) -> None:
    served = Server(run, "sesame")
    try:
        page.open(f"http://127.0.0.1:{served.port}/")
        page.until("!document.getElementById('keyed').hidden")
        page.until("document.getElementById('problem').textContent.includes('Bring the key')")
        page.until("document.activeElement.id === 'key'")
        page.type("sesame")
        page.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        page.until("document.title === 'tiny' && document.getElementById('problem').hidden")
    finally:
        served.close()
