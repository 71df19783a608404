"""The order of training data is a function of seed and position alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import TinyTokens

from mambaseq.batch import Batch
from mambaseq.data.loaders import SequenceDataModule
from mambaseq.data.module import pack_collate, pad_collate
from mambaseq.data.sampler import PositionedBatchSampler
from mambaseq.errors import DataError


def batches(position: int, epochs: int = 1, **options) -> list[list[int]]:
    done = position
    sampler = PositionedBatchSampler(10, 3, position=lambda: done, **options)
    out = []
    for _ in range(epochs):
        for batch in sampler:
            out.append(batch)
        done = len(out) + position
    return out


@pytest.mark.parametrize("endless", [False, True])
def test_any_position_continues_the_same_order(endless: bool) -> None:
    whole = batches(0, epochs=6, endless=endless)
    assert len(whole) == 18
    for position in range(9):
        rest = batches(position, epochs=3, endless=endless)
        assert len(rest) == 9 - position % 3
        assert rest == whole[position : position + len(rest)]


def test_epochs_are_permuted_anew_and_complete() -> None:
    first, second = batches(0, epochs=2)[:3], batches(0, epochs=2)[3:]
    assert first != second
    for epoch in (first, second):
        items = [i for batch in epoch for i in batch]
        assert len(set(items)) == 9
        assert set(items) <= set(range(10))
    assert batches(0, seed=1) != batches(0, seed=2)


def test_endless_indices_never_repeat() -> None:
    items = [i for batch in batches(0, epochs=3, endless=True) for i in batch]
    assert len(set(items)) == len(items)


def test_an_endless_epoch_may_be_longer_than_memory() -> None:
    sampler = PositionedBatchSampler(2**62, 4, endless=True, position=lambda: 2**60 + 5)
    assert next(iter(sampler)) == [2**62 + 20 + k for k in range(4)]


def test_two_processes_see_the_batches_of_one() -> None:
    one = list(PositionedBatchSampler(16, 4, seed=3))
    parts = [list(PositionedBatchSampler(16, 2, seed=3, rank=r, world_size=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == one


def item(length: int, **more) -> Batch:
    ids = torch.arange(1, length + 1)[None]
    return Batch(inputs=ids, targets=ids + 1, **more)


def test_padding_is_on_the_right_masked_and_ignored() -> None:
    batch = pad_collate([item(2), item(4)])
    assert batch.inputs.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[2, 3, -100, -100], [2, 3, 4, 5]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert pad_collate([item(3), item(3)]).mask is None


def test_packing_joins_end_to_end() -> None:
    batch = pack_collate([item(2, condition=torch.tensor([7])), item(3, condition=torch.tensor([9]))])
    assert batch.inputs.tolist() == [[1, 2, 1, 2, 3]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.condition is not None
    assert batch.condition.tolist() == [7, 9]


@pytest.mark.parametrize("collate", [pad_collate, pack_collate])
@pytest.mark.parametrize("outputs", [1, 3, 4])  # 3 and 4 are the lengths of the sequences too
def test_values_of_sequences_are_joined_as_they_are(collate, outputs: int) -> None:
    targets = [torch.randn(1, outputs) for _ in range(2)]
    items = [Batch(inputs=torch.ones(1, n, dtype=torch.long), targets=t) for n, t in zip((3, 4), targets, strict=True)]
    batch = collate(items)
    assert not batch.per_token
    assert torch.equal(batch.targets, torch.cat(targets))
    batch = collate([Batch(inputs=i.inputs, targets=torch.tensor([k])) for k, i in enumerate(items)])
    assert batch.targets is not None
    assert batch.targets.tolist() == [0, 1]


NAN = float("nan")


def test_targets_of_positions_are_padded_whatever_they_are() -> None:
    """Floats by NaN, which is no target, rows of values too; what is padded already is not padding of a kind."""
    rows = [Batch(torch.ones(1, n, dtype=torch.long), torch.full((1, n, 2), float(n))) for n in (1, 3)]
    batch = pad_collate(rows)
    assert batch.per_token
    assert batch.targets.shape == (2, 3, 2)
    assert batch.targets[0].isnan().all(1).tolist() == [False, True, True]
    assert int(batch.n_targets) == 2 * (1 + 3)
    ids = torch.ones(1, 3, dtype=torch.long)
    one_each = [
        Batch(ids, torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]), target_of="position"),
        Batch(ids, torch.tensor([[1.0, NAN, 3.0]]), target_of="position"),
    ]
    for batch, last in ((pad_collate(one_each), [1, 2, NAN, 1, NAN, 3]), (pack_collate(one_each), [1, 2, 1, NAN, 3])):
        assert batch.per_token
        torch.testing.assert_close(batch.targets.flatten(), torch.tensor(last), equal_nan=True)
        assert int(batch.n_targets) == 4
    assert pad_collate(one_each).mask.tolist() == [[True, True, False], [True] * 3]
    assert pack_collate(one_each).cu_seqlens.tolist() == [0, 2, 5]


@pytest.mark.parametrize("collate", [pad_collate, pack_collate])
def test_several_labels_a_sequence_are_no_tokens(collate) -> None:
    """As many as there are positions, and yet the sequence's: the batch says so, not its shape."""
    items = [Batch(torch.ones(1, n, dtype=torch.long), torch.tensor([[0, 1, 1]]), target_of="sequence") for n in (3, 5)]
    batch = collate(items)
    assert not batch.per_token
    assert not batch.to("cpu").per_token
    assert batch.targets.tolist() == [[0, 1, 1], [0, 1, 1]]
    with pytest.raises(DataError, match=r"one for each position.*target_of='sequence'"):
        _ = Batch(torch.ones(1, 5, dtype=torch.long), torch.tensor([[0, 1, 1]])).per_token


def test_bins_are_padded_and_packed_by_themselves() -> None:
    items = [Batch(torch.ones(1, n, dtype=torch.long), torch.full((1, -(-n // 3)), n), stride=3) for n in (7, 2)]
    padded, packed = pad_collate(items), pack_collate(items)
    assert padded.targets.tolist() == [[7, 7, 7], [2, -100, -100]]
    assert packed.targets.tolist() == [[7, 7, 7, 2]]
    for batch in (padded, packed, padded.to("cpu")):
        assert (batch.per_token, batch.stride, int(batch.n_targets)) == (True, 3, 4)
    cut = pad_collate([Batch(torch.ones(1, 7), torch.ones(1, 3, 1), torch.arange(7)[None] < 4, stride=3)])
    assert (cut.inputs.shape, cut.targets.shape) == ((1, 4), (1, 2, 1))
    with pytest.raises(DataError, match=r"a target for 2 positions, and others for 3 \(Batch.stride\)"):
        pad_collate([items[1], dataclasses.replace(items[1], stride=2)])
    with pytest.raises(DataError, match=r"Batch.stride must be at least 1"):
        _ = dataclasses.replace(items[1], stride=0).per_token


def test_sequences_that_do_not_go_together_are_refused() -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    label, values, tokens = torch.tensor([1]), torch.tensor([0.5]), ids
    for collate in (pad_collate, pack_collate):
        for others in ((label, values), (label, None), (label, tokens), (torch.ones(1, 2), torch.ones(1, 4))):
            with pytest.raises(DataError):
                collate([Batch(ids, targets) for targets in others])
    with pytest.raises(DataError, match="right padding"):
        pad_collate([Batch(ids, ids, torch.tensor([[False, True, True]]))])
    with pytest.raises(DataError, match=r"loader\.pack"):
        pad_collate([Batch(ids, ids, cu_seqlens=torch.tensor([0, 1, 3], dtype=torch.int32))])


def test_targets_are_counted_by_what_is_known() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    assert int(Batch(ids, torch.tensor([[1, -100, 2], [-100] * 3])).n_targets) == 2
    assert int(Batch(ids, torch.tensor([1, -100])).n_targets) == 1
    assert int(Batch(ids, torch.tensor([[0.5, NAN], [NAN, NAN]])).n_targets) == 1
    assert int(Batch(ids).n_targets) == 2
    assert int(Batch(ids[:1], cu_seqlens=torch.tensor([0, 1, 1, 3], dtype=torch.int32)).n_targets) == 3


def test_less_than_a_batch_names_the_key_to_lower() -> None:
    module = SequenceDataModule(TinyTokens(size=3), batch_size=4)
    with pytest.raises(DataError, match=r"3 sequences, fewer than one batch of 4 .* Lower loader\.batch_size"):
        module.train_dataloader()


def test_an_epoch_of_any_length_takes_no_memory() -> None:
    sampler = PositionedBatchSampler(2**40, 4, endless=True, position=lambda: 2**40)
    assert next(iter(sampler)) == [2**42, 2**42 + 1, 2**42 + 2, 2**42 + 3]
