"""The backbone of several resolutions: against the definition, who sees what, and in models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.stand_ins import TinyMLP
from torch import Tensor

from mambaseq.backbones.pooling import Pool
from mambaseq.backbones.unet import UNet
from mambaseq.checkpoints import ModelCard, load_model, save_model
from mambaseq.errors import ConfigError
from mambaseq.generation import generate
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.s4d import S4D
from mambaseq.models import SequenceModel, build_model

D_MODEL = 6


def net(mixer: type[Mixer] = S4D, **options: Any) -> UNet:
    torch.manual_seed(0)

    def make(layer: int, name: str | None = None, d_model: int = D_MODEL) -> Mixer:
        return TinyMLP(d_model) if name == "mlp" else mixer(d_model)

    return UNet(make, **{"n_layers": 1, "pool": [2, 3], **options})


def defined(backbone: UNet, x: Tensor) -> Tensor:
    """What it computes, position by position: windows that are whole go down, and up to the window behind them."""

    def layers(modules: Any, x: Tensor) -> Tensor:
        for layer in modules:
            x = x + layer.mixer(layer.norm(x))
        return x

    def tier(at: Any, x: Tensor) -> Tensor:
        x = layers(at.down, x)
        if at.pool is None:
            return x
        p, out = at.pool.pool, x.clone()
        coarse = [at.pool.down(x[0, j : j + p].flatten()) for j in range(0, x.shape[1] - p + 1, p)]
        if coarse:
            below = tier(at.inner, torch.stack(coarse)[None])[0]
            for t in range(p, x.shape[1]):
                out[0, t] += at.pool.up(below[t // p - 1]).view(p, -1)[t % p]
        return layers(at.up, out)

    return backbone.norm_f(tier(backbone.top, x))


@pytest.mark.parametrize("options", [{}, {"mlp": True, "expand": 1}, {"pool": [3], "n_layers": 2}])
@pytest.mark.parametrize("length", [1, 5, 6, 29])
def test_it_is_as_defined(options: dict[str, Any], length: int) -> None:
    backbone, x = net(**options), torch.randn(1, length, D_MODEL)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), defined(backbone, x), atol=1e-5, rtol=1e-5)


def test_a_window_is_seen_by_those_behind_it() -> None:
    backbone, x = net(TinyMLP), torch.randn(1, 24, D_MODEL)  # nothing but the pooling mixes positions
    with torch.no_grad():
        for at in range(24):
            changed = x.clone()
            changed[:, at] += 1
            seen = (backbone(changed) != backbone(x)).any(-1)[0].nonzero().flatten().tolist()
            half, whole = at // 2 * 2 + 2, at // 6 * 6 + 6  # where the windows of both tiers that it is in end
            # the window of the middle tier behind them serves the top's window behind it
            assert seen == sorted({at, *range(half, half + 2), *range(whole + 2, whole + 8)} & set(range(24)))


def test_tiers_are_as_wide_and_as_many_as_asked_for() -> None:
    backbone = net(n_layers=2, pool=[2, 2], expand=3)
    assert [mixer.d_model for mixer in backbone.mixers()] == [6, 6, 18, 18, 54, 54, 18, 18, 6, 6]
    assert backbone.n_states == len(backbone.init_state(3)) == 12
    assert isinstance(backbone.top.pool, Pool)
    weight = backbone.mixers()[0].out_proj.weight
    torch.manual_seed(0)
    torch.testing.assert_close(weight, S4D(6).out_proj.weight * 10**-0.5)


def test_each_tier_has_its_pattern() -> None:
    """It begins anew with each way down and up, and an MLP behind a mixer is no layer of its own."""
    torch.manual_seed(0)
    made: list[str] = []

    def make(layer: int, name: str = "own", d_model: int = D_MODEL) -> Mixer:
        made.append(f"{name} {layer} {d_model}")
        return TinyMLP(d_model)

    UNet(make, n_layers=3, pool=[2, 2], tiers=[["a", "b"], ["c+mlp"], ["d*"]])
    top, below = (" ".join(f"{name} {first + i} 6" for i, name in enumerate("aba")) for first in (0, 12))
    middle = [" ".join(f"c {n} 12 mlp {n} 12" for n in range(first, first + 3)) for first in (3, 9)]
    # the way up of a tier is made after the tiers below it
    assert " ".join(made) == f"{top} {middle[0]} d 6 24 {middle[1]} {below}"


def test_steps_of_some_sequences_leave_the_others() -> None:
    """As on a GPU, where all tiers are computed at every position: no sequence is where another is."""
    backbone = net()
    past = [torch.randn(1, n, D_MODEL) for n in (3, 4, 5, 6, 7, 8)]
    bounds = torch.tensor([0, 3, 7, 12, 18, 25, 33], dtype=torch.int32)
    more = torch.randn(6, 1, D_MODEL)
    with torch.no_grad():
        _, state = backbone(torch.cat(past, 1), cu_seqlens=bounds, return_state=True)
        y = backbone.step_(more, state)
        for i, one in enumerate(past):
            whole, expected = backbone(torch.cat([one, more[i : i + 1]], 1), return_state=True)
            torch.testing.assert_close(y[i, 0], whole[0, -1], atol=1e-5, rtol=1e-5)
            for mine, its in zip(state, expected, strict=True):
                for name, tensor in its.tensors().items():
                    torch.testing.assert_close(mine.tensors()[name][i], tensor[0], atol=1e-5, rtol=1e-5)


def test_steps_that_are_told_which_windows_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as they were without, and no tier is run that is not due."""
    backbone, x = net(), torch.randn(2, 20, D_MODEL)
    with torch.no_grad():
        _, state = backbone(x[:, :7], return_state=True)
        assert backbone.places(state) == [(1, 2), (0, 3)]
        due = []
        coarsest: Any = backbone._tiers()[-1].down[0].mixer
        step_ = coarsest.step_
        for t in range(7, 20):
            (first, two), (second, three) = backbone.places(state)
            whole = 0 if first + 1 < two else 1 if second + 1 < three else 2
            calls: list[int] = []
            monkeypatch.setattr(coarsest, "step_", lambda *given, calls=calls: (calls.append(1), step_(*given))[1])
            y = backbone.step_(x[:, t : t + 1], state, whole=whole)
            due.append(len(calls))
            torch.testing.assert_close(y, backbone(x[:, : t + 1])[:, -1:], atol=1e-5, rtol=1e-5)
    assert due == [int((t + 1) % 6 == 0) for t in range(7, 20)]
    state[1].count[0] += 1
    assert backbone.places(state) is None


def lm(**backbone: Any) -> SequenceModel:
    torch.manual_seed(0)
    return build_model(
        {
            "d_model": 8,
            "tie_embeddings": True,
            "encoder": {"name": "tokens", "vocab_size": 11},
            "backbone": {"name": "unet", "n_layers": 1, "pool": [2, 2], **backbone},
            "mixer": {"name": "s4d", "d_state": 4},
            "head": {"name": "lm", "vocab_size": 11},
        }
    )


@pytest.mark.parametrize("backbone", [{}, {"pattern": ["mamba", "s4d*"], "n_layers": 3, "chunk_length": 11}])
def test_a_language_model_learns_generates_and_is_saved(tmp_path: Path, backbone: dict[str, Any]) -> None:
    model = lm(**backbone)
    ids = torch.randint(0, 11, (2, 21))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids[:, :-1], ids[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    save_model(tmp_path / "m", model, ModelCard(spec=model.spec))
    loaded = load_model(tmp_path / "m").model
    made = generate(loaded, ids[:, :3], 9, temperature=0)
    with torch.no_grad():
        for t in range(3, 12):
            assert torch.equal(model.eval()(made[:, :t]).logits[:, -1].argmax(-1), made[:, t])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": []}, "pool must be a list of at least one integer"),
        ({"pool": [4, 1]}, "each at least 2"),
        ({"expand": 0}, "expand must be an integer of at least 1"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"tiers": [["a"], ["b"]]}, "tiers must be a list of 3 patterns"),
        ({"tiers": [["a"], ["b"], "c"]}, r"tiers\[2\] must be a list of mixer names"),
        ({"tiers": [["a"], ["b", "c"], ["d"]]}, "tiers names 2 layers, but a way of a tier has 1"),
        ({"tiers": [["a"], ["b"], ["d"]], "pattern": ["a"]}, "Leave one of them out"),
        ({"pattern": ["a+b+c"]}, "pattern must be a list of mixer names"),
        ({"pattern": ["+b"]}, "pattern must be a list of mixer names"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"chunk_length": 0}, "chunk_length must be"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        net(**options)
