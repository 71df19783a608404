"""SequenceData, the base of datasets, and how its sequences become batches."""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from mambaseq.batch import Batch
from mambaseq.conditions import Condition
from mambaseq.data.audited import Audited, audited_items
from mambaseq.data.baselines import Baseline
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import DataError, cut_list, shown


class ItemDataset(Protocol):
    """A map-style dataset whose items are batches of one sequence.

    `endless` (optional, default False): any index is valid and item i is a function of i alone (random crops);
    `len` is then the number of items that make an epoch.
    `groups` (optional): for a validation or test set, the group of each item, in their order; any hashable values.
    Items of one group (windows of one record, sequences of one gene or patient) are drawn together where an evaluation
    says how far its figures are from chance, if there are 10 groups or more.
    `__getitems__(indices)` (optional): the same items, as a list of batches of one or more sequences, in order. Many
    short sequences are read faster together.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


_RARE = 5  # targets


class SequenceData(abc.ABC):
    """One kind of data: training, validation and test sets, and what a model must know about them.

    Subclasses take their settings as typed keyword arguments of `__init__` (they become keys of `data:` in YAML,
    with the docstring's text as help), do no work there, and read files in `setup`, which may be called twice.

    Known after `setup`:
    vocab_size: number of token ids, None for continuous inputs. n_codes: codes at a position, None for one token each.
    n_channels: channels of a continuous input.
    class_names: names of the labels, empty for language modelling.
    conditions: what sequences are conditioned on, in order, those of names before numbers (see
        `mambaseq.conditions`); a dataset with one of names may leave it out. n_conditions: number of names of all
        conditions, 0 for none. condition_names: of one condition, its names.
    class_counts: of each class, how many known targets of the training set are of it, and how many are not; None if
        that is not counted. `balanced` weights of heads are made of them.
    n_outputs: how many values the target of a sequence, position or bin has, if targets are values. channel_mean,
        channel_std: of each channel of a continuous input, in its units; the encoder signal and the head forecast
            normalise by them. None leaves the values as they are.
    complement: for DNA, the id that each id is paired with; None for data without another strand.
    strand_classes: the number that each class, or value of a target, has on the other strand: `[0, 2, 1]` for other,
        coding +, coding -. None where they are the same on both. `predict` turns answers by it.
    length: length of the windows, what `predict` cuts long records into.
    tokenizer, tokenizer_name: the tokenizer and its registered name. tokenizer is None for continuous inputs.
    start_ids: what generation starts from without a prompt (silence, a line break).
    reader, writer: registered names of what reads records for `predict` and writes for `generate`.
    task: what is to be learned, one of `mambaseq.data.purpose.TASKS`; None derives it from a few sequences.

    Set before training:
    left_out_file: where a stream lists the rows that it leaves out as it meets them; None for nowhere.
    """

    vocab_size: int | None = None
    n_codes: int | None = None
    n_channels: int | None = None
    class_names: Sequence[str] = ()
    class_counts: Sequence[tuple[int, int]] | None = None
    n_conditions: int = 0
    n_outputs: int | None = None
    channel_mean: Sequence[float] | None = None
    channel_std: Sequence[float] | None = None
    complement: Sequence[int] | None = None
    strand_classes: Sequence[int] | None = None
    condition_names: Sequence[str] = ()
    conditions: Sequence[Condition] = ()
    length: int = 0
    tokenizer: Tokenizer | None = None
    tokenizer_name: str | None = None
    start_ids: Sequence[int] = (0,)
    reader: str | None = None
    writer: str | None = None
    task: Literal["next_token", "masked", "labels", "classes", "multilabels", "values", "next_values"] | None = None
    left_out_file: Path | None = None

    @abc.abstractmethod
    def setup(self) -> None:
        """Read or build what the sets need. Raises DataError that names file, record and remedy."""

    @abc.abstractmethod
    def train(self) -> Any:
        """The training set: an `ItemDataset`, or an iterable dataset of batches of one (see `StreamedWindows`)."""

    def validation(self) -> Any | None:
        """The validation set, the same at every call; None if there is none. Several sets: a mapping from names to
        sets. Each is measured alone, and the overall numbers are means over them."""
        return None

    def test(self) -> Any | None:
        """The test set, or several by name, as in `validation`."""
        return None

    def sources(self) -> dict[str, str]:
        """The contents of this dataset's files, after `setup`: the name of each file to a checksum of its contents. A
        run notices changed data by them. Empty for data that are not read from files."""
        return {}

    def extremes(self) -> list[tuple[int, str]]:
        """The lengths of the shortest and the longest sequence of all sets, after `setup`, each with its file and place
        there: a run is refused at its start if the model cannot read them. Empty where that is not known without
        reading all of them; the first sequence alone is looked at then."""
        return []

    def splits_told(self) -> str:
        """One line for people, after `setup`: how many sequences each set has, and how they were chosen; "" where there
        is nothing to say. `fit` prints it."""
        return ""

    def left_out(self) -> list[dict[str, Any]]:
        """The rows of files that could not be used and were left out, after `setup`: `file`, `line` and `reason` of
        each. `fit` lists them in the run's folder."""
        return []

    def audited(self) -> Audited:
        """What `mambaseq data audit` looks at: the sequences of each split, each with its class and place, before
        augmentation, and how copies and shortcuts among them are told (see `mambaseq.data.audited.Audited`).

        Without an override: the tokens of the sets' items. Datasets that know the records behind their items should
        say so, and give what a run would refuse (copies in two splits) as well: the audit is what finds it. A table of
        labelled sequences gives `Audited({"train": [AuditedSequence(ids, class name, file, row), ...], ...})`; one of
        DNA, `mambaseq_dna.auditing.audited_dna(splits)`. May be called before `setup`, and calls it where it needs it.
        Raises DataError for data that cannot be audited.
        """
        return audited_items(self)

    def baselines(self) -> Mapping[str, Baseline]:
        """What a model of these data must beat: for `mambaseq test --baselines`, called after `setup`. Each name stands
        for a function that fits itself to the training set and answers the records of a test set; see
        `mambaseq.data.baselines`."""
        return {}

    def reader_options(self) -> dict[str, Any]:
        """Plain options that are saved with a model and handed to the reader (sample rate, ...)."""
        return {}

    def writer_options(self) -> dict[str, Any]:
        """Plain options that are saved with a model and handed to the writer."""
        return {}

    def collate(self, items: list[Batch]) -> Batch:
        """Join batches; see `pad_collate`."""
        return pad_collate(items)


def _pad_stack(tensors: list[torch.Tensor], length: int, value: float) -> torch.Tensor:
    """Rows of `(1, length, ...)`, padded on the right. Raises DataError for rows of different kinds."""
    if len({(tensor.dtype, tensor.shape[2:]) for tensor in tensors}) > 1:
        kinds = sorted({f"{tensor.dtype} {tuple(tensor.shape[2:])}" for tensor in tensors})
        raise DataError(f"The sequences of a batch differ in more than their length: {', '.join(kinds[:4])}.")
    out = tensors[0].new_full((len(tensors), length, *tensors[0].shape[2:]), value)
    for row, tensor in enumerate(tensors):
        out[row, : tensor.shape[1]] = tensor[0]
    return out


def _join(items: list[Batch], name: str, dim: int = 0) -> torch.Tensor | None:
    tensors = [getattr(item, name) for item in items]
    given = [tensor for tensor in tensors if tensor is not None]
    if not given:
        return None
    if len(given) < len(tensors) or len({(t.dtype, t.dim(), t.shape[dim + 1 :]) for t in given}) > 1:
        raise DataError(
            f"Some sequences of a batch have {name} of another kind than others, or none. All must have the same."
        )
    return torch.cat(given, dim)


def _per_token(items: list[Batch]) -> bool:
    """Whether targets belong to positions. Raises DataError if that is so for some sequences only, or bins differ in
    size."""
    kinds = {item.per_token for item in items}
    if len(kinds) > 1:
        raise DataError(
            "Some sequences of a batch have a target for each position, and others for the whole sequence. All must "
            "be of one kind; Batch(target_of=...) says which."
        )
    if len(strides := {item.stride for item in items}) > 1:
        raise DataError(
            f"Some sequences of a batch have a target for {min(strides)} positions, and others for {max(strides)} "
            "(Batch.stride). All must have the same."
        )
    return kinds.pop()


def _unpadded(item: Batch) -> Batch:
    """A batch of one, without its padding. Raises DataError if padding is not at the end."""
    if item.mask is None:
        return item
    length = int(item.mask.sum())
    if not item.mask[:, :length].all():
        raise DataError("A sequence's mask must be one of right padding: True up to its end, then False.")
    targets = item.targets
    if item.per_token and targets is not None:
        targets = targets[:, : -(-length // item.stride)]
    return dataclasses.replace(item, inputs=item.inputs[:, :length], targets=targets, mask=None)


def _single(items: list[Batch]) -> list[Batch]:
    """Batches of one sequence, from batches of one or more."""
    if all(len(item.inputs) == 1 for item in items):
        return items
    return [
        item if len(item.inputs) == 1 else item.map(lambda tensor, row=row: tensor[row : row + 1])  # type: ignore
        for item in items
        for row in range(len(item.inputs))
    ]


def pad_collate(items: list[Batch]) -> Batch:
    """Join batches of one sequence or more, padding on the right (inputs 0, targets of positions -100 or NaN) and
    masking where lengths differ. Labels and values of whole sequences are joined as they are.

    Raises DataError for sequences that do not fit together, and for packed ones, which can only be packed."""
    if any(item.cu_seqlens is not None for item in items):
        raise DataError("Packed sequences cannot be padded. Set loader.pack to true.")
    if len(items) == 1 and len(items[0].inputs) > 1:
        return items[0]
    items = [_unpadded(item) for item in _single(items)]
    lengths = [item.inputs.shape[1] for item in items]
    longest = max(lengths)
    mask = None
    if min(lengths) != longest:
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    targets: torch.Tensor | None
    if _per_token(items):
        given = [item.targets for item in items if item.targets is not None]
        targets = _pad_stack(given, -(-longest // items[0].stride), math.nan if given[0].is_floating_point() else -100)
    else:
        targets = _join(items, "targets")
    return Batch(
        inputs=_pad_stack([item.inputs for item in items], longest, 0),
        targets=targets,
        mask=mask,
        target_of=items[0].target_of,
        stride=items[0].stride,
        condition=_join(items, "condition"),
        n_units=_join(items, "n_units"),
    )


def _packed(item: Batch) -> Batch:
    """A batch of several sequences end to end, if its targets are of whole sequences; others as they are."""
    if len(item.inputs) == 1 or item.per_token:
        return item
    rows, longest = item.inputs.shape[:2]
    lengths = torch.full((rows,), longest) if item.mask is None else item.mask.sum(1)
    inputs = item.inputs.flatten(0, 1) if item.mask is None else item.inputs[item.mask]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)])
    return dataclasses.replace(item, inputs=inputs[None], mask=None, cu_seqlens=bounds)


def pack_collate(items: list[Batch]) -> Batch:
    """Join batches of one sequence or more end to end: batch 1 and `cu_seqlens` instead of padding.

    Raises DataError for sequences that do not fit together."""
    items = [_packed(item) for item in items]
    items = [_unpadded(item) for item in _single(items)]
    bounds = [torch.zeros(1, dtype=torch.int32)]
    for item in items:  # an item may itself be packed
        length = torch.tensor([item.inputs.shape[1]], dtype=torch.int32)
        bounds.append(bounds[-1][-1] + (length if item.cu_seqlens is None else item.cu_seqlens[1:]))

    return Batch(
        inputs=_join(items, "inputs", dim=1),  # type: ignore[arg-type]
        targets=_join(items, "targets", dim=1 if _per_token(items) else 0),
        target_of=items[0].target_of,
        stride=items[0].stride,
        cu_seqlens=torch.cat(bounds),
        condition=_join(items, "condition"),
        n_units=_join(items, "n_units"),
    )


def named_sets(sets: Any | None) -> dict[str, Any]:
    """The sets that `SequenceData.validation` or `test` gives, by name; "" for a set without one. Raises DataError for
    invalid names."""
    if not isinstance(sets, Mapping):
        return {} if sets is None else {"": sets}
    for name in sets:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise DataError(
                f"A validation or test set is named {shown(name)}. Names consist of letters, digits, - and _."
            )
    return dict(sets)


def classes_told(data: SequenceData) -> str:
    """The classes of a training set of sequences with their targets, for people; "" if they are not known. Classes that
    are rare are named, and those that another differs from by case alone. Classes of positions are not counted: that
    would read all of a genome before the first step."""
    if data.task != "classes" or data.class_counts is None:
        return ""
    counts = {name: known for name, (known, _) in zip(data.class_names, data.class_counts, strict=True)}
    told = [cut_list([f"{name} {count:,}" for name, count in counts.items()], most=8)]
    rare = [name for name, count in counts.items() if count < min(_RARE, max(counts.values()) / 20)]
    alike = [name for name in counts if [one.casefold() for one in counts].count(name.casefold()) > 1]
    for kind, names in (("rare", rare), ("alike but for case", alike)):
        if names:
            told.append(f"{kind}: {cut_list(list(map(shown, names)), most=4)}. Are they misspelt?")
    return f"classes of the training set: {'; '.join(told)}"
