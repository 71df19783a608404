"""Generation: stepwise equals full, filters by hand, seeds repeat."""

from __future__ import annotations

import pytest
import torch

from mambaseq.errors import ConfigError
from mambaseq.generation import generate
from mambaseq.generation.sampling import filter_logits, sample
from mambaseq.models import build_model, causal_lm


@pytest.mark.parametrize("mixer", ["mamba", "s4d", "attention", "hyena"])
def test_greedy_decoding_equals_the_full_forward(mixer: str) -> None:
    model = causal_lm(vocab_size=29, d_model=16, n_layers=2, mixer=mixer, n_conditions=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prompt, condition = torch.randint(0, 29, (3, 5)), torch.tensor([0, 1, 1])
    out = generate(model, prompt, 12, temperature=0, condition=condition)
    ids = prompt
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids, condition=condition).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_the_seed_decides() -> None:
    model = causal_lm(vocab_size=29, d_model=8, n_layers=1)
    prompt = torch.zeros(2, 1, dtype=torch.long)
    one, again, other = (generate(model, prompt, 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_stop_ids_end_sequences_one_by_one() -> None:
    model = causal_lm(vocab_size=3, d_model=8, n_layers=1)
    out = generate(model, torch.zeros(4, 1, dtype=torch.long), 200, seed=0, stop_ids={2})
    assert out.shape[1] < 200
    for row in out.tolist():
        assert 2 in row
        assert set(row[row.index(2) :]) == {2}


def test_filters_known_answers() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()

    def kept(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[bool]:
        return torch.isfinite(filter_logits(logits, temperature, top_k, top_p))[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.51) == [True, True, False, False]
    assert kept(top_p=0.001) == [True, False, False, False]
    hot = filter_logits(logits, 2.0, 0, 1.0).softmax(-1)
    torch.testing.assert_close(
        hot, torch.tensor([[0.5, 0.25, 0.15, 0.1]]).sqrt() / torch.tensor([0.5, 0.25, 0.15, 0.1]).sqrt().sum()
    )


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(20000, 3)
    drawn = sample(logits, 1.0, 0, 1.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.012, rtol=0)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range_are_refused(bad: dict) -> None:
    model = causal_lm(vocab_size=3, d_model=8, n_layers=1)
    with pytest.raises(ConfigError, match="temperature must be positive"):
        generate(model, torch.zeros(1, 1, dtype=torch.long), 1, **bad)


def test_what_cannot_generate_says_so() -> None:
    model = causal_lm(vocab_size=3, d_model=8, n_layers=1)
    with pytest.raises(ConfigError, match="at least one token"):
        generate(model, torch.zeros(1, 0, dtype=torch.long), 1)
    classifier = build_model(
        {
            "d_model": 8,
            "encoder": {"name": "tokens", "vocab_size": 3},
            "backbone": {"name": "residual", "n_layers": 1},
            "mixer": {"name": "mamba"},
            "head": {"name": "classification", "n_classes": 2},
        }
    )
    with pytest.raises(ConfigError, match="lm head"):
        generate(classifier, torch.zeros(1, 1, dtype=torch.long), 1)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_after_an_error_too(training: bool) -> None:
    model = causal_lm(vocab_size=3, d_model=8, n_layers=1).train(training)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    generate(model, prompt, 2)
    assert all(module.training == training for module in model.modules())
    with pytest.raises(ConfigError, match="top_p"):
        generate(model, prompt, 2, top_p=2)
    assert all(module.training == training for module in model.modules())
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(model, prompt, -1)
