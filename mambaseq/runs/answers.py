"""What a model's outputs mean, by its head and by what it was trained for: an `Answer` turns windows of records into
rows."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.checkpoints import LoadedModel
from mambaseq.data.records import Record
from mambaseq.errors import ConfigError, DataError, shown
from mambaseq.heads.base import Pool, pool
from mambaseq.heads.classification import ClassificationHead, MultilabelHead
from mambaseq.heads.lm import LMHead
from mambaseq.heads.regression import RegressionHead
from mambaseq.runs.tables import Column, Words

CHUNK = 8192
"""Positions read at once where the state is passed on."""

_POOLED = (ClassificationHead, MultilabelHead, RegressionHead)  # of one vector for all positions, see `pool`
WHOLE = {"cpu": 2**15}
"""Positions that are read at once where they need not be: these take a third of a GB on a CPU."""

_WHOLE = 2**20  # on another device
_LOGITS = 2048  # positions whose logits exist at once: a large vocabulary's would not fit
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
    gathered: windows are gathered up to this many tokens, so that those of one length are read together; this bounds
        the memory.
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
        values = record.signal if record.ids is None else record.ids
        assert values is not None
        kind = np.float32 if record.ids is None else np.int64
        return torch.from_numpy(np.ascontiguousarray(values[start:stop], dtype=kind)).to(self.device)

    def batch(self, pieces: list[tuple[Record, Span]]) -> Tensor:
        """Spans of one length, `(spans, length)` ids or `(spans, length, channels)`."""
        return torch.stack([self.tensor(record, span.start, span.stop) for record, span in pieces])

    def conditions(self, pieces: Iterable[tuple[Record, Span]]) -> Tensor | None:
        """Those of the records, `(spans,)` int64 (see `Batch`); None for a model that has none."""
        found = [record.condition for record, _ in pieces]
        return None if None in found else torch.tensor(found, device=self.device)

    @property
    def at_once(self) -> int:
        """Positions that are read together in a batch, or in a span that could be read in parts, at most."""
        return WHOLE.get(self.device.type, _WHOLE) // getattr(self.model.backbone, "strands", 1)

    def long(self, span: Span) -> bool:
        """Whether a span is read in parts."""
        return self.in_parts and not self.whole and span.stop - span.start > CHUNK

    @abc.abstractmethod
    def answers(self, pieces: list[tuple[Record, Span]]) -> list[Found | NotFinite]:
        """What is found for each of several spans of one length, read as a batch."""

    def parts(self, record: Record, span: Span) -> Iterator[Found]:
        """What is found for a span that is `long`. Raises NotFinite."""
        raise NotImplementedError

    @abc.abstractmethod
    def cells(self, values: np.ndarray) -> list[Column]:
        """The columns of a table, from values `(n, numbers)`. Sets their names, `columns`."""

    def turned(self, values: np.ndarray) -> np.ndarray:
        """Values `(n, numbers)` of the other strand as those of this one, position by position."""
        return values


def _scored(record: Record, start: int, stop: int) -> np.ndarray | None:
    """Which tokens count, `(stop - start,)` bool; None if all do."""
    if record.scored is None:
        return None
    scored = np.ascontiguousarray(record.scored[start:stop], dtype=bool)
    return None if scored.all() else scored


class Likelihood(Answer):
    """Bits a token of whole records, or of separate windows. The first token of each is not predicted."""

    least = 2
    unknown = "no token that is scored"

    def too_short(self, length: int) -> str:
        return "only one token, so there is nothing to predict"

    def _labels(self, record: Record, start: int, stop: int, ids: Tensor) -> Tensor:
        labels_of = getattr(self.model.head, "labels_of", None)
        labels: Tensor = ids if labels_of is None else labels_of(ids)
        scored = _scored(record, start, stop)
        if scored is None:
            return labels
        left_out = ~torch.from_numpy(scored).to(ids.device)
        return labels.masked_fill(left_out.view(-1, *[1] * (labels.dim() - 1)), -100)

    def _all_labels(self, pieces: list[tuple[Record, Span]], ids: Tensor) -> Tensor:
        return torch.stack(
            [self._labels(record, span.start, span.stop, row) for (record, span), row in zip(pieces, ids, strict=True)]
        )

    def _bits(self, pieces: list[tuple[Record, Span]]) -> tuple[int, Tensor, Tensor]:
        """How many tokens of the spans come before the first that is predicted, and bits and labels of all others,
        `(spans, tokens)`; -100 is a label that does not count."""
        ids = self.batch(pieces)
        hidden = self.model.backbone(self.model.encoder(ids[:, :-1], self.conditions(pieces)))
        labels = self._all_labels(pieces, ids)[:, 1:]
        return 1, self._losses(hidden, labels) / math.log(2), labels

    def answers(self, pieces: list[tuple[Record, Span]]) -> list[Found | NotFinite]:
        first, bits, labels = self._bits(pieces)
        return [
            self._made(span, span.start + first, one, label)
            for (_, span), one, label in zip(pieces, bits.cpu(), labels.cpu(), strict=True)
        ]

    def _made(self, span: Span, first: int, bits: Tensor, labels: Tensor) -> Found | NotFinite:
        """What is found of a span whose tokens from `first` on have these bits."""
        return self._sum(span, float(bits.double().sum()), int((labels != -100).sum()))

    def _sum(self, span: Span, total: float, count: int) -> Found | NotFinite:
        if not math.isfinite(total):
            return NotFinite("")
        values = np.array([[count, total]])
        return Found(span.start, span.stop, span.stop - span.start, values, np.array([count > 0]))

    def _in_parts(self, record: Record, span: Span) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First token, bits and labels of each part. States are passed on, so memory does not grow with the record."""
        state = None
        for start in range(span.start, span.stop - 1, CHUNK):
            stop = min(start + CHUNK, span.stop - 1)
            ids = self.tensor(record, start, stop + 1)
            labels = self._labels(record, start, stop + 1, ids)[None, 1:]
            x = self.model.encoder(ids[None, :-1], self.conditions([(record, span)]))
            hidden, state = self.model.backbone(x, state=state, return_state=True)
            yield start + 1, (self._losses(hidden, labels)[0] / math.log(2)).cpu(), labels[0].cpu()

    def parts(self, record: Record, span: Span) -> Iterator[Found]:
        total, count = 0.0, 0
        for _, bits, labels in self._in_parts(record, span):
            total, count = total + float(bits.double().sum()), count + int((labels != -100).sum())
        found = self._sum(span, total, count)
        if isinstance(found, NotFinite):
            raise found
        yield found

    def cells(self, values: np.ndarray) -> list[Column]:
        """values: tokens that count, and their bits. Half a token is one that one strand alone counts."""
        self.columns = ["tokens", "bits_per_token", "total_bits"]
        counts, total = values.T
        return [np.ceil(counts).astype(np.int64), total / np.maximum(counts, 0.5), total]

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Nats `(batch, length)` fp32, 0 where a label does not count."""
        # another head may look at neighbouring positions
        alone = getattr(self.model.head, "position_wise", False)
        step = max(1, _LOGITS // len(hidden)) if alone else hidden.shape[1]
        slices = (slice(start, start + step) for start in range(0, hidden.shape[1], step))
        return torch.cat([self._nats(hidden[:, part], labels[:, part]) for part in slices], 1)

    def _nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        losses = getattr(self.model.head, "losses", None)
        if losses is None:  # a plugin's head
            return F.cross_entropy(self.model.told(hidden).transpose(1, 2), labels, reduction="none")
        nats: Tensor = losses(hidden, labels)
        return nats


class Tokens(Likelihood):
    """Bits of each token, given those before it in its record or window."""

    gathered = 2**16
    each = True
    unknown = "not scored"

    def _made(self, span: Span, first: int, bits: Tensor, labels: Tensor) -> Found | NotFinite:
        if not bits.isfinite().all():
            return NotFinite("")
        known = (labels != -100).numpy()
        known = known if known.ndim == 1 else known.any(1)
        return Found(first, first + len(bits), 1, bits.float().numpy()[:, None], None if known.all() else known)

    def parts(self, record: Record, span: Span) -> Iterator[Found]:
        for first, bits, labels in self._in_parts(record, span):
            found = self._made(span, first, bits, labels)
            if isinstance(found, NotFinite):
                raise found
            yield found

    def cells(self, values: np.ndarray) -> list[Column]:
        self.columns = ["bits"]
        return [values[:, 0]]


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

    def _bits(self, pieces: list[tuple[Record, Span]]) -> tuple[int, Tensor, Tensor]:
        ids = self.batch(pieces)
        labels = self._all_labels(pieces, ids)
        nats = torch.zeros(ids.shape, device=ids.device)
        for first in range(min(self._TIMES, ids.shape[1])):
            hidden = ids.clone()
            hidden[:, first :: self._TIMES] = self.mask_id
            asked = torch.full_like(labels, -100)
            asked[:, first :: self._TIMES] = labels[:, first :: self._TIMES]
            found = self.model.backbone(self.model.encoder(hidden, self.conditions(pieces)))
            nats += self._losses(found, asked)
        return 0, nats / math.log(2), labels


class PseudoTokens(PseudoLikelihood, Tokens):
    """Bits of each token, given those around it."""


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
        scored = _scored(record, start, stop)
        unread = scored is not None and stop > start and not scored.any()
        return Likelihood.unknown if unread and not self.each else super()._note(record, start, stop)

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
        output = self.model(self.batch(pieces), condition=self.conditions(pieces)).logits.float().cpu()
        return self._of_windows([span for _, span in pieces], output)

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
        condition = self.conditions([(record, span)])
        for start in range(span.start, span.start + 1 if how == "first" else span.stop, CHUNK):
            x = self.model.encoder(self.tensor(record, start, min(start + CHUNK, span.stop))[None], condition)
            hidden, state = self.model.backbone(x, state=state, return_state=True)
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

    def _found(self, record: Record, first: int, stop: int, output: Tensor) -> Found | NotFinite:
        """The positions, or bins, from `first` on; output `(bins, outputs)`."""
        if not output.isfinite().all():
            return NotFinite("")
        if -(-(stop - first) // self.step) != len(output):
            raise ConfigError(
                f"The model at {self.loaded.source} gives {len(output)} outputs for {stop - first} tokens; they cannot "
                "be one label for each position. Use a head with one output a position."
            )
        known = _scored(record, first, stop)
        if known is not None and self.step > 1:
            known = np.logical_or.reduceat(known, np.arange(0, len(known), self.step))
        return Found(first, stop, self.step, self.numbers(output), known)

    def answers(self, pieces: list[tuple[Record, Span]]) -> list[Found | NotFinite]:
        output = self.model(self.batch(pieces), condition=self.conditions(pieces)).logits.float().cpu()
        return [
            self._found(record, span.start, span.stop, one.reshape(len(one), -1))
            for (record, span), one in zip(pieces, output, strict=True)
        ]

    def parts(self, record: Record, span: Span) -> Iterator[Found]:
        state = None
        for start in range(span.start, span.stop, CHUNK):
            stop = min(start + CHUNK, span.stop)
            inputs = self.tensor(record, start, stop)[None]
            output = self.model(inputs, condition=self.conditions([(record, span)]), state=state, return_state=True)
            state = output.state
            found = self._found(record, start, stop, output.logits[0].float().cpu().reshape(stop - start, -1))
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


def answer_of(loaded: LoadedModel, window: int | None, each_token: bool = False) -> Answer:
    """The `Answer` of a model. window: tokens read at once, if the user wants another number.
    each_token: the likelihood of each token instead of each record.

    Raises ConfigError, naming model and head, where it is unclear what the head's numbers mean.
    """
    found = _answer_of(loaded, window)
    if not each_token:
        return found
    if not isinstance(found, Likelihood):
        raise ConfigError(
            f"Only a language model gives the likelihood of each token, and the model at {loaded.source} is not one. "
            "Leave --what out."
        )
    return PseudoTokens(loaded, window) if isinstance(found, PseudoLikelihood) else Tokens(loaded, window)


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
