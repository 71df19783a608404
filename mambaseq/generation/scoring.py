"""Log-likelihoods of given tokens: of continuations of contexts, and of documents of any length. All are exact: nothing
is cut off, padding is never seen, and the state is passed on where a sequence is read in parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq.errors import ConfigError
from mambaseq.generation.checks import check_finite, continues
from mambaseq.heads.base import Head
from mambaseq.models import SequenceModel

CHUNK = 8192
"""Positions of one sequence that are read at once where the state can be passed on."""

_TOGETHER = {"cpu": 2**14}  # positions in a batch
_TOGETHER_ELSEWHERE = 2**18
_FORKED = 64  # states that exist at once, since those of large models take megabytes each
_LOGITS = 2048  # positions whose logits exist at once: a large vocabulary's would not fit


class Asked(NamedTuple):
    """Ids of a context, `(n,)`, and of what is asked to follow it, `(m,)`.

    given: how many of the continuation's tokens, from its first on, are no part of the score: a question behind a
        context that several have.
    """

    context: np.ndarray
    continuation: np.ndarray
    given: int = 0


class Scored(NamedTuple):
    """What a model says of a continuation.

    nats: the natural logarithm of its probability, at most 0; 0.0 for none. greedy: whether each of its tokens is the
        likeliest one given those before. tokens: how many it has.
    """

    nats: float
    greedy: bool
    tokens: int


class _Row(NamedTuple):
    """A sequence to read; scored are `targets`, each at the position before its own: the last `len(targets)`."""

    ids: np.ndarray
    targets: np.ndarray
    numbers: list[int]  # the questions that it answers


class Scorer:
    """Scores tokens by a causal model of one token a position.

    Raises ConfigError for another model.
    """

    def __init__(self, model: SequenceModel) -> None:
        head = model.head
        by_parts = getattr(type(head), "draw", Head.draw) is not Head.draw  # which tells no logits of all tokens
        codes: int = getattr(head, "codes", 0)
        if not continues(model, "tokens") or codes or by_parts:
            raise ConfigError(
                f"Continuations are scored by a causal model with an lm head; this one has the head "
                f"{type(head).__name__} on {type(model.backbone).__name__}. Give a run with the head lm and a causal "
                "backbone, such as residual or unet."
            )
        self.model = model
        self.device = next(model.parameters()).device
        self.in_parts = bool(getattr(model.encoder, "position_wise", False))
        self.together = _TOGETHER.get(self.device.type, _TOGETHER_ELSEWHERE)
        self.vocab_size = model.spec["encoder"].get("vocab_size") if model.spec else None

    @torch.no_grad()
    def continuations(self, asked: Sequence[Asked], progress: bool = False) -> list[Scored]:
        """Score each continuation given its context. A context that is asked several times is read once.

        Raises ConfigError for an empty context or ids that the model does not have, NotFinite for a model whose logits
        are not finite numbers.
        """
        found: list[Scored | None] = [None] * len(asked)
        contexts: dict[bytes, list[int]] = {}
        for number, (context, continuation, given) in enumerate(asked):
            if not len(context):
                raise ConfigError("A continuation is scored given a context of at least one token; this one is empty.")
            self._check(context)
            self._check(continuation)
            if len(continuation) > given:
                contexts.setdefault(np.asarray(context, dtype=np.int64).tobytes(), []).append(number)
            else:
                found[number] = Scored(0.0, True, 0)
        alone, shared = [], []
        for numbers in contexts.values():
            context = np.asarray(asked[numbers[0]].context, dtype=np.int64)
            if len(numbers) > 1 and self.in_parts:
                shared.append(_Row(context, np.zeros(0, dtype=np.int64), numbers))
                continue
            for number in numbers:
                targets = np.asarray(asked[number].continuation, dtype=np.int64)
                read = np.concatenate([context, targets[:-1]])
                alone.append(_Row(read, targets[asked[number].given :], [number]))
        with tqdm(total=found.count(None), unit="text", disable=not progress) as bar:
            for rows in self._batches(alone, len(alone)):
                for row, scored in zip(rows, self._read(rows), strict=True):
                    found[row.numbers[0]] = scored
                bar.update(len(rows))
            for rows in self._batches(shared, _FORKED):
                for number, scored in self._forked(rows, asked):
                    found[number] = scored
                    bar.update()
        return [one for one in found if one is not None]

    @torch.no_grad()
    def document(self, parts: Iterable[np.ndarray]) -> Scored:
        """Score all tokens of a sequence but its first, each given all before it. `parts` are its ids in order; they
        are read one by one with the state passed on, so that neither memory nor what is seen depends on their sizes.

        Raises ConfigError for a model that cannot be read in parts, or ids that it does not have; NotFinite.
        """
        self.model.check_stateful()
        state, last = None, np.zeros(0, dtype=np.int64)
        total, greedy, count = 0.0, True, 0
        for part in parts:
            self._check(part)
            ids = np.concatenate([last, np.asarray(part, dtype=np.int64)])
            for start in range(0, len(ids) - 1, CHUNK):
                piece = ids[start : start + CHUNK + 1]
                hidden, state = self._hidden(torch.from_numpy(piece[None, :-1]), state)
                nats, right = self._scores(hidden, torch.from_numpy(piece[None, 1:]))
                total, greedy = total + float(nats.sum()), greedy and bool(right.all())
                count += len(piece) - 1
            last = ids[-1:]
        return Scored(total, greedy, count)

    def _check(self, ids: np.ndarray) -> None:
        top = self.vocab_size
        if top is not None and len(ids) and not 0 <= int(np.min(ids)) <= int(np.max(ids)) < top:
            raise ConfigError(
                f"A text has the ids {int(np.min(ids))} to {int(np.max(ids))}, but the model's vocabulary is of "
                f"{top:,}. Use the tokenizer that it was trained with."
            )

    def _batches(self, rows: list[_Row], most: int) -> Iterator[list[_Row]]:
        """Rows of about one length together, the longest first; a long one alone."""
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: -len(row.ids)):
            if batch and (len(batch) == most or (len(batch) + 1) * len(batch[0].ids) > self.together):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _hidden(self, ids: Tensor, state: Any, return_state: bool = True) -> tuple[Tensor, Any]:
        x = self.model.encoder(ids.to(self.device))
        if not return_state:
            return self.model.backbone(x, state=state), None
        hidden, state = self.model.backbone(x, state=state, return_state=True)
        return hidden, state

    def _read(self, rows: list[_Row], state: Any = None) -> list[Scored]:
        """Score the targets of rows, padded on the right, where a causal model does not look."""
        lengths = [len(row.ids) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        targets = torch.full_like(ids, -100)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.from_numpy(row.ids)
            targets[number, len(row.ids) - len(row.targets) : len(row.ids)] = torch.from_numpy(row.targets)
        part = CHUNK if self.in_parts and max(lengths) > CHUNK else max(lengths)
        totals, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
        for start in range(0, max(lengths), part):
            asked = targets[:, start : start + part]
            more = start + part < max(lengths)
            hidden, state = self._hidden(ids[:, start : start + part], state, return_state=more)
            nats, right = self._scores(hidden, asked)
            totals, greedy = totals + nats.sum(1), greedy & right.all(1)
        return [
            Scored(total, one, len(row.targets))
            for row, total, one in zip(rows, totals.tolist(), greedy.tolist(), strict=True)
        ]

    def _forked(self, rows: list[_Row], asked: Sequence[Asked]) -> Iterator[tuple[int, Scored]]:
        """Read each context once, and all that is asked to follow it from its state."""
        states, hidden = self._ends(rows)
        owner, first, rest = [], [], []
        for place, row in enumerate(rows):
            for number in row.numbers:
                continuation = np.asarray(asked[number].continuation, dtype=np.int64)
                owner.append(place)
                given = asked[number].given
                first.append(-100 if given else continuation[0])
                rest.append(_Row(continuation[:-1], continuation[max(given, 1) :], [number]))
        told = hidden[torch.tensor(owner, device=self.device)]
        nats, right = self._scores(told, torch.tensor(first)[:, None])
        begun = [
            Scored(total, greedy, int(token >= 0))
            for total, greedy, token in zip(nats[:, 0].tolist(), right[:, 0].tolist(), first, strict=True)
        ]
        longer = {id(row): place for place, row in enumerate(rest) if len(row.ids)}
        for some in self._batches([row for row in rest if len(row.ids)], _FORKED):
            which = torch.tensor([owner[longer[id(row)]] for row in some], device=self.device)
            forks = [layer.select(which) for layer in states]
            for row, scored in zip(some, self._read(some, forks), strict=True):
                one = begun[longer[id(row)]]
                begun[longer[id(row)]] = Scored(
                    one.nats + scored.nats, one.greedy and scored.greedy, one.tokens + scored.tokens
                )
        for row, one in zip(rest, begun, strict=True):
            yield row.numbers[0], one

    def _ends(self, rows: list[_Row]) -> tuple[Any, Tensor]:
        """States and hidden values `(rows, 1, d_model)` at the end of each row."""
        lengths = torch.tensor([len(row.ids) for row in rows])
        longest = int(lengths.max())
        if len(rows) == 1:
            state, ids = None, torch.from_numpy(rows[0].ids)[None]
            for start in range(0, longest, CHUNK):
                hidden, state = self._hidden(ids[:, start : start + CHUNK], state)
            return state, hidden[:, -1:]
        packed = torch.from_numpy(np.concatenate([row.ids for row in rows]))[None].to(self.device)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(self.device)
        x = self.model.encoder(packed, None, bounds)
        hidden, state = self.model.backbone(x, cu_seqlens=bounds, return_state=True)
        return state, hidden[0, (bounds[1:] - 1).long()][:, None]

    def _scores(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Nats (float64) of targets, and whether each is the likeliest token; 0 and True where nothing is asked (-100).

        hidden `(batch, length, d_model)`; targets, and what is returned, `(batch, length)` on the host."""
        asked = targets != -100
        nats = torch.zeros(targets.shape, dtype=torch.float64)
        right = torch.ones(targets.shape, dtype=torch.bool)
        if not asked.any():
            return nats, right
        places = asked.to(hidden.device)
        alone = getattr(self.model.head, "position_wise", False)
        told = hidden[places] if alone else self.model.told(hidden)[places]
        found, best = [], []
        for rows, wanted in zip(told.split(_LOGITS), targets[asked].to(hidden.device).split(_LOGITS), strict=True):
            logits = (self.model.told(rows[None])[0] if alone else rows).float()
            one = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            # of a model that is not finite the argmax may still be a number
            check_finite(one)
            found.append(one.double())
            best.append(logits.argmax(-1) == wanted)
        nats[asked], right[asked] = torch.cat(found).cpu(), torch.cat(best).cpu()
        return nats, right


def perplexity(nats: float, count: int) -> float:
    """exp of the mean negative log-likelihood; NaN for nothing, infinity where it is too large."""
    if not count:
        return math.nan
    return math.exp(-nats / count) if -nats / count < 709 else math.inf
