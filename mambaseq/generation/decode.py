"""The decode loop: the prompt is read in parts, then one step a token in constant memory."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq import limits
from mambaseq.errors import ConfigError, UserError
from mambaseq.generation.decoder import Decoder
from mambaseq.generation.sampling import Draws, check_settings, sample
from mambaseq.generation.stretches import Stretches
from mambaseq.generation.stretches import why_not as why_not_stretches
from mambaseq.mixers.base import State
from mambaseq.models import SequenceModel

# Tokens of prompts that are read at once, all sequences together.
_PREFILL = 8192
# Fewest new tokens for which a CUDA graph is worth its capture.
WORTH_A_GRAPH = 16
# Positions that one kernel takes, if it can, before their tokens are read.
_STRETCH = 256
# Tokens between checks whether all sequences have ended: on a GPU a check waits.
_TOKENS_A_LOOK = {"cuda": 8}


class NotFinite(UserError):
    """A model whose logits are not finite numbers."""


@torch.no_grad()
def generate(
    model: SequenceModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    condition: Tensor | None = None,
    stop_ids: Collection[int] = (),
    progress: bool = False,
    cuda_graph: bool = True,
    samples: int = 1,
    numbers: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Continue prompts.

    A prompt is read once for all its samples, in parts of a bounded size, whatever its length.

    Args:
        prompt: `(batch, prompt_length)` int64, at least one token each; for a head of several codes `(batch,
            prompt_length, codes)`.
        max_new_tokens: tokens to add, or positions. temperature: 0 is greedy. top_k: 0 is all. top_p: 1 is all.
        seed: each sequence then depends only on model, prompt, condition, settings and its number among the samples of
            its prompt, not on the other sequences. In [0, 2^63); None draws one from PyTorch's generator.
        condition: `(batch,)` int64 (see `Batch`) for conditional models.
        stop_ids: ids after which a sequence ends; ended sequences are filled with the stop id.
        progress: show a bar.
        cuda_graph: on a CUDA device, compute many positions in one kernel if possible (see `generation/stretches.py`),
            or replay the steps from a CUDA graph (see `Decoder`).
        samples: continuations of each prompt.
        numbers: `(batch, samples)` int64, which samples of each prompt are wanted. None: from 0 on; equal prompts of
            the batch are counted together.
        given: tokens to add that are known, of the shape of what is added to each prompt; negative where one is drawn.

    Returns:
        `(batch * samples, prompt_length + n)` int64, n at most max_new_tokens, or `(..., codes)`; a prompt's samples
        follow each other.

    Raises:
        ConfigError: an empty prompt, settings out of range, or a model that is not causal, whose encoder looks ahead,
            or that has no lm head. UserError: more tokens or sequences than `limits` allows. NotFinite: logits that are
            not finite numbers.
    """
    codes = getattr(model.head, "codes", 0)
    if prompt.dim() != (3 if codes else 2) or prompt.numel() == 0 or (codes and prompt.shape[2] != codes):
        several = f", and {codes} codes at each position" if codes else ""
        raise ConfigError(f"Generation needs a prompt of at least one token for each sequence{several}.")
    if not continues(model, "tokens"):
        raise ConfigError(
            "Only a causal model with an lm head can generate; this one cannot. Train one with the head lm and a "
            "causal backbone, such as residual or unet."
        )
    model.check_stateful()
    check_settings(temperature, top_k, top_p)
    check_whole("max_new_tokens", max_new_tokens, 0)
    check_whole("samples", samples, 1)
    limits.SEQUENCES.check(len(prompt) * samples, "Generation")
    limits.GENERATED.check(len(prompt) * samples * max_new_tokens * max(codes, 1), "Generation")
    if given is not None and given.shape != (len(prompt), max_new_tokens, *prompt.shape[2:]):
        raise ConfigError(f"given must have the shape of what is added, not {tuple(given.shape)}.")
    if stop_ids and codes:
        raise ConfigError("A token that ends a sequence (stop_ids) is for heads of one token a position.")
    if numbers is not None and numbers.shape != (len(prompt), samples):
        raise ConfigError(f"numbers must be {(len(prompt), samples)}, one a sample, not {tuple(numbers.shape)}.")
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    check_whole("seed", seed, 0, 2**63 - 1)
    draws = None if temperature == 0 else Draws(seed, prompt, condition, samples, numbers, prompt.device)
    every = torch.arange(len(prompt), device=prompt.device).repeat_interleave(samples)
    out = [prompt[every]]
    ended = torch.zeros(len(every), dtype=torch.bool, device=prompt.device)
    given = None if given is None else given.to(prompt.device)[every]

    def next_token(told: Tensor, place: int) -> Tensor:
        """The token at this place of what is added, from what the head tells."""

        def pick(logits: Tensor) -> Tensor:
            return sample(logits, temperature, top_k, top_p, None if draws is None else draws.next())

        draw = getattr(model.head, "draw", None)
        token: Tensor = pick(told) if draw is None else draw(told, pick)
        return token if given is None else torch.where(given[:, place] < 0, token, given[:, place])

    all_ended: list[Tensor] = []  # after each token since the last check
    tokens_a_look = _TOKENS_A_LOOK.get(prompt.device.type, 1)
    was_training = model.training
    model.eval()
    try:
        state, logits = prefill(model, prompt, condition)
        if samples > 1:
            state, logits = [layer.select(every) for layer in state], logits[every]
            condition = None if condition is None else condition[every]
        peak = logits.amax(-1)  # NaN and infinity stay in it
        cuda_graph = cuda_graph and max_new_tokens >= WORTH_A_GRAPH
        if cuda_graph and given is None and why_not_stretches(model, len(every), top_k, top_p) is None:
            check_finite(peak)
            token = next_token(logits, 0)
            with tqdm(total=max_new_tokens, unit="token", disable=not progress) as bar:
                stretches = Stretches(model, state, condition)
                out += _by_stretches(stretches, token, max_new_tokens, temperature, draws, stop_ids, bar)
            return torch.cat(out, dim=1)
        decoder = Decoder(model, state, condition, cuda_graph=cuda_graph)
        with tqdm(total=max_new_tokens, unit="token", disable=not progress) as bar:
            for i in range(max_new_tokens):
                token = next_token(logits, i)
                if stop_ids:
                    token = torch.where(ended, out[-1][:, -1], token)
                out.append(token[:, None])
                bar.update()
                if stop_ids:
                    for stop in stop_ids:
                        ended |= token == stop
                    all_ended.append(ended.all())
                    if len(all_ended) == tokens_a_look or i + 1 == max_new_tokens:
                        flags = torch.stack(all_ended).tolist()
                        if True in flags:
                            del out[len(out) - len(flags) + flags.index(True) + 1 :]
                            break
                        all_ended.clear()
                if i + 1 < max_new_tokens:
                    logits = decoder.step(token)
                    peak = torch.maximum(peak, logits.amax(-1))
                if i % 64 == 63:
                    check_finite(peak)
        check_finite(peak)
    finally:
        model.train(was_training)
    return torch.cat(out, dim=1)


def _by_stretches(
    stretches: Stretches,
    token: Tensor,
    max_new_tokens: int,
    temperature: float,
    draws: Draws | None,
    stop_ids: Collection[int],
    bar: tqdm,
) -> list[Tensor]:
    """The tokens from the first one on, in pieces `(1, n)`, up to one of `stop_ids`."""
    out, left = [token[:, None]], max_new_tokens - 1
    bar.update()
    while left and not (stop_ids and int(token) in stop_ids):
        n = min(left, _STRETCH)
        uniforms = None if temperature == 0 or draws is None else draws.many(n)[:, 0].contiguous()
        tokens, failed = stretches.run(token, n, temperature, uniforms)
        if failed.item():
            raise _not_finite()
        found = [i for i, one in enumerate(tokens.tolist()) if one in stop_ids] if stop_ids else []
        tokens = tokens[: found[0] + 1] if found else tokens
        out.append(tokens[None])
        token, left = tokens[-1:], left - n
        bar.update(len(tokens))
    return out


def continues(model: SequenceModel, what: Literal["tokens", "values"]) -> bool:
    """Whether a model's outputs can continue sequences of tokens, or of values."""
    head = model.head
    says = getattr(head, "continues", None)
    if says is None:  # a plugin's
        says = "values" if getattr(head, "learns", None) == "values" else "tokens"
    return bool(model.backbone.causal and head.per_token and says == what)


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ConfigError unless the value is a whole number of at least `least` and at most `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        bound = f" and at most {most}" if most is not None else ""
        kind = "" if whole else "a whole number of "
        raise ConfigError(f"{name} must be {kind}at least {least}{bound}, not {str(value)[:40]}.")


def check_finite(peak: Tensor) -> None:
    if not peak.isfinite().all():
        raise _not_finite()


def _not_finite() -> NotFinite:
    return NotFinite(
        "The model's prediction is not a finite number: its training diverged, its weights are damaged or its "
        "computation overflows. Use an earlier checkpoint, or train again with a lower learning rate."
    )


def prefill(model: SequenceModel, prompt: Tensor, condition: Tensor | None) -> tuple[list, Tensor]:
    """The state after the prompt, and what the head tells of its last position only (see `Head.told`), since all of a
    long prompt's would not fit. The prompt is read in parts and the state passed on, so memory does not grow with
    it."""
    part = max(1, _PREFILL // len(prompt))
    state: list | None = None
    for start in range(0, prompt.shape[1], part):
        x = model.encoder(prompt[:, start : start + part], condition)
        hidden, state = model.backbone(x, state=state, return_state=True)
    assert state is not None
    state = [layer.map(Tensor.contiguous) if isinstance(layer, State) else layer for layer in state]
    return state, model.told(hidden[:, -1:])[:, -1]
