"""Prompts of different lengths together: each is continued as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation.test_generate import BACKBONES

from mambaseq.errors import ConfigError
from mambaseq.generation import generate, generate_all, reading
from mambaseq.models import SequenceModel, build_model


def lively(**options: Any) -> SequenceModel:
    spec: dict[str, Any] = {
        "d_model": 16,
        "encoder": {"name": "tokens", "vocab_size": 29, "n_conditions": 2},
        "mixer": {"name": options.pop("mixer", "mamba")},
        "backbone": {"name": "residual", "n_layers": 2, **options},
        "head": {"name": "lm", "vocab_size": 29},
    }
    model = build_model(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


KINDS = {**{kind: BACKBONES[kind] for kind in ("mamba", "attention", "unet")}, "mamba2": {"mixer": "mamba2"}}


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_continued_as_if_it_were_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PREFILL", 20)  # several packs, and parts of long prompts
    model = lively(**KINDS[kind])
    prompts = [torch.randint(0, 29, (length,)) for length in (5, 1, 40, 12, 5)]
    condition = torch.tensor([0, 1, 1, 0, 0])
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"temperature": temperature, "seed": 2, "samples": 2}
        together = generate_all(model, prompts, 8, condition=condition, **options)
        for number, prompt in enumerate(prompts):
            alone = generate(model, prompt[None], 8, condition=condition[number : number + 1], **options)
            assert torch.equal(alone, torch.stack(together[2 * number : 2 * number + 2]))


def test_many_prompts_are_read_in_few_parts() -> None:
    model = lively()
    read: list[tuple] = []
    model.backbone.register_forward_hook(lambda _, args, __: read.append(tuple(args[0].shape[:2])))
    generate_all(model, [torch.randint(0, 29, (length,)) for length in range(1, 50)], 1)
    assert read == [(1, 49 * 50 // 2)]


def test_prompts_that_are_none_are_refused() -> None:
    model = lively()
    for prompts in ([], [torch.ones(3).long(), torch.ones(0).long()], [torch.ones(1, 3).long()]):
        with pytest.raises(ConfigError, match="at least one token"):
            generate_all(model, prompts, 3)
