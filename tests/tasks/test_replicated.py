"""Data parallel: Lightning's strategy, without its stream and with gradients where they are summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from mambaseq.runs.trainer_classes import make_classes
from mambaseq.tasks import replicated


@pytest.mark.parametrize(
    ("written", "view"),
    [
        ("ddp", True),
        ({"class_path": "DDPStrategy", "init_args": {"timeout": "0:05:00"}}, True),
        ({"class_path": "ddp", "init_args": {"gradient_as_bucket_view": False}}, False),
    ],
)
def test_a_model_is_wrapped_on_the_stream_that_trains_it(
    written: Any, view: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}

    def stream(*_: Any) -> None:
        raise AssertionError("another stream")

    strategy = make_classes("strategy", written)
    assert isinstance(strategy, DDPStrategy)
    assert strategy._timeout.total_seconds() == (300 if isinstance(written, dict) and view else 1800)
    monkeypatch.setattr(strategy, "determine_ddp_device_ids", lambda: [0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(replicated, "DistributedDataParallel", lambda model, **options: made.update(options))
    strategy._setup_model(nn.Linear(2, 2))  # type: ignore[attr-defined]
    assert made == {"device_ids": [0], "gradient_as_bucket_view": view}
