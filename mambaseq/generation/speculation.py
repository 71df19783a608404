"""Speculative decoding: several tokens are guessed, and one call of the model says how many of them are right.

Right is a guess that is what the model would have added itself, by the same random number: so the result is that of
decoding without guesses, for every temperature and seed, up to rounding, and its distribution with it (a coupling as in
Daliri, Musco, Suresh, arXiv:2408.07978; the first published kind, Leviathan et al., arXiv:2211.17192, gives the same
distribution, but other tokens for each number of guesses). A call over several positions rounds in another way than
steps do: where two tokens are equally likely within rounding, either may come, and in bf16 that happens now and then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from mambaseq.encoders import settled
from mambaseq.errors import ConfigError, shown
from mambaseq.generation.blocks import MOST_GUESSES, Blocks
from mambaseq.generation.checks import check_one_pick, continues, not_finite
from mambaseq.generation.decoder import WORTH_A_GRAPH, Decoder
from mambaseq.generation.drafts import Drafter, NGrams, SmallerModel
from mambaseq.generation.pace import Pace
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.reading import prefill
from mambaseq.generation.sampling import Draws, Penalties, sample
from mambaseq.generation.stopping import Watch
from mambaseq.limits import check_whole
from mambaseq.models import SequenceModel
from mambaseq.models.modules import evaluating
from mambaseq.resources import NGRAM

# Tokens that are added without a look at them, where nothing is guessed.
_BURST = {"cuda": 8}
_LONGEST_BURST = 64
# Positions that are read again with each call, at most, where the state cannot be had behind them.
_MOST_UNREAD = 16


class Speculation:
    """How tokens are guessed for one model, and what came of it.

    Args:
        draft: `"ngram"`, or a smaller model of the same tokens.
        tokens: guesses in a round at most, 1 to 15. Fewer are made where they do not pay, by what calls take and how
            often guesses are right; none where nothing is won.

    Attributes (of all sequences since it was made):
        rounds, guessed, right: calls with guesses, guesses, and how many of those were right.
        of_rounds: tokens that came of rounds, one more than the guesses that were right in each.
        added, seconds: all tokens, and what they took without the prompt.
        why_not: why there were no guesses at all, or None.

    Raises ConfigError for a number of tokens out of range, or a draft that is neither.
    """

    def __init__(self, draft: SequenceModel | str, tokens: int = MOST_GUESSES) -> None:
        if not isinstance(draft, SequenceModel) and draft != NGRAM:
            raise ConfigError(f'draft must be "{NGRAM}" or a smaller model, not {shown(draft)}.')
        check_whole("draft_tokens", tokens, 1, MOST_GUESSES)
        self.draft, self.tokens = draft, tokens
        self.rounds = self.guessed = self.right = self.of_rounds = self.added = 0
        self.seconds = 0.0
        self.why_not: str | None = None
        self.pace = Pace(tokens)
        self._held: dict[str, tuple[Any, Blocks]] = {}

    @classmethod
    def of(cls, draft: Speculation | SequenceModel | str, tokens: int | None) -> Speculation:
        """One as it is, or a new one. Raises ConfigError for a number of tokens beside one that has its own."""
        if isinstance(draft, Speculation):
            if tokens is not None:
                raise ConfigError("draft says how many tokens there are; leave draft_tokens out.")
            return draft
        return cls(draft) if tokens is None else cls(draft, tokens)

    def begun(
        self, name: str, model: SequenceModel, state: list[Any], condition: Tensor | None, captured: bool, greedy: bool
    ) -> Blocks:
        """Calls of a model behind a state: those of the last sequence, if their graphs can be replayed."""
        key = (greedy, captured, *(parameter.data_ptr() for parameter in model.parameters()))
        before, blocks = self._held.get(name, (None, None))
        if blocks is not None and before == key and condition is None and blocks.captures:
            blocks.decoder.take(state)
            return blocks
        decoder = Decoder(model, state, condition, cuda_graph=captured, greedy=greedy)
        blocks = Blocks(model, decoder, condition, captured)
        if condition is None:
            self._held[name] = key, blocks
        return blocks

    def __str__(self) -> str:
        """What came of it, in words."""
        if self.why_not is not None:
            return f"no tokens were guessed: {self.why_not}"
        speed = f"{self.added / self.seconds:,.0f} tokens/s" if self.seconds else "no tokens"
        if not self.rounds:
            return f"no tokens were guessed, since that would not have been faster; {speed}"
        return (
            f"{self.right / self.guessed:.0%} of the guessed tokens were right; each call that checked some brought "
            f"{self.of_rounds / self.rounds:.1f} tokens, {self.of_rounds / max(self.added, 1):.0%} of all; {speed}"
        )

    def check(self, model: SequenceModel, sequences: int, conditioned: bool, **others: object) -> None:
        """Raise ConfigError for what cannot be done. others: options that exclude drafts where they are given."""
        if sequences != 1:
            raise ConfigError(
                f"Drafts are for one sequence at a time, and there are {sequences:,}, which are faster together "
                "without. Leave draft out, or call once for each."
            )
        check_one_pick(model, "Drafts are")
        if wrong := [name for name, given in others.items() if given]:
            raise ConfigError(f"Drafts do not go with {wrong[0]}. Leave one of them out.")
        if not isinstance(self.draft, SequenceModel):
            return
        draft, head = self.draft, model.head
        if not continues(draft, "tokens"):
            raise ConfigError("The draft cannot generate: only a causal model with an lm head can. Give another one.")
        check_one_pick(draft, "A draft is")
        draft.check_stateful()
        sizes = [getattr(getattr(one, "linear", None), "out_features", None) for one in (head, draft.head)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"The draft has a vocabulary of {sizes[1]} tokens, and the model one of {sizes[0]}. Give a draft of "
                "the same tokenizer."
            )
        places = [next(one.parameters()).device for one in (model, draft)]
        if places[0] != places[1]:
            raise ConfigError(f"The draft is on {places[1]}, and the model on {places[0]}. Move it there.")
        if conditioned and _conditions(draft) != _conditions(model):
            raise ConfigError(
                "A condition is given, and the draft does not take the model's conditions. Give a draft that was "
                "trained with the same ones."
            )


def _conditions(model: SequenceModel) -> list[tuple[int, ...]] | None:
    """The sizes of what a model learns of conditions, without its width."""
    table = getattr(model.encoder, "condition", None)
    return None if table is None else [tuple(one.shape[:1]) for one in table.parameters()]


@torch.no_grad()
def speculate(
    model: SequenceModel,
    prompts: Prompts,
    max_new_tokens: int,
    speculation: Speculation,
    *,
    state: list[Any],
    logits: Tensor,
    settled_condition: Tensor | None,
    condition: Tensor | None,
    settings: tuple[float, int, float, float],
    draws: Draws | None,
    penalties: Penalties | None,
    stop_ids: Collection[int],
    watch: Watch | None,
    cuda_graph: bool,
    patience: float,
) -> Iterator[Tensor]:
    """Continue one sequence; see `mambaseq.generation.decode.stream`, whose arguments these are.

    state, logits: what was read of the prompt, changed in place. settled_condition: as the model's encoder takes it.
    settings: temperature, top_k, top_p, min_p.
    """
    captured = cuda_graph and max_new_tokens >= WORTH_A_GRAPH
    smaller = speculation.draft if isinstance(speculation.draft, SequenceModel) else None
    with contextlib.nullcontext() if smaller is None else evaluating(smaller):
        drafter: Drafter
        if smaller is None:
            drafter = NGrams(prompts.rows[0])
        else:
            under = settled(smaller.encoder, condition)
            begun, _ = prefill(smaller, prompts, under)
            made = speculation.begun("draft", smaller, begun, under, captured, False)
            drafter = SmallerModel(smaller, made.decoder, under)
        picks = _Picks(settings, draws, penalties)
        greedy = settings[0] == 0 and penalties is None
        blocks = speculation.begun("model", model, state, settled_condition, captured, greedy)
        decoder = blocks.decoder
        one = _Sequence(decoder, blocks, drafter, picks, speculation, logits)
        yield from _given_on(one, max_new_tokens, set(stop_ids), watch, patience, logits.device)


class _Picks:
    """Tokens from logits, by the settings and the sequence's random numbers."""

    def __init__(
        self, settings: tuple[float, int, float, float], draws: Draws | None, penalties: Penalties | None
    ) -> None:
        self._settings, self._draws, self._penalties = settings, draws, penalties

    def along(self, logits: Tensor, guesses: Tensor) -> Tensor:
        """The tokens `(m,)` that would be added at the last m of `g + 1` positions, if the guesses `(g,)` before each
        were; logits `(m, n)`. Nothing is added."""
        if self._penalties is not None:
            logits = self._penalties.along(logits, guesses)
        uniforms = None if self._draws is None else self._draws.ahead(len(guesses) + 1)[-len(logits) :, 0]
        temperature, top_k, top_p, min_p = self._settings
        return sample(logits, temperature, top_k, top_p, uniforms, min_p)

    def add(self, tokens: Tensor) -> None:
        """They were added, `(n,)`."""
        if self._draws is not None:
            self._draws.skip(len(tokens))
        if self._penalties is not None:
            self._penalties.add(tokens[None])


class _Sequence:
    """A sequence and all that continues it. The state is that before `unread`, the last tokens added: one, or more
    where a state could not be had that is behind them."""

    def __init__(
        self,
        decoder: Decoder,
        blocks: Blocks,
        drafter: Drafter,
        picks: _Picks,
        speculation: Speculation,
        logits: Tensor,
    ) -> None:
        self.decoder, self.blocks, self.drafter, self.picks, self.told = decoder, blocks, drafter, picks, speculation
        self.pace = speculation.pace
        self.pace.begin()
        self.device = logits.device
        self._logits: Tensor | None = logits  # of the next token, if they are known
        self._unread = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._nothing = self._guesses = self._unread
        self._made = 0

    def more(self, left: int) -> list[int]:
        """The next tokens, at least one and at most `left`."""
        begun, is_first = time.perf_counter(), self._logits is not None
        kind = None if is_first else self.drafter.kind()
        n, unread = 0, len(self._unread)
        if kind is not None and left > 1:
            n = self.pace.guesses(kind, left - 1, self._made, lambda number: self.blocks.size(unread, number))
        if kind is None or not n:
            guessing, size = 0.0, 0
            tokens = self._steps(min(left, self._burst(kind)))
        else:
            guessing, size = self._guess(n), self.blocks.size(unread, n)
            tokens = self._check(kind)
        self._made += len(tokens)
        self.drafter.add(tokens)
        takes = time.perf_counter() - begun
        if size:
            self.pace.guess.add(guessing / n)
            self.pace.called(size, takes - guessing)
        elif not is_first and unread == 1:
            self.pace.step.add(takes / len(tokens))
        return tokens

    def _burst(self, kind: int | None) -> int:
        """Tokens that are added one by one before anything is guessed again."""
        if self._logits is not None:
            return 1
        if self.pace.step.seconds is None:
            return 2
        if kind is None or isinstance(self.drafter, NGrams):
            return _BURST.get(self.device.type, 1)
        return min(max(self.pace.resting(kind, self._made), 1), _LONGEST_BURST)

    def _steps(self, n: int) -> list[int]:
        """n tokens one by one."""
        made, peak = [], []
        logits = self._logits
        if len(self._unread) > 1:
            self.blocks.advance(self._unread[:-1])
            self._unread = self._unread[-1:]
        for _ in range(n):
            if logits is None and self.decoder.greedy:
                token, most = self.decoder.step(self._unread)
                # the graph's own memory, which its next step reads
                self._unread = token
                made.append(token.clone())
                peak.append(most.clone())
                continue
            if logits is None:
                logits = self.decoder.step(self._unread)
            peak.append(logits.amax(-1))
            self._unread = self.picks.along(logits, self._nothing)
            self.picks.add(self._unread)
            made.append(self._unread)
            logits = None
        self._unread = made[-1]
        tokens = self._read(torch.cat(made), torch.cat(peak))
        self._logits = None
        return tokens

    def _guess(self, n: int) -> float:
        """n guesses. Returns what they took, in seconds."""
        begun = time.perf_counter()
        self._guesses = self.drafter.guesses(n, self.picks.along, self.device)
        if self.device.type == "cuda" and isinstance(self.drafter, SmallerModel):
            torch.cuda.current_stream().synchronize()  # what each part takes decides how many there are
        return time.perf_counter() - begun

    def _check(self, kind: int) -> list[int]:
        """What the model says of the guesses: those that are right, and one token more."""
        guesses, n = self._guesses, len(self._guesses)
        logits = self.blocks.run(self._unread, guesses)  # (n + 1, vocabulary)
        picked = self.picks.along(logits, guesses)
        # guesses up to the first that is wrong, and what the model adds there
        right_so_far = (picked[:n] == guesses).cumprod(0)
        finite = logits.amax(-1).isfinite().long()  # NaN and infinity stay in it
        found = torch.cat([picked, right_so_far.sum()[None], finite]).tolist()
        right = found[n + 1]
        tokens = found[: right + 1]
        if not all(found[n + 2 : n + 3 + right]):
            raise not_finite()
        added = picked[: right + 1]
        kept = self.blocks.keep(right)
        self._unread = torch.cat([self._unread, added])[kept:]
        self.picks.add(added)
        if len(self._unread) > _MOST_UNREAD:
            self.blocks.advance(self._unread[:-1])
            self._unread = self._unread[-1:]
        self.pace.came_of(kind, right, n)
        told = self.told
        told.rounds, told.guessed, told.right = told.rounds + 1, told.guessed + n, told.right + right
        told.of_rounds += right + 1
        return tokens

    def _read(self, tokens: Tensor, peak: Tensor) -> list[int]:
        found = torch.cat([tokens, peak.isfinite().all().long()[None]]).tolist()
        if not found.pop():
            raise not_finite()
        return [int(one) for one in found]


def _given_on(
    one: _Sequence, max_new_tokens: int, stops: set[int], watch: Watch | None, patience: float, device: torch.device
) -> Iterator[Tensor]:
    """All tokens of a sequence up to its end, `(1, n)` at a time."""
    out: list[int] = []
    made, has_ended = 0, False
    begun = given_on = time.perf_counter()
    try:
        while made < max_new_tokens and not has_ended:
            tokens = one.more(max_new_tokens - made)
            for number, token in enumerate(tokens):
                stopped = watch is not None and bool(watch(torch.tensor([[token]]).numpy())[0])
                if token in stops or stopped:
                    tokens, has_ended = tokens[: number + 1], True
                    break
            out += tokens
            made += len(tokens)
            if time.perf_counter() - given_on > patience:
                one.told.seconds += time.perf_counter() - begun
                one.told.added += len(out)
                piece, out = torch.tensor([out], device=device), []
                yield piece
                begun = given_on = time.perf_counter()
    except KeyboardInterrupt:
        if out:
            yield torch.tensor([out], device=device)
        raise
    one.told.seconds += time.perf_counter() - begun
    one.told.added += len(out)
    if out:
        yield torch.tensor([out], device=device)
