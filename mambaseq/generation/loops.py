"""The loops in which tokens are made: one step a token, or one kernel for many."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from mambaseq.generation.checks import check_finite, not_finite
from mambaseq.generation.decoder import Decoder
from mambaseq.generation.guidance import Guided
from mambaseq.generation.sampling import Draws
from mambaseq.generation.stopping import Watch
from mambaseq.generation.stretches import Stretches

# Positions that one kernel takes before their tokens are read.
_STRETCH = 256
# Tokens between checks whether all sequences have ended: on a GPU a check waits.
_TOKENS_A_LOOK = {"cuda": 8}


def by_steps(
    decoder: Decoder | Guided,
    logits: Tensor,
    max_new_tokens: int,
    next_token: Callable[[Tensor, int], Tensor],
    stop_ids: Collection[int],
    watch: Watch | None,
    patience: float,
) -> Iterator[Tensor]:
    """One token of each sequence at a time, up to where all have ended; see `mambaseq.generation.decode.stream`.

    logits: what the head told of the prompts' last positions, `(sequences, ...)`. next_token: the token `(sequences,)`
        int64, or `(sequences, codes)`, at a place of what is added, from what the head tells. watch: of texts that end
        a sequence, None for none. patience: seconds after which tokens are given on.

    Yields pieces `(sequences, n)` int64, or `(..., codes)`. Raises NotFinite for logits that are not finite numbers.
    """
    device = logits.device
    out: list[Tensor] = []
    last: Tensor | None = None
    ended = torch.zeros(len(logits), dtype=torch.bool, device=device)
    all_ended: list[Tensor] = []  # after each token since the last check
    unread: list[Tensor] = []  # these tokens
    may_end = bool(stop_ids) or watch is not None
    tokens_a_look = _TOKENS_A_LOOK.get(device.type, 1)
    peak = logits.amax(-1)  # NaN and infinity stay in it
    chosen: Tensor | None = None  # by the decoder
    given_on = time.monotonic()
    try:
        for i in range(max_new_tokens):
            token = next_token(logits, i) if chosen is None else chosen
            if may_end and last is not None:
                token = torch.where(ended, last, token)
            out.append(token[:, None] if chosen is None else token[:, None].clone())  # which the decoder overwrites
            last = out[-1][:, 0]
            if may_end:
                for stop in stop_ids:
                    ended |= token == stop
                all_ended.append(ended.all())
                unread.append(last)
                if len(all_ended) == tokens_a_look or i + 1 == max_new_tokens:
                    if watch is not None:
                        ended |= torch.from_numpy(watch(torch.stack(unread, 1).cpu().numpy())).to(device)
                        all_ended[-1] = ended.all()
                    unread.clear()
                    flags = torch.stack(all_ended).tolist()
                    if True in flags:
                        del out[len(out) - len(flags) + flags.index(True) + 1 :]
                        break
                    all_ended.clear()
            if i + 1 < max_new_tokens:
                if isinstance(decoder, Decoder) and decoder.greedy:
                    chosen, highest = decoder.step(token)
                else:
                    logits = decoder.step(token)
                    highest = logits.amax(-1)
                peak = torch.maximum(peak, highest)
            if i % 64 == 63:
                check_finite(peak)
            # what may still be cut off at a stop is held back
            if not all_ended and time.monotonic() - given_on > patience:
                check_finite(peak)
                piece, out = torch.cat(out, dim=1), []
                yield piece
                given_on = time.monotonic()
        check_finite(peak)
    except KeyboardInterrupt:
        if out and peak.isfinite().all():
            yield torch.cat(out, dim=1)
        raise
    if out:
        yield torch.cat(out, dim=1)


def by_stretches(
    stretches: Stretches,
    token: Tensor,
    max_new_tokens: int,
    settings: tuple[float, int, float],
    draws: Draws | None,
    stop_ids: Collection[int],
    watch: Watch | None,
) -> Iterator[Tensor]:
    """The tokens from the first one on, up to where all sequences have ended, by one kernel for many positions.

    token: the first of each sequence, `(sequences,)` int64. settings: temperature, top_k, top_p. draws: random numbers,
        None for the likeliest tokens.

    Yields pieces `(sequences, n)` int64. Raises NotFinite for logits that are not finite numbers.
    """
    stops = torch.tensor(sorted(stop_ids), device=token.device)
    tokens, left = token[:, None], max_new_tokens
    ended = torch.full_like(token, -1)  # the stop with which each sequence has ended
    while True:
        if stop_ids:
            tokens = _filled(tokens, ended, stops)
            ended = torch.where(torch.isin(tokens[:, -1], stops), tokens[:, -1], ended)
            if bool((ended >= 0).all()):
                begun = torch.isin(tokens, stops).int().argmax(1)
                yield tokens[:, : int(begun.max()) + 1]
                return
        yield tokens
        if watch is not None and bool(
            (torch.from_numpy(watch(tokens.cpu().numpy())).to(ended.device) | (ended >= 0)).all()
        ):
            return
        left -= tokens.shape[1]
        if not left:
            return
        n = min(left, _STRETCH)
        uniforms = None if draws is None else draws.many(n).t().contiguous()
        tokens, failed = stretches.run(tokens[:, -1], n, settings[0], uniforms, *settings[1:])
        if failed.item():
            raise not_finite()


def _filled(tokens: Tensor, ended: Tensor, stops: Tensor) -> Tensor:
    """tokens `(batch, n)` with all after a sequence's first stop replaced by it; ended `(batch,)`: an earlier one, or
    negative."""
    is_stop = torch.isin(tokens, stops)
    first = torch.where(is_stop.any(1), is_stop.int().argmax(1), tokens.shape[1])  # (batch,)
    stop = tokens.gather(1, first.clamp(max=tokens.shape[1] - 1)[:, None])  # (batch, 1)
    after = torch.arange(tokens.shape[1], device=tokens.device) > first[:, None]  # (batch, n)
    tokens = torch.where(after, stop, tokens)
    return torch.where(ended[:, None] >= 0, ended[:, None], tokens)
