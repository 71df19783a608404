"""A description asks for more than a machine has, by whatever number: it is sized before any of it is made."""

from __future__ import annotations

import contextlib
import inspect
import os
import resource
import time
import typing
from collections.abc import Sequence
from typing import Any

import pytest
from test_combinations import BACKBONES, ENCODERS, HEADS

from mambaseq.domain import catalog
from mambaseq.errors import UserError
from mambaseq.models import build_model

PAIRS: dict[str, Any] = {"vocab_size": 6, "complement": [3, 2, 1, 0, 4, 5]}
PLAIN: dict[str, Any] = {
    "d_model": 8,
    "encoder": {"name": "tokens", "vocab_size": 6},
    "backbone": {"name": "residual", "n_layers": 1},
    "mixer": {"name": "mamba"},
    "head": {"name": "lm", "vocab_size": 6},
}
STRANDS: dict[str, Any] = {
    "d_model": 8,
    "encoder": {"name": "rc_tokens", **PAIRS},
    "backbone": {"name": "reverse_complement", "n_layers": 1},
    "mixer": {"name": "mamba"},
    "head": {"name": "rc_lm", **PAIRS},
}
# how a call is cut in time or over processes, and lengths that something is scaled to: no tensor has such a size
NO_SIZE = {"chunk_length", "chunk_size", "context_parallel", "window", "l_max", "max_length", "most_labels"}


def parts() -> list[tuple[str, str, dict[str, Any]]]:
    tables = (("encoder", ENCODERS), ("backbone", BACKBONES), ("head", HEADS))
    found = [(kind, entry.name, table[entry.name][0]) for kind, table in tables for entry in catalog()[f"{kind}s"]]
    return found + [("mixer", entry.name, {}) for entry in catalog()["mixers"]]


def numbers(kind: str, name: str) -> list[tuple[str, bool]]:
    """The arguments of a part that are whole numbers, or lists of such."""
    part = catalog()[f"{kind}s"].get(name)
    hints = typing.get_type_hints(part.__init__)
    hints = {key: hints[key] for key in inspect.signature(part).parameters if key in hints}
    kinds = {key: {hint, *typing.get_args(hint)} for key, hint in hints.items()}
    single = [(key, False) for key, hint in kinds.items() if int in hint and typing.get_origin(hints[key]) is not list]
    return single + [(key, True) for key, hint in kinds.items() if hint & {list[int], Sequence[int]}]


@pytest.mark.parametrize(("kind", "name", "options"), parts(), ids=lambda value: str(value)[:20])
def test_what_is_too_large_is_refused_by_name_before_it_is_made(
    kind: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda key: 2**15)  # a machine with 1 GiB of memory
    spec = {**(STRANDS if name.startswith(("rc_", "reverse_complement")) else PLAIN), kind: {"name": name, **options}}
    if options.get("stride", 1) != 1:
        spec["head"] = {"name": "classification", "n_classes": 2}
    refused = 0
    for key, several in numbers(kind, name):
        for number in (10**9, 2**62):
            value = [number, number] if several else number
            changed = {**spec, "d_model": value} if key == "d_model" else {**spec, kind: {**spec[kind], key: value}}
            before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            if key in NO_SIZE:
                with contextlib.suppress(UserError):  # some have a limit of their own
                    build_model(changed)
            else:
                with pytest.raises(UserError) as told:
                    build_model(changed)
                assert key in str(told.value)
                assert len(str(told.value)) < 1000
                refused += 1
            assert time.process_time() - begun < 2
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB
    assert refused
