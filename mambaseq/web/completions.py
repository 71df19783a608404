"""A request for completions or chat, from JSON to what the engine takes, and its answer back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mambaseq.atomic import json_text
from mambaseq.errors import ConfigError, did_you_mean, shown
from mambaseq.generation.sampling import NEUTRAL
from mambaseq.generation.stopping import check_stop
from mambaseq.limits import check_whole
from mambaseq.serving import Request, Ticket
from mambaseq.web.service import Service

_SETTINGS = {"temperature": 1.0, **NEUTRAL}
_COMMON = (*_SETTINGS, "model", "n", "seed", "stop", "stream", "stream_options", "user")
_OPTIONS = ("include_usage", "continuous_usage_stats")


class _Kind(NamedTuple):
    """What differs between completions and chats. keys: of a request. fixed: those of the API whose other values are
    not served. most: new tokens where none are asked for. id, whole, part: how answers begin their id, and are
    called."""

    keys: tuple[str, ...]
    fixed: dict[str, tuple[Any, ...]]
    most: int
    id: str
    whole: str
    part: str


_TEXT = _Kind(
    ("prompt", "max_tokens"),
    {
        "best_of": (1,),
        "echo": (False,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (),
        "suffix": ("",),
    },
    16,
    "cmpl",
    "text_completion",
    "text_completion",
)
_CHAT = _Kind(
    ("messages", "max_tokens", "max_completion_tokens"),
    {
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none",),
        "functions": ([],),
    },
    512,
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
)


class NoModel(ConfigError):
    """A name of a model that is not served."""

    @classmethod
    def of(cls, name: object, served: str) -> NoModel:
        return cls(f"There is no model {shown(name)} here. Ask for {shown(served)}.")


class Completion(NamedTuple):
    """What is asked: a request for each prompt and sample, in this order; the texts that end answers; whether they are
    streamed, and whether the stream ends with the numbers of tokens (usage), or each of its pieces has them (usages).
    id: of the answer. prompts: their number."""

    requests: list[Request]
    stop: list[str]
    stream: bool
    usage: bool
    usages: bool
    id: str
    begun: int
    prompts: int
    kind: _Kind

    @property
    def chat(self) -> bool:
        return self.kind is _CHAT


def parse(body: dict[str, Any], service: Service, chat: bool = False) -> Completion:
    """chat: whether there are messages, not prompts. Raises ConfigError for keys and values that cannot be used,
    UserError for messages that the model's template refuses, NoModel for another model's name."""
    kind = _CHAT if chat else _TEXT
    known = (*_COMMON, *kind.keys, *kind.fixed)
    for key in body:
        if key not in known:
            raise ConfigError(f"There is no parameter {shown(key)}.{did_you_mean(key, known)}")
    given = {key: value for key, value in body.items() if value is not None}
    for key, allowed in kind.fixed.items():
        if key in given and not any(given[key] == one for one in allowed):
            possible = " or ".join(json_text(one) for one in allowed) or "null"
            raise ConfigError(f"{key} cannot be {shown(given[key])} here. Leave it out, or give {possible}.")
    name = given.get("model", service.name)
    if name != service.name:
        raise NoModel.of(name, service.name)
    count = given.get("n", 1)
    check_whole("n", count, 1)
    prompts = [] if chat else prompts_of(given.get("prompt"), service)
    if (number := max(len(prompts), 1)) * count > service.engine.capacity:
        raise ConfigError(
            f"{number} prompts with n = {shown(count)} ask for more answers than the {service.engine.capacity:,} "
            "that may be at once. Ask for fewer."
        )
    ids, stop_ids = [ids_of(one, service) for one in prompts], service.stop_ids
    if chat:
        if service.damaged:
            raise ConfigError(service.damaged)
        prompt, stop_ids = service.tokenizer.chat(given.get("messages", []))
        ids = [prompt.astype(np.int64)]
    most = given.get("max_completion_tokens", given.get("max_tokens"))
    if most is None:
        most = min(kind.most, max(service.engine.longest - len(ids[0]), 1)) if chat else kind.most
    check_whole("max_tokens", most, 1)
    seed = given.get("seed", secrets.randbits(62))
    check_whole("seed", seed, 0, 2**63 - 1)
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not {*options} <= {*_OPTIONS}:
        raise ConfigError(f"stream_options has {' and '.join(_OPTIONS)} alone, and is {shown(options)}.")
    stream, usage, usages = given.get("stream", False), *(options.get(key, False) for key in _OPTIONS)
    for key, value in (("stream", stream), (_OPTIONS[0], usage), (_OPTIONS[1], usages)):
        if not isinstance(value, bool):
            raise ConfigError(f"{key} must be true or false, not {shown(value)}.")
    stop = given.get("stop", [])
    if not isinstance(stop, str | list):
        raise ConfigError(f"stop must be a text, or a list of texts, not {shown(stop)}.")
    settings = {key: given.get(key, default) for key, default in _SETTINGS.items()}
    requests = [
        Request(prompt, most, **settings, seed=seed, number=number, stop_ids=stop_ids)
        for prompt in ids
        for number in range(count)
    ]
    told = f"{kind.id}-{secrets.token_hex(12)}"
    return Completion(requests, check_stop(stop), stream, usage, usages, told, int(time.time()), len(ids), kind)


def prompts_of(prompt: Any, service: Service) -> list[str | list[int]]:
    """The prompts: a text, a list of ids, or a list of either. None is the start of a text. Raises ConfigError for
    anything else."""
    if prompt is None:
        return [service.start_ids]
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ConfigError(f"prompt must be a text, a list of token ids, or a list of these, not {shown(prompt)}.")
    return prompt


def ids_of(prompt: Any, service: Service) -> np.ndarray:
    """A prompt's ids, `(length,)` int64. Raises ConfigError for what is neither a text nor a list of ids."""
    if isinstance(prompt, str):
        return np.asarray(service.tokenizer.encode(prompt), dtype=np.int64)
    if not isinstance(prompt, list) or any(isinstance(one, bool) or not isinstance(one, int) for one in prompt):
        raise ConfigError(f"A prompt must be a text or a list of token ids, not {shown(prompt)}.")
    if any(not 0 <= one < 2**31 for one in prompt):
        raise ConfigError("The prompt has token ids that the model lacks. Use those of its own tokenizer.")
    return np.array(prompt, dtype=np.int64)


def whole(completion: Completion, service: Service, texts: Sequence[str], tickets: Sequence[Ticket]) -> dict[str, Any]:
    """The answer in one piece."""
    told = [
        {"message": {"role": "assistant", "content": text}} if completion.chat else {"text": text} for text in texts
    ]
    choices = [_choice(index, *one) for index, one in enumerate(zip(told, tickets, strict=True))]
    head = _head(completion, service, completion.kind.whole)
    return {**head, "choices": choices, "usage": usage(completion, tickets)}


def first(completion: Completion, service: Service, index: int) -> dict[str, Any] | None:
    """What a chat's stream begins with; completions have no such piece."""
    if not completion.chat:
        return None
    told = {"delta": {"role": "assistant", "content": ""}}
    return {**_head(completion, service, completion.kind.part), "choices": [_choice(index, told, None)]}


def part(
    completion: Completion,
    service: Service,
    index: int,
    text: str,
    ticket: Ticket | None,
    tickets: Sequence[Ticket],
) -> dict[str, Any]:
    """A piece of a streamed answer; ticket: of one that ended with it. tickets: of all, for the numbers of tokens so
    far."""
    told = {"delta": {"content": text}} if completion.chat else {"text": text}
    more = {"usage": usage(completion, tickets)} if completion.usages else {}
    return {**_head(completion, service, completion.kind.part), "choices": [_choice(index, told, ticket)], **more}


def last(completion: Completion, service: Service, tickets: Sequence[Ticket]) -> dict[str, Any]:
    """The numbers of tokens at the end of a stream."""
    head = _head(completion, service, completion.kind.part)
    return {**head, "choices": [], "usage": usage(completion, tickets)}


def _head(completion: Completion, service: Service, kind: str) -> dict[str, Any]:
    return {"id": completion.id, "object": kind, "created": completion.begun, "model": service.name}


def _choice(index: int, told: dict[str, Any], ticket: Ticket | None) -> dict[str, Any]:
    reason = None if ticket is None else ticket.finished
    return {"index": index, **told, "logprobs": None, "finish_reason": reason}


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
