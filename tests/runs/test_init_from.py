"""A run begins with the weights of another, once, and says so in its configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mambaseq.checkpoints import load_model
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.checkpoints.upstream import to_upstream
from mambaseq.cli.main import main
from mambaseq.plain import read_yaml

CONFIG = """
seed: 1
data: {name: "tiny:TinyTokens", size: 20}
loader: {batch_size: 4}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4}}
optimizer: {lr: 1.0e-2}
checkpoint: {every_n_steps: 2}
trainer: {max_steps: 3, accelerator: cpu, enable_progress_bar: false}
"""
KILLER = '[{"class_path": "tasks.test_resume.Killer", "init_args": {"step": 3}}]'


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    assert main(["fit", "--config", str(path), "--out", "first"]) == 0
    return path


def weights(run: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(Path(run) / "checkpoints" / "last.ckpt")["state_dict"]


def test_a_run_begins_with_the_weights_of_another_and_goes_on_without_it(config: Path, capsys) -> None:
    begin = ["fit", "--config", str(config), "--init-from", "first"]
    still = ["--trainer.max_steps=1", "--optimizer.lr=0"]
    capsys.readouterr()
    assert main([*begin, "--out", "still", *still]) == 0
    assert f"still: 13 of 13 tensors come from {config.parent}/first (step 3)" in capsys.readouterr().err
    for name, tensor in weights("first").items():
        assert torch.equal(tensor, weights("still")[name]), name
    assert main([*begin, "--out", "whole", "--trainer.max_steps=6"]) == 0
    with pytest.raises(ZeroDivisionError):
        main([*begin, "--out", "killed", "--trainer.max_steps=6", f"--trainer.callbacks={KILLER}"])
    assert read_yaml("killed/config.yaml")["finetune"]["init_from"] == str(config.parent / "first")
    shutil.rmtree("first")  # what it began with is in its own checkpoint
    capsys.readouterr()
    assert main(["fit", "--resume", "killed", "--trainer.callbacks=null"]) == 0
    assert "tensors" not in capsys.readouterr().err
    for name, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("killed")[name]), name


def test_from_its_model_folder_and_by_its_key(config: Path, tmp_path: Path) -> None:
    text = CONFIG.replace("optimizer: {lr: 1.0e-2}", "optimizer: {lr: 0}\nfinetune: {init_from: first/model}")
    (tmp_path / "more.yaml").write_text(text)
    assert main(["fit", "--config", "more.yaml", "--out", "more"]) == 0
    one, other = (load_model(run).model.state_dict() for run in ("first", "more"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_from_a_published_model(config: Path, capsys) -> None:
    first = load_model("first").model
    Path("hub").mkdir()
    ssm = {"d_model": 8, "n_layer": 1, "vocab_size": 7, "pad_vocab_size_multiple": 1, "tie_embeddings": False}
    Path("hub/config.json").write_text(json.dumps(ssm | {"ssm_cfg": {"d_state": 4}}))
    save_file(to_upstream(first), "hub/model.safetensors")
    capsys.readouterr()
    assert main(["fit", "--config", str(config), "--init-from", "hub", "--out", "x", "--optimizer.lr=0"]) == 0
    assert f"x: 13 of 13 tensors come from {config.parent}/hub; there is no tokenizer of" in capsys.readouterr().err
    assert all(torch.equal(one, first.state_dict()[name]) for name, one in load_model("x").model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--config=run.yaml", "--out=x", "--init-from=nowhere"], "finetune.init_from: There is no model at"),
        (["--config=run.yaml", "--out=x", "--init-from=first", "--model.d_model=16"], "finetune.init_from: the model"),
        (["--resume=first", "--init-from=first"], "--init-from is for a new run"),
        (["--resume=first", "--trainer.max_steps=9", "--finetune.init_from=first"], "finetune.init_from cannot change"),
    ],
)
def test_what_cannot_be_begun_with_is_refused_and_leaves_nothing(config: Path, capsys, options, told: str) -> None:
    before = {path: path.read_bytes() for path in Path("first").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["fit", *options]) == 2
    assert told in capsys.readouterr().err
    assert not Path("x").exists() or not any(Path("x").glob("[!.]*"))
    assert {path: path.read_bytes() for path in Path("first").rglob("*") if path.is_file()} == before


def test_a_run_of_an_earlier_version_goes_on(config: Path, capsys) -> None:
    path = Path("first/config.yaml")
    lines = path.read_text().splitlines(keepends=True)
    at = lines.index("finetune:\n")
    end = next(number for number in range(at + 1, len(lines)) if not lines[number].startswith(" "))
    path.write_text("".join(lines[:at] + lines[end:]))
    capsys.readouterr()
    assert main(["fit", "--resume", "first", "--trainer.max_steps=4"]) == 0
    assert "finetune" not in capsys.readouterr().err
