"""The next tokens of a batch whose sequences have settings of their own, picked on the device at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mambaseq.generation.prompts import Prompts
from mambaseq.generation.sampling import Draws, uniforms
from mambaseq.heads.base import Head
from mambaseq.models import SequenceModel
from mambaseq.ops.gpu.capture import Replay
from mambaseq.serving.requests import Request

_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
_NEUTRAL = dict(zip(_NAMES, (0.0, 0.0, 1.0, 0.0, 1.0, 0.0), strict=True))  # greedy


_FEW = 64  # the largest top_k for which the likeliest are looked for without sorting all


class Needs(NamedTuple):
    """What picking the tokens of some rows takes: whether any is the likeliest, whether any is drawn, and of those
    whether any has a min_p or a top_p, and the largest top_k that leaves something out (0 for none)."""

    greedy: bool = True
    drawn: bool = False
    min_p: bool = False
    top_k: int = 0
    top_p: bool = False

    @classmethod
    def of(cls, values: np.ndarray, n: int) -> Needs:
        """values: settings `(settings, rows)` float64. n: the vocabulary's size."""
        temperature, top_k, top_p, min_p = values[:4]
        drawn = temperature > 0
        if not drawn.any():
            return cls()
        limited = top_k[(top_k > 0) & (top_k < n)]
        return cls(not drawn.all(), True, bool((min_p > 0).any()), int(limited.max(initial=0)), bool((top_p < 1).any()))

    def rounded(self, n: int) -> Needs:
        """The one of `kinds` that does it, too."""
        greedy, plain, few, every = kinds(n)
        if not self.drawn:
            return greedy
        return every if self.top_p or self.top_k > _FEW else few if self.top_k else plain


def kinds(n: int) -> tuple[Needs, ...]:
    """How batches are picked where shapes are few, of a vocabulary of n: greedy, drawn, from at most `_FEW`, all."""
    return Needs(), *(Needs(True, True, True, *limits) for limits in ((), (min(_FEW, n),), (n, True)))


class Picker:
    """Settings, random numbers and penalties of the requests in the slots, and the last token of each.

    Slots are taken and left as in `Slots`. tokens: `(size,)` int64 on the device; those of slots that are not in use
    mean nothing. fixed: pick for all slots up to one of a few sizes, on a GPU by a CUDA graph.
    """

    def __init__(self, model: SequenceModel, size: int, fixed: bool = False) -> None:
        self._model, self._device, self._fixed = model, next(model.parameters()).device, fixed
        self.tokens = torch.zeros(size, dtype=torch.int64, device=self._device)
        self._requests: list[Request] = []
        self._keys, self._drawn = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.uint64)
        self._values = np.tile(np.array([*_NEUTRAL.values()])[:, None], size)  # (settings, size)
        self._there = torch.from_numpy(self._values.copy()).to(self._device)  # the same on the device
        self._uniform = torch.zeros(size, dtype=torch.float64, device=self._device)
        self._changed = False
        self._needs: dict[int, Needs] = {}  # of the slots in use from one on, until they change
        # (size, vocab_size) bool: what prompts and answers hold; made for the first request with a penalty
        self._seen: Tensor | None = None
        self._added: Tensor | None = None
        self._penalised = 0  # requests with a penalty
        self._calls: dict[tuple[int, Needs], tuple[Tensor, Replay]] = {}
        self._pool = torch.cuda.graph_pool_handle() if fixed and self._device.type == "cuda" else None

    def enter(self, request: Request) -> None:
        """A request behind the others."""
        slot = len(self._requests)
        self._requests.append(request)
        self._penalised += request.settings.penalises
        self._values[:, slot] = request.settings._replace(top_k=min(request.top_k, 2**31))
        self._change()
        if request.temperature > 0:
            prompt = Prompts([request.prompt.astype(np.int64, copy=False)], torch.device("cpu"))
            self._keys[slot] = Draws(request.seed, prompt, None, 1, torch.tensor([[request.number]]), "cpu").keys[0]
        self._drawn[slot] = 0
        if self._seen is not None:
            self._fill(slot)

    def leave(self, slot: int) -> None:
        """Free a slot, whose place the last request takes."""
        self._penalised -= self._requests[slot].settings.penalises
        last = self._requests.pop()
        end = len(self._requests)
        if slot != end:
            self._requests[slot] = last
            self._keys[slot], self._drawn[slot] = self._keys[end], self._drawn[end]
            self._values[:, slot] = self._values[:, end]
            tables = [self.tokens, *(table for table in (self._seen, self._added) if table is not None)]
            for table in tables:
                table[slot].copy_(table[end])
        self._change()

    def cut(self, count: int) -> None:
        """Free all slots but the first `count`. The device is not used."""
        del self._requests[count:]
        self._penalised = sum(request.settings.penalises for request in self._requests)
        self._change()

    def pick(self, told: Tensor, first: int = 0, stays: bool = False) -> Tensor:
        """The next tokens of the slots in use from `first` on, and whether what the head tells of them is finite: `(2,
        n)` int64, or more columns that mean nothing; the next call may overwrite them. told: what the head tells of
        them, `(n or more, ...)`. stays: it is that of all slots, and will be at the same place for as many. Nothing
        waits for the device."""
        end = len(self._requests)
        if self._changed:
            self._there.copy_(torch.from_numpy(self._values), non_blocking=True)
            self._changed = False
        # a head of its own way to draw may ask for several numbers a token, and have a memory
        if stays and self._fixed and not self._penalised and _draws_plainly(self._model.head):
            needs = self._needed(told, 0, end).rounded(told.shape[-1])
            if needs.drawn:
                self._draw(0, end)
            return self._again(told, needs)
        return self._picked(told[: end - first], first, end)

    def warm_up(self, told: Tensor) -> str | None:
        """Compile and capture what is needed for so many slots, `told` being what steps tell. None may be in use.
        Returns why it is not captured on a GPU, if so."""
        why_not = None
        for needs in kinds(told.shape[-1]) if _draws_plainly(self._model.head) else ():
            for _ in range(3 if self._fixed else 1):  # the second is watched, the third captured
                self._again(told, needs)
            if self._fixed and told.is_cuda:
                why_not = self._calls[len(told), needs][1].why_not or why_not
        return why_not

    def _change(self) -> None:
        self._changed = True
        self._needs.clear()

    def _needed(self, told: Tensor, first: int, end: int) -> Needs:
        if first not in self._needs:
            self._needs[first] = Needs.of(self._values[:, first:end], told.shape[-1])
        return self._needs[first]

    def _again(self, told: Tensor, needs: Needs) -> Tensor:
        """`_all`, by a graph if `told` is where it was the last time: what no graph tells is somewhere else each time,
        and watching each pick would cost more than it."""
        key = len(told), needs
        if key in self._calls and self._calls[key][0] is told:
            return self._calls[key][1]()[0]
        self._calls[key] = told, Replay(lambda: (self._all(told, needs),), self._device, self._pool)
        return self._all(told, needs)

    def _all(self, told: Tensor, needs: Needs) -> Tensor:
        """Of the first slots, as many as `told` has, where no penalties are."""
        token = self._chosen(told, slice(0, len(told)), needs)
        self.tokens[: len(told)] = token
        return _with_finite(token, told)

    def _picked(self, told: Tensor, first: int, end: int) -> Tensor:
        draw = getattr(self._model.head, "draw", None)
        slots = slice(first, end)

        def choose(logits: Tensor) -> Tensor:
            needs = self._needed(logits, first, end)
            if self._penalised:
                logits = self._with_penalties(logits, slots)
            if needs.drawn:
                self._draw(first, end)
            return self._chosen(logits, slots, needs)

        token: Tensor = choose(told) if draw is None else draw(told, choose)  # a plugin's may have none
        self.tokens[slots] = token
        if self._added is not None:
            self._added[slots].scatter_(1, token[:, None], True)
        return _with_finite(token, told)

    def _draw(self, first: int, end: int) -> None:
        """New random numbers for some slots."""
        numbers = torch.from_numpy(uniforms(self._keys[first:end], self._drawn[first:end]))
        self._uniform[first:end].copy_(numbers, non_blocking=True)
        self._drawn[first:end] += np.uint64(1)

    def _chosen(self, logits: Tensor, slots: slice, needs: Needs) -> Tensor:
        likeliest = logits.argmax(-1) if needs.greedy else None
        if likeliest is not None and not needs.drawn:
            return likeliest
        there = dict(zip(_NAMES, self._there[:, slots, None], strict=True))
        token = sample_rows(logits, there, self._uniform[slots], needs)
        return token if likeliest is None else torch.where(there["temperature"][:, 0] > 0, token, likeliest)

    def _with_penalties(self, logits: Tensor, slots: slice) -> Tensor:
        """As `Penalties` does it, for rows with penalties of their own; those without stay as they are."""
        if self._seen is None or self._added is None:
            seen = torch.zeros(len(self.tokens), logits.shape[-1], dtype=torch.bool, device=self._device)
            self._seen, self._added = seen, seen.clone()  # both or none, also where memory is short
            for slot in range(slots.stop):
                self._fill(slot)
        seen, added = self._seen[slots], self._added[slots]
        repetition, presence = (self._there[number, slots, None].to(logits.dtype) for number in (4, 5))
        penalised = torch.where(logits < 0, logits * repetition, logits / repetition)
        return torch.where(seen | added, penalised, logits) - presence * added

    def _fill(self, slot: int) -> None:
        assert self._seen is not None
        assert self._added is not None
        self._seen[slot] = False
        self._added[slot] = False
        if (request := self._requests[slot]).settings.penalises:
            self._seen[slot, self._sent(np.unique(request.prompt).astype(np.int64))] = True

    def _sent(self, values: np.ndarray) -> Tensor:
        """On the device, without a wait for what it is doing."""
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _with_finite(token: Tensor, told: Tensor) -> Tensor:
    return torch.stack([token, told.amax(-1).isfinite().long()])


def _draws_plainly(head: nn.Module) -> bool:
    return getattr(type(head), "draw", Head.draw) is Head.draw and "draw" not in vars(head)


def sample_rows(logits: Tensor, there: dict[str, Tensor], uniform: Tensor, needs: Needs) -> Tensor:
    """What `mambaseq.generation.sampling.sample` gives for each row by its own settings, `(batch,)` int64; rows of
    temperature 0 get any token.

    there: the settings by name, `(batch, 1)` float64. uniform: `(batch,)` float64. needs: what no row needs is left
    out.
    """
    temperature = torch.where(there["temperature"] > 0, there["temperature"], 1.0)
    logits = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).float()
    n, unlikely = logits.shape[-1], None
    if needs.min_p:
        unlikely = logits < there["min_p"].log().float()  # of 0 it is -inf, and nothing is below
    ordered = order = None
    if needs.top_p:
        ordered, order = logits.sort(descending=True)
    if needs.top_k:
        likeliest = logits.topk(needs.top_k).values if ordered is None else ordered
        kth = likeliest.gather(1, (there["top_k"].long() - 1).clamp(0, likeliest.shape[1] - 1))
        is_limited = (there["top_k"] > 0) & (there["top_k"] < n)
        logits = logits.masked_fill((logits < kth) & is_limited, -torch.inf)
        if ordered is not None:
            ordered = ordered.masked_fill((ordered < kth) & is_limited, -torch.inf)
    if ordered is not None and order is not None:
        shares = ordered.softmax(-1)
        drop = (shares.cumsum(-1) - shares >= there["top_p"].float()) & (there["top_p"] < 1)
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    if unlikely is not None:
        logits = logits.masked_fill(unlikely, -torch.inf)
    sums = logits.softmax(-1).double().cumsum(-1)
    token = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
    return token.clamp(max=n - 1)
