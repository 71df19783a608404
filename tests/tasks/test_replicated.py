"""Data parallel: Lightning's strategy, without its stream and with gradients where they are summed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from parallel.ranks import contexts, on_ranks
from tasks.test_resume import CONFIG
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mambaseq.cli.main import main
from mambaseq.models import SequenceModel, causal_lm
from mambaseq.runs.trainer_classes import make_classes
from mambaseq.tasks import replicated
from mambaseq.tasks.replicated import Replicated


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
    assert strategy._timeout is not None
    assert strategy._timeout.total_seconds() == (300 if isinstance(written, dict) and view else 1800)
    monkeypatch.setattr(strategy, "determine_ddp_device_ids", lambda: [0])
    monkeypatch.setattr(torch.cuda, "stream", stream)

    class Wrapped:
        process_group = None

        def __init__(self, model: nn.Module, **options: Any) -> None:
            made.update(options)

        def register_comm_hook(self, state: Any, hook: Any) -> None:
            made["sums"] = True

    monkeypatch.setattr(replicated, "DistributedDataParallel", Wrapped)
    monkeypatch.setattr(replicated, "get_backend", lambda group: "nccl")
    strategy._setup_model(nn.Linear(2, 2))
    assert made == {"device_ids": [0], "gradient_as_bucket_view": view} | ({"sums": True} if view else {})


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_backbones_of_one_model_share_the_places(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters may be those of several, and a place is for one gradient."""
    strategy = Replicated()
    monkeypatch.setattr(strategy, "determine_ddp_device_ids", lambda: None)
    models = nn.ModuleList([causal_lm(5, 8, 2) for _ in range(2)])
    strategy._setup_model(models)
    one, other = (model.backbone.graphs.places for model in models)
    assert one is other


def wrapped(strategy: Replicated, monkeypatch: pytest.MonkeyPatch) -> tuple[SequenceModel, nn.Module]:
    torch.manual_seed(0)
    model = causal_lm(5, 8, 2)
    monkeypatch.setattr(strategy, "determine_ddp_device_ids", lambda: None)
    return model, strategy._setup_model(model)


def test_graphs_are_told_where_gradients_are_summed(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = Replicated()
    model, ddp = wrapped(strategy, monkeypatch)
    tokens = torch.tensor([[1, 2, 3, 4]])
    places = model.backbone.graphs.places
    for step in range(3):
        model.zero_grad()
        ddp(tokens, tokens).loss.backward()
        assert bool(places) is bool(step)  # the first buckets, which are made anew, are not held
    for p in model.parameters():
        assert p.grad is not None
        assert places[p].data_ptr() == p.grad.data_ptr()
    monkeypatch.setattr(DDPStrategy, "teardown", lambda self: None)  # of a trainer, which is not here
    strategy.teardown()
    assert not places


@pytest.mark.parametrize(
    "options", [{"gradient_as_bucket_view": False}, {"ddp_comm_hook": allreduce_hook}], ids=["apart", "hook"]
)
def test_other_sums_are_as_they_were(alone: None, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    model, ddp = wrapped(Replicated(**options), monkeypatch)
    tokens = torch.tensor([[1, 2, 3, 4]])
    ddp(tokens, tokens).loss.backward()
    assert not model.backbone.graphs.places


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_the_mean_is_over_all_processes(dtype: torch.dtype) -> None:
    def run(group: Any) -> Tensor:
        buffer = torch.tensor([1.0, 3.0], dtype=dtype) * (group.rank() + 1)
        bucket: Any = SimpleNamespace(is_last=lambda: True, buffer=lambda: buffer)
        return replicated._Mean(group, False, {}).begin(bucket).wait()

    for size in (2, 3):
        ranks = contexts(size)
        for mean in on_ranks(size, lambda rank, ranks=ranks: run(ranks[rank].group)):
            torch.testing.assert_close(mean, torch.tensor([1.0, 3.0], dtype=dtype) * (size + 1) / 2)


@pytest.mark.parametrize(
    ("written", "unused"),
    [([], False), (["--trainer.strategy=auto"], False), (["--trainer.strategy=ddp_find_unused_parameters_true"], True)],
    ids=str,
)
def test_several_devices_have_it_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[str], unused: bool
) -> None:
    made: list[lightning.Trainer] = []

    class Made(Exception):
        pass

    def fit(self: lightning.Trainer, *_: Any, **__: Any) -> None:
        made.append(self)
        raise Made

    monkeypatch.setattr(lightning.Trainer, "fit", fit)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    with pytest.raises(Made):
        main(["fit", "--config", str(path), "--out", str(tmp_path / "run"), "--trainer.devices=2", *written])
    strategy = made[0].strategy
    assert isinstance(strategy, Replicated)
    assert strategy._ddp_kwargs.get("find_unused_parameters", False) is unused
    assert type(lightning.Trainer(accelerator="cpu", devices=2, logger=False).strategy) is DDPStrategy  # as it was
