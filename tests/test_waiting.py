"""What takes long is said once, on a terminal alone."""

from __future__ import annotations

import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambaseq import waiting
from mambaseq.compiled import compiling, kept_njit
from mambaseq.ops.gpu import compiling as compiling_for_gpu
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


def doubled_by_triton(x, n):
    x += n


def test_kernels_that_triton_compiles_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own steps before and after a kernel is compiled, which takes a GPU."""
    triton = pytest.importorskip("triton")
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(waiting, "_PATIENCE", 0.2)
    monkeypatch.setattr(compiling_for_gpu, "told", Told(compiling_for_gpu.told.what))
    for name in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(triton.knobs.runtime, name, None)
    compiling_for_gpu.tell_of_triton()
    backend = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options = SimpleNamespace(num_warps=4, num_ctas=1, num_stages=3, enable_fp_fusion=True,
                              launch_cooperative_grid=False, extern_libs=())  # fmt: skip
    kernel = triton.runtime.jit.JITFunction(doubled_by_triton)
    compiled: list[float] = []

    def compiles(*_: Any, **__: Any) -> str:
        time.sleep(compiled.pop())
        return "a kernel"

    kernel.compile = compiles
    kernel.ASTSource = lambda *_: None
    kernel.device_caches[0] = {}, {}, backend, None, None
    signature = {"x": "*fp32", "n": "i32"}
    for seconds, said in ((0.0, 0), (0.5, 1), (0.5, 1)):  # from the disk; anew; once
        compiled.append(seconds)
        key = (("x",), (("*fp32", ""), ("i32", "")))
        assert kernel._do_compile(key, signature, 0, {}, options, {}, False) == "a kernel"
        assert not compiled
        assert terminal.getvalue().count("mambaseq: kernels for the GPU are compiled") == said
    assert compiling_for_gpu.told._inside == 0


def test_who_listens_to_triton_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", other := lambda **_: None)
    compiling_for_gpu.tell_of_triton()
    assert triton.knobs.runtime.jit_cache_hook is other
