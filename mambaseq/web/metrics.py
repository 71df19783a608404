"""What the server does, as text for Prometheus."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from mambaseq.web.service import Service

_COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were begun.",
    "run": "Tokens of prompts that were run; the states of others were known.",
    "new_tokens": "Tokens that were added.",
    "steps": "Steps of the engine.",
    "answered": "Requests that were answered.",
    "cancelled": "Requests that were cancelled.",
    "failed": "Requests that failed.",
    "refused": "Requests that were refused because too many waited.",
}


def metrics(service: Service) -> str:
    """In Prometheus' text format, version 0.0.4."""
    return "".join(
        f"# HELP mambaseq_{name} {told}\n# TYPE mambaseq_{name} {kind}\nmambaseq_{name} {value}\n"
        for name, kind, told, value in _values(service)
    )


def _values(service: Service) -> Iterator[tuple[str, str, str, float]]:
    engine = service.engine
    for name, value in dataclasses.asdict(engine.counts).items():
        kept = {"run": "prompt_tokens_run", "answered": "requests_answered"}
        kept |= {one: f"requests_{one}" for one in ("cancelled", "failed", "refused")}
        yield f"{kept.get(name, name)}_total", "counter", _COUNTERS[name], value
    yield "seconds_to_first_token_sum", "counter", "Seconds until first tokens, all answers together.", service.to_first
    yield "seconds_to_first_token_count", "counter", "Answers that had a first token.", service.first_tokens
    yield "answer_seconds_total", "counter", "Seconds until the last tokens, all answers together.", service.to_last
    yield "requests_active", "gauge", "Requests that are being answered.", engine.active
    yield "requests_waiting", "gauge", "Requests that wait.", engine.waiting
    yield "slots", "gauge", "Answers that can be made at once.", engine.slots.size
    yield "state_bytes", "gauge", "Bytes of one answer's state.", engine.slots.bytes_each
    if engine.warmed is not None:
        yield "warm_up_seconds", "gauge", "Seconds of compiling and capturing before the start.", engine.warmed.seconds
    if (resident := resident_bytes()) is not None:
        yield "resident_bytes", "gauge", "Bytes of memory that the process holds.", resident
    if torch.cuda.is_initialized():
        yield "gpu_bytes", "gauge", "Bytes of GPU memory that PyTorch holds.", torch.cuda.memory_reserved()
    if (cache := engine.cache) is not None:
        yield "cache_bytes", "gauge", "Bytes of states of prompts that are kept.", cache.bytes
        yield "cache_states", "gauge", "States of prompts that are kept.", len(cache)


def resident_bytes() -> int | None:
    """Bytes of memory that this process holds; None where the system does not say (/proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
