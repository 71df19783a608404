"""Numba's machine code on disk, only in folders that nobody else can write to.

Numba stores it as pickles, and reading a pickle runs code. They are beside the source in `__pycache__`, where whoever
can write could change the source as well; in the user's own cache folder, if that one cannot be written; or in
NUMBA_CACHE_DIR, which may be shared with other users.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

from mambaseq.resources import why_unsafe
from mambaseq.waiting import told_of_kernels


class _Compiling(event.Listener):
    """Says that kernels are compiled, and not taken from disk."""

    def __init__(self) -> None:
        self.told = told_of_kernels("CPU")

    def on_start(self, event: Any) -> None:
        self.told.__enter__()

    def on_end(self, event: Any) -> None:
        self.told.__exit__(None, None, None)


compiling = _Compiling()
event.register("numba:compile", compiling)


@functools.cache
def why_not_kept(folder: Path, source: Path) -> str | None:
    """The reason why code is not stored in the folder that Numba chose for a source file, or None. It is printed
    once."""
    if folder == source.parent / "__pycache__" or (reason := why_unsafe(folder)) is None:
        return None
    print(
        f"mambaseq: kernels for the CPU are compiled anew in each process, because {reason}. Set NUMBA_CACHE_DIR to a "
        f"folder that only you may write to.",
        file=sys.stderr,
    )
    return reason


def _nothing() -> None:
    pass


def folder_of_numba() -> tuple[Path | None, str | None]:
    """The folder where Numba stores code (None: nowhere), and the reason why it does not."""
    try:
        folder = Path(str(njit(cache=True)(_nothing).stats.cache_path))
    except (RuntimeError, AttributeError):
        return None, "no folder can be written, or nothing is compiled"
    return folder, why_not_kept(folder, Path(__file__))


# What Numba wraps a function in for callers in Python and in C takes a quarter of the time to compile kernels.
_NOT_FROM_C: dict[str, Any] = {"no_cfunc_wrapper": True}
_NOT_FROM_PYTHON: dict[str, Any] = _NOT_FROM_C | {"no_cpython_wrapper": True}


def inner_njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` for functions that kernels alone call: Python cannot."""
    return njit(**_NOT_FROM_PYTHON, **options)


def sources() -> list[Path]:
    """The files that kernels take functions from; those of the domains take from their own alone."""
    ops = Path(__file__).parent / "ops"
    return sorted([Path(__file__), *ops.glob("cpu/*.py"), *ops.rglob("*kernels.py")])


@functools.cache
def _digest() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kept_njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True, ...)` if the folder is safe; without `cache` if it is not, or if none can be written.

    Code is compiled anew when a file changes that kernels take functions from: Numba looks at a kernel's own file.
    """

    options = _NOT_FROM_C | options

    def compiled(function: Callable[..., Any]) -> Any:
        source = Path(function.__code__.co_filename)
        try:
            made = njit(cache=True, **options)(function)
        except RuntimeError:  # Numba found no folder
            return njit(**options)(function)
        folder = getattr(getattr(made, "stats", None), "cache_path", None)  # a plain function with NUMBA_DISABLE_JIT
        if folder is None:
            return made
        if why_not_kept(Path(folder), source) is None:
            index = made._cache._cache_file
            index._source_stamp = (index._source_stamp, _digest())
            return made
        return njit(**options)(function)

    return compiled
