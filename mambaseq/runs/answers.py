"""What a model's outputs mean, by its head and by what it was trained for: an `Answer` turns windows of records into
rows."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.checkpoints import LoadedModel
from mambaseq.data.records import Record
from mambaseq.errors import ConfigError, DataError, shown
from mambaseq.heads.classification import ClassificationHead
from mambaseq.heads.lm import LMHead
from mambaseq.heads.regression import RegressionHead
from mambaseq.runs.tables import Value

CHUNK = 8192
"""Positions read at once where the state is passed on."""

_LOGITS = 2048  # positions whose logits exist at once: a large vocabulary's would not fit
_COLUMNS = 100  # classes that get a column of probabilities each, in tables with a row for each position


class Row(NamedTuple):
    """Tokens [start, stop) of a record, and cells; None and a note where there is no prediction."""

    start: int
    stop: int
    values: list[Value] | None
    note: str = ""


class Span(NamedTuple):
    """Tokens [start, stop) of a record that are read by themselves. One with a note is not read."""

    start: int
    stop: int
    note: str = ""


class NotFinite(DataError):
    """A prediction that is not a finite number. Its message begins with where."""


class Answer(abc.ABC):
    """What a table says of sequences.

    window: tokens that are read by themselves; None for whole records. columns: names of the values, known after the
        first output. least: fewest tokens that give an answer. whole: one answer for all positions together.
    gathered: windows are gathered up to this many tokens, so that those of one length are read together; this bounds
        the memory.
    """

    columns: list[str]
    least = 1
    whole: ClassVar[bool] = False
    gathered: ClassVar[int] = 2**20

    def __init__(self, loaded: LoadedModel, window: int | None) -> None:
        self.loaded, self.model = loaded, loaded.model
        self.window = window
        self.device = next(self.model.parameters()).device
        encoder, backbone = self.model.encoder, self.model.backbone
        # with the results of one reading
        self.in_parts = bool(backbone.causal and getattr(encoder, "position_wise", False))
        self.least = max(self.least, getattr(self.model.encoder, "min_length", 1))

    def spans(self, record: Record) -> Iterator[Span]:
        """Tiles of a record, in order; the last one may be shorter. Each token is in exactly one."""
        length = len(record)
        if length == 0:
            yield Span(0, 0, "empty")
        step = self.window or max(length, 1)
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield Span(start, stop, self.too_short(stop - start) if stop - start < self.least else "")

    def too_short(self, length: int) -> str:
        """The note for what is shorter than `least`."""
        return f"shorter than the {self.least} tokens that the model reads at once"

    def tensor(self, record: Record, start: int, stop: int) -> Tensor:
        values = record.signal if record.ids is None else record.ids
        assert values is not None
        kind = np.float32 if record.ids is None else np.int64
        return torch.from_numpy(np.ascontiguousarray(values[start:stop], dtype=kind)).to(self.device)

    def batch(self, pieces: list[tuple[Record, Span]]) -> Tensor:
        """Spans of one length, `(spans, length)` ids or `(spans, length, channels)`."""
        return torch.stack([self.tensor(record, span.start, span.stop) for record, span in pieces])

    def conditions(self, pieces: Iterable[tuple[Record, Span]]) -> Tensor | None:
        """Those of the records, `(spans,)` int64; None for a model that has none."""
        found = [record.condition for record, _ in pieces]
        return None if None in found else torch.tensor(found, device=self.device)

    def long(self, span: Span) -> bool:
        """Whether a span is read in parts."""
        return self.in_parts and not self.whole and span.stop - span.start > CHUNK

    @abc.abstractmethod
    def rows(self, pieces: list[tuple[Record, Span]]) -> list[list[Row] | NotFinite]:
        """The rows of spans of one length, read as a batch."""

    def parts(self, record: Record, span: Span) -> Iterator[Row]:
        """The rows of a span that is `long`. Raises NotFinite."""
        raise NotImplementedError


class Likelihood(Answer):
    """Bits a token of whole records, or of separate windows. The first token of each is not predicted."""

    least = 2

    def __init__(self, loaded: LoadedModel, window: int | None) -> None:
        super().__init__(loaded, window)
        self.columns = ["tokens", "bits_per_token"]

    def too_short(self, length: int) -> str:
        return "only one token, so there is nothing to predict"

    def _labels(self, record: Record, start: int, stop: int, ids: Tensor) -> Tensor:
        if record.scored is None:
            return ids
        scored = np.ascontiguousarray(record.scored[start:stop], dtype=bool)
        return ids.masked_fill(~torch.from_numpy(scored).to(ids.device), -100)

    def rows(self, pieces: list[tuple[Record, Span]]) -> list[list[Row] | NotFinite]:
        ids = self.batch(pieces)
        labels = torch.stack(
            [self._labels(record, span.start, span.stop, row) for (record, span), row in zip(pieces, ids, strict=True)]
        )
        hidden = self.model.backbone(self.model.encoder(ids[:, :-1], self.conditions(pieces)))
        nats, counts = self._nats(hidden, labels[:, 1:])
        return [
            self._row(span, total, count)
            for (_, span), total, count in zip(pieces, nats.tolist(), counts.tolist(), strict=True)
        ]

    def parts(self, record: Record, span: Span) -> Iterator[Row]:
        """States are passed on, so memory does not grow with the record."""
        state, total, count = None, 0.0, 0
        for start in range(span.start, span.stop - 1, CHUNK):
            stop = min(start + CHUNK, span.stop - 1)
            ids = self.tensor(record, start, stop + 1)
            labels = self._labels(record, start, stop + 1, ids)
            x = self.model.encoder(ids[None, :-1], self.conditions([(record, span)]))
            hidden, state = self.model.backbone(x, state=state, return_state=True)
            nats, counts = self._nats(hidden, labels[None, 1:])
            total, count = total + float(nats), count + int(counts)
        row = self._row(span, total, count)
        if isinstance(row, NotFinite):
            raise row
        yield from row

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Nats `(batch, length)` fp32, 0 where a label does not count."""
        # a linear map can be applied in slices; another head may look at neighbouring positions
        step = max(1, _LOGITS // len(hidden)) if isinstance(self.model.head, LMHead) else hidden.shape[1]
        parts = []
        for start in range(0, hidden.shape[1], step):
            _, logits = self.model.head(hidden[:, start : start + step])
            parts.append(F.cross_entropy(logits.transpose(1, 2), labels[:, start : start + step], reduction="none"))
        return torch.cat(parts, 1)

    def _nats(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over each row: nats, float64, and labels that count, int64, `(batch,)` both."""
        return self._losses(hidden, labels).double().sum(1), (labels != -100).sum(1)

    def _row(self, span: Span, total: float, count: int) -> list[Row] | NotFinite:
        if not math.isfinite(total):
            return NotFinite("")
        if not count:
            return [Row(span.start, span.stop, None, "no token that is scored")]
        return [Row(span.start, span.stop, [count, total / count / math.log(2)])]


class Tokens(Likelihood):
    """Bits of each token, given those before it in its record or window."""

    gathered = 2**16

    def __init__(self, loaded: LoadedModel, window: int | None) -> None:
        super().__init__(loaded, window)
        self.columns = ["bits"]

    def _each(self, first: int, hidden: Tensor, labels: Tensor) -> list[Row] | NotFinite:
        """Rows of the tokens from `first` on; hidden `(1, tokens, d_model)`, labels `(1, tokens)`."""
        bits = self._losses(hidden, labels)[0].float() / math.log(2)
        if not bits.isfinite().all():
            return NotFinite("")
        counted = (labels[0] != -100).tolist()
        return [
            Row(place, place + 1, [value] if counts else None, "" if counts else "not scored")
            for place, (value, counts) in enumerate(zip(bits.tolist(), counted, strict=True), start=first)
        ]

    def rows(self, pieces: list[tuple[Record, Span]]) -> list[list[Row] | NotFinite]:
        ids = self.batch(pieces)
        hidden = self.model.backbone(self.model.encoder(ids[:, :-1], self.conditions(pieces)))
        return [
            self._each(span.start + 1, one[None], self._labels(record, span.start, span.stop, row)[None, 1:])
            for (record, span), row, one in zip(pieces, ids, hidden, strict=True)
        ]

    def parts(self, record: Record, span: Span) -> Iterator[Row]:
        state = None
        for start in range(span.start, span.stop - 1, CHUNK):
            stop = min(start + CHUNK, span.stop - 1)
            ids = self.tensor(record, start, stop + 1)
            x = self.model.encoder(ids[None, :-1], self.conditions([(record, span)]))
            hidden, state = self.model.backbone(x, state=state, return_state=True)
            rows = self._each(start + 1, hidden, self._labels(record, start, stop + 1, ids)[None, 1:])
            if isinstance(rows, NotFinite):
                raise rows
            yield from rows


class PseudoLikelihood(Likelihood):
    """Bits a token of separate windows, each token predicted from all others except those hidden with it. Every seventh
    token is hidden at once, so a window is read seven times (after Salazar et al., arXiv:1910.14659, who hide one at a
    time)."""

    least = 1
    _TIMES = 7

    def __init__(self, loaded: LoadedModel, window: int | None) -> None:
        assert loaded.tokenizer is not None
        super().__init__(loaded, window or loaded.card.length or None)
        # the last id, which in the vocabulary of a published model is not the one behind the bases
        self.mask_id = loaded.card.spec["encoder"].get("vocab_size", loaded.tokenizer.vocab_size + 1) - 1

    def too_short(self, length: int) -> str:
        return Answer.too_short(self, length)

    def rows(self, pieces: list[tuple[Record, Span]]) -> list[list[Row] | NotFinite]:
        ids = self.batch(pieces)
        labels = torch.stack(
            [self._labels(record, span.start, span.stop, row) for (record, span), row in zip(pieces, ids, strict=True)]
        )
        nats = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        for first in range(min(self._TIMES, ids.shape[1])):
            hidden = ids.clone()
            hidden[:, first :: self._TIMES] = self.mask_id
            asked = torch.full_like(labels, -100)
            asked[:, first :: self._TIMES] = labels[:, first :: self._TIMES]
            found = self.model.backbone(self.model.encoder(hidden, self.conditions(pieces)))
            nats += self._nats(found, asked)[0]
        counts = (labels != -100).sum(1).tolist()
        return [
            self._row(span, total, count) for (_, span), total, count in zip(pieces, nats.tolist(), counts, strict=True)
        ]


class Sequences(Answer):
    """For each window: a label and the probabilities, the probability of each of several labels, or values.

    classes: names of the labels; None for values. several: any number of labels may apply.
    """

    whole = True

    def __init__(
        self,
        loaded: LoadedModel,
        window: int | None,
        classes: list[str] | None,
        several: bool = False,
    ) -> None:
        super().__init__(loaded, window)
        self.classes, self.several = classes, several

    def cells(self, output: Tensor) -> list[list[Value]]:
        """Cells of outputs `(n, outputs)` fp32. Sets the columns."""
        if self.classes is None:
            count = output.shape[1]
            columns = getattr(self.model.head, "columns", None)
            numbered = ["value"] if count == 1 else [f"value_{number}" for number in range(1, count + 1)]
            self.columns = numbered if columns is None else columns()
            return output.tolist()
        names = class_names(self.loaded, self.classes, output.shape[1])
        if self.several:
            self.columns = names
            return output.sigmoid().tolist()
        self.columns = ["predicted", *names]
        best = output.argmax(-1).tolist()
        shares = output.softmax(-1).tolist()
        return [[names[label], *row] for label, row in zip(best, shares, strict=True)]

    def rows(self, pieces: list[tuple[Record, Span]]) -> list[list[Row] | NotFinite]:
        output = self.model(self.batch(pieces), condition=self.conditions(pieces)).logits.float().cpu()
        output = output.view(len(pieces), -1)
        finite = output.isfinite().all(1).tolist()
        return [
            [Row(span.start, span.stop, cells)] if good else NotFinite("")
            for (_, span), cells, good in zip(pieces, self.cells(output), finite, strict=True)
        ]


class Positions(Sequences):
    """For each position, or bin of positions: a label and the probabilities, the probability of each of several labels,
    or values. Whole records are read where the model can read them in parts, otherwise separate windows."""

    whole = False
    gathered = 2**14  # each is a row of up to a hundred cells

    def __init__(
        self,
        loaded: LoadedModel,
        window: int | None,
        classes: list[str] | None,
        several: bool = False,
    ) -> None:
        super().__init__(loaded, window, classes, several)
        self.stride = getattr(self.model.head, "stride", 1)
        self.in_parts = self.in_parts and self.stride == 1
        if window is None and not self.in_parts:
            self.window = loaded.card.length or None

    def cells(self, output: Tensor) -> list[list[Value]]:
        if self.classes is None or self.several or output.shape[1] <= _COLUMNS:
            return super().cells(output)
        names = class_names(self.loaded, self.classes, output.shape[1])
        self.columns = ["predicted", "probability"]
        shares, labels = output.softmax(-1).max(-1)
        return [[names[label], share] for label, share in zip(labels.tolist(), shares.tolist(), strict=True)]

    def _rows(self, first: int, stop: int, output: Tensor) -> list[Row] | NotFinite:
        """Rows of the positions, or bins, from `first` on; output `(bins, outputs)`."""
        if not output.isfinite().all():
            return NotFinite("")
        if -(-(stop - first) // self.stride) != len(output):
            raise ConfigError(
                f"The model at {self.loaded.source} gives {len(output)} outputs for {stop - first} tokens; they cannot "
                "be one label for each position. Use a head with one output a position."
            )
        starts = range(first, stop, self.stride)
        cells = self.cells(output)
        return [Row(start, min(start + self.stride, stop), one) for start, one in zip(starts, cells, strict=True)]

    def rows(self, pieces: list[tuple[Record, Span]]) -> list[list[Row] | NotFinite]:
        output = self.model(self.batch(pieces), condition=self.conditions(pieces)).logits.float().cpu()
        return [
            self._rows(span.start, span.stop, one.reshape(len(one), -1))
            for (_, span), one in zip(pieces, output, strict=True)
        ]

    def parts(self, record: Record, span: Span) -> Iterator[Row]:
        state = None
        for start in range(span.start, span.stop, CHUNK):
            stop = min(start + CHUNK, span.stop)
            inputs = self.tensor(record, start, stop)[None]
            output = self.model(inputs, condition=self.conditions([(record, span)]), state=state, return_state=True)
            state = output.state
            rows = self._rows(start, stop, output.logits[0].float().cpu().reshape(stop - start, -1))
            if isinstance(rows, NotFinite):
                raise rows
            yield from rows


def class_names(loaded: LoadedModel, classes: list[str], count: int) -> list[str]:
    """Names of `count` classes: their numbers where the model was saved without names.

    Raises ConfigError when there are as many names as the head has outputs for.
    """
    if classes and len(classes) != count:
        raise ConfigError(
            f"The head {shown(loaded.card.spec['head']['name'])} of the model at {loaded.source} gives {count} "
            f"numbers, but its description names {len(classes)} classes, so it is unclear which is which. Train it "
            "with a head that fits (`mambaseq list heads`)."
        )
    return classes or [str(number) for number in range(count)]


def answer_of(loaded: LoadedModel, window: int | None, each_token: bool = False) -> Answer:
    """The `Answer` of a model. window: tokens read at once, if the user wants another number.
    each_token: the likelihood of each token instead of each record.

    Raises ConfigError, naming model and head, where it is unclear what the head's numbers mean.
    """
    found = _answer_of(loaded, window)
    if not each_token:
        return found
    if type(found) is not Likelihood:
        raise ConfigError(
            f"Only a language model gives the likelihood of each token, and the model at {loaded.source} is not one. "
            "Leave --what out."
        )
    return Tokens(loaded, window)


def _answer_of(loaded: LoadedModel, window: int | None) -> Answer:
    card, model = loaded.card, loaded.model
    head, task, names = model.head, card.task, list(card.class_names)
    here = f"The model at {loaded.source} (head {shown(card.spec['head']['name'])})"
    if not head.per_token:
        if task in ("next_token", "masked", "labels"):
            raise ConfigError(
                f"{here} gives one answer a sequence but was trained on one a position ({task}), so its numbers mean "
                "nothing. Train it with a head that fits (`mambaseq list heads`)."
            )
        span = window or card.length or None
        if task == "multilabels":
            return Sequences(loaded, span, names, several=True)
        values = isinstance(head, RegressionHead) or task == "values"
        classes = not values and (task == "classes" or bool(names) or isinstance(head, ClassificationHead))
        return Sequences(loaded, span, names if classes else None)
    if task is None:  # saved by an older version
        next_token = not names and isinstance(head, LMHead) and model.backbone.causal
        task = "labels" if names else "next_token" if next_token else None
    if task in ("labels", "multilabels"):
        return Positions(loaded, window, names, several=task == "multilabels")
    if task == "masked" and loaded.tokenizer is not None:
        return PseudoLikelihood(loaded, window)
    if task == "masked":
        raise ConfigError(
            f"{here} was trained on masked tokens, but its model.json names no tokenizer, so the id of the mask token "
            "is unknown. Embed records with it instead (--what embeddings), or start another run from it "
            "(--init-from)."
        )
    if task in ("values", "next_values"):
        return Positions(loaded, window, None)
    if task == "next_token" and model.backbone.causal and getattr(model.encoder, "causal", False):
        if window == 1:
            raise ConfigError(
                "--window must be at least 2 for a language model, not 1: it predicts from what precedes."
            )
        return Likelihood(loaded, window)
    if task == "next_token":
        raise ConfigError(
            f"{here} was trained for the next token, which its encoder {shown(card.spec['encoder']['name'])} or its "
            f"backbone {shown(card.spec['backbone']['name'])} lets it see, so its bits mean nothing. Train one with "
            "the encoder tokens and a causal backbone, such as residual."
        )
    raise ConfigError(
        f"{here} gives numbers for each position, but its description does not say what they are: it has no class "
        'names and no task. If they are labels, add "task": "labels" to model.json; otherwise train it again.'
    )
