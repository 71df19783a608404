"""Answers of language models: bits of records, of windows and of each token, by what precedes or by both sides."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseq.checkpoints import LoadedModel
from mambaseq.data.records import Record
from mambaseq.runs import answers
from mambaseq.runs.answers import Answer, Found, NotFinite, Span, scored_tokens
from mambaseq.runs.tables import Column

_LOGITS = 2048  # positions whose logits exist at once: a large vocabulary's would not fit


class Likelihood(Answer):
    """Bits a token of whole records, or of separate windows. The first token of each is not predicted."""

    least = 2
    unknown = answers.NOTHING_SCORED

    def __init__(self, loaded: LoadedModel, window: int | None) -> None:
        super().__init__(loaded, window)
        # another head may look at neighbouring positions, and is given no mask
        self.alone = getattr(self.model.head, "position_wise", False)
        self.pads = self.pads and self.alone

    def too_short(self, length: int) -> str:
        return "only one token, so there is nothing to predict"

    def _labels(self, record: Record, start: int, stop: int, ids: Tensor) -> Tensor:
        """Those of ids `(tokens, ...)`, the first of which are tokens [start, stop) of a record and the others
        padding."""
        labels_of = getattr(self.model.head, "labels_of", None)
        labels: Tensor = ids if labels_of is None else labels_of(ids)
        scored = scored_tokens(record, start, stop)
        if scored is None and len(ids) == stop - start:
            return labels
        counts = np.zeros(len(ids), dtype=bool)
        counts[: stop - start] = True if scored is None else scored
        left_out = ~torch.from_numpy(counts).to(ids.device)
        return labels.masked_fill(left_out.view(-1, *[1] * (labels.dim() - 1)), -100)

    def _all_labels(self, pieces: list[tuple[Record, Span]], ids: Tensor) -> Tensor:
        return torch.stack(
            [self._labels(record, span.start, span.stop, row) for (record, span), row in zip(pieces, ids, strict=True)]
        )

    def _bits(self, pieces: list[tuple[Record, Span]]) -> tuple[int, Tensor, Tensor]:
        """How many tokens of the spans come before the first that is predicted, and bits and labels of all others,
        `(spans, tokens)`; -100 is a label that does not count, as those of padding are."""
        batch = self.batch(pieces)
        mask = None if batch.mask is None else batch.mask[:, 1:]  # a row without its last token
        hidden = self.read(batch.inputs[:, :-1], batch.condition, mask)
        labels = self._all_labels(pieces, batch.inputs)[:, 1:]
        return 1, self._losses(hidden, labels) / math.log(2), labels

    def answers(self, pieces: list[tuple[Record, Span]]) -> list[Found | NotFinite]:
        first, bits, labels = self._bits(pieces)
        found = []
        for (_, span), one, label in zip(pieces, bits.cpu(), labels.cpu(), strict=True):
            count = span.stop - span.start - first
            found.append(self._made(span, span.start + first, one[:count], label[:count]))
        return found

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
        for start in range(span.start, span.stop - 1, answers.CHUNK):
            stop = min(start + answers.CHUNK, span.stop - 1)
            ids = self.tensor(record, start, stop + 1)
            labels = self._labels(record, start, stop + 1, ids[0])[None, 1:]
            hidden, state = self.read(ids[:, :-1], self.condition(record), state=state, return_state=True)
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
        step = max(1, _LOGITS // len(hidden)) if self.alone else hidden.shape[1]
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
        known = (labels != -100).view(len(labels), -1).any(1).numpy()
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
        batch = self.batch(pieces)
        ids, labels = batch.inputs, self._all_labels(pieces, batch.inputs)
        nats = torch.zeros(ids.shape, device=ids.device)
        for first in range(min(self._TIMES, ids.shape[1])):
            hidden = ids.clone()
            hidden[:, first :: self._TIMES] = self.mask_id
            asked = torch.full_like(labels, -100)
            asked[:, first :: self._TIMES] = labels[:, first :: self._TIMES]
            nats += self._losses(self.read(hidden, batch.condition, batch.mask), asked)
        return 0, nats / math.log(2), labels


class PseudoTokens(PseudoLikelihood, Tokens):
    """Bits of each token, given those around it."""
