"""Tables of packed sequences are made once for all layers of a call."""

from __future__ import annotations

import threading
from typing import Any

import torch

from mambaseq.generation.blocks import Blocks
from mambaseq.generation.decoder import Decoder
from mambaseq.models import causal_lm
from mambaseq.ops import sequences
from mambaseq.ops.selective_scan import segments


def test_tables_are_made_once_in_a_call_and_anew_in_the_next() -> None:
    bounds, same = torch.tensor([0, 3, 16], dtype=torch.int32), torch.tensor([0, 3, 16], dtype=torch.int32)
    elsewhere: list[Any] = []

    def made(of: torch.Tensor = bounds, steps: int = 16) -> Any:
        table = segments.cut(2, 16, steps, steps, of, False).table
        assert table is not None
        torch.testing.assert_close(table, segments.of_packed(of, 16, steps, False))
        return table

    assert made() is not made()
    with sequences.shared_tables():
        first = made()
        assert made() is first
        assert made(same) is not first
        assert made(steps=32) is not first
        thread = threading.Thread(target=lambda: elsewhere.append(made()))
        thread.start()
        thread.join()
        assert elsewhere[0] is not first
        with sequences.shared_tables():  # a call of another model
            assert made() is not first
        assert made() is first
    bounds[1] = 5
    assert made() is not first


def test_a_checked_call_shares_them(monkeypatch: Any) -> None:
    model, seen = causal_lm(vocab_size=9, d_model=8, n_layers=2).eval(), []
    forward = type(model.backbone).forward

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(sequences._held.tables)
        return forward(*arguments, **options)

    monkeypatch.setattr(type(model.backbone), "forward", watched)
    with torch.no_grad():
        state = model(torch.ones(1, 3).long(), return_state=True).state
        Blocks(model, Decoder(model, state), None, packed=True).run(torch.ones(1).long(), torch.ones(2).long())
    assert seen == [None, {}]
    assert sequences._held.tables is None
