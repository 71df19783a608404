"""Scores of continuations: batched, shared and in parts they equal one plain reading each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mambaseq.errors import ConfigError
from mambaseq.generation import scoring
from mambaseq.generation.checks import NotFinite
from mambaseq.generation.scoring import Asked, Scorer, perplexity
from mambaseq.models import SequenceModel, build_model, causal_lm

VOCABULARY = 29


def model(**options: Any) -> SequenceModel:
    torch.manual_seed(0)
    made = causal_lm(VOCABULARY, 16, 2, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def plainly(of: SequenceModel, asked: Asked) -> tuple[float, bool]:
    ids = torch.from_numpy(np.concatenate([asked.context, asked.continuation]).astype(np.int64))[None]
    with torch.no_grad():
        logits = of(ids[:, :-1]).logits[0, len(asked.context) - 1 :].double()
    logits, wanted = logits[asked.given :], ids[0, len(asked.context) + asked.given :]
    nats = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("options", [{}, {"pattern": ["mamba", "attention"]}])
def test_continuations_equal_one_reading_each(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 7)  # several parts
    monkeypatch.setattr(scoring, "_LOGITS", 5)
    monkeypatch.setitem(scoring._TOGETHER, "cpu", 40)  # several batches
    of = model(**options)
    draw = np.random.default_rng(0)
    contexts = [draw.integers(VOCABULARY, size=n) for n in (1, 3, 20, 9)]
    asked = [Asked(contexts[n % 4], draw.integers(VOCABULARY, size=n)) for n in range(12)]
    asked.append(Asked(draw.integers(VOCABULARY, size=16).astype(np.uint8), draw.integers(VOCABULARY, size=1)))
    likeliest = int(of(torch.from_numpy(contexts[2])[None]).logits[0, -1].argmax())
    asked += [one._replace(given=len(one.continuation) // 2) for one in asked[4:]]
    asked += [Asked(contexts[2], np.array([likeliest])), Asked(contexts[1][:2], np.array([likeliest, 3]))]
    lengths: list[int] = []
    of.encoder.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].numel()))
    found = Scorer(of).continuations(asked)
    read = sum(lengths)
    for one, scored in zip(asked, found, strict=True):
        if len(one.continuation) == one.given:
            assert scored == (0.0, True, 0)
            continue
        nats, greedy = plainly(of, one)
        assert scored.nats == pytest.approx(nats, rel=2e-6, abs=1e-6)
        assert (scored.greedy, scored.tokens) == (greedy, len(one.continuation) - one.given)
    assert any(scored.greedy for scored in found if scored.tokens)
    # padding included, this is far less than all contexts once for each continuation
    assert read < sum(len(one.context) + len(one.continuation) for one in asked)


def test_a_document_is_read_whole_whatever_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    of = model()
    ids = np.random.default_rng(1).integers(VOCABULARY, size=50)
    nats, _ = plainly(of, Asked(ids[:1], ids[1:]))
    for cut in ([50], [1, 0, 20, 29], [7] * 7 + [1]):
        monkeypatch.setattr(scoring, "CHUNK", cut[0])
        scored = Scorer(of).document(np.split(ids, np.cumsum(cut)[:-1]))
        assert scored.nats == pytest.approx(nats, rel=2e-6)
        assert scored.tokens == 49
    assert Scorer(of).document([ids[:1]]) == (0.0, True, 0)
    assert math.isnan(perplexity(0.0, 0))
    assert perplexity(-3 * math.log(4), 3) == pytest.approx(4)


def test_what_cannot_be_scored_is_refused() -> None:
    of = model()
    some = np.array([1, 2])
    with pytest.raises(ConfigError, match="at least one token"):
        Scorer(of).continuations([Asked(some[:0], some)])
    with pytest.raises(ConfigError, match="ids 1 to 29, but the model's vocabulary is of 29"):
        Scorer(of).continuations([Asked(np.array([1, 29]), some)])
    spec = {**of.spec, "head": {"name": "levels", "vocab_size": VOCABULARY, "fine": 29}, "tie_embeddings": False}
    with pytest.raises(ConfigError, match="head LevelsHead"):
        Scorer(build_model(spec))
    with torch.no_grad():
        of.head.linear.weight[3] = math.nan
    with pytest.raises(NotFinite):
        Scorer(of).continuations([Asked(some, some)])
