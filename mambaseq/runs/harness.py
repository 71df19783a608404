"""Runs as models of lm-eval, the harness that language models are compared by. Needs its package: the extra
`harness`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from mambaseq.checkpoints import load_model
from mambaseq.errors import ConfigError, cut_list, shown
from mambaseq.generation import generate_all
from mambaseq.generation.scoring import Asked, Scorer
from mambaseq.generation.stopping import StopStrings
from mambaseq.runs.devices import choose_device

_NEW_TOKENS = 256  # as lm-eval's other models, where a task does not say
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("mambaseq")
class Harness(TemplateLM):
    """A run for lm-eval: `simple_evaluate(Harness(run), tasks=[...])`.

    Contexts may have any length, since the state is passed on; those that several answers share are read once. Rolling
    log-likelihoods give every token all that precedes it, where others cut windows.

    checkpoint: the folder of a run, or of an exported model. device: the GPU if there is one, when left out.
    batch_size: prompts that are continued together; scores are batched by their lengths. dtype: see `load_model`.
    Raises ConfigError for a model without a tokenizer of text, or that is no causal language model.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.loaded = load_model(checkpoint, choose_device(device), dtype)
        self._device = next(self.loaded.model.parameters()).device
        tokenizer = self.loaded.tokenizer
        if tokenizer is None or not isinstance(tokenizer.decode(np.zeros(0, dtype=np.int64)), str):
            raise ConfigError(
                f"The model at {checkpoint} has no tokenizer of text, which the tasks of lm-eval are made of. Give a "
                "run of text."
            )
        self._tokenizer = tokenizer
        self.scorer = Scorer(self.loaded.model)
        self.batch_size = max(int(str(batch_size)), 1) if str(batch_size).isdigit() else 64  # None, "auto", "auto:4"
        self._bos: int | None = getattr(tokenizer, "bos_id", None)
        self._eos: int | None = getattr(tokenizer, "eos_id", None)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text; of a model that has none the one that a text begins with."""
        return self.prefix_token_id if self._eos is None else self._eos

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without a context: the mark that begins or ends documents, else a line end."""
        marks = [mark for mark in (self._bos, self._eos) if mark is not None]
        start: Sequence[int] = getattr(self._tokenizer, "start_ids", None) or self.loaded.card.start_ids
        return int((marks or start)[0])

    @property
    def tokenizer_name(self) -> str:
        return f"{type(self._tokenizer).__name__} of {self.loaded.source.parent}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; with the mark that begins documents, if the tokenizer has one, unless it is said not to be
        added or stands there already."""
        ids: list[int] = self._tokenizer.encode(string).tolist()
        if self._bos is not None and ids[:1] == [self._bos]:
            written = ids[1:2] == [self._bos]
            if written or add_special_tokens is False:
                ids = ids[1:]
        return ids

    def tok_decode(self, tokens: Iterable[int], **kwargs: Any) -> str:
        return str(self._tokenizer.decode(np.asarray(list(tokens), dtype=np.int64)))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        prefix = [self.prefix_token_id]
        asked = [Asked(_ids(context or prefix), _ids(continuation)) for _, context, continuation in requests]
        found = []
        scores = self.scorer.continuations(asked, progress=not disable_tqdm)
        for (texts, _, _), one in zip(requests, scores, strict=True):
            found.append((one.nats, one.greedy))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, the first token given the mark before it; every token is given all that
        precede it."""
        asked = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            begun = ids[:1] == [self._bos]
            asked.append(Asked(_ids([self.prefix_token_id]), _ids(ids[begun:])))
        found = [one.nats for one in self.scorer.continuations(asked, progress=not disable_tqdm)]
        for request, nats in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the texts that a task names (`until`), which is left out, or the mark that
        ends documents. Generation ends there, wherever tokens have their borders.

        Raises ConfigError for settings of a task that this model has not.
        """
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        settings = [_settings(request.args[1]) for request in requests]
        found = [""] * len(requests)
        for numbers in _alike(prompts, settings, self.batch_size):
            first = settings[numbers[0]]
            rows = [torch.tensor(prompts[number], device=self._device) for number in numbers]
            for number, text in zip(numbers, self._continued(rows, *first), strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _continued(
        self, prompts: list[torch.Tensor], count: int, until: list[str], sampling: dict[str, Any]
    ) -> list[str]:
        marks = {self._eos} if self._eos is not None else set()
        texts = []
        for text in until:
            ids = self.tok_encode(text, add_special_tokens=False)
            if len(ids) == 1 and self.tok_decode(ids) == "":  # a special token, which is never part of a text
                marks.add(ids[0])
            else:
                texts.append(text)
        whole = generate_all(
            self.loaded.model,
            prompts,
            count,
            seed=0,
            stop_ids=sorted(mark for mark in marks if mark is not None),
            stop=StopStrings(texts, self._tokenizer) if texts else None,
            **sampling,
        )
        added = [row[len(prompt) :].tolist() for row, prompt in zip(whole, prompts, strict=True)]
        return [_cut(self.tok_decode(itertools.takewhile(lambda one: one not in marks, row)), texts) for row in added]


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)


def _cut(text: str, stops: list[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _settings(given: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """How many tokens, the texts that end a continuation, and the settings of sampling, of what a task gives."""
    rest = dict(given)
    counts = [rest.pop(name, None) for name in _COUNTS]
    count = next((int(one) for one in counts if one is not None), _NEW_TOKENS)
    until = rest.pop("until", None) or []
    sample = rest.pop("do_sample", None)
    sampling = {name: rest.pop(name) for name in _SAMPLING if rest.get(name) is not None}
    sampling.setdefault("temperature", 1.0 if sample else 0.0)
    if sample is False:
        sampling["temperature"] = 0.0
    if rest := {name: value for name, value in rest.items() if value is not None}:
        raise ConfigError(
            f"The task asks for {shown(rest)} in generation_kwargs, which models of mambaseq do not have. They have: "
            f"{cut_list([*_COUNTS, 'until', 'do_sample', *_SAMPLING])}."
        )
    return count, [text for text in ([until] if isinstance(until, str) else until) if text], sampling


def _alike(prompts: list[list[int]], settings: list[Any], most: int) -> Iterator[list[int]]:
    """Numbers of prompts that are continued together: by equal settings, and of about one length."""

    def key(number: int) -> tuple[str, int]:
        return repr(settings[number]), len(prompts[number])

    for _, group in itertools.groupby(sorted(range(len(prompts)), key=key), lambda number: key(number)[0]):
        numbers = list(group)
        yield from (numbers[start : start + most] for start in range(0, len(numbers), most))
