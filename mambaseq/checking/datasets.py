"""Checks of datasets: batches of one as declared, an order that depends only on the seed, sources."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mambaseq.atomic import json_text
from mambaseq.batch import Batch
from mambaseq.checking.laws import LawBroken
from mambaseq.data.loaders import SequenceDataModule
from mambaseq.data.module import SequenceData, named_sets

_LOOKED_AT = 6


def training_items(data: SequenceData, count: int = _LOOKED_AT) -> list[Batch]:
    """The first items of a training set, in the order of training."""
    return list(itertools.islice(SequenceDataModule(data, batch_size=1).train_dataloader(), count))


def check_items(data: SequenceData) -> None:
    """Items of every set are batches of one as the dataset declares. Raises LawBroken."""
    for name, item in _all_items(data):
        _check_item(data, item, name)


def _all_items(data: SequenceData) -> Iterator[tuple[str, Any]]:
    train = data.train()
    if isinstance(train, torch.utils.data.IterableDataset):
        yield from (("training", item) for item in training_items(data))
    else:
        yield from _first(train, "training")
    for what, sets in (("validation", data.validation()), ("test", data.test())):
        for name, part in named_sets(sets).items():
            yield from _first(part, f"{what} {name}".rstrip())


def _first(dataset: Any, name: str) -> Iterator[tuple[str, Any]]:
    if len(dataset) == 0:
        raise LawBroken(f"the {name} set is empty.")
    yield from ((f"{name} item {index}", dataset[index]) for index in range(min(_LOOKED_AT, len(dataset))))


def _check_item(data: SequenceData, item: Any, name: str) -> None:
    if not isinstance(item, Batch):
        raise LawBroken(f"{name} is a {type(item).__name__}, not a mambaseq.batch.Batch.")
    inputs = item.inputs
    if inputs.dim() not in (2, 3) or len(inputs) != 1 or not inputs.shape[1]:
        raise LawBroken(f"{name}: inputs are {tuple(inputs.shape)}; (1, length) or (1, length, channels) is needed.")
    if inputs.is_floating_point() != (inputs.dim() == 3) and data.n_codes is None:
        raise LawBroken(
            f"{name}: inputs are {inputs.dtype} {tuple(inputs.shape)}; floats have channels, and ids have none unless "
            "n_codes says how many codes a position has."
        )
    if inputs.is_floating_point():
        if inputs.dtype != torch.float32 or not inputs.isfinite().all():
            raise LawBroken(f"{name}: inputs must be finite float32 numbers, but are {inputs.dtype}, or not finite.")
        _within(name, "the channels of inputs", inputs.shape[2] - 1, "n_channels", data.n_channels, exactly=True)
    else:
        if inputs.dtype != torch.int64 or int(inputs.min()) < 0:
            raise LawBroken(f"{name}: ids must be int64 of at least 0, but are {inputs.dtype} from {inputs.min()}.")
        _within(name, "an id of inputs", int(inputs.max()), "vocab_size", data.vocab_size)
        if data.n_codes is not None:
            count = inputs.shape[2] if inputs.dim() == 3 else 0
            _within(name, "the codes of inputs", count - 1, "n_codes", data.n_codes, exactly=True)
    if item.condition is not None:
        _check_condition(data, item.condition, name)
    if data.n_outputs is not None and item.kind == "values" and item.targets is not None:
        count = item.targets.shape[-1] if item.targets.dim() == 2 + item.per_token else 1
        _within(name, "the numbers of a target", count - 1, "n_outputs", data.n_outputs, exactly=True)
    _ = item.per_token  # raises if the targets are wrong
    if data.class_names and item.kind == "labels" and item.targets is not None and int(item.n_targets):
        _within(name, "a label", int(item.targets.max()), "len(class_names)", len(data.class_names))


def _check_condition(data: SequenceData, condition: torch.Tensor, name: str) -> None:
    if condition.dim() == 1:
        _within(name, "a condition", int(condition.max()), "n_conditions", data.n_conditions)
        return
    sizes = [len(one.names) for one in data.conditions if not one.is_number]
    if condition.shape[1] != len(data.conditions) or data.n_conditions != sum(sizes):
        raise LawBroken(
            f"{name}: a condition is a row of {condition.shape[1]}, but data.conditions are {len(data.conditions)}, "
            f"with {sum(sizes)} names (n_conditions is {data.n_conditions})."
        )
    for largest, size in zip(condition.amax(0).tolist(), sizes, strict=False):
        _within(name, "a condition", largest, "the number of its names", size)


def _within(name: str, what: str, largest: int, declared: str, count: int | None, exactly: bool = False) -> None:
    if count is None or largest >= count or (exactly and largest + 1 != count):
        found = f"are {largest + 1}" if exactly else f"is {largest}"
        raise LawBroken(f"{name}: {what} {found}, and {declared} is {count}.")


def check_order(make: Callable[[], SequenceData]) -> None:
    """The order of training data depends only on the seed and the number of batches done, and an item only on its
    index: nothing depends on what was read before. make: gives the dataset after `setup`. Raises LawBroken."""
    one, other = make(), make()
    train = one.train()
    if not isinstance(train, torch.utils.data.IterableDataset):
        indices = range(min(_LOOKED_AT, len(train)))
        first = [train[index] for index in indices]
        again = {index: train[index] for index in reversed(indices)}
        fresh = other.train()
        for index in indices:
            _same(first[index], again[index], f"training item {index} differs when it is read again")
            _same(first[index], fresh[index], f"training item {index} differs in a new instance of the dataset")
    for what in ("validation", "test"):
        sets = [named_sets(getattr(data, what)()) for data in (one, one, other)]
        for name, part in sets[0].items():
            for index in range(min(2, len(part))):
                for same in sets[1:]:
                    _same(part[index], same[name][index], f"the {what} set differs at each call")
    size = 1 if isinstance(train, torch.utils.data.IterableDataset) else max(min(2, len(train) // 4), 1)
    whole = list(itertools.islice(SequenceDataModule(one, batch_size=size).train_dataloader(), 4))
    module = SequenceDataModule(other, batch_size=size)
    module.load_state_dict({"batches_done": 2})
    for number, (left, right) in enumerate(zip(whole[2:], _taken(module.train_dataloader(), 2), strict=False), 2):
        _same(left, right, f"training batch {number} differs in a run that is resumed after batch 2")


def _taken(batches: Iterable[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def _same(one: Batch, other: Batch, told: str) -> None:
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        tensor = isinstance(left, Tensor) and isinstance(right, Tensor)
        if not (torch.equal(left.nan_to_num(), right.nan_to_num()) if tensor else left is right or left == right):
            raise LawBroken(f"{told} ({field.name}). Let it depend only on the seed and its index.")


def check_sources(make: Callable[[], SequenceData]) -> None:
    """`sources` gives the same checksums at every call, and options are plain. Raises LawBroken."""
    data = make()
    found = data.sources()
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in found.items()):
        raise LawBroken("sources() must be a mapping from names to checksums, both text.")
    if found != make().sources():
        raise LawBroken("sources() gives other checksums for the same files.")
    _check_tokenizer(data)
    for name in ("reader_options", "writer_options"):
        try:
            json.dumps(getattr(data, name)(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise LawBroken(f"{name}() cannot be saved with a model: {error}.") from error


def _check_tokenizer(data: SequenceData) -> None:
    tokenizer = data.tokenizer
    if tokenizer is None:
        return
    if data.tokenizer_name is None:
        raise LawBroken("it has a tokenizer but no tokenizer_name, which saving a model needs.")
    again = type(tokenizer)(**json.loads(json_text(tokenizer.options)))
    if again.options != tokenizer.options or again.vocab_size != tokenizer.vocab_size:
        raise LawBroken("its tokenizer, made again from its options, has other options or another vocab_size.")


def ragged(items: list[Batch], least: int, most: int = 48) -> list[Batch]:
    """Batches of one, cut to different lengths; those that would have no target left are not cut. least: the fewest
    inputs that the model reads."""
    found = []
    for number, item in enumerate(items):
        bin_ = item.stride
        length = min(item.inputs.shape[1], most)
        length = max(length * (len(items) - number) // len(items) // bin_ * bin_, bin_, min(least, length))
        targets = item.targets
        if item.per_token and targets is not None:
            targets = targets[:, : -(-length // bin_)]
        mask = None if item.mask is None else item.mask[:, :length]
        cut = dataclasses.replace(item, inputs=item.inputs[:, :length], targets=targets, mask=mask)
        found.append(cut if int(cut.n_targets) else item)
    return found
