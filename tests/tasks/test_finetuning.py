"""What is frozen stays as it is, bit for bit, until its step has come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tasks.test_resume import CONFIG, fit, weights

from mambaseq.cli.main import main
from mambaseq.errors import ConfigError
from mambaseq.tasks.finetuning import FinetuneConfig


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


FREEZE = "--finetune.freeze=[encoder, backbone]"
THAW = '--finetune.unfreeze={"backbone.layers.0.mixer": 2, encoder: 9}'


def test_what_is_frozen_stays_until_its_step(config: Path, tmp_path: Path, capsys) -> None:
    runs = {}
    for steps in (1, 2, 3):
        runs[steps] = fit(config, tmp_path / str(steps), FREEZE, THAW, f"--trainer.max_steps={steps}")
    assert "848 parameters, 792 of them frozen at first" in capsys.readouterr().out
    for name, tensor in runs[1].items():
        if name.startswith("model."):
            moved = [steps for steps in (2, 3) if not torch.equal(tensor, runs[steps][name])]
            thawed = [3] if "mixer" in name else []  # by its third step
            assert moved == ([2, 3] if "head" in name else thawed), name


def test_freezing_may_change_on_resume(config: Path, tmp_path: Path) -> None:
    before = fit(config, tmp_path / "run", "--trainer.max_steps=3", '--finetune.lr_of={"head": 0.5}')
    more = ["--trainer.max_steps=5", "--finetune.freeze=[head]", '--finetune.lr_of={"head": 0.7}']
    assert main(["fit", "--resume", str(tmp_path / "run"), *more]) == 0
    after = weights(tmp_path / "run")
    assert torch.equal(before["model.head.linear.weight"], after["model.head.linear.weight"])
    assert not torch.equal(before["model.encoder.embedding.weight"], after["model.encoder.embedding.weight"])


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--finetune.freeze=[bakbone]", "finetune.freeze: no parameter is named 'bakbone'"),
        ("--finetune.freeze=['*']", "finetune.freeze leaves nothing to train"),
        ("--finetune.lr_of={head.lm: 2}", "finetune.lr_of: no parameter is named 'head.lm'"),
        ("--finetune.lr_of={head: -1}", "finetune.lr_of.head must be at least 0"),
        ("--finetune.unfreeze={head: 2}", "finetune.unfreeze needs finetune.freeze"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(config: Path, tmp_path: Path, capsys, option: str, told: str) -> None:
    assert main(["fit", "--config", str(config), "--out", str(tmp_path / "run"), option]) == 2
    assert told in capsys.readouterr().err


def test_thawing_names_what_is_frozen(config: Path, tmp_path: Path, capsys) -> None:
    options = ["--finetune.freeze=[backbone]", "--finetune.unfreeze={head: 2}"]
    assert main(["fit", "--config", str(config), "--out", str(tmp_path / "run"), *options]) == 2
    assert "finetune.unfreeze: no parameter that is frozen is named 'head'" in capsys.readouterr().err


def test_adapters_are_not_frozen_with_the_backbone() -> None:
    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2), "base": torch.nn.Linear(2, 2)})

    with pytest.raises(ConfigError, match=r"finetune\.freeze: 'backbone' names .*with lora\.rank"):
        FinetuneConfig(freeze=["backbone"]).check(Adapted())
