"""Guesses of what a model will add: by what followed the same tokens before, or by a smaller model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mambaseq.generation.decoder import Decoder, tensors_of
from mambaseq.generation.prompts import Row
from mambaseq.mixers.growing import GrowingState
from mambaseq.models import SequenceModel

# Lengths of the n-grams that are looked up, the longest first.
SIZES = (16, 8, 4, 2)
# The last tokens of a prompt that are looked at: each takes about a kilobyte.
_WINDOW = 1 << 15
# Tokens that the smaller model reads one by one, since a call that gives a state takes longer.
_FEW = 4

Pick = Callable[[Tensor, Tensor], Tensor]
"""The next token `(1,)` from its logits `(1, n)` and the guesses before it `(g,)`."""


class Drafter(Protocol):
    """Guesses the next tokens of one sequence."""

    def add(self, tokens: list[int]) -> None:
        """The sequence's next tokens, also those that were guessed."""

    def kind(self) -> int | None:
        """What the next guesses would rest on: guesses of one kind are about equally often right. None if there are
        none."""

    def guesses(self, n: int, pick: Pick, device: torch.device) -> Tensor:
        """The next tokens, `(n,)` int64; n is at least 1."""


class NGrams:
    """Prompt lookup: what followed the last tokens where they were seen the last time, in the prompt or in what was
    added. The longest n-gram that was seen decides.

    row: the prompt, of which the last 32,768 tokens are looked at.
    """

    def __init__(self, row: Row) -> None:
        self._bytes, self._ids = bytearray(), list[int]()
        self._behind: list[dict[bytes, int]] = [{} for _ in SIZES]  # where a token follows
        self._at: int | None = None
        self.add(row[max(len(row) - _WINDOW, 0) : len(row)].tolist())

    def add(self, tokens: list[int]) -> None:
        """See `Drafter`."""
        for token in tokens:
            end = len(self._ids)
            for size, behind in zip(SIZES, self._behind, strict=True):
                if end >= size:
                    behind[self._key(size)] = end
            self._ids.append(token)
            self._bytes += token.to_bytes(4, "little")

    def kind(self) -> int | None:
        """The length of the longest n-gram that was seen."""
        for size, behind in zip(SIZES, self._behind, strict=True):
            if len(self._ids) >= size and (at := behind.get(self._key(size))) is not None:
                self._at = at
                return size
        return None

    def guesses(self, n: int, pick: Pick, device: torch.device) -> Tensor:
        """See `Drafter`; called behind `kind`. What repeats up to the end is repeated further."""
        assert self._at is not None
        found = self._ids[self._at : self._at + n]
        period = len(self._ids) - self._at
        for i in range(len(found), n):
            found.append(found[i - period])
        return torch.tensor(found, device=device)

    def _key(self, size: int) -> bytes:
        return bytes(self._bytes[-4 * size :])


class SmallerModel:
    """The smaller model's own continuation, drawn by the same settings and the same random numbers.

    decoder: behind the prompt. The states after its guesses are kept until it is known how many were right.
    """

    def __init__(self, model: SequenceModel, decoder: Decoder, condition: Tensor | None) -> None:
        self.model, self.decoder, self.condition = model, decoder, condition
        self._unread: list[int] = []
        self._kept: list[list[Any]] = []  # states after each number of guesses
        self._made: Tensor | None = None

    def add(self, tokens: list[int]) -> None:
        """See `Drafter`."""
        if self._made is not None:
            made = self._made.tolist()
            self._made = None
            right = 0
            while right < min(len(made), len(tokens)) and made[right] == tokens[right]:
                right += 1
            read = min(right, len(made) - 1)
            if read < len(made) - 1:
                _restore(self.decoder, self._kept[read])
            tokens = tokens[read:]
        self._unread += tokens

    def kind(self) -> int | None:
        """Always one."""
        return 0

    def guesses(self, n: int, pick: Pick, device: torch.device) -> Tensor:
        """See `Drafter`."""
        unread = torch.tensor(self._unread, device=device)
        self._unread = []
        if len(unread) > _FEW:
            x = self.model.encoder(unread[None, :-1], self.condition)
            _, state = self.model.backbone(x, state=self.decoder.state, return_state=True)
            self.decoder.take(state)
            unread = unread[-1:]
        for token in unread:
            logits = self.decoder.step(token[None])
        made = torch.zeros(0, dtype=torch.int64, device=device)
        for i in range(n):
            if i:
                self._keep(i - 1)
                logits = self.decoder.step(made[-1:])
            made = torch.cat([made, pick(logits, made)])
        self._made = made
        return made

    def _keep(self, number: int) -> None:
        state = self.decoder.state
        if number == len(self._kept):
            self._kept.append([_copy(layer) for layer in state])
            return
        kept = self._kept[number]
        if any(isinstance(layer, GrowingState) for layer in state):
            self._kept[number] = [_copy(layer) for layer in state]
        elif own := tensors_of(kept):
            torch._foreach_copy_(own, tensors_of(state))


def _copy(layer: Any) -> Any:
    """What it takes to come back to a state: of one that grows only how long it is."""
    if isinstance(layer, GrowingState):
        others = {name: getattr(layer, name).clone() for name in layer.tensors() if name not in layer.rows}
        return layer.longest, others
    return layer.clone()


def _restore(decoder: Decoder, kept: list[Any]) -> None:
    """Come back to a state that `_copy` kept."""
    for layer, old in zip(decoder.state, kept, strict=True):
        if isinstance(layer, GrowingState):
            layer.longest, others = old
            for name, tensor in others.items():
                setattr(layer, name, tensor.clone())
        elif own := list(layer.tensors().values()):
            torch._foreach_copy_(own, list(old.tensors().values()))
