"""What a model's outputs mean: an `Answer` turns windows of records into rows. Here are those of labels and values; of
likelihoods, `mambaseq.runs.likelihoods`; `mambaseq.runs.meaning` says which one a model has."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mambaseq.batch import Batch
from mambaseq.checkpoints import LoadedModel
from mambaseq.data.module import pad_collate
from mambaseq.data.records import Record
from mambaseq.errors import ConfigError, DataError, shown
from mambaseq.heads.base import Pool, pool
from mambaseq.heads.classification import ClassificationHead, MultilabelHead
from mambaseq.heads.regression import RegressionHead
from mambaseq.runs.tables import Column, Words

CHUNK = 8192
"""Positions read at once where the state is passed on."""

_POOLED = (ClassificationHead, MultilabelHead, RegressionHead)  # of one vector for all positions, see `pool`
WHOLE = {"cpu": 2**15}
"""Positions that are read at once where they need not be: these take a third of a GB on a CPU."""

NOTHING_SCORED = "no token that is scored"
"""The note for a window whose tokens all do not count."""

_WHOLE = 2**20  # on another device
_COLUMNS = 100  # classes that get a column of probabilities each, in tables with a row for each position


class Found(NamedTuple):
    """What a model says of tokens [start, stop) of a record: `(n, numbers)` values, a row for each `step` of them, the
    last of which may be shorter.

    known: `(n,)` bool, those that count; None for all.
    """

    start: int
    stop: int
    step: int
    values: np.ndarray
    known: np.ndarray | None = None


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
        first output. least, most: fewest and most tokens that give an answer. whole: all positions are read together.
    each: answers are for positions, or bins of `step` of them, not for a window. unknown: the note where none counts.
    stride: from the start of a window to that of the next; None for windows end to end.
    gathered: windows are gathered up to this many tokens, so that those of about one length are read together; this
        bounds the memory.
    pads: whether windows of different lengths are read together, the shorter ones padded, as encoder and backbone can
        do without seeing it; otherwise those of one length are.
    """

    columns: list[str]
    least = 1
    whole: bool = False
    each: bool = False
    step: int = 1
    unknown: str = "not scored"
    gathered: int = 2**20

    def __init__(self, loaded: LoadedModel, window: int | None) -> None:
        self.loaded, self.model = loaded, loaded.model
        self.window = window
        self.stride: int | None = None
        self.device = next(self.model.parameters()).device
        encoder, backbone = self.model.encoder, self.model.backbone
        self.pads = self.model.takes_padding
        # with the results of one reading
        self.in_parts = bool(backbone.causal and getattr(encoder, "position_wise", False))
        self.least = max(self.least, getattr(self.model.encoder, "min_length", 1))
        self.most: int | None = getattr(self.model.encoder, "max_length", None)

    def overlap(self, stride: int) -> None:
        """Read windows that begin every `stride` tokens. Raises ConfigError if they would leave gaps, or would not
        begin with a bin."""
        self.window = self.window or self.loaded.card.length or None
        if self.window is None:
            raise ConfigError("--stride is from the start of a window to the next; say how long they are (--window).")
        if stride > self.window:
            raise ConfigError(
                f"--stride {stride} would leave gaps between windows of {self.window}. Give at most that."
            )
        if stride % self.step:
            raise ConfigError(f"--stride must be a multiple of the {self.step} tokens of a bin, not {stride}.")
        self.stride = stride

    def spans(self, record: Record) -> Iterator[Span]:
        """The windows of a record, in order: end to end, the last one shorter, or every `stride` tokens. Then the last
        one is complete (but for less than a bin), if the record is as long as a window."""
        length = len(record)
        if length == 0:
            yield Span(0, 0, "empty")
        window = self.window or max(length, 1)
        starts: Iterable[int] = range(0, length, window)
        if self.stride is not None and length > window:
            last = -(-(length - window) // self.step) * self.step
            starts = itertools.chain(range(0, last, self.stride), [last])
        for start in starts:
            yield Span(start, min(start + window, length), self._note(record, start, min(start + window, length)))

    def _note(self, record: Record, start: int, stop: int) -> str:
        """Why tokens [start, stop) are not read; "" if they are."""
        if self.most is not None and stop - start > self.most:
            return f"longer than the {self.most} tokens that the model reads at once (see --window)"
        return self.too_short(stop - start) if stop - start < self.least else ""

    def too_short(self, length: int) -> str:
        """The note for what is shorter than `least`."""
        return f"shorter than the {self.least} tokens that the model reads at once"

    def tensor(self, record: Record, start: int, stop: int) -> Tensor:
        """Tokens [start, stop) of a record, `(1, length)` ids or `(1, length, channels)`."""
        return _tensor(record, start, stop).to(self.device)

    def batch(self, pieces: list[tuple[Record, Span]]) -> Batch:
        """Spans, with the conditions of their records, those of different lengths padded under a mask."""
        return pad_collate(
            [Batch(_tensor(record, span.start, span.stop), condition=_condition(record)) for record, span in pieces]
        ).to(self.device)

    def condition(self, record: Record) -> Tensor | None:
        """That of a record, a row (see `Batch`); None for a model that has none."""
        found = _condition(record)
        return None if found is None else found.to(self.device)

    def read(self, inputs: Tensor, condition: Tensor | None, mask: Tensor | None = None, **options: Any) -> Any:
        """What the backbone makes of inputs `(batch, length, ...)`: `(batch, positions, d_model)`. mask: `(batch,
        length)` bool, of real positions. options: of states, which are then returned as well."""
        model = self.model
        x = model.encoder(inputs, condition, **model.given_mask(model.encoder, "encoder", mask))
        mask = None if mask is None else mask[:, :: model.stride]
        return model.backbone(x, **options, **model.given_mask(model.backbone, "backbone", mask))

    @property
    def at_once(self) -> int:
        """Positions that are read together in a batch, or in a span that could be read in parts, at most."""
        return WHOLE.get(self.device.type, _WHOLE) // getattr(self.model.backbone, "strands", 1)

    def long(self, span: Span) -> bool:
        """Whether a span is read in parts."""
        return self.in_parts and not self.whole and span.stop - span.start > CHUNK

    @abc.abstractmethod
    def answers(self, pieces: list[tuple[Record, Span]]) -> list[Found | NotFinite]:
        """What is found for each of several spans, read as a batch: of one length, unless it `pads`."""

    def parts(self, record: Record, span: Span) -> Iterator[Found]:
        """What is found for a span that is `long`. Raises NotFinite."""
        raise NotImplementedError

    @abc.abstractmethod
    def cells(self, values: np.ndarray) -> list[Column]:
        """The columns of a table, from values `(n, numbers)`. Sets their names, `columns`."""

    def turned(self, values: np.ndarray) -> np.ndarray:
        """Values `(n, numbers)` of the other strand as those of this one, position by position."""
        return values


def _tensor(record: Record, start: int, stop: int) -> Tensor:
    values = record.signal if record.ids is None else record.ids
    assert values is not None
    kind = np.float32 if record.ids is None else np.int64
    return torch.from_numpy(np.array(values[None, start:stop], dtype=kind, order="C"))


def _condition(record: Record) -> Tensor | None:
    return None if record.condition is None else torch.tensor([record.condition])


def scored_tokens(record: Record, start: int, stop: int) -> np.ndarray | None:
    """Which tokens count, `(stop - start,)` bool; None if all do."""
    if record.scored is None:
        return None
    scored = np.ascontiguousarray(record.scored[start:stop], dtype=bool)
    return None if scored.all() else scored


class Sequences(Answer):
    """For each window: a label and the probabilities, the probability of each of several labels, or values. Where the
    head pools positions and the state is passed on, long windows are read in parts, so memory does not grow with them.

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
        self.whole = type(self).whole and type(self.model.head) not in _POOLED

    def long(self, span: Span) -> bool:
        return super().long(span) and (self.each or span.stop - span.start > self.at_once)

    def _note(self, record: Record, start: int, stop: int) -> str:
        scored = scored_tokens(record, start, stop)
        unread = scored is not None and stop > start and not scored.any()
        return NOTHING_SCORED if unread and not self.each else super()._note(record, start, stop)

    def numbers(self, output: Tensor) -> np.ndarray:
        """Outputs `(n, outputs)` as probabilities or values, fp32."""
        if self.classes is not None:
            class_names(self.loaded, self.classes, output.shape[1])
            output = output.sigmoid() if self.several else output.softmax(-1)
        return output.numpy()

    def cells(self, values: np.ndarray) -> list[Column]:
        count = values.shape[1]
        if self.classes is None:
            columns = getattr(self.model.head, "columns", None)
            numbered = ["value"] if count == 1 else [f"value_{number}" for number in range(1, count + 1)]
            self.columns = numbered if columns is None else columns()
            return list(values.T)
        names = class_names(self.loaded, self.classes, count)
        if self.several:
            self.columns = names
            return list(values.T)
        self.columns = ["predicted", *names]
        return [Words(values.argmax(-1), names), *values.T]

    def turned(self, values: np.ndarray) -> np.ndarray:
        swapped = self.loaded.card.strand_classes
        if swapped and len(swapped) != values.shape[1]:
            raise ConfigError(
                f"The model at {self.loaded.source} gives {values.shape[1]} numbers, but its strand_classes are "
                f"{len(swapped)}, so it is unclear what the other strand's are. Train it again."
            )
        return values[:, swapped] if swapped else values

    def answers(self, pieces: list[tuple[Record, Span]]) -> list[Found | NotFinite]:
        return self._of_windows([span for _, span in pieces], self._outputs(pieces))

    def _outputs(self, pieces: list[tuple[Record, Span]]) -> Tensor:
        """Logits of a batch, fp32, on the CPU."""
        batch = self.batch(pieces)
        output: Tensor = self.model(batch.inputs, mask=batch.mask, condition=batch.condition).logits
        return output.float().cpu()

    def _of_windows(self, spans: list[Span], output: Tensor) -> list[Found | NotFinite]:
        output = output.view(len(spans), -1)
        finite = output.isfinite().all(1).tolist()
        return [
            Found(span.start, span.stop, span.stop - span.start, one[None]) if good else NotFinite("")
            for span, one, good in zip(spans, self.numbers(output), finite, strict=True)
        ]

    def parts(self, record: Record, span: Span) -> Iterator[Found]:
        how = cast(Pool, self.model.head.pooling)
        pooled = state = None
        condition = self.condition(record)
        for start in range(span.start, span.start + 1 if how == "first" else span.stop, CHUNK):
            inputs = self.tensor(record, start, min(start + CHUNK, span.stop))
            hidden, state = self.read(inputs, condition, state=state, return_state=True)
            if how == "mean":
                part = hidden.sum(1, dtype=torch.float64 if hidden.device.type != "mps" else torch.float32)
                pooled = part if pooled is None else pooled + part
            else:
                part = pool(hidden, how, None, None)
                pooled = torch.maximum(pooled, part) if how == "max" and pooled is not None else part
        assert pooled is not None
        if how == "mean":
            pooled = pooled / (span.stop - span.start)
        _, output = self.model.head(pooled.float()[:, None])  # which pools one position
        (found,) = self._of_windows([span], output.float().cpu())
        if isinstance(found, NotFinite):
            raise found
        yield found


class Positions(Sequences):
    """For each position, or bin of positions: a label and the probabilities, the probability of each of several labels,
    or values. Whole records are read where the model can read them in parts, otherwise separate windows. A bin without
    a token that counts has no answer."""

    whole = False
    each = True
    unknown = "not scored"
    gathered = 2**14  # each is a row of up to a hundred cells

    def __init__(
        self,
        loaded: LoadedModel,
        window: int | None,
        classes: list[str] | None,
        several: bool = False,
    ) -> None:
        super().__init__(loaded, window, classes, several)
        self.step = getattr(self.model.head, "stride", 1)
        self.in_parts = self.in_parts and self.step == 1
        if window is None and not self.in_parts:
            self.window = loaded.card.length or None

    def cells(self, values: np.ndarray) -> list[Column]:
        if self.classes is None or self.several or values.shape[1] <= _COLUMNS:
            return super().cells(values)
        names = class_names(self.loaded, self.classes, values.shape[1])
        self.columns = ["predicted", "probability"]
        return [Words(values.argmax(-1), names), values.max(-1)]

    def _bins(self, tokens: int) -> int:
        return -(-tokens // self.step)

    def _check_count(self, output: Tensor, tokens: int) -> None:
        """Raise ConfigError unless output `(batch, bins, ...)` has as many bins as there are."""
        if self._bins(tokens) != output.shape[1]:
            raise ConfigError(
                f"The model at {self.loaded.source} gives {output.shape[1]} outputs for {tokens} tokens; they cannot "
                "be one label for each position. Use a head with one output a position."
            )

    def _found(self, record: Record, first: int, stop: int, output: Tensor) -> Found | NotFinite:
        """The positions, or bins, from `first` on; output `(bins, ...)`."""
        if not output.isfinite().all():
            return NotFinite("")
        known = scored_tokens(record, first, stop)
        if known is not None and self.step > 1:
            known = np.logical_or.reduceat(known, np.arange(0, len(known), self.step))
        return Found(first, stop, self.step, self.numbers(output.reshape(len(output), -1)), known)

    def answers(self, pieces: list[tuple[Record, Span]]) -> list[Found | NotFinite]:
        output = self._outputs(pieces)
        self._check_count(output, max(span.stop - span.start for _, span in pieces))
        return [
            self._found(record, span.start, span.stop, one[: self._bins(span.stop - span.start)])
            for (record, span), one in zip(pieces, output, strict=True)
        ]

    def parts(self, record: Record, span: Span) -> Iterator[Found]:
        state = None
        for start in range(span.start, span.stop, CHUNK):
            stop = min(start + CHUNK, span.stop)
            inputs = self.tensor(record, start, stop)
            output = self.model(inputs, condition=self.condition(record), state=state, return_state=True)
            state = output.state
            self._check_count(output.logits, stop - start)
            found = self._found(record, start, stop, output.logits[0].float().cpu())
            if isinstance(found, NotFinite):
                raise found
            yield found


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
