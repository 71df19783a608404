"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

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
import torch

from mambaseq.registry import allow_imports
from mambaseq.reporting import pictures

if not torch.cuda.is_available():  # Triton decides when a kernel is defined whether to interpret it
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
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


_png = pictures.png


@pytest.fixture(autouse=True, scope="session")
def _undrawn() -> Iterator[None]:
    """Runs of tests make the figures of their curves, but a PNG of them, which takes as long as such a run's training,
    only where `drawn` is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "png", lambda figure: b"\x89PNG\r\n\x1a\n")
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn, as for users."""
    monkeypatch.setattr(pictures, "png", _png)


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_initialized():
        torch.manual_seed(0)
    else:  # which notes for each GPU to come, with a stack trace, that it is to be seeded: a millisecond a test
        torch.default_generator.manual_seed(0)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none here")
    return torch.device("cuda")


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Matrix products in fp32 on a GPU. Set by hand: an undone monkeypatch would delete what these modules make up."""
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
    with allow_imports("tiny", "runs", "tasks", request.node.module.__name__):
        yield
