"""Speculative decoding: what is added is what decoding without guesses adds."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from generation.test_generate import BACKBONES
from generation.test_ragged import lively
from mambaseq_text.tokenization import ByteTokenizer

from mambaseq.errors import ConfigError
from mambaseq.generation import decode, generate, speculation
from mambaseq.generation.blocks import Blocks
from mambaseq.generation.decoder import Decoder
from mambaseq.generation.drafts import NGrams
from mambaseq.generation.pace import Pace
from mambaseq.generation.speculation import Speculation
from mambaseq.generation.stopping import StopStrings
from mambaseq.mixers.base import State
from mambaseq.models import SequenceModel, build_model
from mambaseq.resources import NGRAM

KINDS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba and mlp": {"mlp": True},
    "mamba2": {"mixer": "mamba2"},
    "s4d": {"mixer": "s4d"},
    "attention": {"mixer": "attention"},
    "hybrid": {"pattern": ["mamba", "attention"]},
    "unet": BACKBONES["unet"],
}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if drafting always paid: what calls take is another matter."""

    def always(self: Pace, kind: int, left: int, made: int, size: Any) -> int:
        return min(self.most, left) if made % 7 else 0

    monkeypatch.setattr(Pace, "guesses", always)


def near(model: SequenceModel) -> SequenceModel:
    """A model that is often of another opinion."""
    assert model.spec is not None
    other = build_model(model.spec).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("kind", "packed"), [*((kind, False) for kind in KINDS), ("unet", True)])
def test_the_result_is_that_without_drafts(kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "Blocks", functools.partial(Blocks, packed=packed))
    model = lively(**KINDS[kind])
    prompt, condition = torch.randint(0, 29, (1, 11)), torch.tensor([1])
    draft, right, guessed = near(model), 0, 0
    greedy: dict[str, Any] = {"temperature": 0.0}
    drawn = {"top_k": 9, "min_p": 0.02, "repetition_penalty": 1.3, "presence_penalty": 0.2, "seed": 5}
    for options, drafts in ((greedy, [("ngram", 3), (draft, 5)]), (drawn, [(draft, 4)])):
        plain = generate(model, prompt, 20, condition=condition, **options)
        for source, tokens in drafts:
            told = Speculation(source, tokens)
            assert torch.equal(generate(model, prompt, 20, condition=condition, draft=told, **options), plain)
            assert told.added == 20
            assert told.of_rounds == told.rounds + told.right > 0
            right, guessed = right + told.right, guessed + told.guessed
    assert 0 < right < guessed


@pytest.mark.usefixtures("eager")
def test_a_draft_that_is_the_model_is_right() -> None:
    model = lively()
    prompt = torch.randint(0, 29, (1, 11))
    for temperature in (0.0, 1.0):
        told = Speculation(model, 4)
        generate(model, prompt, 40, temperature=temperature, seed=1, draft=told)
        assert told.right == told.guessed
        assert str(told).startswith("100% of the guessed tokens were right; ")


@pytest.mark.usefixtures("eager")
def test_what_is_drawn_has_the_models_distribution() -> None:
    """The chi-square test of pairs of tokens, over many seeds: 8 degrees of freedom, 0.1% of them above 26.1."""
    model = build_model(
        {
            "d_model": 8,
            "encoder": {"name": "tokens", "vocab_size": 3},
            "mixer": {"name": "mamba"},
            "backbone": {"name": "residual", "n_layers": 1},
            "head": {"name": "lm", "vocab_size": 3},
        }
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    draft, prompt, count = near(model), torch.tensor([[1, 2, 0]]), 250
    with torch.no_grad():
        first = model(prompt).logits[0, -1].double().softmax(-1)
        rows = torch.cat([prompt.expand(3, 3), torch.arange(3)[:, None]], 1)
        expected = count * first[:, None] * model(rows).logits[:, -1].double().softmax(-1)
    seen = torch.zeros(3, 3, dtype=torch.float64)
    for seed in range(count):
        pair = generate(model, prompt, 2, seed=seed, draft=draft, draft_tokens=2)[0, 3:]
        seen[pair[0], pair[1]] += 1
    assert float(((seen - expected) ** 2 / expected).sum()) < 26.1


@pytest.mark.usefixtures("eager")
def test_it_ends_where_it_would_without() -> None:
    tokenizer, model = ByteTokenizer(), lively()
    prompt = torch.randint(0, 29, (1, 11))
    whole = generate(model, prompt, 60, seed=3)[0, 11:]
    stop = int(whole[37])
    text = tokenizer.decode(whole[20:23].numpy())
    for options in ({"stop_ids": [stop]}, {"stop": StopStrings([text], tokenizer)}):
        plain = generate(model, prompt, 60, seed=3, **options)
        assert 11 < plain.shape[1] < 71
        assert torch.equal(generate(model, prompt, 60, seed=3, draft=model, **options), plain)


def test_guesses_that_do_not_pay_are_left_out() -> None:
    def size(n: int) -> int:
        return n + 1

    pace = Pace(15)
    assert pace.guesses(0, 100, 0, size) == 0  # nothing is known yet
    for _ in range(4):
        pace.step.add(1.0)
        pace.guess.add(0.1)
        for positions in (2, 4, 8, 16):
            pace.called(positions, 1.0 + 0.05 * positions)
    assert pace.guesses(0, 100, 5, size) > 1
    assert pace.guesses(0, 1, 5, size) == 1
    for _ in range(20):
        pace.came_of(0, 15, 15)
    assert pace.guesses(0, 100, 30, size) == 15
    for _ in range(40):
        pace.came_of(0, 0, 15)
    tried = [made for made in range(2000) if pace.guesses(0, 100, made, size) and pace.came_of(0, 0, 1) is None]
    assert 1 <= len(tried) < 25  # seldom again, and ever more seldom
    slow = Pace(15)
    for _ in range(4):
        slow.step.add(1.0)
        for positions in (2, 4, 8, 16):
            slow.called(positions, 3.0 * positions)
    assert not any(slow.guesses(0, 100, made, size) for made in range(2000))


def test_what_followed_before_is_guessed() -> None:
    grams = NGrams(np.array([5, 1, 2, 3, 4, 9, 8, 1, 2]))
    assert grams.kind() == 2
    pick: Any = None
    assert grams.guesses(4, pick, torch.device("cpu")).tolist() == [3, 4, 9, 8]
    grams.add([3, 4])
    assert grams.kind() == 4
    assert grams.guesses(9, pick, torch.device("cpu")).tolist() == [9, 8, 1, 2, 3, 4, 9, 8, 1]
    grams.add([7])
    assert grams.kind() is None


@pytest.mark.parametrize(("kind", "packed"), [*((kind, False) for kind in KINDS), ("mamba2", True), ("unet", True)])
def test_the_state_is_that_after_what_is_kept(kind: str, packed: bool) -> None:
    model = lively(**KINDS[kind])
    ids = torch.randint(0, 29, (20,))
    with torch.no_grad():
        told = model(ids[None], return_state=True)
        decoder = Decoder(model, model(ids[None, :9], return_state=True).state)
        blocks = Blocks(model, decoder, None, packed=packed)
        logits = blocks.run(ids[9:11], torch.cat([ids[11:14], ids[:3]]))
    torch.testing.assert_close(logits[:4], told.logits[0, 10:14])
    kept = blocks.keep(3)
    assert kept == (2 if packed else 5 if kind in ("mamba", "mamba and mlp", "attention") else 0)
    blocks.run(ids[9 + kept : 15], ids[15:17])
    kept += blocks.keep(2)
    assert kept == 8
    blocks.advance(ids[17:19])
    torch.testing.assert_close(decoder.step(ids[19:]), told.logits[:, -1])


class Knows:
    """In the place of n-grams: guesses what is known to follow, every fifth token wrong."""

    text: ClassVar[list[int]] = []

    def __init__(self, row: Any) -> None:
        self._ids = list(self.text[: len(row)])

    def add(self, tokens: list[int]) -> None:
        self._ids += tokens

    def kind(self) -> int:
        return 0

    def guesses(self, n: int, pick: Any, device: torch.device) -> torch.Tensor:
        first = len(self._ids)
        known = (self.text + [0] * n)[first : first + n]
        found = [(token + (place % 5 == 0)) % 29 for place, token in enumerate(known, first)]
        return torch.tensor(found, device=device)


def check_replays(
    model: SequenceModel,
    prompt: torch.Tensor,
    drafts: list[Any],
    same: float,
    monkeypatch: pytest.MonkeyPatch,
    captured: bool = True,
) -> None:
    """Calls of the model are captured once, and replayed for the next sequence, too. same: share of the tokens."""
    count = 64 if prompt.is_cuda else 48
    monkeypatch.setattr("mambaseq.generation.decode.why_not_stretches", lambda *_: "the test is of steps")
    monkeypatch.setattr(speculation, "NGrams", Knows)
    for options in ({"temperature": 0.0}, {"seed": 5}):
        plain = generate(model, prompt, count, cuda_graph=False, **options)
        monkeypatch.setattr(Knows, "text", plain[0].tolist())
        for source in drafts:
            told, graphs = Speculation(source, 7), []
            for _ in range(2):
                found = generate(model, prompt, count, draft=told, **options)
                assert float((found == plain).float().mean()) >= same
                blocks = told.begun("model", model, model.init_state(1), None, True, "seed" not in options)
                graphs.append({size: one.graph for size, one in blocks._graphs.items()})
            assert told.rounds > count // 6
            assert bool(graphs[1]) is captured
            assert graphs[0].items() <= graphs[1].items()


@pytest.mark.gpu
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "s4d", "unet", "hybrid"])
def test_calls_are_replayed_on_a_gpu(kind: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # a GPU's calls round otherwise, and go on from there
    prompt = torch.randint(0, 29, (1, 11)).to(cuda)
    model = lively(**KINDS[kind]).to(cuda)
    drafts = [NGRAM, near(model).to(cuda)]
    check_replays(model, prompt, drafts, 0.9, monkeypatch, captured=kind != "hybrid")


class Replayed:
    """A CUDA graph on a CPU: what was captured is run again, into the same memory."""

    def __init__(self) -> None:
        self.run: Any = None
        self.made: list[torch.Tensor] = []

    def replay(self) -> None:
        for own, new in zip(self.made, leaves(self.run()), strict=True):
            own.copy_(new)


def leaves(made: Any) -> list[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        return [made]
    return [leaf for part in (made.tensors().values() if isinstance(made, State) else made) for leaf in leaves(part)]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", ["mamba2", "unet"])
def test_calls_are_replayed_where_they_can_be_captured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the GPU."""
    decoders: list[Decoder] = []

    def capture(graph: Any, run: Any) -> Any:
        held = [
            one for each in decoders for one in [*leaves(each.state), *([] if each._token is None else [each._token])]
        ]
        before = [one.clone() for one in held]
        made, graph.run = run(), run
        for own, old in zip(held, before, strict=True):  # a capture computes nothing
            own.copy_(old)
        graph.made = [one.fill_(0) for one in leaves(made)]
        return made

    class Watched(Decoder):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            decoders.append(self)

    for module in ("blocks", "decoder"):
        monkeypatch.setattr(f"mambaseq.generation.{module}.can_capture", lambda *_: True)
    monkeypatch.setattr(speculation, "Decoder", Watched)
    monkeypatch.setattr("mambaseq.ops.gpu.capture.warm_up", lambda run, stream: (run(), False))
    monkeypatch.setattr("mambaseq.ops.gpu.capture.capture", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    for name in ("device", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    check_replays(lively(**KINDS[kind]), torch.randint(0, 29, (1, 11)), [NGRAM], 1.0, monkeypatch)


def test_drafts_that_cannot_be() -> None:
    model, prompt = lively(), torch.ones(1, 3).long()
    assert model.spec is not None
    other = {**model.spec, "head": {"name": "lm", "vocab_size": 30}}
    untold = {**model.spec, "encoder": {"name": "tokens", "vocab_size": 29}}
    levels = {**model.spec, "head": {"name": "levels", "vocab_size": 256}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"draft": "bigram"}, 'draft must be "ngram" or a smaller model'),
        ({"draft": "ngram", "draft_tokens": 0}, "draft_tokens must be at least 1 and at most 15"),
        ({"draft_tokens": 3}, "draft_tokens is of draft"),
        ({"draft": Speculation("ngram"), "draft_tokens": 3}, "leave draft_tokens out"),
        ({"draft": "ngram", "samples": 2}, "one sequence at a time"),
        ({"draft": "ngram", "state_dtype": torch.bfloat16}, "do not go with state_dtype"),
        ({"draft": "ngram", "given": torch.ones(1, 4).long()}, "do not go with given"),
        ({"draft": "ngram", "guidance": 2.0, "condition": torch.tensor([0])}, "do not go with guidance"),
        ({"draft": build_model(other)}, "vocabulary of 30 tokens, and the model one of 29"),
        ({"draft": build_model(untold), "condition": torch.tensor([0])}, "does not take the model's conditions"),
        ({"draft": build_model(levels)}, "picks parts of it"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            generate(model, prompt, 4, **options)
    with pytest.raises(ConfigError, match="Drafts are for heads that pick one token"):
        generate(build_model(levels), prompt, 4, draft="ngram")


class OneKernel:
    """In the place of the kernel, which takes long to compile."""

    def __init__(self, model: SequenceModel, state: Any, condition: Any, batch_size: int) -> None:
        self.decoder = Decoder(model, state, condition)

    def run(self, token: torch.Tensor, n: int, *settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = [token]
        for _ in range(n):
            tokens.append(self.decoder.step(tokens[-1]).argmax(-1))
        return torch.stack(tokens[1:], 1), torch.tensor(False)


def test_one_kernel_is_not_given_up_for_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Speculation("ngram")
    model, prompt = lively(), torch.ones(1, 3).long()
    plain = generate(model, prompt, 24, temperature=0)
    monkeypatch.setattr(decode, "_WORTH_A_KERNEL", 24)
    monkeypatch.setattr(decode, "Stretches", OneKernel)
    assert torch.equal(generate(model, prompt, 24, temperature=0, draft=told), plain)
    assert "by one kernel" in str(told)
    assert not told.rounds
