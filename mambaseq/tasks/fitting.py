"""Checks before the first step that a model, its metrics and the data fit each other, so that nothing else is learned
or measured than it seems."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mambaseq.batch import Batch
from mambaseq.data.module import SequenceData, named_sets
from mambaseq.data.purpose import NEXT, asks_for_the_next
from mambaseq.encoders import TokenEncoder, output_bounds
from mambaseq.errors import ConfigError, UserError, shown
from mambaseq.heads.positions import PositionHead
from mambaseq.metrics.base import Metric
from mambaseq.models import SequenceModel
from mambaseq.models.modules import evaluating

_GIVEN = {"labels": "label", "multilabels": "set of yes-or-no labels", "values": "value"}
_FITTING: dict[tuple[str, bool], tuple[str, ...]] = {  # kind and whether it is of positions, to heads
    ("labels", False): ("classification",),
    ("labels", True): ("lm", "token_classification"),
    ("multilabels", False): ("multilabel",),
    ("multilabels", True): ("token_multilabel",),
    ("values", False): ("regression",),
    ("values", True): ("token_regression", "forecast"),
}
_EXAMPLES = 8  # examples to look at for one with a target
_PROBED = 64  # positions


def check_data(model: SequenceModel, data: SequenceData, dataset: str, metrics: Mapping[str, Metric]) -> None:
    """Raise ConfigError if the examples of a dataset (after `setup`) do not fit the model or the metrics.

    A stream gives no example before its place is set: its validation set is checked, and the first training batch when
    it comes (`Task`).
    """
    batch = _example(data)
    if batch is not None:
        if batch.cu_seqlens is None:
            _check_lengths(model, data.extremes() or [(batch.inputs.shape[1], "")], dataset)
        _check_inputs(model, batch, dataset)
        check_kinds(model, batch, metrics, dataset)
        _check_labels(model, batch, dataset)
        if asks_for_the_next(data, batch):
            check_next_token(model, dataset, batch.kind)
    elif data.task in NEXT:
        check_next_token(model, dataset, "values" if data.task == "next_values" else "labels")
    if data.task == "masked":
        check_masked(model, dataset)
    elif data.class_names and data.task in (None, "classes") and model.head.per_token:
        raise _wrong_head(model, dataset, "label a sequence", _FITTING["labels", False])


def _check_lengths(model: SequenceModel, lengths: list[tuple[int, str]], dataset: str) -> None:
    """Raise ConfigError for a sequence that is shorter or longer than the encoder reads."""
    least, most = getattr(model.encoder, "min_length", 1), getattr(model.encoder, "max_length", None)
    for length, where in lengths:
        which = f"a sequence of {length:,}{f' ({where})' if where else ''}"
        if length < least:
            raise ConfigError(
                f"The encoder {_name(model, 'encoder')} reads {least} inputs at once, but the dataset {dataset} gives "
                f"{which}. Give longer ones (data.length), or choose another encoder."
            )
        if most is not None and length > most:
            raise ConfigError(
                f"The encoder {_name(model, 'encoder')} reads sequences of up to {most:,} positions, but the dataset "
                f"{dataset} gives {which}. Give shorter ones (data.length {most}, where a dataset has it), "
                "or let the encoder read more (its settings under model.encoder)."
            )


def check_shares(shared: int, data: SequenceData, dataset: str, in_a_row: int = 1, warmup: int = 0) -> None:
    """Raise ConfigError for sequences of fewer positions than the `shared` processes that split each, where a dataset
    (after `setup`) knows its shortest one. Nothing is known of a batch but that it may have that one alone.

    in_a_row: how many sequences are packed into one that is split. warmup: the length that they begin with, 0 for
        their own.
    """
    splits = f"model.backbone.context_parallel splits each sequence over {shared} processes, which need a position each"
    if 0 < warmup < shared:
        raise ConfigError(
            f"{splits}, but length_warmup.start is {warmup}. Set it to at least {shared}, or context_parallel to at "
            f"most {warmup}."
        )
    for length, where in data.extremes():
        if (most := length * in_a_row) < shared:
            place = f" ({where})" if where else ""
            raise ConfigError(
                f"{splits}, but the dataset {dataset} gives one of {length}{place}. Set context_parallel to at most "
                f"{most}, give longer ones (data.length with data.pad, where a dataset has them), or leave out what "
                "is shorter."
            )


def _example(data: SequenceData) -> Batch | None:
    """A batch of one, with a target if one of the first has any."""
    for dataset in itertools.chain([data.train()], named_sets(data.validation()).values()):
        if dataset is None or isinstance(dataset, torch.utils.data.IterableDataset) or len(dataset) == 0:
            continue
        examples = (dataset[index] for index in range(min(_EXAMPLES, len(dataset))))
        first = next(examples)
        return next((one for one in itertools.chain([first], examples) if int(one.n_targets)), first)
    return None


def _check_inputs(model: SequenceModel, batch: Batch, dataset: str) -> None:
    """Raise ConfigError for several codes at a position and an encoder of one, or the other way round."""
    inputs, encoder = batch.inputs, model.encoder
    if not isinstance(encoder, TokenEncoder) or inputs.is_floating_point():
        return
    count, wanted = (inputs.shape[2] if inputs.dim() == 3 else 0), getattr(encoder, "n_codes", 0)
    if count != wanted:
        raise ConfigError(
            f"model.encoder.name is {_name(model, 'encoder')}, which reads {wanted or 'one'} token(s) at a position, "
            f"but the dataset {dataset} gives {count or 'one'}. Choose the encoder {'codes' if count else 'tokens'}, "
            "or another dataset."
        )


def check_kinds(
    model: SequenceModel, batch: Batch, metrics: Mapping[str, Metric], dataset: str = "that is given"
) -> None:
    """Raise ConfigError if a batch's targets are not what the head learns or a metric measures. Reads no values."""
    if batch.targets is None:
        return
    per_token, kind, head = batch.per_token, batch.kind, model.head
    of_codes = batch.target_of == "code"
    place = "code" if of_codes else "position" if per_token else "sequence"
    fits = per_token == head.per_token and getattr(head, "learns", None) in (None, kind)
    if not fits or of_codes != bool(getattr(head, "codes", 0)):
        fitting = ("codes",) if of_codes else _FITTING[kind, per_token]
        raise _wrong_head(model, dataset, f"{_GIVEN[kind]} a {place}", fitting)
    if per_token and (stride := getattr(head, "stride", 1)) != batch.stride:
        binned = next((name for name in _FITTING[kind, True] if name.startswith("token_")), "")
        has_bins = isinstance(head, PositionHead)
        remedy = f"Set model.head.stride to {batch.stride}" if has_bins else f"Choose the head {shown(binned)}"
        raise ConfigError(
            f"model.head.name is {_name(model, 'head')}, which answers once for {stride} position(s), but the dataset "
            f"{dataset} gives one {_GIVEN[kind]} for {batch.stride}. {remedy}, or choose another dataset."
        )
    for name, metric in metrics.items():
        if metric.per_token not in (None, per_token) or metric.measures not in (None, kind):
            takes = "a target" if metric.measures is None else f"a {_GIVEN[metric.measures]}"
            where = {None: "", True: " for each position", False: " for each sequence"}[metric.per_token]
            raise ConfigError(
                f"The metric {shown(name)} needs {takes}{where}, but the dataset {dataset} gives one {_GIVEN[kind]} a "
                f"{place}. Remove it from metrics, or choose another (`mambaseq list metrics`)."
            )


def _wrong_head(model: SequenceModel, dataset: str, given: str, fitting: tuple[str, ...]) -> ConfigError:
    such = " or ".join(map(repr, fitting))
    return ConfigError(
        f"model.head.name is {_name(model, 'head')}, but the dataset {dataset} gives one {given}. Choose a head for "
        f"those, such as {such} (`mambaseq list heads`), or another dataset."
    )


def _check_labels(model: SequenceModel, batch: Batch, dataset: str) -> None:
    """Raise ConfigError for labels that the head has no output for, and for multilabels that are neither 1 nor 0."""
    targets, kind = batch.targets, batch.kind
    if targets is None or kind == "values":
        return
    known = targets[targets != -100]
    if not len(known):
        return
    least, most = int(known.min()), int(known.max())
    if kind == "multilabels" and (least < 0 or most > 1):
        raise ConfigError(
            f"The dataset {dataset} gives labels from {least} to {most} where any of several may apply. Give 1 for a "
            "label that applies, 0 for one that does not, and -100 for an unknown one."
        )
    count = getattr(model.head, "n_labels", None)
    count = count or getattr(getattr(model.head, "linear", None), "out_features", None)
    if kind == "labels" and (least < 0 or (count is not None and most >= count)):
        raise ConfigError(
            f"The dataset {dataset} gives labels from {least} to {most}, and the head {_name(model, 'head')} tells "
            f"{'those from 0 on' if count is None else f'{count} classes (0 to {count - 1})'} apart. Give labels of "
            "these classes (data.class_names, vocab_size), or -100 for unknown ones."
        )


def _name(model: SequenceModel, part: str) -> str:
    """The name in the configuration, if there is one."""
    return repr((model.spec or {}).get(part, {}).get("name") or type(getattr(model, part)).__name__)


def check_next_token(model: SequenceModel, dataset: str = "that is given", kind: str = "labels") -> None:
    """Raise ConfigError if a model that predicts the next token, or value, can see it, or an encoder does not say
    whether it can."""
    asks = f"The dataset {dataset} asks for the next {'value' if kind == 'values' else 'token'}, which the"
    if not model.backbone.causal:
        raise ConfigError(
            f"{asks} backbone {_name(model, 'backbone')} sees. Choose a causal backbone, such as 'residual', or a "
            f"dataset of labels or of masked tokens (data.objective masked, where a dataset has it)."
        )
    causal = getattr(model.encoder, "causal", None)
    if causal is None:
        raise ConfigError(
            f"{asks} encoder {_name(model, 'encoder')} may see: it does not say whether it is causal. Declare causal = "
            f"True in {type(model.encoder).__name__} if a position sees nothing after it, or choose another encoder."
        )
    if not causal:
        raise ConfigError(
            f"{asks} encoder {_name(model, 'encoder')} sees. Choose a causal encoder, such as 'tokens', or a dataset "
            f"of labels."
        )


def check_masked(model: SequenceModel, dataset: str = "that is given") -> None:
    """Raise ConfigError if a model that predicts masked tokens from both sides sees only one side."""
    if model.backbone.causal:
        raise ConfigError(
            f"The dataset {dataset} asks for masked tokens, which are predicted from both sides, but the backbone "
            f"{_name(model, 'backbone')} is causal. Choose one that reads both ways, such as 'bidirectional', or ask "
            "for the next token (data.objective next_token)."
        )


@contextlib.contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """Runs the block in evaluation mode without gradients, and restores the state afterwards."""
    with evaluating(model), torch.no_grad():
        yield


def rehearse(model: SequenceModel, batch: Batch, metrics: Mapping[str, Metric]) -> None:
    """Give the first row's output to a copy of each metric that reads it. Raises ConfigError for a metric that
    fails."""
    reading = {name: metric for name, metric in metrics.items() if metric.needs_logits}
    if not reading:
        return
    if batch.cu_seqlens is None:
        batch = batch.map(lambda tensor: tensor[:1])
    with _aside(model):
        output = model(
            batch.inputs,
            batch.targets,
            mask=batch.mask,
            condition=batch.condition,
            cu_seqlens=batch.cu_seqlens,
            return_logits=True,
        )
        for name, metric in reading.items():
            try:
                metric.clone().update(output, batch)
            except UserError:
                raise
            except Exception as error:  # a third party's metric may raise anything
                raise ConfigError(
                    f"The metric {shown(name)} cannot be computed from the output of the head {_name(model, 'head')}: "
                    f"{' '.join(str(error).split())[:300]}. Remove it from metrics, or choose another."
                ) from error


def probe_future(model: SequenceModel, batch: Batch) -> None:
    """Change the end of a sequence and see whether the outputs at its beginning change: for encoders and backbones that
    declare to be causal. Raises ConfigError if one is not."""
    inputs = batch.inputs[:1, :_PROBED]
    changed, at = _other_end(inputs)
    if at == 0:
        return
    condition = None if batch.condition is None else batch.condition[:1]
    whole = at // model.stride  # positions with unchanged inputs
    with _aside(model):
        before, after = model.encoder(inputs, condition), model.encoder(changed, condition)
        if getattr(model.encoder, "causal", False):
            _compare(before[:, :whole], after[:, :whole], "encoder", model, whole)
        if model.backbone.causal:
            other = torch.cat([before[:, :whole], after[:, whole:]], 1)
            _compare(model.backbone(before)[:, :whole], model.backbone(other)[:, :whole], "backbone", model, whole)


def probe_neighbours(model: SequenceModel, batch: Batch) -> None:
    """Encode sequences of a padded or packed batch alone as well, to see whether an encoder that looks at more than a
    position's own input sees padding or other sequences. Raises ConfigError if it does."""
    encoder, condition = model.encoder, batch.condition
    if getattr(encoder, "position_wise", False) or (batch.mask is None and batch.cu_seqlens is None):
        return
    with _aside(model):
        mask = model.given_mask(encoder, "encoder", batch.mask)
        together = encoder(batch.inputs, condition, batch.cu_seqlens, **mask)
        for number, row, begin, end, first in _places(batch, model.stride):
            one = None if condition is None else condition[number : number + 1]
            alone = encoder(batch.inputs[row : row + 1, begin:end], one)
            part = together[row : row + 1, first : first + alone.shape[1]]
            if part.shape != alone.shape or _differ(alone, part, model):
                others = "the others of a pack" if batch.mask is None else "padding"
                raise ConfigError(
                    f"The encoder {_name(model, 'encoder')} gives another output for a sequence in a batch than for "
                    f"the same one alone: it sees {others}. Let it honour the mask (takes_mask) and cu_seqlens, or "
                    "choose another encoder."
                )


def _places(batch: Batch, stride: int) -> list[tuple[int, int, int, int, int]]:
    """Number, row, start and end in the inputs, and start in the encoder's output: for the shortest row of a padded
    batch, or the first and last sequences of a pack."""
    if batch.mask is not None:
        lengths = batch.mask.sum(1)
        shortest = int(lengths.argmin())
        found = [(shortest, shortest, 0, int(lengths[shortest]), 0)]
    else:
        assert batch.cu_seqlens is not None
        bounds, firsts = batch.cu_seqlens.tolist(), output_bounds(batch.cu_seqlens, stride).tolist()
        found = [(i, 0, bounds[i], bounds[i + 1], firsts[i]) for i in range(len(bounds) - 1)]
    found = [place for place in found if place[2] < place[3]]
    return found if len(found) < 3 else [found[0], found[-1]]


def _other_end(inputs: Tensor) -> tuple[Tensor, int]:
    """A row `(1, length, ...)` with different values from some position on, and that position; 0 if there is none."""
    length = inputs.shape[1]
    if inputs.is_floating_point():
        at = length // 2
        return torch.cat([inputs[:, :at], 1 - inputs[:, at:]], 1), at
    ids = inputs[0].tolist()
    middle = sorted(range(1, length), key=lambda at: abs(at - length // 2))
    for at, turn in itertools.product(middle, range(1, length)):
        if ids[at] != ids[at - turn]:
            return torch.cat([inputs[:, :at], inputs.roll(turn, 1)[:, at:]], 1), at
    return inputs, 0


def _differ(one: Tensor, other: Tensor, model: SequenceModel) -> bool:
    """Whether outputs differ by more than rounding, which an FFT spreads over all positions."""
    if not one.numel():
        return False
    one, other = one.float(), other.float()
    tolerance = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 3e-2
    return bool((one - other).abs().max() > tolerance * one.abs().max())


def _compare(one: Tensor, other: Tensor, part: str, model: SequenceModel, at: int) -> None:
    if _differ(one, other, model):
        raise ConfigError(
            f"The {part} {_name(model, part)} says that it is causal, but its outputs for the first {at} positions "
            f"change with later inputs: a model that predicts the next token would see it. Choose another {part}, or "
            "correct its `causal`."
        )
