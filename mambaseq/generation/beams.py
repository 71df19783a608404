"""Beam search: the likeliest sequences, as far as few beginnings at a time can tell."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseq import limits
from mambaseq.encoders import settled
from mambaseq.errors import ConfigError, shown
from mambaseq.generation.checks import check_finite, check_one_pick, continues
from mambaseq.generation.decoder import WORTH_A_GRAPH, Decoder
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.reading import prefill
from mambaseq.limits import check_whole
from mambaseq.models import SequenceModel
from mambaseq.models.modules import evaluating

MOST_BEAMS = 1024


class Found(NamedTuple):
    """What a search found, the best first.

    tokens: `(batch, beams, n)` int64, after its end filled with the stop. scores: `(batch, beams)` float64, the sum of
    the tokens' log-probabilities over their number to the power of the length penalty; -inf where there is no further
    sequence.
    """

    tokens: Tensor
    scores: Tensor


def check_beams(beams: object, length_penalty: object = 1.0) -> None:
    """Raise ConfigError unless there are 1 to 1,024 beams and the penalty is a number from -10 to 10."""
    check_whole("beams", beams, 1, MOST_BEAMS)
    number = isinstance(length_penalty, int | float) and not isinstance(length_penalty, bool)
    if not number or not -10 <= length_penalty <= 10:  # type: ignore[operator]
        raise ConfigError(f"length_penalty must be a number from -10 to 10, not {shown(length_penalty)}; 0 is none.")


@torch.no_grad()
def beam_search(
    model: SequenceModel,
    prompts: Prompts,
    max_new_tokens: int,
    beams: int,
    *,
    condition: Tensor | None = None,
    stop_ids: Collection[int] = (),
    length_penalty: float = 1.0,
    cuda_graph: bool = True,
) -> Found:
    """The likeliest continuations of prompts, of any lengths.

    At each step the likeliest `beams` beginnings of each prompt go on; those that end in a stop wait for the end, when
    all are compared by their scores.

    max_new_tokens: at least 1. condition, stop_ids: see `generate`. length_penalty: 0 compares probabilities, which
        short sequences win; 1 the mean log-probability of a token, as transformers does.

    Raises ConfigError for settings out of range, and a model that cannot generate one token at a time; UserError for
    more sequences than `limits` allows; NotFinite.
    """
    check_beams(beams, length_penalty)
    check_whole("max_new_tokens", max_new_tokens, 1)
    if not continues(model, "tokens"):
        raise ConfigError("Only a causal model with an lm head can generate; this one cannot.")
    check_one_pick(model, "A beam search is")
    model.check_stateful()
    limits.SEQUENCES.check(len(prompts) * beams, "A beam search")
    limits.GENERATED.check(len(prompts) * beams * max_new_tokens, "A beam search")
    with evaluating(model):
        return _search(model, prompts, max_new_tokens, beams, condition, sorted(stop_ids), length_penalty, cuda_graph)


def _search(
    model: SequenceModel,
    prompts: Prompts,
    count: int,
    beams: int,
    condition: Tensor | None,
    stops: list[int],
    penalty: float,
    cuda_graph: bool,
) -> Found:
    batch, device = len(prompts), prompts.device
    condition = settled(model.encoder, condition)
    state, logits = prefill(model, prompts, condition)
    every = torch.arange(batch, device=device).repeat_interleave(beams)
    state, logits = [layer.select(every) for layer in state], logits[every]
    under = None if condition is None else condition[every]
    decoder = Decoder(model, state, under, cuda_graph=cuda_graph and count >= WORTH_A_GRAPH)
    first = torch.arange(batch, device=device)[:, None] * beams  # (batch, 1): the place of a prompt's first beam

    live = torch.full((batch, beams), -torch.inf, dtype=torch.float64, device=device)
    live[:, 0] = 0  # all beams are equal at first: one of them goes on
    tokens = torch.zeros(batch, beams, count, dtype=torch.int64, device=device)
    ended = Found(torch.zeros_like(tokens), torch.full_like(live, -torch.inf))
    for step in range(count):
        check_finite(logits.amax(-1))
        shares = logits.double().log_softmax(-1).unflatten(0, (batch, beams)) + live[..., None]  # (batch, beams, n)
        if stops:
            whole = tokens[:, :, None].repeat(1, 1, len(stops), 1)  # (batch, beams, stops, count)
            whole[..., step:] = torch.tensor(stops, device=device)[:, None]
            scores = shares[..., stops] / (step + 1) ** penalty
            ended = _best(ended, Found(whole.flatten(1, 2), scores.flatten(1)), beams)
            shares[..., stops] = -torch.inf
        n = shares.shape[-1]
        live, chosen = shares.flatten(1).topk(beams)  # (batch, beams)
        parent, token = chosen // n, chosen % n
        tokens = tokens.gather(1, parent[..., None].expand_as(tokens))
        tokens[:, :, step] = token
        if step + 1 == count or (stops and _is_settled(ended, live, step + 1, count, penalty)):
            break
        for layer in state:
            for tensor in layer.tensors().values():
                tensor.copy_(tensor[(first + parent).flatten()])
        logits = decoder.step(token.flatten())
    if step + 1 == count:
        ended = _best(ended, Found(tokens, live / count**penalty), beams)
    return Found(ended.tokens[..., : step + 1], ended.scores)


def _best(one: Found, other: Found, most: int) -> Found:
    """The best of both, in order; of equal ones those that were there."""
    scores = torch.cat([one.scores, other.scores], 1)
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :most]
    tokens = torch.cat([one.tokens, other.tokens], 1)
    return Found(tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2])), scores.gather(1, chosen))


def _is_settled(ended: Found, live: Tensor, length: int, count: int, penalty: float) -> bool:
    """Whether no beginning of this length can become better than what has ended: its sum only falls."""
    hope = torch.stack([live[:, 0] / n**penalty for n in (length + 1, count)]).amax(0)
    return bool((hope <= ended.scores[:, -1]).all())
