"""The formulas of what many GPUs send each other, against counts by hand and against what a model really has."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from mambaseq.backbones.relay import _kind
from mambaseq.models import build_model

ROOT = Path(__file__).parents[2]
PAPER = runpy.run_path(str(ROOT / "benchmarks" / "scaling_on_paper.py"))
TINY = PAPER["Model"]("tiny", layers=2, width=32, vocabulary=10)


def test_a_model_has_the_parameters_and_states_that_are_counted() -> None:
    spec = {
        "encoder": {"name": "tokens", "vocab_size": 10},
        "backbone": {"name": "residual", "n_layers": 2},
        "mixer": {"name": "mamba"},
        "head": {"name": "lm", "vocab_size": 10},
        "d_model": 32,
    }
    for tied, extra in ((True, 0), (False, 320)):
        model = build_model({**spec, "tie_embeddings": tied})
        assert sum(p.numel() for p in model.parameters()) == TINY.parameters + extra
        assert PAPER["Model"]("", 2, 32, 10, tied).parameters == TINY.parameters + extra
    (state, _) = model.init_state(1)
    assert sum(_kind(tensor, False).bytes for tensor in state.tensors().values()) == PAPER["state_bytes"](TINY)
    assert TINY.flops == PAPER["Model"]("", 2, 32, 10, False).flops == 6 * TINY.parameters


def test_costs_are_those_of_a_count_by_hand() -> None:
    p = TINY.parameters
    # a token takes a second, a byte 1/8 of one within a host of two and 1/4 between hosts, a message 16 and 32 more
    machine = PAPER["Machine"](
        *(6 * p, 1.0, 1.0), nvlink=8.0, network=4.0, host=2, near=16.0, far=32.0, backward=0.5, summary=0.25, hidden=0.5
    )
    assert machine.seconds_a_token(TINY) == 1
    # two hosts of two: half a message each way within the host, half of the half each way between them
    assert machine.sum_seconds(4, 64) == (32 + 32) / 8 + (16 + 16) / 4 + 2 * (16 + 32)
    # one message over the network, and two hosts' of the neighbour within; a round of each
    assert machine.gather_seconds(4, 64) == 64 / 4 + 2 * 64 / 8 + 16 + 32
    # three hops, the middle one between hosts
    assert machine.relay_seconds(4, 64) == 2 * (16 + 64 / 8) + 32 + 64 / 4
    gradients = machine.sum_seconds(2, 4 * p)
    assert gradients == 4 * p / 8 + 32
    for tokens in (100, 10**6):
        data = PAPER["data"](machine, TINY, tokens, 2)
        assert data.bytes == 4 * p / tokens
        assert data.seconds == tokens + max(0, gradients - tokens / 2)
        assert data.efficiency == tokens / data.seconds
    tokens, state = 10**6, 4 * 64 * (16 + 3)
    half = tokens / 2
    relayed = PAPER["relayed"](machine, TINY, tokens, 2)
    assert relayed.seconds == half * 3 / 2 + 2 * (16 + state / 8)  # three layers' time on each of two, for two
    assert relayed.bytes == pytest.approx((2 * 2 * state + 4 * p) / half)
    gathered, sent = PAPER["gathered"](machine, TINY, tokens, 2), state + 4 * 64 * 16
    assert gathered.seconds == half + 2 * 0.25  # the states travel beside half of a layer
    assert gathered.bytes == pytest.approx((2 * 2 * sent + 4 * p) / half)
    short = PAPER["gathered"](machine, TINY, 100, 2)
    assert short.seconds == pytest.approx(50 + 2 * 0.25 + 4 * (16 + sent / 8 - 0.5 * 50 / 4) + gradients - 25)
    # in each of two layers both ways: 32 of out_proj, 2 + 32 of x_proj, two bytes each
    tensor = PAPER["tensor"](machine, TINY, tokens, 2)
    assert tensor.seconds == pytest.approx(half + 4 * (2 * 66 * tokens / 8 + 32))
    assert tensor.bytes == pytest.approx(4 * 2 * 66 * tokens / half)
    # two share each of two sequences: gradients are summed over all four
    mixed = PAPER["mixed"](machine, TINY, tokens, 4)
    assert mixed.seconds == pytest.approx(half + 2 * 0.25 + max(0, machine.sum_seconds(4, 4 * p) - half / 2))
    assert (
        PAPER["stops"](machine, "context, gathered", TINY, tokens, 0.8)
        >= 2
        > PAPER["stops"](machine, "context, relayed", TINY, tokens, 0.8)
    )


def test_the_table_of_the_documentation_is_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "several_devices.md").read_text(encoding="utf-8")
    assert PAPER["table"](PAPER["Machine"]()) in page, "run `python benchmarks/scaling_on_paper.py`"


def test_the_documentation_names_what_is_measured_and_what_is_assumed() -> None:
    page = " ".join((ROOT / "docs" / "several_devices.md").read_text(encoding="utf-8").split())
    m = PAPER["Machine"]()
    measured = (
        f"Only {m.mfu} of the bf16 peak, for 130 M parameters on one H200, and the {1e3 * m.summary} ms that gathering"
    )
    assert f"{measured} takes of a layer of it are measured; {m.larger} for" in page
    rates = f"{m.nvlink / 1e9:.0f} GB/s between the GPUs of a host, {m.network / 1e9:.0f} GB/s a GPU between hosts"
    assert f"{rates}, {m.near * 1e6:.0f} and {m.far * 1e6:.0f} µs a message" in page
    told = "None of it has run on more than two GPUs"
    assert page.count(told) == 1
    assert told in " ".join(PAPER["__doc__"].split())
