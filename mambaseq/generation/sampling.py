"""From logits to a token."""

from __future__ import annotations

import collections
import hashlib
import math
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaseq.errors import ConfigError, shown
from mambaseq.generation.prompts import Prompts, Row, parts

_LARGEST = 100  # penalty: logits stay finite

# Settings beside the temperature that leave what is drawn as the model says.
NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}


def check_settings(
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    presence_penalty: Any = 0.0,
) -> None:
    """Raise ConfigError unless temperature is a finite number of at least 0 (0 is greedy), top_k a whole number of at
    least 0 (0 is all), top_p in (0, 1], min_p in [0, 1], repetition_penalty in [0.01, 100] and
    presence_penalty in [-100, 100] (OpenAI's API has -2 to 2; below 0, what was added becomes likelier)."""

    def finite(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

    if not finite(temperature) or temperature < 0:
        raise ConfigError(f"temperature must be a finite number of at least 0, not {shown(temperature)}.")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise ConfigError(f"top_k must be a whole number of at least 0, not {shown(top_k)}.")
    if not finite(top_p) or not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, not {shown(top_p)}.")
    if not finite(min_p) or not 0 <= min_p <= 1:
        raise ConfigError(f"min_p must be a number from 0 to 1, not {shown(min_p)}; 0 keeps all tokens.")
    if not finite(repetition_penalty) or not 1 / _LARGEST <= repetition_penalty <= _LARGEST:
        raise ConfigError(
            f"repetition_penalty must be a number from {1 / _LARGEST} to {_LARGEST}, not "
            f"{shown(repetition_penalty)}; 1 is none."
        )
    if not finite(presence_penalty) or abs(presence_penalty) > _LARGEST:
        raise ConfigError(
            f"presence_penalty must be a number from -{_LARGEST} to {_LARGEST}, not {shown(presence_penalty)}; 0 is "
            "none."
        )


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Scale by 1/temperature, and set to -inf what is outside the top k, the nucleus of mass top_p, or below min_p
    times the largest probability.

    logits `(batch, vocab_size)` fp32; the result is fp32, and the largest of a row 0. top_k 0, top_p 1 and min_p 0 keep
    everything. The nucleus is the smallest set of the likeliest tokens whose mass reaches top_p (Holtzman et al.,
    arXiv:1904.09751); it is never empty. min_p is that of Nguyen et al. (arXiv:2407.01082). A temperature may be
    arbitrarily near 0: in the limit the likeliest tokens are left. Raises ConfigError for values out of range
    (temperature 0 is for `sample`).
    """
    check_settings(temperature, top_k, top_p, min_p)
    if temperature == 0:
        raise ConfigError("temperature must be above 0 to scale by it.")
    # in fp64, where no quotient by a temperature becomes 0 / 0
    logits = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).float()
    unlikely = logits < math.log(min_p) if min_p > 0 else None  # the largest is 0
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        drop = mass - ordered.softmax(-1) >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return logits if unlikely is None else logits.masked_fill(unlikely, -torch.inf)


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor | None, min_p: float = 0.0
) -> Tensor:
    """One token for each row, `(batch,)` int64, from a number in [0, 1) for each row, `(batch,)` float64. Temperature 0
    takes the likeliest token and needs no number."""
    if temperature == 0:
        return logits.argmax(-1)
    assert uniform is not None
    shares = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1).double().cumsum(-1)
    # the first token whose cumulative sum is above: never one with share 0
    token = torch.searchsorted(shares, uniform[:, None] * shares[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


class Penalties:
    """Changes logits by what the sequences hold already.

    repetition: logits of tokens of the prompt or of what was added are divided by it if they are positive, else
        multiplied (Keskar et al., arXiv:1909.05858). presence: subtracted from the logits of tokens that were added.
    prompts: of which each has `samples` sequences, that follow each other. n: the size of the vocabulary.
    """

    def __init__(self, repetition: float, presence: float, prompts: Prompts, samples: int, n: int) -> None:
        self.repetition, self.presence, self.device = repetition, presence, prompts.device
        self._added = torch.zeros(len(prompts) * samples, n, dtype=torch.bool, device=prompts.device)
        seen = np.zeros((len(prompts), n), dtype=bool)
        for row, prompt in zip(seen, prompts.rows, strict=True):
            for part in parts(prompt):
                row[part] = True
        self._seen = torch.from_numpy(seen).to(prompts.device).repeat_interleave(samples, 0)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits `(batch, n)`, as new ones."""
        if self.repetition != 1:
            penalised = torch.where(logits < 0, logits * self.repetition, logits / self.repetition)
            logits = torch.where(self._seen | self._added, penalised, logits)
        return logits - self.presence * self._added

    def along(self, logits: Tensor, guesses: Tensor) -> Tensor:
        """Of one sequence, logits `(m, n)` of its next positions, the last of which come behind `guesses` `(g,)`, each
        as if the guesses before it had been added: of `g + 1` positions the last m. As new ones."""
        added = self._added
        guessed = torch.nn.functional.one_hot(guesses, added.shape[1]).cumsum(0).bool()
        self._added = (torch.cat([added, added | guessed]))[-len(logits) :]
        try:
            return self(logits)
        finally:
            self._added = added

    def add(self, token: Tensor) -> None:
        """The tokens that were taken, `(batch,)`, or `(batch, n)`."""
        self._added.scatter_(1, token.view(len(self._added), -1), True)


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
    2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(keys: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64, of streams at their steps from 0 on. keys (`Draws.keys`) and steps: uint64, of shapes
    that broadcast to that of the numbers."""
    bits = _mix(keys + _GAMMA * (steps + np.uint64(1))) >> np.uint64(32)
    found: np.ndarray = bits.astype(np.float64) * 2.0**-32
    return found


class Draws:
    """Random numbers in [0, 1) for each sequence, from a stream of its own that depends on the seed, its prompt, its
    condition and its number among the samples of that prompt, but not on other sequences.

    prompts: whole numbers, or fp32. condition: as in `Batch`, or None.
    numbers: `(batch, samples)` int64; None counts samples from 0, after those of equal prompts (with equal conditions)
        before it.
    """

    _BLOCK = 64

    def __init__(
        self, seed: int, prompts: Prompts, condition: Tensor | None, samples: int, numbers: Tensor | None, device: Any
    ) -> None:
        conditions = [-1] * len(prompts) if condition is None else condition.tolist()
        roots = [_digest(seed, one, row) for one, row in zip(conditions, prompts.rows, strict=True)]
        if numbers is None:
            seen: collections.Counter[int] = collections.Counter()
            first = []
            for root in roots:
                first.append(seen[root])
                seen[root] += samples
            counted = np.array(first, dtype=np.uint64)[:, None] + np.arange(samples, dtype=np.uint64)
        else:
            counted = numbers.cpu().numpy().astype(np.uint64)
        self.keys = _mix(np.array(roots, dtype=np.uint64)[:, None] + _GAMMA * counted).ravel()  # what `uniforms` takes
        self._device, self._step = device, 0
        self._block: Tensor | None = None
        self._begin = 0  # the step of the block's first numbers

    def next(self) -> Tensor:
        """`(batch * samples,)` float64 on the device, new at each call."""
        if self._block is None or not 0 <= self._step - self._begin < self._BLOCK:
            self._block, self._begin = self._numbers(self._BLOCK), self._step
        self._step += 1
        return self._block[self._step - 1 - self._begin]

    def many(self, n: int) -> Tensor:
        """What `next` would give `n` times: `(n, batch * samples)` float64."""
        numbers = self._numbers(n)
        self._step += n
        return numbers

    def ahead(self, n: int) -> Tensor:
        """What `many` would give; it is given again."""
        if self._block is None or not self._begin <= self._step <= self._begin + len(self._block) - n:
            self._block, self._begin = self._numbers(max(n, self._BLOCK)), self._step
        return self._block[self._step - self._begin :][:n]

    def skip(self, n: int) -> None:
        """As if so many had been given."""
        self._step += n

    def _numbers(self, n: int) -> Tensor:
        steps = np.arange(self._step, self._step + n, dtype=np.uint64)
        return torch.from_numpy(uniforms(self.keys, steps[:, None])).to(self._device)


def _digest(seed: int, condition: int | list[int], prompt: Row) -> int:
    given = [condition] if isinstance(condition, int) else condition
    head = np.array([*given, len(prompt)], dtype="<i8").tobytes()
    found = hashlib.blake2b(seed.to_bytes(8, "little") + head, digest_size=8)
    for part in parts(prompt):
        found.update(part.astype("<f4" if part.dtype.kind == "f" else "<i8").tobytes())
    return int.from_bytes(found.digest(), "little")
