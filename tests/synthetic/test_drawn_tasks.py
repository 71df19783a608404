"""Selective copying and induction heads: what they are by construction, and items that depend on (seed, i) alone."""

from __future__ import annotations

import doctest
import importlib
import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from mambaseq_synthetic import induction_heads, recall, selective_copying, state_tracking
from mambaseq_synthetic.drawing import TEST
from mambaseq_synthetic.induction_heads import InductionHeadsData
from mambaseq_synthetic.listops import ListOpsData
from mambaseq_synthetic.listops import draw as listops_draw
from mambaseq_synthetic.pathfinder import PathfinderData
from mambaseq_synthetic.recall import RecallData
from mambaseq_synthetic.selective_copying import SelectiveCopyingData
from mambaseq_synthetic.state_tracking import StateTrackingData, machine

from mambaseq.data.drawing import below, distinct, splitmix64, words
from mambaseq.data.loaders import SequenceDataModule
from mambaseq.data.module import pad_collate
from mambaseq.errors import ConfigError

ENDLESS = (
    lambda **options: SelectiveCopyingData(length=40, n_data=4, **options),
    lambda **options: InductionHeadsData(length=20, test_lengths=[10, 30], **options),
    lambda **options: ListOpsData(min_length=10, length=40, **options),
    lambda **options: PathfinderData(size=12, **options),
    lambda **options: RecallData(length=20, n_pairs=3, test_lengths=[10, 30], **options),
    lambda **options: StateTrackingData(length=20, test_lengths=[10, 30], **options),
)


@pytest.mark.parametrize(
    "module", ["selective_copying", "induction_heads", "digits", "listops", "pathfinder", "recall", "state_tracking"]
)
def test_examples_in_the_docstrings(module: str) -> None:
    done = doctest.testmod(importlib.import_module(f"mambaseq_synthetic.{module}"))
    assert done.attempted >= 2
    assert done.failed == 0


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("make", ENDLESS)
def test_items_depend_on_seed_and_index_alone(make: Any) -> None:
    train = make(seed=3).train()
    assert train.endless
    alone = [train[index] for index in (7, 10**9, 2)]
    again = make(seed=3).train()
    assert all(same(again[index], item) for index, item in zip((7, 10**9, 2), alone, strict=True))
    assert not same(train[7], train[9])
    assert not same(train[7], make(seed=4).train()[7])
    module = SequenceDataModule(make(seed=3), batch_size=3)
    module.batches_done = 5
    assert same(next(iter(module.train_dataloader())), pad_collate([train[index] for index in (15, 16, 17)]))


@pytest.mark.parametrize("make", ENDLESS)
def test_validation_and_test_sets_are_fixed(make: Any) -> None:
    one, other = (make(seed=seed, n_validation=6, n_test=8) for seed in (0, 1))
    for split, size in (("validation", 6), ("test", 8)):
        sets = [getattr(data, split)() for data in (one, other)]
        items = [list(found) for found in sets]  # ends by itself
        assert (
            len(items[0])
            == len(sets[0])
            == size * (len(one.test_lengths) if hasattr(one, "test_lengths") and split == "test" else 1)
        )
        assert all(same(a, b) for a, b in zip(*items, strict=True))
    for data in (one, other):
        found = [getattr(data, split)()[0] for split in ("train", "validation", "test")]
        assert not any(same(a, b) for a, b in itertools.combinations(found, 2))


def test_splitmix64_is_the_published_generator() -> None:
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, seed 1234567
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [number % 2**64 for number in splitmix64(torch.tensor([1234567]), 5)[0].tolist()] == known


def test_random_numbers_are_uniform() -> None:
    numbers = below(words(0, torch.arange(4000), 10), 10)
    counts = np.bincount(numbers.flatten().numpy(), minlength=10)
    assert np.abs(counts - 4000).max() < 5 * np.sqrt(4000 * 0.9)
    sets = distinct(words(1, torch.arange(20000), 2), 5)
    which, counts = np.unique(sets.numpy(), axis=0, return_counts=True)
    assert which.tolist() == [list(pair) for pair in itertools.combinations(range(5), 2)]
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000 * 0.9)
    assert distinct(words(2, torch.arange(3), 6), 6).tolist() == [list(range(6))] * 3


@pytest.mark.gpu
def test_a_gpu_draws_the_same(cuda: torch.device) -> None:
    items = torch.arange(5, 9)
    for draw in (selective_copying.draw, induction_heads.draw, recall.draw, state_tracking.draw):
        for one, other in zip(draw(0, items), draw(0, items.to(cuda)), strict=True):
            assert torch.equal(one, other.cpu())


def test_copying_asks_for_the_data_in_order() -> None:
    inputs, labels = selective_copying.draw(0, torch.arange(500), length=100, n_data=8, vocab_size=16)
    assert inputs.shape == labels.shape == (500, 100)
    assert (inputs[:, -8:] == 15).all()
    assert (labels[:, :-8] == -100).all()
    for row, answer in zip(inputs[:, :-8], labels[:, -8:], strict=True):
        assert row[row > 0].tolist() == answer.tolist()
    assert set(labels[:, -8:].flatten().tolist()) == set(range(1, 15))
    places = (inputs[:, :-8] > 0).float().mean(0)  # 8 of 92 at each place
    assert (places - 8 / 92).abs().max() < 5 * (8 / 92 / 500) ** 0.5


def test_induction_asks_for_what_followed() -> None:
    inputs, labels = induction_heads.draw(0, torch.arange(3000), length=23, vocab_size=16)
    assert (inputs[:, -1] == 15).all()
    assert ((inputs == 15).sum(1) == 2).all()
    first = (inputs == 15).float().argmax(1)
    assert torch.equal(labels[:, -1], inputs[torch.arange(3000), first + 1])
    assert (labels[:, :-1] == -100).all()
    assert (labels[:, -1] < 15).all()
    counts = np.bincount(first.numpy(), minlength=21)
    assert len(counts) == 21  # the answer is never the last token
    assert np.abs(counts - 3000 / 21).max() < 5 * np.sqrt(3000 / 21)


def test_induction_is_tested_at_many_lengths() -> None:
    data = InductionHeadsData(test_lengths=[64, 16], n_test=4)
    test = data.test()
    assert [item.inputs.shape[1] for item in test] == [64] * 4 + [16] * 4
    inputs, labels = induction_heads.draw(TEST, torch.arange(4), length=16)
    for k in range(4):
        assert torch.equal(test[4 + k].inputs[0], inputs[k])
        assert torch.equal(test[4 + k].targets[0], labels[k])


def test_recall_asks_once_for_the_value_of_each_key() -> None:
    inputs, labels = recall.draw(0, torch.arange(300), length=40, n_pairs=6, vocab_size=30)
    keys, values, later = inputs[:, :12:2], inputs[:, 1:12:2], inputs[:, 12:]
    assert (keys.min() >= 1, keys.max() < 15 <= values.min(), values.max() < 30) == (True, True, True)
    assert (labels[:, :12] == -100).all()
    assert torch.equal(later > 0, labels[:, 12:] > 0)
    for row in range(300):
        pairs = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        asked = later[row][later[row] > 0].tolist()
        assert sorted(asked) == sorted(pairs)
        assert [pairs[key] for key in asked] == labels[row][labels[row] > 0].tolist()
    assert set(keys.flatten().tolist()) == set(range(1, 15))
    assert (keys.double().mean(0) - 7.5).abs().max() < 5 * (14**2 / 12 / 300) ** 0.5  # in random order


@pytest.mark.parametrize("task", ["parity", "modular", "permutations"])
def test_a_machine_is_kept_with_its_numbers(task: Any) -> None:
    """Whoever asks first may be making something on the meta device."""
    machine.cache_clear()
    with torch.device("meta"):
        machine(task, 2)
    assert machine(task, 2).device.type == "cpu"
    machine.cache_clear()


def test_states_are_those_of_the_machines() -> None:
    inputs, labels = state_tracking.draw(0, torch.arange(50), task="parity", size=2, length=30)
    assert torch.equal(labels, inputs.cumsum(1) % 2)
    inputs, labels = state_tracking.draw(0, torch.arange(50), task="modular", size=5, length=30)
    for tokens, states in zip(inputs.tolist(), labels.tolist(), strict=True):
        value, found = 0, []
        for what, number in (divmod(token, 5) for token in tokens):
            value = (value + number, value - number, value * number)[what] % 5
            found.append(value)
        assert found == states
    inputs, labels = state_tracking.draw(0, torch.arange(20), task="permutations", size=5, length=30)
    every = list(itertools.permutations("abcde"))
    for tokens, states in zip(inputs.tolist(), labels.tolist(), strict=True):
        order = every[0]
        for token, state in zip(tokens, states, strict=True):
            order = tuple(order["abcde".index(letter)] for letter in every[token])
            assert order == every[state]
    for size in (2, 5):  # a group: each token, and each state, is a permutation of the others
        table = machine("permutations", size)
        for axis in (0, 1):
            assert torch.equal(table.sort(axis).values, torch.arange(len(table)).expand_as(table).movedim(-1, axis))


@pytest.mark.parametrize("task", ["parity", "modular", "permutations"])
def test_states_are_the_same_whatever_is_run_at_once(task: state_tracking.Task) -> None:
    table = machine(task, state_tracking.SIZES[task])
    inputs, labels = state_tracking.draw(0, torch.arange(9), task=task, size=state_tracking.SIZES[task], length=37)
    for stretch in (1, 2, 6, 36, 37):
        assert torch.equal(state_tracking.states(table, inputs, stretch), labels)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (RecallData, {"n_pairs": 0}, "data.n_pairs"),
        (RecallData, {"length": 47}, r"data.length.*three times data.n_pairs"),
        (RecallData, {"test_lengths": [256, 5]}, "data.test_lengths"),
        (RecallData, {"vocab_size": 33}, "data.vocab_size must be at least 34 for 16 pairs"),
        (StateTrackingData, {"task": "party"}, "data.task must be parity, modular or permutations, not 'party'"),
        (StateTrackingData, {"size": 3}, "data.size must be 2 for data.task parity, not 3; leave it out for 2"),
        (StateTrackingData, {"task": "permutations", "size": 6}, "from 2 to 5 .* not 6; leave it out for 5"),
        (StateTrackingData, {"test_lengths": []}, "data.test_lengths"),
        (StateTrackingData, {"length": 0}, "data.length"),
        (StateTrackingData, {"seed": -1}, "data.seed"),
    ],
)
def test_settings_of_recall_and_of_machines_that_cannot_be(kind: type, wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**wrong)


def test_settings_that_cannot_be() -> None:
    for wrong in ({"length": 31}, {"n_data": 0}, {"vocab_size": 3}, {"n_test": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}"):
            SelectiveCopyingData(**wrong)  # type: ignore[arg-type]
    for wrong in ({"length": 2}, {"test_lengths": [2, 64]}, {"test_lengths": []}, {"vocab_size": 2}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}"):
            InductionHeadsData(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [SelectiveCopyingData, InductionHeadsData, ListOpsData, PathfinderData])
def test_sizes_that_no_machine_holds(kind: Any) -> None:
    """Refused by their key; the largest seed works."""
    for key, value in (
        ("seed", 2**63),
        ("samples_per_epoch", 2**63),
        ("n_test", 2**63),
        ("length", 2**40),
        ("size", 2**20),
    ):
        if key in inspect.signature(kind).parameters:
            with pytest.raises(ConfigError, match=r"data\.\w+ must be 0|data\.\w+ must be 1"):
                kind(**{key: value})
    data = kind(seed=2**63 - 1)
    data.setup()
    assert data.train()[5].inputs.shape[0] == 1


def test_shapes_that_no_machine_draws() -> None:
    """A depth that is never reached takes no memory; numbers that take forever are refused."""
    rng = [np.random.default_rng(0) for _ in range(2)]
    assert (listops_draw(rng[0], max_depth=2**62) == listops_draw(rng[1], max_depth=200)).all()
    with pytest.raises(ConfigError, match=r"data\.n_distractors must be"):
        PathfinderData(n_distractors=2**20)
