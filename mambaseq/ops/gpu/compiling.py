"""A line for people while kernels for the GPU are compiled, by NVRTC or by Triton."""

from __future__ import annotations

import importlib
from typing import Any

from mambaseq.waiting import Told

told = Told("kernels for the GPU are compiled; the next run takes them from disk")


def tell_of_triton() -> None:
    """Let Triton say when it compiles, unless somebody else listens. It asks its hooks before it looks on the disk as
    well, which takes too little time to be told."""
    runtime: Any = importlib.import_module("triton.knobs").runtime
    if runtime.jit_cache_hook is None and runtime.jit_post_compile_hook is None:
        runtime.jit_cache_hook, runtime.jit_post_compile_hook = _begin, _end


def _begin(**_: Any) -> None:
    """After it nothing is left out: Triton takes what is true for that."""
    told.__enter__()


def _end(**_: Any) -> None:  # it is not called where compiling fails, which ends more than the line
    told.__exit__(None, None, None)
