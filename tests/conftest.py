"""What all tests share."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# OpenMP's threads sleep soon: on a machine that is busy, those that wait and spin keep the others from working
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# processes that run side by side (pytest-xdist) share the cores: more threads than cores only wait for each other
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(min(2, max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))),
)
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import pytest

if TYPE_CHECKING:
    import torch


def _has_gpu() -> bool:
    """PyTorch is not asked where `make test` hides them: the process that hands out tests never imports it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    import torch

    return torch.cuda.is_available()


if not _has_gpu():  # Triton decides when a kernel is defined whether to interpret it
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """The garbage collector stands still while everything is imported, and leaves that alone from then on, as in
    `mambaseq.importing`: to look through it takes a second each time. It looks seldom, since what PyTorch's compiler
    makes while it traces would have it look an eighth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        gc.enable()


@pytest.fixture
def uninterpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for GPUs are left alone, as on other machines without one: interpreted they take seconds each. All are
    defined before, since later tests could not interpret what is defined meanwhile."""
    if importlib.util.find_spec("triton") is not None:
        root = Path(__file__).parent.parent
        for path in (root / "mambaseq").rglob("*.py"):
            if "@triton.jit" in path.read_text(encoding="utf-8"):
                importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long goes first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def _unsynced() -> Iterator[None]:
    """Nothing waits until it is on the disk: no file of a test has to outlive the machine, and each of the dozens that
    a run syncs takes ten milliseconds, in which the worker does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _undrawn() -> Iterator[Any]:
    """Runs of tests make the figures of their curves, but a PNG of them, which takes as long as such a run's training,
    only where `drawn` is asked for. What draws it."""
    from mambaseq.reporting import pictures

    png = pictures.png
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "png", lambda figure: b"\x89PNG\r\n\x1a\n")
        yield png


@pytest.fixture
def drawn(_undrawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn, as for users."""
    monkeypatch.setattr("mambaseq.reporting.pictures.png", _undrawn)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.manual_seed(0)
    else:  # which notes for each GPU to come, with a stack trace, that it is to be seeded: a millisecond a test
        torch.default_generator.manual_seed(0)


@pytest.fixture
def cuda() -> torch.device:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none here")
    return torch.device("cuda")


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Matrix products in fp32 on a GPU. Set by hand: an undone monkeypatch would delete what these modules make up."""
    import torch

    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def _own_modules(request: pytest.FixtureRequest) -> Iterator[None]:
    """Configurations of the tests may name classes of the tests by import paths."""
    from mambaseq.registry import allow_imports

    with allow_imports("tiny", "runs", "tasks", request.node.module.__name__):
        yield
