"""A small model for the engine, requests of it, and what `generate` answers to them."""

from __future__ import annotations

import numpy as np
import torch

from mambaseq.generation import generate
from mambaseq.models import SequenceModel, build_model
from mambaseq.serving import Engine, Request


def made(mixer: str = "mamba", backbone: dict[str, object] | None = None) -> SequenceModel:
    torch.manual_seed(0)
    backbone = {"name": "residual", "n_layers": 2} if backbone is None else backbone
    tokens, head = {"name": "tokens", "vocab_size": 31}, {"name": "lm", "vocab_size": 31}
    spec = {"d_model": 16, "encoder": tokens, "mixer": {"name": mixer}, "backbone": backbone, "head": head}
    model = build_model(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 31, length)


def run(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


def expected(model: SequenceModel, request: Request) -> list[int]:
    settings = {**request.settings._asdict(), "seed": request.seed, "stop_ids": request.stop_ids}
    out = generate(
        model,
        torch.from_numpy(request.prompt)[None],
        request.max_new_tokens,
        numbers=torch.tensor([[request.number]]),
        **settings,
    )
    return out[0, len(request.prompt) :].tolist()
