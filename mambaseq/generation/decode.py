"""Continuing prompts: they are read in parts, then one step a token in constant memory; tokens are given on as they
come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq import limits
from mambaseq.encoders import settled
from mambaseq.errors import ConfigError
from mambaseq.generation.checks import (
    PENALTIES,
    check_finite,
    check_one_pick,
    check_read,
    check_state_dtype,
    continues,
    draws_once,
)
from mambaseq.generation.decoder import WORTH_A_GRAPH, Decoder
from mambaseq.generation.guidance import Guided, check_guidance, drawn
from mambaseq.generation.loops import by_steps, by_stretches
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.reading import best_even, prefill
from mambaseq.generation.sampling import NEUTRAL, Draws, Penalties, check_settings, sample
from mambaseq.generation.speculation import Speculation, speculate
from mambaseq.generation.stopping import StopStrings
from mambaseq.generation.stretches import Stretches
from mambaseq.generation.stretches import why_not as why_not_stretches
from mambaseq.limits import check_whole
from mambaseq.mixers.base import State
from mambaseq.models import SequenceModel
from mambaseq.models.modules import evaluating

# Fewest new tokens for which one kernel for many positions is used on a CPU, where it is compiled for seconds at the
# first use.
_WORTH_A_KERNEL = 1024
# Seconds after which tokens are given on.
_PATIENCE = 0.25


@torch.no_grad()
def generate(
    model: SequenceModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    seed: int | None = None,
    condition: Tensor | None = None,
    stop_ids: Collection[int] = (),
    stop: StopStrings | None = None,
    progress: bool = False,
    cuda_graph: bool = True,
    samples: int = 1,
    numbers: Tensor | None = None,
    given: Tensor | None = None,
    guidance: float = 1.0,
    state_dtype: torch.dtype | None = None,
    draft: Speculation | SequenceModel | str | None = None,
    draft_tokens: int | None = None,
) -> Tensor:
    """Continue prompts.

    A prompt is read once for all its samples, in parts of a bounded size, whatever its length.

    Args:
        prompt: `(batch, prompt_length)` int64, at least one token each; for a head of several codes `(batch,
            prompt_length, codes)`.
        max_new_tokens: tokens to add, or positions. temperature: 0 is greedy. top_k: 0 is all. top_p: 1 is all.
        min_p: leave out tokens less likely than this share of the likeliest one.
        repetition_penalty, presence_penalty: see `sampling.Penalties`; for heads that pick one token a position.
        seed: each sequence then depends only on model, prompt, condition, settings and its number among the samples of
            its prompt, not on the other sequences. In [0, 2^63); None draws one from PyTorch's generator.
        condition: `(batch,)` int64 (see `Batch`) for conditional models.
        stop_ids: ids after which a sequence ends; ended sequences are filled with the stop id.
        stop: texts after which a sequence ends. What stands behind one means nothing; `stop.cut` leaves it out.
        progress: show a bar.
        cuda_graph: on a CUDA device, compute many positions in one kernel if possible (see `generation/stretches.py`),
            or replay the steps from a CUDA graph (see `Decoder`).
        samples: continuations of each prompt.
        numbers: `(batch, samples)` int64, which samples of each prompt are wanted. None: from 0 on; equal prompts of
            the batch are counted together.
        given: tokens to add that are known, of the shape of what is added to each prompt; negative where one is drawn.
        guidance: how many times over what the condition changes in the logits counts (see `generation/guidance.py`);
            for models that have learned to do without (`condition_dropout`). Every token then takes two steps.
        state_dtype: torch.bfloat16 keeps the states of mamba, mamba2, mamba3, gated_delta, kda and gla rounded between
            steps: half the memory and its traffic, for tokens that may come to differ (`benchmarks/state_drift.py`).
            None is float32.
        draft: guess several tokens and let the model check them at once, one sequence at a time: `"ngram"` guesses what
            followed the same tokens before, a smaller model of the same vocabulary what it would add. The result stays
            the same, within rounding (see `generation/speculation.py`, whose `Speculation` also tells what came of it).
        draft_tokens: guesses in a round at most, 1 to 15, as None; fewer where they do not pay.

    Returns:
        `(batch * samples, prompt_length + n)` int64, n at most max_new_tokens, or `(..., codes)`; a prompt's samples
        follow each other.

    Raises:
        ConfigError: an empty prompt, settings out of range, or a model that is not causal, whose encoder looks ahead,
            or that has no lm head. UserError: more tokens or sequences than `limits` allows. NotFinite: logits that are
            not finite numbers.
    """
    settings = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "seed": seed,
        "condition": condition,
        "stop_ids": stop_ids,
        "stop": stop,
        "cuda_graph": cuda_graph,
        "samples": samples,
        "numbers": numbers,
        "given": given,
        "guidance": guidance,
        "state_dtype": state_dtype,
        "draft": draft,
        "draft_tokens": draft_tokens,
    }
    added = _added(model, prompt, max_new_tokens, settings, progress)
    return torch.cat([prompt if samples == 1 else prompt.repeat_interleave(samples, 0), added], dim=1)


@torch.no_grad()
def generate_all(
    model: SequenceModel, prompts: Sequence[Tensor], max_new_tokens: int, *, progress: bool = False, **options: Any
) -> list[Tensor]:
    """Continue prompts of different lengths together, without padding.

    prompts: `(length,)` int64 each, or `(length, codes)`. options: those of `generate`.

    Returns:
        `(length + n,)` for each prompt and sample, as `generate` gives for the prompt alone, filled after its end up to
        the n of the longest.

    Raises:
        See `generate`.
    """
    added = _added(model, prompts, max_new_tokens, options, progress)
    samples = options.get("samples", 1)
    return [torch.cat([prompts[number // samples], row]) for number, row in enumerate(added)]


def _added(
    model: SequenceModel, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, options: dict[str, Any], shown: bool
) -> Tensor:
    """What is added to prompts, `(batch * samples, n)` or `(..., codes)`; see `generate`."""
    samples, codes = options.get("samples", 1), getattr(model.head, "codes", 0)
    out = []
    with tqdm(total=max_new_tokens, unit="token", disable=not shown) as bar:
        for piece in stream(model, prompts, max_new_tokens, **options):
            out.append(piece)
            bar.update(piece.shape[1])
    return torch.cat(out, dim=1) if out else prompts[0].new_zeros(len(prompts) * samples, 0, *[codes] * bool(codes))


def _check(
    model: SequenceModel, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, samples: int, options: dict[str, Any]
) -> None:
    """Raise what `generate` raises for prompts, a model and settings that cannot be."""
    codes = getattr(model.head, "codes", 0)
    shapes = [tuple(one.shape) for one in prompts]
    if not shapes or any(len(one) != 1 + bool(codes) or not one[0] or one[1:] not in ((), (codes,)) for one in shapes):
        several = f", and {codes} codes at each position" if codes else ""
        raise ConfigError(f"Generation needs a prompt of at least one token for each sequence{several}.")
    if not continues(model, "tokens"):
        raise ConfigError(
            "Only a causal model with an lm head can generate; this one cannot. Train one with the head lm and a "
            "causal backbone, such as residual or unet."
        )
    model.check_stateful()
    check_settings(options["temperature"], **{name: options[name] for name in NEUTRAL})
    check_whole("max_new_tokens", max_new_tokens, 0)
    check_whole("samples", samples, 1)
    limits.SEQUENCES.check(len(shapes) * samples, "Generation")
    limits.GENERATED.check(len(shapes) * samples * max_new_tokens * max(codes, 1), "Generation")
    given, numbers = options["given"], options["numbers"]
    if given is not None and given.shape != (len(shapes), max_new_tokens, *shapes[0][1:]):
        raise ConfigError(f"given must have the shape of what is added, not {tuple(given.shape)}.")
    if (options["stop_ids"] or options["stop"]) and codes:
        raise ConfigError("What ends a sequence (stop_ids, stop) is for heads of one token a position.")
    if numbers is not None and numbers.shape != (len(shapes), samples):
        raise ConfigError(f"numbers must be {(len(shapes), samples)}, one a sample, not {tuple(numbers.shape)}.")


@torch.no_grad()
def stream(
    model: SequenceModel,
    prompts: Tensor | Sequence[Tensor] | Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    seed: int | None = None,
    condition: Tensor | None = None,
    stop_ids: Collection[int] = (),
    stop: StopStrings | None = None,
    cuda_graph: bool = True,
    samples: int = 1,
    numbers: Tensor | None = None,
    given: Tensor | None = None,
    guidance: float = 1.0,
    state_dtype: torch.dtype | None = None,
    draft: Speculation | SequenceModel | str | None = None,
    draft_tokens: int | None = None,
    read: tuple[list[Any], Tensor] | None = None,
    patience: float | None = None,
) -> Iterator[Tensor]:
    """Continue prompts as `generate` does, whose arguments these are, and give on what is added while it comes; it is
    not held.

    prompts: as of `generate` or, of several lengths, of `generate_all`.
    read: the state after the prompts and the logits at their last position, `(batch, vocabulary)`, if they were read
        before, as `model(ids, return_state=True)` gives them: `(output.state, output.logits[:, -1])`. It stays as it
        is; None reads the prompts.
    patience: seconds after which tokens are given on, 0 for each by itself; None is a quarter.

    Yields:
        What is added, in pieces `(batch * samples, n)` int64, or `(..., codes)`. When it is
        interrupted, a last piece comes before the KeyboardInterrupt.

    Raises:
        What `generate` raises, when the first piece is asked for.
    """
    if not isinstance(prompts, Prompts):
        asked: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        asked |= {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty}
        asked |= {"stop_ids": stop_ids, "stop": stop, "given": given, "numbers": numbers}
        _check(model, prompts, max_new_tokens, samples, asked)
        prompts = Prompts.of(prompts)
    check_whole("max_new_tokens", max_new_tokens, 0)
    check_guidance(guidance)
    if guidance != 1 and condition is None:
        raise ConfigError("guidance makes a condition count more, and none is given. Give one, or leave guidance out.")
    if state_dtype is not None:
        check_state_dtype(model, state_dtype, guidance)
    if read is not None:
        check_read(model, *read, len(prompts))
    speculation = _speculation(draft, draft_tokens)
    if speculation is not None:
        others = {"guidance": guidance != 1, "given": given is not None, "state_dtype": state_dtype is not None}
        speculation.check(model, len(prompts) * samples, condition is not None, **others)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    check_whole("seed", seed, 0, 2**63 - 1)
    device, patience = prompts.device, _PATIENCE if patience is None else patience
    draws = None if temperature == 0 else Draws(seed, prompts, condition, samples, numbers, device)
    with_guidance = guidance != 1 and condition is not None
    penalised = repetition_penalty != 1 or presence_penalty != 0
    if penalised:
        check_one_pick(model, PENALTIES)
    watch = None if stop is None else stop.watch(prompts, samples)
    penalties: list[Penalties] = []  # made of the first logits, which tell the vocabulary

    def next_token(told: Tensor, place: int) -> Tensor:
        """The token at this place of what is added, from what the head tells."""

        def pick(logits: Tensor) -> Tensor:
            if penalised:
                if not penalties:
                    n = logits.shape[-1]
                    penalties.append(Penalties(repetition_penalty, presence_penalty, prompts, samples, n))
                logits = penalties[0](logits)
            return sample(logits, temperature, top_k, top_p, None if draws is None else draws.next(), min_p)

        draw = getattr(model.head, "draw", None)
        if draw is None:  # a plugin's
            draw = _picked
        token: Tensor = drawn(draw, told, pick, guidance) if with_guidance else draw(told, pick)
        token = token if given is None else torch.where(given[:, place] < 0, token, given[:, place])
        if penalised:
            penalties[0].add(token)
        return token

    with evaluating(model):
        as_given, condition = condition, settled(model.encoder, condition)
        state, logits = prefill(model, prompts, condition, cuda_graph=cuda_graph) if read is None else read
        # what is next is asked of a GPU while it reads
        every = torch.arange(len(prompts), device=device).repeat_interleave(samples)
        given = None if given is None else given.to(device)[every]
        if with_guidance and condition is not None:
            more, untold = prefill(model, prompts, None)
            state, more = ([layer.select(every) for layer in one] for one in (state, more))
            captured = cuda_graph and max_new_tokens >= WORTH_A_GRAPH
            pair = Guided(
                Decoder(model, state, condition[every], cuda_graph=captured),
                Decoder(model, more, cuda_graph=captured),
            )
            logits = torch.stack([logits, untold], 1)[every]
            yield from by_steps(pair, logits, max_new_tokens, next_token, stop_ids, watch, patience)
            return
        if samples > 1 or read is not None:
            state, logits = [layer.select(every) for layer in state], logits[every]
            condition = None if condition is None else condition[every]
        if state_dtype is not None:
            state = [layer.stored_as(state_dtype) if isinstance(layer, State) else layer for layer in state]
        worth = max_new_tokens >= (_WORTH_A_KERNEL if device.type == "cpu" else WORTH_A_GRAPH)
        even = not best_even(model) or len(set(prompts.lengths)) == 1
        worth = (
            worth and even and given is None and not penalised and min_p == 0 and state_dtype is None
        )  # what the kernel does not know
        if cuda_graph and worth and why_not_stretches(model, len(every), top_k, top_p) is None:
            check_finite(logits)
            token = next_token(logits, 0)
            stretches = Stretches(model, state, condition, len(every))
            choices = temperature, top_k, top_p
            if speculation is not None:
                speculation.why_not = "this model's tokens are made by one kernel, which takes less time"
            yield from by_stretches(stretches, token, max_new_tokens, choices, draws, stop_ids, watch)
            return
        if speculation is not None:
            n = logits.shape[-1]
            yield from speculate(
                model,
                prompts,
                max_new_tokens,
                speculation,
                state=state,
                logits=logits,
                settled_condition=condition,
                condition=as_given,
                settings=(temperature, top_k, top_p, min_p),
                draws=draws,
                penalties=Penalties(repetition_penalty, presence_penalty, prompts, 1, n) if penalised else None,
                stop_ids=stop_ids,
                watch=watch,
                cuda_graph=cuda_graph,
                patience=patience,
            )
            return
        greedy = temperature == 0 and not penalised and given is None and draws_once(model)
        worth = cuda_graph and max_new_tokens >= WORTH_A_GRAPH
        decoder = Decoder(model, state, condition, cuda_graph=worth, greedy=greedy)
        yield from by_steps(decoder, logits, max_new_tokens, next_token, stop_ids, watch, patience)


def _speculation(draft: Speculation | SequenceModel | str | None, tokens: int | None) -> Speculation | None:
    """How tokens are guessed. Raises ConfigError as `Speculation` does, and for a number of guesses without them."""
    if draft is None:
        if tokens is not None:
            raise ConfigError("draft_tokens is of draft. Give it, or leave draft_tokens out.")
        return None
    return Speculation.of(draft, tokens)


def _picked(told: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """The `draw` of a head that has none."""
    return pick(told)
