"""docs/mixers.md has every mixer, and of each the numbers that its state has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from mambaseq.domain import catalog
from mambaseq.mixers import Mixer

PAGE = Path(__file__).parents[2] / "docs/mixers.md"
WIDTH = 768


def rows() -> list[tuple[str, dict, str]]:
    """Name, options and state of each row of the page's first table."""
    table = PAGE.read_text(encoding="utf-8").split("| mixer |")[1].split("\n\n")[0]
    found = []
    for line in table.splitlines()[2:]:
        name, _, state, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        kind, *options = re.findall(r"`([^`]+)`", name)
        found.append((kind, yaml.safe_load("{" + ", ".join(options) + "}"), state))
    return found


def numbers(mixer: Mixer, length: int) -> int:
    """Of the state of one sequence; without counters."""
    tensors = mixer.init_state(1, max_length=length).tensors()
    return sum(t.numel() * (1 + t.is_complex()) for t in tensors.values() if t.dtype != torch.int64)


def test_the_page_has_every_mixer() -> None:
    assert {name for name, _, _ in rows()} == {entry.name for entry in catalog()["mixers"]} - {"mlp"}


@pytest.mark.parametrize(("name", "options", "state"), rows())
def test_the_page_tells_the_size_of_a_state(name: str, options: dict, state: str) -> None:
    mixer = catalog()["mixers"].get(name)(WIDTH, **options)
    fixed = 2 * numbers(mixer, 1000) - numbers(mixer, 2000)
    growing = (numbers(mixer, 2000) - numbers(mixer, 1000)) / 1000
    said = [f"{fixed:,}"] * (fixed > 0) + [f"{growing:,.0f} a position"] * (growing > 0)
    assert state == ", and ".join(said)
    assert mixer.bounded_state == (growing == 0)
