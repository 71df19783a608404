"""A plugin of one file brings a loss, a callback, an optimizer and a command: listed, used, checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from installed import installed

from mambaseq.checking import check
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.domain import catalog
from mambaseq.registry import allow_imports

PROJECT = """
[project]
name = "mambaseq-parts"
version = "0.1.0"
[project.entry-points."mambaseq.domains"]
parts = "mambaseq_parts:domain"
"""
DOMAIN = """
from mambaseq.domain import Domain

domain = Domain(
    name="parts",
    summary="parts of a plugin",
    datasets={"tokens": ("tiny:TinyTokens", "arithmetic sequences")},
    heads={"weighed": ("parts_code:Weighed", "next tokens by a loss of its own")},
    optimizers={"sign": ("parts_code:Sign", "steps of one size")},
    callbacks={"counter": ("parts_code:Counter", "counts steps, and moves weights by how many there were")},
    configs={"run": ("mambaseq_parts:run.yaml", "all of them")},
    commands={"greet": ("parts_code:greet", "says what it is given")},
)
"""
CODE = """
import lightning
import torch
from mambaseq.errors import UserError
from mambaseq.heads.lm import LMHead


class Weighed(LMHead):
    def forward(self, hidden, labels=None, mask=None, cu_seqlens=None, return_logits=True):
        loss, logits = super().forward(hidden, labels, mask, cu_seqlens, return_logits)
        return (None if loss is None else 2 * loss), logits


class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr: float, beta: float = 0.0):
        super().__init__(params, {"lr": lr, "beta": beta, "count": 1})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["beta"])
                p.sub_(group["lr"] / group["count"] * mean.sign())
            group["count"] += 1
        return loss


class Counter(lightning.Callback):
    def __init__(self, size: float = 1e-3):
        self.size, self.count = size, 0

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.count += 1
        with torch.no_grad():
            pl_module.model.head.linear.weight.add_(self.size * self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def greet(argv):
    if argv == ["wrong"]:
        raise UserError("nobody is named so. Give another name.")
    print("hello", *argv)
    return 3 if argv else None
"""
CONFIG = """
data: {name: parts/tokens}
loader: {batch_size: 4}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba},
  head: {name: parts/weighed}}
optimizer: {name: parts/sign, lr: 1.0e-3, options: {beta: 0.9}}
trainer: {accelerator: cpu, enable_progress_bar: false, max_steps: 4, log_every_n_steps: 1,
  callbacks: [{class_path: parts/counter, init_args: {size: 0.002}}]}
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    project = tmp_path / "project"
    (project / "mambaseq_parts").mkdir(parents=True)
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "mambaseq_parts" / "__init__.py").write_text(DOMAIN)
    (project / "mambaseq_parts" / "run.yaml").write_text(CONFIG)
    (project / "parts_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    with installed(project, tmp_path / "site"):
        yield


def test_its_parts_are_listed_and_used(parts: None, capsys: pytest.CaptureFixture) -> None:
    for kind, name in (("optimizers", "sign"), ("callbacks", "counter"), ("commands", "greet")):
        assert main(["list", kind]) == 0
        assert f"  parts/{name} " in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "parts/greet" in capsys.readouterr().out
    assert [main(["parts/greet"]), main(["parts/greet", "you"]), main(["parts/greet", "wrong"])] == [0, 3, 2]
    said = capsys.readouterr()
    assert said.out == "hello\nhello you\n"
    assert said.err == "mambaseq parts/greet: nobody is named so. Give another name.\n"

    assert main(["fit", "--config", "parts/run", "--out", "run", "--optimizer.schedule=constant"]) == 0
    checkpoint = read_checkpoint(Path("run/checkpoints/last.ckpt"))
    assert [state["count"] for state in checkpoint["callbacks"].values() if "count" in state] == [4]
    assert {key for state in checkpoint["optimizer_states"][0]["state"].values() for key in state} == {"mean"}
    assert {group["beta"] for group in checkpoint["optimizer_states"][0]["param_groups"]} == {0.9}

    capsys.readouterr()
    assert main(["fit", "--config", "parts/run", "--out", "no", "--optimizer.options={beat: 0.5}"]) == 2
    assert "Did you mean 'beta'?" in capsys.readouterr().err
    assert main(["fit", "--config", "parts/run", "--out", "no", "--optimizer.beta1=0.5"]) == 2
    assert "optimizer.beta1 is 0.5, which parts/sign does not use." in capsys.readouterr().err
    assert main(["fit", "--config", "parts/run", "--out", "adamw", "--optimizer.name=adamw"]) == 0
    note = "adamw is another optimizer; parts/sign's settings are dropped: options {'beta': 0.9}.\n"
    assert note in capsys.readouterr().err
    assert read_checkpoint(Path("adamw/checkpoints/last.ckpt"))["optimizer_states"][0]["param_groups"][0]["lr"] <= 1e-3


def test_they_are_held_against_the_laws(parts: None) -> None:
    found = {str(finding) for finding in check("parts")}
    assert not [text for text in found if text.startswith("fails")]
    resumed = "ok: config parts/run: 4 steps are the same when killed and resumed"
    assert {resumed, "ok: optimizer parts/sign: saved and resumed, its steps are the same"} <= found


@pytest.mark.parametrize(
    "override",
    [
        "--optimizer.name=parts_code:Sign",
        "--optimizer.name=parts/counter",
        "--optimizer.name=os:system",
        "--trainer.callbacks=[parts_code.Counter]",
        "--trainer.callbacks=[parts/sign]",
        "--trainer.callbacks=[{class_path: parts/nothing}]",
    ],
)
def test_names_in_files_are_looked_up_alone(parts: None, capsys: pytest.CaptureFixture, override: str) -> None:
    assert main(["fit", "--config", "parts/run", "--out", "no", override]) == 2
    key, _, name = override[2:].partition("=")
    error = capsys.readouterr().err
    assert key in error
    assert ("is named" in error) == (key == "optimizer.name" and ":" not in name)
    assert "imported because a file names it" in error or "is named" in error
    assert not Path("no").exists()
    with allow_imports("parts_code"):  # which is for what configurations name
        assert main(["parts_code:greet"]) == 2
    assert "parts_code:greet" not in catalog()["commands"]
