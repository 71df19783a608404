"""Backbones on a GPU: the ways to run them agree, steps wait for nothing and are replayed, training steps too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambaseq.generation import Decoder, generate
from mambaseq.models import SequenceModel, build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("full_precision"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]
CAUSAL = [
    {"name": "unet", "pool": [2, 3], "n_layers": 1},
    {"name": "unet", "pool": [4], "n_layers": 2, "tiers": [["mamba", "s4d*"], ["s4d+mlp"]], "expand": 1},
    {"name": "residual", "n_layers": 4, "pattern": ["s4d", "mamba*"]},
]
WHOLE = [
    {"name": "bidirectional", "n_layers": 2},
    {"name": "reverse_complement", "n_layers": 2},
    {"name": "reverse_complement", "n_layers": 2, "bidirectional": False},
]


def make(backbone: dict[str, Any]) -> SequenceModel:
    torch.manual_seed(0)
    rc, token = "rc_" * (backbone["name"] == "reverse_complement"), {"vocab_size": 4}
    if rc:
        token["complement"] = [3, 2, 1, 0]  # type: ignore[assignment]
    model = build_model(
        {
            "d_model": 64,
            "encoder": {"name": f"{rc}tokens", **token},
            "backbone": backbone,
            "mixer": {"name": "mamba"},
            "head": {"name": f"{rc}lm", **token},
        }
    ).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def close(actual: Tensor, expected: Tensor) -> None:
    assert (actual.detach() - expected.detach()).norm() <= 1e-4 * expected.detach().norm()


@pytest.mark.parametrize("backbone", CAUSAL)
def test_full_chunked_stepped_and_packed_agree(backbone: dict[str, Any]) -> None:
    model, ids = make(backbone), torch.randint(0, 4, (3, 60)).cuda()
    bounds = torch.tensor([0, 7, 7, 8, 60], dtype=torch.int32, device="cuda")
    with torch.no_grad():
        full = model(ids).logits
        one = model(ids[:, :25], return_state=True)
        close(torch.cat([one.logits, model(ids[:, 25:], state=one.state).logits], 1), full)
        packed = model(ids[:1], cu_seqlens=bounds, return_state=True)
        for begin, end in ((0, 7), (7, 8), (8, 60)):
            close(packed.logits[:, begin:end], model(ids[:1, begin:end]).logits)
        for graph in (False, True):  # all sequences at once, then where the packed ones left off
            decoder = Decoder(model, model.init_state(3), cuda_graph=graph)
            close(torch.stack([decoder.step(token).clone() for token in ids.unbind(1)], 1), full)
            assert decoder.captured == graph
        apart = [state.select(torch.tensor([0, 2, 3], device="cuda")) for state in packed.state]
        decoder = Decoder(model, apart)
        stepped = torch.stack([decoder.step(token).clone() for token in ids[:, :20].unbind(1)], 1)
        assert decoder.captured
        for row, (begin, end) in enumerate(((0, 7), (7, 8), (8, 60))):
            whole = model(torch.cat([ids[:1, begin:end], ids[row : row + 1, :20]], 1)).logits
            close(stepped[row], whole[0, end - begin :])


@pytest.mark.parametrize("backbone", CAUSAL)
def test_nothing_waits_for_the_gpu(backbone: dict[str, Any]) -> None:
    model, ids = make(backbone), torch.randint(0, 4, (1, 60)).cuda()
    bounds = torch.tensor([0, 7, 7, 8, 60], dtype=torch.int32, device="cuda")
    with torch.no_grad():
        try:
            for mode in ("default", "error"):  # kernels are compiled in the first
                torch.cuda.set_sync_debug_mode(mode)
                state = model(ids, cu_seqlens=bounds, return_state=True).state
                model.step_(ids[0, :4], state)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backbone", CAUSAL)
def test_generation_by_graph_is_that_of_the_loop(backbone: dict[str, Any]) -> None:
    model, prompt = make(backbone), torch.randint(0, 4, (3, 7)).cuda()
    graph, loop = (generate(model, prompt, 40, seed=1, cuda_graph=wanted) for wanted in (True, False))
    assert torch.equal(graph, loop)


@pytest.mark.parametrize("backbone", CAUSAL + WHOLE)
def test_training_steps_by_graphs_are_the_usual(backbone: dict[str, Any]) -> None:
    usual, graphs = make(backbone).train(), make({**backbone, "cuda_graph": True}).train()
    for step in range(5):
        ids = torch.randint(0, 4, (2, 37), generator=torch.Generator().manual_seed(step)).cuda()
        for model in (usual, graphs):
            model.zero_grad()
            model(ids, ids).loss.backward()
        for one, expected in zip(graphs.parameters(), usual.parameters(), strict=True):
            torch.testing.assert_close(one.grad, expected.grad, atol=1e-5, rtol=1e-3)
    stack = graphs.backbone.stack if backbone["name"] == "reverse_complement" else graphs.backbone
    assert stack.graphs.replays == 3


@pytest.mark.parametrize("backbone", WHOLE)
def test_padded_and_packed_sequences_are_as_by_themselves(backbone: dict[str, Any]) -> None:
    model, ids = make(backbone), torch.randint(0, 4, (2, 50)).cuda()
    mask = torch.arange(50, device="cuda") < torch.tensor([[50], [21]], device="cuda")
    bounds = torch.tensor([0, 50, 71], dtype=torch.int32, device="cuda")
    with torch.no_grad():
        alone = torch.cat([model(ids[:1]).logits[0], model(ids[1:, :21]).logits[0]])
        close(model(ids, mask=mask).logits[mask], alone)
        close(model(ids[mask][None], cu_seqlens=bounds).logits[0], alone)
