"""What takes long is said once, on a terminal alone."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from mambaseq import waiting
from mambaseq.compiled import compiling, kept_njit
from mambaseq.waiting import Told


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be called in a test itself: pytest sets standard error anew after fixtures."""
    monkeypatch.setattr("sys.stderr", found := Terminal())
    return found


def until(found: Terminal, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in found.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_what_takes_long_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(waiting, "_PATIENCE", 0.2)
    told = Told("a long thing")
    with told:
        pass
    assert terminal.getvalue() == ""
    with told, told:  # within itself
        until(terminal, "long thing")
    with told:
        time.sleep(0.3)
    assert terminal.getvalue() == "mambaseq: a long thing\n"


def test_many_short_ones_take_long_together(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(waiting, "_PATIENCE", 0.5)
    told, begun = Told("many things"), time.monotonic()
    for _ in range(1000):
        with told:
            time.sleep(0.05)
        if told.said:
            break
    until(terminal, "many things")
    assert terminal.getvalue() == "mambaseq: many things\n"
    assert time.monotonic() - begun > 0.4


def test_nothing_is_said_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_PATIENCE", 0.0)
    monkeypatch.setattr("sys.stderr", found := io.StringIO())
    told = Told("a long thing")
    with told:
        while not told.said:
            time.sleep(0.01)
        time.sleep(0.05)
    assert found.getvalue() == ""


def test_kernels_that_are_compiled_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(waiting, "_PATIENCE", 0.0)
    monkeypatch.setattr(compiling, "told", Told("kernels for the CPU are compiled; the next run takes them from disk"))
    source = tmp_path / "kernels_of_a_test.py"
    source.write_text("def doubled(x):\n    return 2 * x\n")
    names: dict[str, object] = {"__name__": "kernels_of_a_test"}
    exec(compile(source.read_text(), str(source), "exec"), names)
    assert kept_njit()(names["doubled"])(4) == 8
    until(terminal, "compiled")
    assert terminal.getvalue().count("mambaseq: kernels for the CPU are compiled") == 1
