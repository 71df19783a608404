"""What takes long is said once, on a terminal alone."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambaseq import waiting
from mambaseq.compiled import compiling, kept_njit
from mambaseq.ops.gpu import compiling as compiling_for_gpu
from mambaseq.waiting import Phases, Told, process_began, told_of_kernels


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


def test_what_was_another_thing_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(waiting, "_PATIENCE", 0.5)
    told = Told("many things")
    for _ in range(12):
        told.__enter__()
        time.sleep(0.05)
        told.leave(counts=False)
    assert (told.seconds, terminal.getvalue()) == (0.0, "")
    told.__enter__()
    told.__enter__()
    time.sleep(0.05)
    told.leave()  # of one in it that counts, so does the whole
    told.leave(counts=False)
    assert 0.05 <= told.seconds < 0.5
    before = told.seconds
    told.__enter__()
    told.leave(counts=False)
    assert told.seconds == before


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


_FRESH = "MAMBASEQ_TEST_IN_A_PROCESS_OF_ITS_OWN"


def doubled_by_triton(x, n):
    x += n


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiles one of Triton by `kernel.compile`, between Triton's own steps before and after it, which take a GPU."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(compiling_for_gpu, "told", Told(compiling_for_gpu.told.what))
    monkeypatch.setattr(compiling_for_gpu._kernel, "begun", False)
    for knobs, name in (
        (triton.knobs.runtime, "jit_cache_hook"),
        (triton.knobs.runtime, "jit_post_compile_hook"),
        (triton.knobs.compilation, "listener"),
    ):
        monkeypatch.setattr(knobs, name, None)
    compiling_for_gpu.tell_of_triton()
    made = triton.runtime.jit.JITFunction(doubled_by_triton)
    made.ASTSource = lambda *_: None
    made.device_caches[0] = {}, {}, triton.backends.compiler.GPUTarget("cuda", 90, 32), None, None
    return made


def compile_with(kernel: Any, compiles: Callable[[], Any]) -> None:
    options = SimpleNamespace(num_warps=4, num_ctas=1, num_stages=3, enable_fp_fusion=True,
                              launch_cooperative_grid=False, extern_libs=())  # fmt: skip
    kernel.compile = lambda *_, **__: compiles()
    key = (("x",), (("*fp32", ""), ("i32", "")))
    kernel._do_compile(key, {"x": "*fp32", "n": "i32"}, 0, {}, options, {}, False)


def test_kernels_that_triton_compiles_are_said(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(waiting, "_PATIENCE", 0.2)
    for seconds, said in ((0.0, 0), (0.5, 1), (0.5, 1)):  # at once; slowly; once
        compile_with(kernel, functools.partial(time.sleep, seconds))
        assert terminal.getvalue().count("mambaseq: kernels for the GPU are compiled") == said
    assert compiling_for_gpu.told._inside == 0


def test_kernels_that_triton_finds_on_the_disk_do_not_count(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    triton = pytest.importorskip("triton")
    if os.environ.get(_FRESH) != "1":  # Triton compiles no more where its interpreter has run
        test = f"{__file__}::{test_kernels_that_triton_finds_on_the_disk_do_not_count.__name__}"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", test]
        done = subprocess.run(command, env={**os.environ, _FRESH: "1"}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    monkeypatch.setattr(waiting, "_PATIENCE", 1e4)  # after the line no time is taken
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    source = triton.compiler.ASTSource(
        triton.runtime.jit.JITFunction(doubled_by_triton), {"x": "*fp32", "n": "i32"}, {}
    )
    times = []
    for _ in range(3):
        compile_with(kernel, lambda: triton.compile(source, target=target))
        times.append(compiling_for_gpu.told.seconds)
    assert 0 < times[0] == times[1] == times[2]


def test_a_kernel_that_cannot_be_compiled_ends(kernel: Any) -> None:
    def fails() -> None:
        raise ValueError("no kernel")

    told = compiling_for_gpu.told
    for _ in range(2):
        with pytest.raises(ValueError, match="no kernel"):
            compile_with(kernel, fails)
        assert told._inside == 1
    compile_with(kernel, lambda: None)
    assert (told._inside, told._timer, told.said) == (0, None, False)


def test_who_listens_to_triton_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", other := lambda **_: None)
    compiling_for_gpu.tell_of_triton()
    assert triton.knobs.runtime.jit_cache_hook is other


def test_a_wait_is_told_by_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(waiting, "_compiling", [])
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(waiting, "_PATIENCE", 1e6)
    kernels = told_of_kernels("GPU")
    with kernels:
        now[0] += 7  # before the wait
    phases = Phases(since=now[0] - 2)
    phases.end("imports")
    now[0] += 0.01
    phases.end("data")
    with kernels, kernels:
        now[0] += 3
    kernels.said = True
    with kernels:  # counts as well once it has been said
        now[0] += 1
    now[0] += 0.5
    phases.end("first step")
    now[0] += 50
    assert phases.told() == "6.5 s: imports 2.0, first step 4.5 (of all, compiling kernels 4.0)"
    told = {"imports": 2.0, "data": 0.01, "first step": 4.5, "compiling kernels": 4.0}
    assert phases.plain() == {"all": 6.51, **told}


def test_a_process_knows_when_it_began() -> None:
    script = "import time; time.sleep(0.5); from mambaseq import waiting; "
    script += "print(time.perf_counter() - waiting.process_began())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert 0.45 < float(done.stdout) < 30 or not Path("/proc/self/stat").exists()
    assert "torch" in sys.modules
    assert time.perf_counter() - process_began() < 0.2, "this one has long been doing other things"
