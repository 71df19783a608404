"""A request for completions, from JSON to what the engine takes, and its answer back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.generation.decode import check_whole
from mambaseq.generation.stopping import check_stop
from mambaseq.serving import Request, Ticket
from mambaseq.web.service import Service

_SETTINGS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
}
# keys of the API whose other values are not served
_FIXED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "suffix": ("",),
}
_KEYS = (*_SETTINGS, *_FIXED, "model", "prompt", "max_tokens", "n", "seed", "stop", "stream", "stream_options", "user")


class NoModel(ConfigError):
    """A name of a model that is not served."""


class Completion(NamedTuple):
    """What is asked: a request for each prompt and sample, in this order; the texts that end answers; whether they are
    streamed, and whether the stream ends with the numbers of tokens. id: of the answer. prompts: their number."""

    requests: list[Request]
    stop: list[str]
    stream: bool
    usage: bool
    id: str
    begun: int
    prompts: int


def parse(body: dict[str, Any], service: Service) -> Completion:
    """Raises ConfigError for keys and values that cannot be used, NoModel for another model's name."""
    for key in body:
        if key not in _KEYS:
            raise ConfigError(f"There is no parameter {shown(key)}.{did_you_mean(key, _KEYS)}")
    given = {key: value for key, value in body.items() if value is not None}
    for key, allowed in _FIXED.items():
        if key in given and not any(given[key] == one for one in allowed):
            raise ConfigError(f"{key} cannot be {shown(given[key])} here. Leave it out.")
    name = given.get("model", service.name)
    if name != service.name:
        raise NoModel(f"There is no model {shown(name)} here. Ask for {shown(service.name)}.")
    count, most, prompts = given.get("n", 1), given.get("max_tokens", 16), prompts_of(given.get("prompt"), service)
    check_whole("n", count, 1)
    if len(prompts) * count > service.engine.capacity:
        raise ConfigError(
            f"{len(prompts)} prompts with n = {shown(count)} ask for more answers than the {service.engine.capacity:,} "
            "that may be at once. Ask for fewer."
        )
    check_whole("max_tokens", most, 1)
    seed = given.get("seed", secrets.randbits(62))
    check_whole("seed", seed, 0, 2**63 - 1)
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not {*options} <= {"include_usage"}:
        raise ConfigError(f"stream_options has include_usage alone, and is {shown(options)}.")
    stream, counts = given.get("stream", False), options.get("include_usage", False)
    for key, value in (("stream", stream), ("include_usage", counts)):
        if not isinstance(value, bool):
            raise ConfigError(f"{key} must be true or false, not {shown(value)}.")
    stop = given.get("stop", [])
    if not isinstance(stop, str | list):
        raise ConfigError(f"stop must be a text, or a list of texts, not {shown(stop)}.")
    settings = {key: given.get(key, default) for key, default in _SETTINGS.items()}
    ids = [ids_of(one, service) for one in prompts]
    requests = [
        Request(prompt, most, **settings, seed=seed, number=number, stop_ids=service.stop_ids)
        for prompt in ids
        for number in range(count)
    ]
    told = f"cmpl-{secrets.token_hex(12)}"
    return Completion(requests, check_stop(stop), stream, counts, told, int(time.time()), len(prompts))


def prompts_of(prompt: Any, service: Service) -> list[str | list[int]]:
    """The prompts: a text, a list of ids, or a list of either. None is the start of a text."""
    if prompt is None:
        return [service.start_ids]
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ConfigError(f"prompt must be a text, a list of token ids, or a list of these, not {shown(prompt)}.")
    return prompt


def ids_of(prompt: Any, service: Service) -> np.ndarray:
    """`(length,)` int64."""
    if isinstance(prompt, str):
        return np.asarray(service.tokenizer.encode(prompt), dtype=np.int64)
    if not isinstance(prompt, list) or any(isinstance(one, bool) or not isinstance(one, int) for one in prompt):
        raise ConfigError(f"A prompt must be a text or a list of token ids, not {shown(prompt)}.")
    if any(not 0 <= one < 2**31 for one in prompt):
        raise ConfigError("The prompt has token ids that the model lacks. Use those of its own tokenizer.")
    return np.array(prompt, dtype=np.int64)


def whole(completion: Completion, service: Service, texts: Sequence[str], tickets: Sequence[Ticket]) -> dict[str, Any]:
    """The answer in one piece."""
    choices = [_choice(index, *one) for index, one in enumerate(zip(texts, tickets, strict=True))]
    return {**_head(completion, service), "choices": choices, "usage": usage(completion, tickets)}


def part(completion: Completion, service: Service, index: int, text: str, ticket: Ticket | None) -> dict[str, Any]:
    """A piece of a streamed answer; ticket: of one that ended with it."""
    return {**_head(completion, service), "choices": [_choice(index, text, ticket)]}


def last(completion: Completion, service: Service, tickets: Sequence[Ticket]) -> dict[str, Any]:
    """The numbers of tokens at the end of a stream."""
    return {**_head(completion, service), "choices": [], "usage": usage(completion, tickets)}


def _head(completion: Completion, service: Service) -> dict[str, Any]:
    return {"id": completion.id, "object": "text_completion", "created": completion.begun, "model": service.name}


def _choice(index: int, text: str, ticket: Ticket | None) -> dict[str, Any]:
    reason = None if ticket is None else ticket.finished
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def usage(completion: Completion, tickets: Sequence[Ticket]) -> dict[str, Any]:
    """Tokens of the prompts, each counted once, and of all answers; cached: whose states were known."""
    firsts = tickets[:: len(tickets) // completion.prompts]
    prompt = sum(len(ticket.request.prompt) for ticket in firsts)
    added = sum(len(ticket.tokens) for ticket in tickets)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": added,
        "total_tokens": prompt + added,
        "prompt_tokens_details": {"cached_tokens": sum(ticket.known for ticket in firsts)},
    }
