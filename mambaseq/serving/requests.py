"""What is asked of the engine, and what becomes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from mambaseq.errors import ConfigError
from mambaseq.generation.sampling import check_settings
from mambaseq.limits import check_whole

Finish = Literal["stop", "length", "cancelled", "failed"]


class Settings(NamedTuple):
    """How tokens are picked; see `Request`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, and how; the settings are those of `mambaseq.generation.generate`.

    prompt: `(length,)` whole numbers, at least one. number: which of the samples of this prompt, from 0. stop_ids: ids
        that end it; the one that did is its last token.
    ends: told of each new token; True ends the answer after it. It is called while the engine steps, so it is quick.

    Raises ConfigError for an empty prompt and for settings out of range.
    """

    prompt: np.ndarray
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int = 0
    number: int = 0
    stop_ids: frozenset[int] = frozenset()
    ends: Callable[[int], bool] | None = None

    def __post_init__(self) -> None:
        if self.prompt.ndim != 1 or not len(self.prompt) or self.prompt.dtype.kind not in "iu":
            raise ConfigError("A prompt must be at least one token, and its tokens whole numbers.")
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_settings(*self.settings)
        check_whole("seed", self.seed, 0, 2**63 - 1)
        check_whole("number", self.number, 0, 2**63 - 1)

    @property
    def settings(self) -> Settings:
        """How its tokens are picked."""
        return Settings(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.presence_penalty
        )


class Ticket:
    """A request's answer, which the engine fills.

    tokens: what was added so far. finished: why it ended, None while it has not. error: of one that failed.
    known: tokens of its prompt whose state was known, which were not run again.
    """

    def __init__(self, request: Request, listen: Callable[[Ticket], None] | None) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.finished: Finish | None = None
        self.error: Exception | None = None
        self.known = 0
        self.cancelled = False
        self._listen = listen

    def cancel(self) -> None:
        """End it; its slot is free at the engine's next step. From any thread."""
        self.cancelled = True

    def add(self, token: int) -> None:
        """A new token; ends the answer where it should."""
        self.tokens.append(token)
        request = self.request
        stops = token in request.stop_ids
        if request.ends is not None and request.ends(token):
            stops = True
        if stops or len(self.tokens) == request.max_new_tokens:
            self.finished = "stop" if stops else "length"
        self._tell()

    def end(self, why: Finish, error: Exception | None = None) -> None:
        """It ended without a token of its own."""
        self.finished, self.error = why, error
        self._tell()

    def _tell(self) -> None:
        if self._listen is not None:
            self._listen(self)
