"""Generation: stepwise equals full, filters by hand, seeds repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pages import blocks, run_cell

from mambaseq.errors import ConfigError, UserError
from mambaseq.generation import generate, reading, stream
from mambaseq.generation.checks import NotFinite
from mambaseq.generation.prompts import Prompts
from mambaseq.generation.sampling import Draws, filter_logits, sample
from mambaseq.models import SequenceModel, build_model, causal_lm


@pytest.mark.parametrize("mixer", ["mamba", "s4d", "attention", "hyena", "mamba3", "gated_delta", "kda", "gla"])
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
    drawn = sample(logits, 1.0, 0, 1.0, torch.rand(20000, dtype=torch.float64))
    shares = torch.bincount(drawn, minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.012, rtol=0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("temperature", [-1.0, -1e-300, NAN, INF, -INF, "hot", None, True]),
        ("top_k", [-1, 2.0, NAN, True, None]),
        ("top_p", [0.0, 1.5, -0.1, NAN, INF, 2, True]),
        ("seed", [-1, 2**63, 1.5, NAN]),
        ("samples", [0, -1, 1.0, True, 10**9]),
        ("max_new_tokens", [-1, 1.5, NAN, INF, True, 10**12]),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, values: list) -> None:
    model = causal_lm(vocab_size=3, d_model=8, n_layers=1)
    settings = {"max_new_tokens": 1}
    for value in values:
        with pytest.raises(UserError, match=f"{setting} must be|asks for 1,000,000,000"):
            generate(model, torch.zeros(1, 1, dtype=torch.long), **{**settings, setting: value})


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest(temperature: float) -> None:
    model = causal_lm(vocab_size=29, d_model=8, n_layers=1)
    prompt = torch.randint(0, 29, (3, 5))
    cold = generate(model, prompt, 12, temperature=temperature, seed=0)
    assert torch.equal(cold, generate(model, prompt, 12, temperature=0))


@pytest.mark.parametrize("temperature", [1e30, 1.7e308])
def test_the_largest_temperatures_take_any(temperature: float) -> None:
    logits = torch.tensor([[50.0, -50.0, 0.0]])
    torch.testing.assert_close(filter_logits(logits, temperature, 0, 1.0).softmax(-1), torch.full((1, 3), 1 / 3))


def test_tokens_without_a_share_are_never_taken() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]).expand(4, 5)
    ends = torch.tensor([0.0, 0.2, 0.5, 1 - 2.0**-32], dtype=torch.float64)
    assert sample(logits, 1.0, 0, 1.0, ends).tolist() == [1, 1, 3, 3]


def lively(**options: Any) -> SequenceModel:
    model = causal_lm(vocab_size=29, d_model=16, n_layers=2, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_draws_are_even_and_independent() -> None:
    draws = Draws(1, Prompts.of(torch.zeros(500, 1, dtype=torch.long)), None, 4, None, "cpu")
    drawn = torch.stack([draws.next() for _ in range(130)])  # beyond a block
    assert drawn.shape == (130, 2000)
    assert 0 <= float(drawn.min()) < 1e-4 < 1 - 1e-4 < float(drawn.max()) < 1
    assert len(drawn.unique()) > drawn.numel() * 0.999
    counts = torch.histc(drawn.float(), 20, 0, 1)
    assert float(((counts - 13000) ** 2 / 13000).sum()) < 50  # chi squared of 19 degrees: 1 in 10,000 is above
    for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        assert abs(float(torch.corrcoef(torch.stack([one.ravel(), other.ravel()]))[0, 1])) < 0.01


def test_a_sequence_does_not_depend_on_those_beside_it() -> None:
    model = lively(n_conditions=2)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    condition = torch.tensor([0, 1, 0])
    together = generate(model, prompts, 30, seed=5, condition=condition, samples=2).view(3, 2, -1)
    for row in (0, 1):
        alone = generate(model, prompts[row : row + 1], 30, seed=5, condition=condition[row : row + 1], samples=2)
        assert torch.equal(alone, together[row])
    assert len({tuple(row) for row in together.flatten(0, 1).tolist()}) == 6  # equal prompts get further samples
    wanted = torch.tensor([[3]])
    last = generate(model, prompts[2:], 30, seed=5, condition=condition[2:], numbers=wanted)
    assert torch.equal(last[0], together[2, 1])
    with pytest.raises(ConfigError, match="numbers must be"):
        generate(model, prompts, 3, condition=condition, numbers=wanted)


BACKBONES: dict[str, dict] = {
    "mamba": {"mixer": "mamba"},
    "s4d": {"mixer": "s4d"},
    "attention": {"mixer": "attention"},
    "hyena": {"mixer": "hyena"},
    "both": {"mixer": "mamba", "pattern": ["mamba", "attention*"]},
    "unet": {"name": "unet", "n_layers": 1, "pool": [2, 2]},
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_prompt_is_read_in_parts_with_the_same_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(BACKBONES[kind])
    spec: dict[str, Any] = {
        "d_model": 16,
        "encoder": {"name": "tokens", "vocab_size": 29},
        "mixer": {"name": options.pop("mixer", "mamba")},
        "backbone": {"name": "residual", "n_layers": 2, **options},
        "head": {"name": "lm", "vocab_size": 29},
    }
    model = build_model(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prompt = torch.randint(0, 29, (2, 61))
    read: list[int] = []
    headed: list[int] = []
    model.backbone.register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))
    model.head.register_forward_hook(lambda _, args, __: headed.append(args[0].shape[1]))
    whole = reading.prefill(model, Prompts.of(prompt), None)[1]
    monkeypatch.setattr(reading, "_PREFILL", 16)
    with torch.no_grad():
        state, logits = reading.prefill(model, Prompts.of(prompt), None)
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, model(prompt).logits[:, -1], rtol=1e-4, atol=1e-5)
        following = torch.randint(0, 29, (2,))
        after = model(torch.cat([prompt, following[:, None]], 1)).logits[:, -1]
        torch.testing.assert_close(model.step_(following, state), after, rtol=1e-4, atol=1e-5)
    assert read[:9] == [61] + [16, 16, 16, 13] * 2  # as each would be read alone
    assert headed[:3] == [1, 1, 1]


def test_many_samples_cost_one_reading() -> None:
    model = lively()
    read: list[tuple] = []
    model.backbone.register_forward_hook(lambda _, args, __: read.append(tuple(args[0].shape[:2])))
    generate(model, torch.randint(0, 29, (2, 9)), 1, samples=50)
    assert read == [(2, 9)]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_no_number_is_not_generated(value: float) -> None:
    model = lively()
    with torch.no_grad():
        model.backbone.mixers()[0].out_proj.weight.fill_(value)  # type: ignore[union-attr, operator]
    for temperature in (0.0, 1.0):
        with pytest.raises(NotFinite, match="not a finite number"):
            generate(model, torch.zeros(1, 1, dtype=torch.long), 3, temperature=temperature)


def test_logits_that_become_infinite_on_the_way_are_seen() -> None:
    model = lively()
    model.encoder.embedding.weight.data[7] = INF  # type: ignore[union-attr, operator]
    prompt = torch.zeros(4, 1, dtype=torch.long)
    with pytest.raises(NotFinite):
        generate(model, prompt, 400, seed=0, temperature=5.0)


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
    with pytest.raises(ConfigError, match="prompt of at least one"):
        generate(model, torch.zeros(0, 3, dtype=torch.long), 1)
    with pytest.raises(ConfigError, match="lm head"):
        generate(classifier, torch.zeros(1, 1, dtype=torch.long), 1)


def test_each_module_keeps_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = causal_lm(vocab_size=3, d_model=8, n_layers=1).eval(), torch.zeros(1, 1, dtype=torch.long)
    model.head.train()
    seen = []
    model.head.register_forward_hook(lambda head, *_: seen.append(head.training))
    generate(model, prompt, 2)
    assert seen == [False] * 2
    assert [module for module in model.modules() if module.training] == list(model.head.modules())
    model.eval()
    monkeypatch.setattr(torch.nn.Module, "train", None)  # which takes milliseconds
    generate(model, prompt, 2)


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


def test_stream_gives_on_what_generate_adds_and_goes_on_from_a_state() -> None:
    model = lively(mixer="gated_delta")
    one, other = torch.randint(0, 29, (2, 5)), torch.randint(0, 29, (2, 4))
    both = torch.cat([one, other], 1)
    added = generate(model, both, 12, seed=3)[:, 9:]
    pieces = list(stream(model, both, 12, seed=3, patience=0.0))
    assert [piece.shape for piece in pieces] == [(2, 1)] * 12
    assert torch.equal(torch.cat(pieces, 1), added)
    with torch.no_grad():
        begun = model(one, return_state=True)
        told = model(other, state=begun.state, return_state=True)
    read = told.state, told.logits[:, -1]
    for _ in range(2):  # the state stays as it is
        assert torch.equal(torch.cat(list(stream(model, both, 12, seed=3, read=read)), 1), added)
    refused = (
        (both, (told.state, told.logits)),  # of all positions
        (both, (told.state, told.logits[0, -1])),
        (both[:1], read),
        (both, ([layer.select(torch.tensor([0])) for layer in told.state], read[1])),
    )
    for prompts, wrong in refused:
        with pytest.raises(ConfigError, match=r"read must be the state after the . prompts.*logits\[:, -1\]"):
            next(stream(model, prompts, 12, read=wrong))
    ragged = list(stream(model, [one[0], both[1]], 12, temperature=0))
    expected = [generate(model, row[None], 12, temperature=0)[0, len(row) :] for row in (one[0], both[1])]
    assert torch.equal(torch.cat(ragged, 1), torch.stack(expected))


def test_stream_refuses_what_generate_refuses() -> None:
    model = lively()
    for prompt, settings, message in (
        (torch.zeros(1, 0, dtype=torch.long), {}, "at least one token"),
        (torch.zeros(1, 3, dtype=torch.long), {"top_p": 2.0}, "top_p must be"),
        (torch.zeros(1, 3, dtype=torch.long), {"samples": 0}, "samples must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            next(stream(model, prompt, 3, **settings))


def test_the_page_on_generating_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "text" / "generating.md"
    ((cell, line),) = [(text, line) for kind, text, line in blocks(page) if kind == "python" and "stream(" in text]
    run_cell(cell, page, line, {})
    assert len(capsys.readouterr().out.splitlines()) > 20  # 20 for the first, fewer pieces for the second
