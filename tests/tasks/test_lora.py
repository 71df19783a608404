"""Adapters: trained beside weights that stay as they are, exported with them or apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tasks.test_resume import CONFIG, assert_equal, fit, weights

from mambaseq.checkpoints import load_model
from mambaseq.checkpoints.adapters import merged, split
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, UserError
from mambaseq.models import build_model
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks.lora import LoraConfig, add_adapters


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    fit(path, tmp_path / "first", "--trainer.max_steps=2")
    return path


LORA = ("--init-from=first", "--lora.rank=2", "--lora.alpha=6", "--trainer.max_steps=8")


@pytest.mark.parametrize("ema", [(), ("--ema.decay=0.5",)])
def test_adapters_are_trained_and_merged(config: Path, tmp_path: Path, ema: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft")
    more = (*LORA, *ema, "--lora.dropout=0.1", "--optimizer.name=muon")
    whole = fit(config, tmp_path / "whole", *more)
    first, found = (load_model(run).model.state_dict() for run in ("first", "whole"))
    moved = {name for name in first if not torch.equal(first[name], found[name])}
    layer = "backbone.layers.0.mixer"
    assert moved == {f"{layer}.{n}.weight" for n in ("in_proj", "x_proj", "dt_proj", "out_proj")} | {
        "head.linear.weight"
    }
    assert torch.equal(whole[f"model.{layer}.in_proj.base_layer.weight"], first[f"{layer}.in_proj.weight"])
    # killed and gone on with
    killer = '--trainer.callbacks=[{"class_path": "tasks.test_resume.Killer", "init_args": {"step": 5}}]'
    with pytest.raises(ZeroDivisionError):
        main(["fit", "--config", str(config), "--out", "killed", *more, killer])
    load_model("killed")
    assert main(["fit", "--resume", "killed", "--trainer.callbacks=null"]) == 0
    assert_equal(whole, weights(tmp_path / "killed"))
    assert_equal(found, load_model("killed").model.state_dict())
    # as peft merges them
    if not ema:
        model = load_model("first").model
        targets = [f"{layer}.{n}" for n in ("in_proj", "x_proj", "dt_proj", "out_proj")]
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets), model)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in whole.items()})
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.merge()
                name = next(n for n, m in model.named_modules() if m is module)
                torch.testing.assert_close(module.get_base_layer().weight, found[f"{name}.weight"])


def test_adapters_are_kept(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    targets = "--lora.targets=['*.in_proj']"
    fit(config, tmp_path / "merged", *LORA, targets)
    fit(config, tmp_path / "kept", *LORA, targets, "--lora.export=kept")
    one, other, first = (load_model(run).model for run in ("merged", "kept", "first"))
    assert_equal(one.state_dict(), other.state_dict())
    base = load_file("kept/model/model.safetensors")
    weight = first.backbone.layers[0].mixer.in_proj.weight
    assert torch.equal(base["backbone.layers.0.mixer.in_proj.weight"], weight)
    first.load_state_dict(base)
    tokens = torch.arange(12)[None] % 7
    adapted = peft.PeftModel.from_pretrained(first, "kept/model/adapter")
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, other(tokens).logits)
    before = RunFolder("kept").read_results()
    monkeypatch.setitem(sys.modules, "peft", None)  # what is exported needs none
    assert main(["validate", "--checkpoint", "kept"]) == 0
    after = RunFolder("kept").read_results()
    assert after["val/bits_per_token"] == pytest.approx(before["val/bits_per_token"], rel=1e-6)  # added up at once
    path = Path("kept/model/adapter/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        load_model("kept")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lora.rank=2"], r"finetune.init_from must name the run"),
        (["--lora.rank=2", "--init-from=first"], "pip install 'mambaseq[finetune]'"),
    ],
)
def test_what_is_missing_is_said(config: Path, capsys, monkeypatch, options: list[str], told: str) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["fit", "--config", str(config), "--out", "x", *options]) == 2
    assert told in capsys.readouterr().err


def test_targets_that_are_none_are_refused(config: Path, capsys) -> None:
    pytest.importorskip("peft")
    assert main(["fit", "--config", str(config), "--out", "x", *LORA, "--lora.targets=[inproj]"]) == 2
    assert "lora.targets: no linear map of the backbone is named 'inproj'" in capsys.readouterr().err


def test_the_product_is_added_to_the_weight() -> None:
    weight, down, up = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2)
    saved = {"a.base_layer.weight": weight, "a.lora_A.default.weight": down, "a.lora_B.default.weight": up, "b": weight}
    found = merged(saved, 1.5)
    torch.testing.assert_close(found["a.weight"], weight + 1.5 * torch.einsum("or,ri->oi", up, down))
    assert found.keys() == {"a.weight", "b"}
    del saved["a.lora_B.default.weight"]
    with pytest.raises(UserError, match="incomplete"):
        split(saved)


def test_adapters_do_not_part_what_is_one_weight() -> None:
    pytest.importorskip("peft")
    spec = {
        "d_model": 8,
        "encoder": {"name": "tokens", "vocab_size": 5},
        "backbone": {"name": "bidirectional", "n_layers": 1, "tie_projections": True},
        "mixer": {"name": "mamba", "d_state": 2},
        "head": {"name": "lm", "vocab_size": 5},
    }
    with pytest.raises(ConfigError, match=r"ahead\.in_proj and .*back\.in_proj have one weight.*tie_projections"):
        add_adapters(build_model(spec), LoraConfig(rank=2))
    model = build_model(spec)
    add_adapters(model, LoraConfig(rank=2, targets=["*.x_proj"]))
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == 2
