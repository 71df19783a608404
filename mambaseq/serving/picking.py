"""The next tokens of a batch whose sequences have settings of their own, picked on the device at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mambaseq.generation.prompts import Prompts
from mambaseq.generation.sampling import Draws, uniforms
from mambaseq.models import SequenceModel
from mambaseq.serving.requests import Request

_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
_NEUTRAL = dict(zip(_NAMES, (0.0, 0.0, 1.0, 0.0, 1.0, 0.0), strict=True))  # greedy


class Picker:
    """Settings, random numbers and penalties of the requests in the slots, and the last token of each.

    Slots are taken and left as in `Slots`. tokens: `(size,)` int64 on the device; those of slots that are not in use
    mean nothing.
    """

    def __init__(self, model: SequenceModel, size: int) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self.tokens = torch.zeros(size, dtype=torch.int64, device=self._device)
        self._requests: list[Request] = []
        self._keys, self._drawn = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.uint64)
        self._values = np.tile(np.array([*_NEUTRAL.values()])[:, None], size)  # (settings, size)
        self._there: Tensor | None = None  # the values on the device, None where they have changed
        # (size, vocab_size) bool: what prompts and answers hold; made for the first request with a penalty
        self._seen: Tensor | None = None
        self._added: Tensor | None = None

    def enter(self, request: Request) -> None:
        """A request behind the others."""
        slot = len(self._requests)
        self._requests.append(request)
        self._values[:, slot] = request.settings._replace(top_k=min(request.top_k, 2**31))
        self._there = None
        if request.temperature > 0:
            prompt = Prompts([request.prompt.astype(np.int64, copy=False)], torch.device("cpu"))
            self._keys[slot] = Draws(request.seed, prompt, None, 1, torch.tensor([[request.number]]), "cpu").keys[0]
        self._drawn[slot] = 0
        if self._seen is not None:
            self._fill(slot)

    def leave(self, slot: int) -> None:
        """Free a slot, whose place the last request takes."""
        last = self._requests.pop()
        end = len(self._requests)
        if slot != end:
            self._requests[slot] = last
            self._keys[slot], self._drawn[slot] = self._keys[end], self._drawn[end]
            self._values[:, slot] = self._values[:, end]
            tables = [self.tokens, *(table for table in (self._seen, self._added) if table is not None)]
            for table in tables:
                table[slot].copy_(table[end])
        self._there = None

    def cut(self, count: int) -> None:
        """Free all slots but the first `count`. The device is not used."""
        del self._requests[count:]

    def pick(self, told: Tensor, first: int = 0) -> Tensor:
        """The next tokens of the slots in use from `first` on, `(n,)` int64, by what the head tells of them, `(n,
        ...)`. Nothing waits for the device."""
        draw = getattr(self._model.head, "draw", None)
        end = len(self._requests)

        def choose(logits: Tensor) -> Tensor:
            return self._chosen(logits, first, end)

        token: Tensor = choose(told) if draw is None else draw(told, choose)  # a plugin's may have none
        self.tokens[first:end] = token
        if self._added is not None:
            self._added[first:end].scatter_(1, token[:, None], True)
        return token

    def _chosen(self, logits: Tensor, first: int, end: int) -> Tensor:
        values = dict(zip(_NAMES, self._values[:, first:end], strict=True))
        if self._there is None:
            self._there = self._sent(self._values.copy())
        there = dict(zip(_NAMES, self._there[:, first:end, None], strict=True))
        if (values["repetition_penalty"] != 1).any() or (values["presence_penalty"] != 0).any():
            logits = self._penalised(logits, there, first, end)
        sampled = values["temperature"] > 0
        if not sampled.any():
            return logits.argmax(-1)
        uniform = self._sent(uniforms(self._keys[first:end], self._drawn[first:end]))
        self._drawn[first:end] += np.uint64(1)
        token = sample_rows(logits, values, there, uniform)
        return token if sampled.all() else torch.where(there["temperature"][:, 0] > 0, token, logits.argmax(-1))

    def _penalised(self, logits: Tensor, there: dict[str, Tensor], first: int, end: int) -> Tensor:
        """As `Penalties` does it, for rows with penalties of their own; those without stay as they are."""
        if self._seen is None or self._added is None:
            seen = torch.zeros(len(self.tokens), logits.shape[-1], dtype=torch.bool, device=self._device)
            self._seen, self._added = seen, seen.clone()  # both or none, also where memory is short
            for slot in range(end):
                self._fill(slot)
        seen, added = self._seen[first:end], self._added[first:end]
        repetition, presence = (there[name].to(logits.dtype) for name in _NAMES[4:])
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


def sample_rows(logits: Tensor, values: dict[str, np.ndarray], there: dict[str, Tensor], uniform: Tensor) -> Tensor:
    """What `mambaseq.generation.sampling.sample` gives for each row by its own settings, `(batch,)` int64; rows of
    temperature 0 get any token.

    values: the settings by name, `(batch,)` float64, by which what no row needs is left out; there: the same on the
    device, `(batch, 1)`. uniform: `(batch,)` float64.
    """
    temperature = torch.where(there["temperature"] > 0, there["temperature"], 1.0)
    logits = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).float()
    n, unlikely = logits.shape[-1], None
    if (values["min_p"] > 0).any():
        unlikely = logits < there["min_p"].log().float()  # of 0 it is -inf, and nothing is below
    limited = (values["top_k"] > 0) & (values["top_k"] < n)
    if limited.any():
        most = int(values["top_k"][limited].max())
        place = (there["top_k"].long() - 1).clamp(0, most - 1)
        kth = logits.topk(most).values.gather(1, place)
        is_limited = (there["top_k"] > 0) & (there["top_k"] < n)
        logits = logits.masked_fill((logits < kth) & is_limited, -torch.inf)
    if (values["top_p"] < 1).any():
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(-1)
        drop = (shares.cumsum(-1) - shares >= there["top_p"].float()) & (there["top_p"] < 1)
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    if unlikely is not None:
        logits = logits.masked_fill(unlikely, -torch.inf)
    sums = logits.softmax(-1).double().cumsum(-1)
    token = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
    return token.clamp(max=n - 1)
