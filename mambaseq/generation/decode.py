"""The decode loop: the prompt is read in parts, then one step a token in constant memory; tokens are given on as they
come."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mambaseq import limits
from mambaseq.encoders import settled
from mambaseq.errors import ConfigError, UserError, shown
from mambaseq.generation.decoder import Decoder
from mambaseq.generation.guidance import Guided, check_guidance, drawn
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.reading import best_even, prefill
from mambaseq.generation.sampling import Draws, Penalties, check_settings, sample
from mambaseq.generation.stopping import StopStrings, Watch
from mambaseq.generation.stretches import Stretches
from mambaseq.generation.stretches import why_not as why_not_stretches
from mambaseq.heads.base import Head
from mambaseq.mixers.base import State
from mambaseq.models import SequenceModel
from mambaseq.models.modules import evaluating

if TYPE_CHECKING:
    from mambaseq.generation.speculation import Speculation

# Fewest new tokens for which a CUDA graph is worth its capture.
WORTH_A_GRAPH = 16
# Positions that one kernel takes, if it can, before their tokens are read.
_STRETCH = 256
# Fewest new tokens for which that kernel is used on a CPU, where it is compiled for seconds at the first use.
_WORTH_A_KERNEL = 1024
PENALTIES = "repetition_penalty and presence_penalty are"
# Seconds after which tokens are given on.
_PATIENCE = 0.25
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
    return torch.cat([prompt.repeat_interleave(samples, 0), added], dim=1)


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
    """What is added to prompts, `(batch * samples, n)` or `(..., codes)`; see `generate`, whose checks these are."""
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
    choices = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    check_settings(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | {k: options[k] for k in choices if k in options})
    check_whole("max_new_tokens", max_new_tokens, 0)
    check_whole("samples", samples := options.get("samples", 1), 1)
    limits.SEQUENCES.check(len(shapes) * samples, "Generation")
    limits.GENERATED.check(len(shapes) * samples * max_new_tokens * max(codes, 1), "Generation")
    given, numbers = options.get("given"), options.get("numbers")
    if given is not None and given.shape != (len(shapes), max_new_tokens, *shapes[0][1:]):
        raise ConfigError(f"given must have the shape of what is added, not {tuple(given.shape)}.")
    if (options.get("stop_ids") or options.get("stop")) and codes:
        raise ConfigError("What ends a sequence (stop_ids, stop) is for heads of one token a position.")
    if numbers is not None and numbers.shape != (len(shapes), samples):
        raise ConfigError(f"numbers must be {(len(shapes), samples)}, one a sample, not {tuple(numbers.shape)}.")
    out = []
    with tqdm(total=max_new_tokens, unit="token", disable=not shown) as bar:
        for piece in stream(model, Prompts.of(prompts), max_new_tokens, **options):
            out.append(piece)
            bar.update(piece.shape[1])
    return torch.cat(out, dim=1) if out else prompts[0].new_zeros(len(shapes) * samples, 0, *shapes[0][1:])


@torch.no_grad()
def stream(
    model: SequenceModel,
    prompts: Prompts,
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
    """Continue prompts as `generate` does, whose arguments these are; neither the prompts nor what was added is held.

    read: what `prefill` gave of the prompts, which stays as it is; None reads them. patience: seconds after which
        tokens are given on; None is a quarter.

    Yields:
        What is added, in pieces `(batch * samples, n)` int64, or `(..., codes)`. When it is
        interrupted, a last piece comes before the KeyboardInterrupt.
    """
    check_whole("max_new_tokens", max_new_tokens, 0)
    check_guidance(guidance)
    if guidance != 1 and condition is None:
        raise ConfigError("guidance makes a condition count more, and none is given. Give one, or leave guidance out.")
    if state_dtype is not None:
        _check_state_dtype(model, state_dtype, guidance)
    speculation = _speculation(draft, draft_tokens)
    if speculation is not None:
        others = {"guidance": guidance != 1, "given": given is not None, "state_dtype": state_dtype is not None}
        speculation.check(model, len(prompts) * samples, condition is not None, **others)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    check_whole("seed", seed, 0, 2**63 - 1)
    device, patience = prompts.device, _PATIENCE if patience is None else patience
    draws = None if temperature == 0 else Draws(seed, prompts, condition, samples, numbers, device)
    every = torch.arange(len(prompts), device=device).repeat_interleave(samples)
    given = None if given is None else given.to(device)[every]

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
        if with_guidance and condition is not None:
            more, untold = prefill(model, prompts, None)
            state, more = ([layer.select(every) for layer in one] for one in (state, more))
            captured = cuda_graph and max_new_tokens >= WORTH_A_GRAPH
            pair = Guided(
                Decoder(model, state, condition[every], cuda_graph=captured),
                Decoder(model, more, cuda_graph=captured),
            )
            logits = torch.stack([logits, untold], 1)[every]
            yield from _by_steps(pair, logits, max_new_tokens, next_token, stop_ids, watch, patience)
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
            yield from _by_stretches(stretches, token, max_new_tokens, choices, draws, stop_ids, watch)
            return
        if speculation is not None:
            from mambaseq.generation.speculation import speculate

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
        yield from _by_steps(decoder, logits, max_new_tokens, next_token, stop_ids, watch, patience)


def _speculation(draft: Speculation | SequenceModel | str | None, tokens: int | None) -> Speculation | None:
    """How tokens are guessed. Raises ConfigError as `Speculation` does, and for a number of guesses without them."""
    if draft is None:
        if tokens is not None:
            raise ConfigError("draft_tokens is of draft. Give it, or leave draft_tokens out.")
        return None
    from mambaseq.generation.speculation import Speculation  # which uses the checks below

    return Speculation.of(draft, tokens)


def _picked(told: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """The `draw` of a head that has none."""
    return pick(told)


def _by_steps(
    decoder: Decoder | Guided,
    logits: Tensor,
    max_new_tokens: int,
    next_token: Callable[[Tensor, int], Tensor],
    stop_ids: Collection[int],
    watch: Watch | None,
    patience: float,
) -> Iterator[Tensor]:
    """One token of each sequence at a time, up to where all have ended; see `stream`."""
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


def _by_stretches(
    stretches: Stretches,
    token: Tensor,
    max_new_tokens: int,
    settings: tuple[float, int, float],
    draws: Draws | None,
    stop_ids: Collection[int],
    watch: Watch | None,
) -> Iterator[Tensor]:
    """The tokens from the first one on, up to where all sequences have ended; settings: temperature, top_k, top_p."""
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


def continues(model: SequenceModel, what: Literal["tokens", "values"]) -> bool:
    """Whether a model's outputs can continue sequences of tokens, or of values."""
    head = model.head
    says = getattr(head, "continues", None)
    if says is None:  # a plugin's
        says = "values" if getattr(head, "learns", None) == "values" else "tokens"
    return bool(model.backbone.causal and head.per_token and says == what)


def _check_state_dtype(model: SequenceModel, dtype: torch.dtype, guidance: float) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"state_dtype must be torch.float32 or torch.bfloat16, not {shown(dtype)}.")
    layers = [layer for layer in model.init_state(1) if isinstance(layer, State)]
    if not any(getattr(layer, name).dtype == torch.float32 for layer in layers for name in layer.accumulated):
        raise ConfigError(
            "state_dtype is for models with real states of mamba, mamba2, mamba3, gated_delta, kda or gla; this one "
            "has none. Leave it out."
        )
    if guidance != 1:
        raise ConfigError("state_dtype does not go with guidance. Leave one of them out.")


def draws_once(model: SequenceModel) -> bool:
    """Whether its head picks one token for a position, by all logits."""
    return getattr(type(model.head), "draw", Head.draw) is Head.draw


def check_one_pick(model: SequenceModel, what: str) -> None:
    """Raise ConfigError for a model whose head picks several times for a position. what: what cannot be had then."""
    if not draws_once(model):
        raise ConfigError(
            f"{what} for heads that pick one token a position, and {type(model.head).__name__} picks parts of it. "
            "Leave it out."
        )


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ConfigError unless the value is a whole number of at least `least` and at most `most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        bound = f" and at most {most}" if most is not None else ""
        kind = "" if whole else "a whole number of "
        raise ConfigError(f"{name} must be {kind}at least {least}{bound}, not {str(value)[:40]}.")


def check_finite(peak: Tensor) -> None:
    if not peak.isfinite().all():
        raise not_finite()


def not_finite() -> NotFinite:
    return NotFinite(
        "The model's prediction is not a finite number: its training diverged, its weights are damaged or its "
        "computation overflows. Use an earlier checkpoint, or train again with a lower learning rate."
    )
