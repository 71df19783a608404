"""What is drawn from, and what ends a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from mambaseq.errors import ConfigError
from mambaseq.generation import decode, generate, loops
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.sampling import Penalties, filter_logits, sample
from mambaseq.generation.stopping import StopStrings, Text
from mambaseq.models import SequenceModel, build_model, causal_lm

NAN = float("nan")


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "repetition"),
    [(0, 1.0, 0.1, 1.0), (5, 0.8, 0.05, 1.3), (0, 0.6, 0.0, 0.7), (4, 1.0, 1.0, 2.0)],
)
def test_choices_are_those_of_transformers(top_k: int, top_p: float, min_p: float, repetition: float) -> None:
    logits, prompts = 3 * torch.randn(6, 29), torch.randint(0, 29, (3, 4))
    added = torch.randint(0, 29, (6, 2))
    ids = torch.cat([prompts.repeat_interleave(2, 0), added], 1)
    theirs = LogitsProcessorList([logits_process.RepetitionPenaltyLogitsProcessor(repetition)])
    theirs.append(logits_process.TemperatureLogitsWarper(0.7))
    theirs += [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    theirs += [logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs += [logits_process.MinPLogitsWarper(min_p)] if min_p else []
    penalties = Penalties(repetition, 0.0, Prompts.of(prompts), 2, 29)
    for token in added.T:
        penalties.add(token)
    ours = filter_logits(penalties(logits), 0.7, top_k, top_p, min_p)
    torch.testing.assert_close(ours.softmax(-1), theirs(ids, logits).softmax(-1))


def test_presence_counts_what_was_added_once() -> None:
    penalties = Penalties(1.0, 0.5, Prompts.of(torch.tensor([[0, 0]])), 1, 3)
    for token in (2, 2):
        penalties.add(torch.tensor([token]))
    assert penalties(torch.ones(1, 3)).tolist() == [[1.0, 1.0, 0.5]]


def test_a_presence_penalty_below_0_repeats() -> None:
    model, prompt = causal_lm(vocab_size=29, d_model=8, n_layers=1), torch.tensor([[3], [5]])
    ids = generate(model, prompt, 9, seed=1, presence_penalty=-100.0)
    assert all(len(set(row[1:])) == 1 for row in ids.tolist())


def test_penalties_change_what_is_generated() -> None:
    model, prompt = causal_lm(vocab_size=29, d_model=8, n_layers=1), torch.tensor([[3], [5]])
    ids = generate(model, prompt, 28, temperature=0, presence_penalty=100.0)
    assert all(len(set(row[1:])) == 28 for row in ids.tolist())
    ids = generate(model, prompt, 28, seed=1, repetition_penalty=100.0)
    assert torch.equal(ids[1:], generate(model, prompt[1:], 28, seed=1, repetition_penalty=100.0))
    assert not torch.equal(ids, generate(model, prompt, 28, seed=1))
    parts = build_model(
        {
            "d_model": 8,
            "encoder": {"name": "tokens", "vocab_size": 256},
            "backbone": {"name": "residual", "n_layers": 1},
            "mixer": {"name": "mamba"},
            "head": {"name": "levels", "vocab_size": 256},
        }
    )
    with pytest.raises(ConfigError, match="picks parts of it"):
        generate(parts, prompt, 2, presence_penalty=1.0)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("min_p", [2, -0.1, NAN, "x", True]),
        ("repetition_penalty", [0, -1.0, NAN, float("inf"), 1e300, None]),
        ("presence_penalty", [-100.5, NAN, float("inf"), True]),
    ],
)
def test_choices_out_of_range_are_refused(setting: str, values: list) -> None:
    model = causal_lm(vocab_size=3, d_model=8, n_layers=1)
    for value in values:
        with pytest.raises(ConfigError, match=f"{setting} must be"):
            generate(model, torch.zeros(1, 1, dtype=torch.long), 1, **{setting: value})


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    """Byte pairs, in which `Ġein`, `e` and half of a character are tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["ein einer eines keiner 😀"] * 20, trainer)
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    made.save(str(path))
    return HFTokenizer(str(path))


WRITTEN = "grün 😀😀 einer €, keiner mehr\n\n" + "x" * 90 + "é\ufffd ende"


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_text_comes_in_whole_characters(kind: str, pieces: HFTokenizer) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else pieces
    ids, before = tokenizer.encode(WRITTEN), tokenizer.encode("davor ü")
    text = Text(tokenizer, before)
    given = [text.add([one]) for one in ids.tolist()]
    assert "".join(given) + text.rest() == WRITTEN
    assert all(WRITTEN.startswith("".join(given[:n])) for n in range(len(given)))
    broken = Text(ByteTokenizer())
    assert broken.add([0x41, 0xE2, 0x82]) == "A"
    assert broken.rest() == "\ufffd"
    noise = np.random.default_rng(0).integers(0, 256, 500)
    torn = Text(ByteTokenizer())
    assert "".join(torn.add([one]) for one in noise.tolist()) + torn.rest() == ByteTokenizer().decode(noise)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize(
    ("stops", "kept"),
    [
        (["einer"], "grün 😀😀 "),
        (["mehr", "in"], "grün 😀😀 e"),
        ([", k"], "grün 😀😀 einer €"),
        (["😀 "], "grün 😀"),
        (["€"], "grün 😀😀 einer "),
        (["\n\n"], "grün 😀😀 einer €, keiner mehr"),
        (["g"], ""),
        (["ende "], WRITTEN),
    ],
)
def test_a_text_ends_before_its_stop(kind: str, stops: list[str], kept: str, pieces: HFTokenizer) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else pieces
    stop, ids = StopStrings(stops, tokenizer), tokenizer.encode(WRITTEN)
    cut = stop.cut(tokenizer.encode("so: e"), ids)
    assert tokenizer.decode(cut) == kept
    assert cut.dtype == ids.dtype


class Stepped:
    """Stretches that are steps, which need no kernel."""

    def __init__(self, model: SequenceModel, state: list, condition: None, batch_size: int) -> None:
        self.model, self.state = model, state

    def run(self, token: Tensor, n: int, temperature: float, uniforms: Tensor, *choices: Any) -> tuple[Tensor, Tensor]:
        found = []
        for uniform in uniforms.T:
            token = sample(self.model.step_(token, self.state), temperature, *choices, uniform)
            found.append(token)
        return torch.stack(found, 1), torch.zeros(1)


def test_generation_ends_with_the_last_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = causal_lm(vocab_size=256, d_model=8, n_layers=1), ByteTokenizer()
    prompt = torch.tensor([[97], [98]])
    texts = [tokenizer.decode(row[1:].numpy()) for row in generate(model, prompt, 300, seed=3)]
    ends = [next(n for n in range(20, 300) if "\ufffd" not in text[n : n + 3]) for text in texts]
    stop = StopStrings([text[n : n + 3] for n, text in zip(ends, texts, strict=True)], tokenizer)
    monkeypatch.setattr(decode, "Stretches", Stepped)
    for by_stretches in (False, True):
        if by_stretches:
            monkeypatch.setattr(decode, "_WORTH_A_KERNEL", 100)
            monkeypatch.setattr(loops, "_STRETCH", 64)
        ids = generate(model, prompt, 300, seed=3, stop=stop)
        assert ids.shape[1] < 301
        for text, row in zip(texts, ids.numpy(), strict=True):
            found = tokenizer.decode(stop.cut(row[:1], row[1:]))
            assert text.startswith(found)
            assert text[len(found) :].startswith(tuple(stop.strings))


@pytest.mark.parametrize("stop", ["", [""], ["a", None], ["x" * 1001], ["a"] * 65, [b"a"]])
def test_stops_that_are_no_texts_are_refused(stop: object) -> None:
    with pytest.raises(ConfigError, match="stop must be"):
        StopStrings(stop, ByteTokenizer())  # type: ignore[arg-type]
