"""Heads of ids in two parts and of several codes: probabilities by brute force, and decoding equals the parallel
pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mambaseq.batch import Batch
from mambaseq.errors import ConfigError
from mambaseq.generation import Decoder, generate
from mambaseq.heads.codes import CodesHead
from mambaseq.heads.levels import LevelsHead
from mambaseq.models import SequenceModel, build_model
from mambaseq.tasks.fitting import check_kinds


def made(encoder: dict[str, Any], head: dict[str, Any], **backbone: Any) -> SequenceModel:
    spec = {
        "d_model": 8,
        "encoder": encoder,
        "backbone": {"name": "residual", "n_layers": 1, **backbone},
        "mixer": {"name": "mamba"},
        "head": head,
    }
    model = build_model(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def levels(size: int = 12, fine: int = 4, **backbone: Any) -> SequenceModel:
    parts = [{"name": "levels", "vocab_size": size, "fine": fine} for _ in range(2)]
    return made(*parts, **backbone)


def codes(**backbone: Any) -> SequenceModel:
    parts = [{"name": "codes", "vocab_size": 6, "n_codes": 3} for _ in range(2)]
    return made(*parts, **backbone)


def test_the_two_parts_of_a_sample_have_the_probability_of_the_sample() -> None:
    """65,536 values of a 16-bit sample, each by its own two logarithms."""
    model = levels(65_536, 256)
    head = model.head
    assert isinstance(head, LevelsHead)
    ids = torch.tensor([[0, 65_535, 32_768, 511, 512]])
    with torch.no_grad():
        hidden = model.backbone(model.encoder(ids))[:, 2:3]
        all_ids = torch.arange(65_536)[:, None]
        nats = head.losses(hidden.expand(65_536, 1, -1), all_ids)[:, 0].double()
        assert float(nats.neg().exp().sum()) == pytest.approx(1, abs=1e-5)
        by_hand = []
        for value in (0, 511, 40_000):
            coarse = (hidden[0, 0] @ head.coarse.weight.t()).log_softmax(0)[value // 256]
            inner = hidden[0, 0] @ head.inner.weight.t() + head.inner.bias + head.given.weight[value // 256]
            fine = (torch.nn.functional.silu(inner) @ head.fine.weight.t()).log_softmax(0)[value % 256]
            by_hand.append(-float(coarse + fine))
        torch.testing.assert_close(nats[[0, 511, 40_000]].tolist(), by_hand, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(head(hidden)[1][0, 0].double(), -nats, rtol=1e-5, atol=1e-5)
        loss = model(ids[:, :-1], torch.tensor([[-100, 7, 65_535, 300]])).loss
        each = head.losses(model.backbone(model.encoder(ids[:, :-1])), torch.tensor([[-100, 7, 65_535, 300]]))
        torch.testing.assert_close(loss, each.sum() / 3)
        assert each[0, 0] == 0


@pytest.mark.parametrize("backbone", [{}, {"name": "unet", "pool": [2, 2]}], ids=["residual", "unet"])
def test_a_step_tells_what_the_parallel_pass_tells(backbone: dict[str, Any]) -> None:
    for model, shape in ((levels(**backbone), (2, 9)), (codes(**backbone), (2, 9, 3))):
        ids = torch.randint(0, 5, shape)
        with torch.no_grad():
            together = model.told(model.backbone(model.encoder(ids)))
            state = model.init_state(2)
            steps = torch.stack([model.step_(ids[:, t], state) for t in range(9)], 1)
        torch.testing.assert_close(steps, together, rtol=1e-4, atol=1e-5)


def test_greedy_generation_takes_the_likeliest_of_each_part() -> None:
    model, prompt = levels(), torch.randint(0, 12, (2, 4))
    ids = prompt
    with torch.no_grad():
        for _ in range(10):
            joint = model(ids).logits[:, -1].unflatten(-1, (3, 4))
            coarse = joint.logsumexp(-1).argmax(-1)
            ids = torch.cat([ids, (4 * coarse + joint[torch.arange(2), coarse].argmax(-1))[:, None]], 1)
    assert torch.equal(generate(model, prompt, 10, temperature=0), ids)
    several, prompt = codes(), torch.randint(0, 6, (2, 4, 3))
    frames = prompt
    with torch.no_grad():
        for _ in range(10):
            frames = torch.cat([frames, several(frames).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(several, prompt, 10, temperature=0), frames)


def test_drawn_ids_follow_the_joint_distribution() -> None:
    model = levels()
    drawn = generate(model, torch.tensor([[3]]), 1, samples=20_000, seed=0)[:, 1]
    with torch.no_grad():
        expected = model(torch.tensor([[3]])).logits[0, -1].exp()
    torch.testing.assert_close(torch.bincount(drawn, minlength=12) / 20_000, expected, atol=0.012, rtol=0)


def test_what_is_given_is_not_drawn_and_draws_do_not_depend_on_neighbours() -> None:
    model, prompt = codes(), torch.zeros(2, 1, 3, dtype=torch.long)
    prompt[1] = 4
    given = torch.full((2, 6, 3), -1)
    given[0, 1, 2], given[1, :, 0] = 5, 5  # 5 is no code, and is never drawn
    out = generate(model, prompt, 6, seed=1, samples=2, given=given)
    assert out.shape == (4, 7, 3)
    assert out[:2, 2, 2].tolist() == [5, 5]
    assert (out[2:, 1:, 0] == 5).all()
    assert int((out == 5).sum()) == 2 + 2 * 6
    alone = generate(model, prompt[1:], 6, seed=1, samples=2, given=given[1:])
    assert torch.equal(alone, out[2:])
    for wrong in (prompt[..., 0], prompt[..., :2]):
        with pytest.raises(ConfigError, match="3 codes at each position"):
            generate(model, wrong, 1)
    with pytest.raises(ConfigError, match="given must have the shape"):
        generate(model, prompt, 5, given=given)


def test_codes_count_each_and_those_that_are_none_do_not() -> None:
    head = CodesHead(8, 6, 3)
    ids = torch.tensor([[[1, 5, 5], [0, 2, 5]]])
    labels = head.labels_of(ids)
    assert labels.tolist() == [[[1, -100, -100], [0, 2, -100]]]
    hidden = torch.randn(1, 2, 8)
    loss, logits = head(hidden, labels)
    p = logits.log_softmax(-1)
    nats = -torch.stack([p[0, 0, 0, 1], p[0, 1, 0, 0] + p[0, 1, 1, 2]])
    torch.testing.assert_close(head.losses(hidden, labels)[0], nats)
    torch.testing.assert_close(loss, nats.sum() / 3)
    batch = Batch(ids, labels, target_of="code")
    assert (batch.kind, batch.per_token, int(batch.n_targets)) == ("labels", True, 3)
    assert math.isfinite(codes()(ids, labels).loss.item())


def test_heads_that_do_not_fit_are_refused() -> None:
    ids = torch.zeros(1, 4, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"gives one label a code\. Choose a head for those, such as 'codes'"):
        check_kinds(made({"name": "codes", "vocab_size": 6, "n_codes": 3}, {"name": "lm", "vocab_size": 6}),
                    Batch(ids, ids, target_of="code"), {})  # fmt: skip
    with pytest.raises(ConfigError, match=r"gives one label a position"):
        check_kinds(codes(), Batch(ids[..., 0], ids[..., 0]), {})
    with pytest.raises(ConfigError, match=r"model\.head\.fine must divide the number of ids, 12; it is 5"):
        LevelsHead(8, 12, 5)
    with pytest.raises(ConfigError, match=r"table with a row for each token"):
        build_model({**(levels().spec or {}), "head": {"name": "lm", "vocab_size": 12}, "tie_embeddings": True})


@pytest.mark.gpu
def test_a_gpu_replays_steps_of_several_parts(cuda: torch.device) -> None:
    for model, shape in ((levels(), (3, 20)), (codes(), (3, 20, 3))):
        ids = torch.randint(0, 5, shape)
        with torch.no_grad():
            expected = model.told(model.backbone(model.encoder(ids)))
        model.to(cuda)
        decoder = Decoder(model, model.init_state(3))
        steps = torch.stack([decoder.step(ids[:, t].to(cuda)).clone() for t in range(20)], 1).cpu()
        assert decoder.captured
        torch.testing.assert_close(steps, expected, rtol=1e-3, atol=1e-4)
        prompt = ids[:, :2].to(cuda)
        graph, loop = (generate(model, prompt, 40, seed=1, cuda_graph=captured) for captured in (True, False))
        assert torch.equal(graph, loop)
