"""Stacks of several mixers: what is built, shared, saved, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambaseq.backbones.residual import ResidualStack
from mambaseq.checkpoints import ModelCard, load_model, save_model
from mambaseq.checkpoints.export import load_weights, read_safetensors, weights
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError
from mambaseq.generation import generate
from mambaseq.mixers.mamba import Mamba
from mambaseq.models import SequenceModel, build_model, causal_lm
from mambaseq.models.modules import further_names
from mambaseq.registry import Entry
from mambaseq.runs.parsing import parse_config

DATA = 'data: {name: "tiny:TinyTokens"}\n'


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, attribute in (("attention", "Attends"), ("mlp", "TinyMLP")):
        entry = Entry(name, f"backbones.stand_ins:{attribute}", "a stand-in", "tests")
        monkeypatch.setitem(catalog()["mixers"]._entries, name, entry)


def lm(n_layers: int = 5, **options) -> SequenceModel:
    torch.manual_seed(0)
    return causal_lm(vocab_size=11, d_model=8, n_layers=n_layers, **options)


def kinds(model: SequenceModel) -> str:
    return " ".join(type(mixer).__name__ for mixer in model.backbone.mixers())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"n_layers": 2}, "Mamba Mamba"),
        ({"n_layers": 2, "mlp": True}, "Mamba TinyMLP Mamba TinyMLP"),
        ({"n_layers": 2, "mixer": "attention"}, "Attends TinyMLP Attends TinyMLP"),
        ({"n_layers": 2, "mixer": "attention", "mlp": False}, "Attends Attends"),
        ({"pattern": ["mamba", "attention"]}, "Mamba Attends TinyMLP Mamba Attends TinyMLP Mamba"),
        ({"pattern": ["mamba", "attention*"], "mlp": False}, "Mamba Attends Mamba Attends Mamba"),
        # a pattern that places the companion itself has no other
        ({"pattern": ["mamba", "attention", "mlp"]}, "Mamba Attends TinyMLP Mamba Attends"),
        # one written behind a mixer counts as one layer with it
        ({"pattern": ["s4d+mlp", "mamba"]}, "S4D TinyMLP Mamba S4D TinyMLP Mamba S4D TinyMLP"),
        ({"n_layers": 2, "pattern": ["s4d+mamba", "attention"]}, "S4D Mamba Attends TinyMLP"),
        ({"n_layers": 4, "pattern": ["s4d", "mlp"], "mlp": True}, "S4D TinyMLP TinyMLP S4D TinyMLP TinyMLP"),
    ],
)
def test_what_is_built(options: dict, expected: str) -> None:
    model = lm(**options)
    assert kinds(model) == expected
    assert len(model.init_state(2)) == len(expected.split())


def test_options_reach_their_mixers() -> None:
    model = lm(
        pattern=["s4d", "mamba", "attention"], mixers={"attention": {"n_heads": 3}, "mlp": {"factor": 5}}, d_state=3
    )
    s4d, mamba, attends, mlp, *_ = model.backbone.mixers()
    assert (s4d.ssm.d_state, mamba.d_state, attends.n_heads, mlp.in_proj.out_features) == (32, 3, 3, 40)


def test_a_mixer_in_two_variants() -> None:
    """A name of the pattern may stand for a registered mixer with options of its own."""
    model = lm(
        n_layers=3,
        pattern=["mamba", "inside+mlp", "inside"],
        d_state=3,
        mixers={"inside": {"name": "mamba", "lti": True}},
    )
    assert kinds(model) == "Mamba Mamba TinyMLP Mamba"
    own, one, _, two = model.backbone.mixers()
    assert [(mixer.lti, mixer.d_state) for mixer in (own, one, two)] == [(False, 3), (True, 16), (True, 16)]
    again = build_model(model.spec)
    again.load_state_dict(model.state_dict())
    ids = torch.randint(0, 11, (1, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ConfigError, match=r"No mixer is named 'mmaba'.*Did you mean 'mamba'"):
        lm(pattern=["inside"], mixers={"inside": {"name": "mmaba"}})
    with pytest.raises(ConfigError, match=r"mixers\.inside\.name must be a mixer's name, not 3"):
        lm(pattern=["inside"], mixers={"inside": {"name": 3}})


def test_writes_to_the_residual_stream_are_scaled_by_their_number() -> None:
    plain, scaled = [], []

    def make(layer: int, name: str | None = None) -> Mamba:
        made = Mamba(8, d_state=2)
        plain.append(made.out_proj.weight.detach().clone())
        scaled.append(made.out_proj.weight)
        return made

    ResidualStack(make, n_layers=4, pattern=["a", "b*"])  # five writes would be wrong, and so is scaling b twice
    assert len(plain) == 3
    for before, after in zip(plain, scaled, strict=True):
        torch.testing.assert_close(after, before / 2)


def test_shared_mixers_share_weights_and_nothing_else(tmp_path: Path) -> None:
    model = lm(n_layers=6, pattern=["mamba", "mamba", "attention*"]).eval()
    layers = model.backbone.layers
    assert kinds(model) == "Mamba Mamba Attends TinyMLP Mamba Mamba Attends TinyMLP"
    assert layers[2].mixer is layers[6].mixer
    assert layers[3].mixer is layers[7].mixer
    assert layers[2].norm is not layers[6].norm
    assert layers[0].mixer is not layers[1].mixer
    own = lm(n_layers=6, pattern=["mamba", "mamba", "attention"])
    once = sum(p.numel() for i in (2, 3) for p in layers[i].mixer.parameters())
    assert own.n_parameters() - model.n_parameters() == once
    # saved once, loaded into both
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 50)
    assert not any(name.startswith(("backbone.layers.6.mixer", "backbone.layers.7.mixer")) for name in weights(model))
    save_model(tmp_path / "m", model, ModelCard(spec=model.spec))
    again = load_model(tmp_path / "m").model
    assert again.backbone.layers[2].mixer is again.backbone.layers[6].mixer
    ids = torch.randint(0, 11, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    tensors = read_safetensors(tmp_path / "m" / "model.safetensors")
    tensors["backbone.layers.6.mixer.out_proj.weight"] = torch.ones(8, 8)
    with pytest.raises(UserError, match=r"layers\.6\.mixer\.out_proj\.weight that differs.*without shared"):
        load_weights(again, tensors, tmp_path)


def test_the_gradient_of_a_shared_mixer_is_that_of_all_its_layers() -> None:
    shared, own = (lm(pattern=["mamba", entry], n_layers=4) for entry in ("s4d*", "s4d"))
    once = shared.state_dict()
    own.load_state_dict(once | {name: once[earlier] for name, earlier in further_names(shared).items()})
    ids = torch.randint(0, 11, (2, 9))
    for model in (shared, own):
        model(ids, ids).loss.backward()
    summed = [sum(own.backbone.layers[i].mixer.out_proj.weight.grad for i in (1, 3))]
    torch.testing.assert_close([shared.backbone.layers[1].mixer.out_proj.weight.grad], summed)


@pytest.mark.parametrize("more", [{"chunk_length": 4}, {"checkpoint": True}, {"cuda_graph": True}])
def test_other_ways_of_running_it_are_the_same(more: dict) -> None:
    mixed = {"pattern": ["mamba", "s4d*", "mlp"], "n_layers": 6}
    usual, other = lm(**mixed), lm(**mixed, **more)
    ids = torch.randint(0, 11, (2, 11))
    for model in (usual, other):
        model(ids, ids).loss.backward()
    for one, expected in zip(other.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(one.grad, expected.grad, atol=1e-6, rtol=1e-4)


def test_chunks_refuse_a_state_that_grows() -> None:
    with pytest.raises(ConfigError, match="Attends is not"):
        lm(pattern=["mamba", "attention"], chunk_length=4)


def test_it_generates() -> None:
    model = lm(pattern=["mamba", "attention*"])
    prompt = torch.randint(0, 11, (2, 3))
    made = generate(model, prompt, 5, temperature=0)
    for t in range(3, 8):
        with torch.no_grad():
            assert torch.equal(model(made[:, :t]).logits[:, -1].argmax(-1), made[:, t])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": []}, "pattern must be a list of mixer names"),
        ({"pattern": ["mamba", "*"]}, "pattern must be a list of mixer names"),
        ({"pattern": ["mamba", "atention"]}, r"No mixer is named 'atention'\. Did you mean 'attention'"),
        ({"pattern": ["mamba"], "mixers": {"s4d": {}}}, r"options for 's4d', which is not a mixer of this backbone"),
        ({"mixers": {"mlp": {}}}, r"options for 'mlp', which is not a mixer of this backbone"),
        ({"pattern": ["mamba"], "mixers": {"mamba": {}}}, r"under model\.mixer and model\.mixers"),
        (
            {"pattern": ["attention"], "mixers": {"attention": {"heads": 2}}},
            r"'attention' has no option 'heads'.*'n_heads'",
        ),
        ({"n_layers": 0, "pattern": ["mamba"]}, "n_layers must be at least 1"),
        ({"n_layers": 2, "pattern": ["mamba", "mamba", "attention"]}, "names 3 layers, but the backbone has 2"),
    ],
)
def test_mistakes(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lm(**options)


MIXED = (
    DATA + "model:\n  d_model: 8\n  backbone: {name: residual, n_layers: 3, pattern: [mamba, attention*]}\n"
    "  mixer: {name: mamba, d_state: 4}\n  mixers: {attention: {n_heads: 2}, mlp: {factor: 3}}\n"
)


def parsed(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return parse_config(str(path), list(overrides))


def test_a_configuration_reads_back_and_builds(tmp_path: Path) -> None:
    run = parsed(tmp_path, MIXED, "--model.mixers.mlp.factor=4")
    assert run.settings["model"]["mixers"] == {"attention": {"n_heads": 2}, "mlp": {"factor": 4}}
    again = parsed(tmp_path, run.yaml)
    assert again.settings == run.settings
    data = run.make_data()
    data.setup()
    model = build_model(run.model_spec(data))
    assert kinds(model) == "Mamba Attends TinyMLP Mamba"
    assert model.backbone.mixers()[2].in_proj.out_features == 32
    # the defaults of a companion that no key is about
    run = parsed(tmp_path, DATA + "model: {d_model: 8, mixer: {name: attention}}\n")
    assert run.settings["model"]["mixers"] == {"mlp": {"factor": 2}}


def test_another_pattern_on_the_command_line_drops_the_options_of_the_former(tmp_path: Path) -> None:
    run = parsed(tmp_path, MIXED, "--model.backbone.pattern=[mamba, s4d]", "--model.mixers.s4d.d_state=5")
    assert run.settings["model"]["mixers"].keys() == {"s4d"}
    assert run.settings["model"]["mixers"]["s4d"]["d_state"] == 5
    assert parsed(tmp_path, MIXED, "--model.backbone.mlp=false").settings["model"]["mixers"].keys() == {"attention"}
    run = parsed(tmp_path, MIXED, "--model.mixer.name=attention")
    assert run.settings["model"]["mixers"].keys() == {"mamba", "mlp"}
    assert "mixers" not in parsed(tmp_path, MIXED, "--model.backbone.pattern=null").settings["model"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_heads", "n_head", r"no key 'model\.mixers\.attention\.n_head'\. Did you mean '.*n_heads'"),
        ("attention*", "atention", r"model.backbone.pattern: no mixer is named 'atention'\. Did you mean 'attention'"),
        ("{attention: {n_heads: 2}", "{atention: {n_heads: 2}", r"'atention', which is not a mixer.*mean 'attention'"),
        ("[mamba, attention*]", "[]", "pattern must be a list of mixer names"),
        ("[mamba, attention*]", "mamba", "pattern must be a list of mixer names.*not 'mamba'"),
        ("n_heads: 2", "n_heads: two", r"model\.mixers\.attention\.n_heads"),
        ("factor: 3}", "factor: 3}, mamba: {d_state: 2}", r"under model\.mixer and model\.mixers"),
    ],
)
def test_mistakes_in_a_configuration(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MIXED
    with pytest.raises(ConfigError, match=message):
        parsed(tmp_path, MIXED.replace(old, new))


def test_a_mixer_is_a_name_with_its_options_beside_it() -> None:
    with pytest.raises(ConfigError, match=r"mixer must be a name, not .* mixer='mamba3', d_state=32"):
        causal_lm(7, 8, 1, {"name": "mamba3", "d_state": 32})  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"chunk_length.*Attends is not one\. Take others, such as mamba, or do without"
    ):
        causal_lm(7, 8, 2, pattern=["mamba", "attention"], chunk_length=4)
