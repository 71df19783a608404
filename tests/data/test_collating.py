"""Batches of several sequences are joined as their sequences would be, one by one: padded and packed."""

from __future__ import annotations

import torch

from mambaseq.batch import Batch
from mambaseq.data.module import pack_collate, pad_collate


def one(length: int, label: int, per_token: bool) -> Batch:
    ids = torch.arange(length)[None] + 10 * label
    return Batch(ids, ids + 1 if per_token else torch.tensor([label]))


def same(left: Batch, right: Batch) -> None:
    for name in ("inputs", "targets", "mask", "cu_seqlens"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None and b is None) or torch.equal(a, b), name
        assert a is None or a.dtype == b.dtype, name


def test_several_at_once() -> None:
    for per_token in (False, True):
        for lengths in ((3, 5, 2, 4), (3, 3, 3, 3)):
            items = [one(length, label, per_token) for label, length in enumerate(lengths)]
            joined = [pad_collate(items[:3]), items[3]]
            assert len(joined[0].inputs) == 3
            same(pad_collate(joined), pad_collate(items))
            same(pack_collate(joined), pack_collate(items))
            same(pad_collate([pad_collate(items)]), pad_collate(items))
            same(pack_collate([pad_collate(items)]), pack_collate(items))
