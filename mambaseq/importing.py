"""Imports that take seconds, made quicker."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from mambaseq.errors import shown


@contextlib.contextmanager
def uncollected(for_good: bool = False) -> Iterator[None]:
    """Python's garbage collector stands still meanwhile. PyTorch and Lightning make a million objects that stay, and it
    would look through them again and again: a sixth of the time until the first step of a training. Of torchmetrics,
    only what Lightning needs is imported; see `_InPart`.

    for_good: if PyTorch is imported meanwhile, the collector leaves all that is there at the end alone from then on.
    Only for a process that is ours.
    """
    was_on, had_torch = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    finder = _Torchmetrics()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if for_good and not had_torch and "torch" in sys.modules:
            gc.freeze()
        if was_on:
            gc.enable()


class _Torchmetrics(importlib.abc.MetaPathFinder):
    """Finds torchmetrics, to be imported in part."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchmetrics":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _InPart(spec.loader)
        return spec


class _InPart(importlib.abc.Loader):
    """Imports the classes of torchmetrics that Lightning asks for; all of it once somebody asks for more. All of it
    imports scipy.signal and, where it is installed, transformers: a quarter of what a training imports.

    `importlib.util.LazyLoader` would import it all at Lightning's first question.
    """

    def __init__(self, whole: importlib.abc.Loader) -> None:
        self._whole = whole
        self._lock, self._busy = threading.RLock(), False

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._whole.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._whole
        if module.__spec__ is not None:
            module.__spec__.loader = self._whole
        try:
            self._import_part(module)
        except (ImportError, AttributeError):  # a version of another layout
            self._whole.exec_module(module)

    def _import_part(self, module: ModuleType) -> None:
        about = importlib.import_module("torchmetrics.__about__")
        module.__dict__.update({name: getattr(about, name) for name in about.__all__})
        module._logger = logging.getLogger("torchmetrics")  # type: ignore[attr-defined]
        importlib.import_module("torchmetrics.utilities")  # which the next imports, and is imported by, in this order
        for name, where in (("Metric", "torchmetrics.metric"), ("MetricCollection", "torchmetrics.collections")):
            setattr(module, name, getattr(importlib.import_module(where), name))

        def others(name: str) -> Any:
            # what asks all modules for attributes of Python's own asks for nothing of this one
            if not name.startswith("__") or name == "__all__":
                self._import_whole(module)
            if name in module.__dict__:
                return module.__dict__[name]
            raise AttributeError(f"module 'torchmetrics' has no attribute {shown(name)}")

        module.__getattr__ = others  # type: ignore[method-assign]

    def _import_whole(self, module: ModuleType) -> None:
        """Once, by one thread while others wait; what it imports meanwhile finds the module as far as it is."""
        with self._lock:
            if self._busy or "__getattr__" not in module.__dict__:
                return
            self._busy = True
            try:
                self._whole.exec_module(module)
                del module.__getattr__
            finally:
                self._busy = False
