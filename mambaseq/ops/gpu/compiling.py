"""A line for people while kernels for the GPU are compiled, by NVRTC or by Triton."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from mambaseq.waiting import told_of_kernels

told = told_of_kernels("GPU")


class _Kernel(threading.local):
    """The kernel that Triton compiles in this thread. begun: whether there is one. cached: whether it was on the
    disk."""

    begun = cached = False


_kernel = _Kernel()


def tell_of_triton() -> None:
    """Let Triton say when it compiles, unless somebody else listens. It asks its hooks before it looks on the disk as
    well; what it finds there is not counted, where it says so."""
    knobs: Any = importlib.import_module("triton.knobs")
    runtime = knobs.runtime
    if runtime.jit_cache_hook is None and runtime.jit_post_compile_hook is None:
        runtime.jit_cache_hook, runtime.jit_post_compile_hook = _begin, _end
        if getattr(knobs.compilation, "listener", _listen) is None:
            knobs.compilation.listener = _listen


def _begin(**_: Any) -> None:
    """After it nothing is left out: Triton takes what is true for that."""
    _end()  # of one that could not be compiled, of which Triton says nothing
    _kernel.begun, _kernel.cached = True, False
    told.__enter__()


def _listen(*, cache_hit: bool = False, **_: Any) -> None:
    _kernel.cached = cache_hit


def _end(**_: Any) -> None:
    if _kernel.begun:
        _kernel.begun = False
        told.leave(counts=not _kernel.cached)
