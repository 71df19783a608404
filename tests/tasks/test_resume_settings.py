"""Every setting that a resumed run is given is used, or refused by name, and what changed is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from tasks.watching import SEEN
from tiny import Items, TinyTokens

from mambaseq.batch import Batch
from mambaseq.checkpoints import load_model
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.errors import shown
from mambaseq.plain import dump_yaml, flatten, parse_yaml
from mambaseq.registry import allow_imports
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.naming import MODEL_PARTS
from mambaseq.runs.parser import make_parser
from mambaseq.runs.resuming import moved, other_steps
from mambaseq.tasks.optimizer import OptimizerConfig, learning_rate_factor, make_optimizer, reapply

CONFIG = """
seed: 1
metrics: [bits_per_token]
data: {name: "tasks.test_resume_settings:Numbered"}
loader: {batch_size: 4}
model: {d_model: 8, backbone: {name: residual, n_layers: 1}, mixer: {name: mamba, d_state: 4}}
optimizer: {lr: 1.0e-2}
checkpoint: {every_n_steps: 2, monitor: val/bits_per_token}
trainer: {max_steps: 3, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1, val_check_interval: 2,
  check_val_every_n_epoch: null}
"""


class _Items(Items):
    def __getitem__(self, index: int) -> Batch:
        tokens = torch.full((1, self.length + 1), index % 32)
        return Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:])


class Numbered(TinyTokens):
    """Item i is made of the token i.

    Args:
        size: sequences an epoch.
    """

    def __init__(self, size: int = 20) -> None:
        super().__init__(16, size)
        self.vocab_size = 32

    def train(self) -> Items:
        return _Items(0, self.size, self.length, 32, False)

    def validation(self) -> Items:
        return _Items(1, 6, self.length, 32, False)


WATCHED = '--trainer.callbacks=[{"class_path": "tasks.watching.Watcher"}]'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where a run of three steps is, which is trained once, and what its steps used."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "run.yaml").write_text(CONFIG)
    SEEN.clear()
    with allow_imports("tiny", "tasks"):
        assert main(["fit", "--config", str(folder / "run.yaml"), "--out", str(folder / "run"), WATCHED]) == 0
    return folder, list(SEEN)


@pytest.fixture
def run(trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> Path:
    """A copy of that run, and of what its steps used."""
    folder, SEEN[:] = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


CHANGED = {
    "seed": 5,
    "metrics": ["bits_per_token", "perplexity"],
    "loader.batch_size": 2,
    "loader.num_workers": 1,
    "loader.pack": True,
    "optimizer.lr": 3e-3,
    "optimizer.weight_decay": 0.3,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.7,
    "optimizer.eps": 1e-6,
    "optimizer.decay_share": 0.5,
    "optimizer.warmup_steps": 5,
    "optimizer.schedule": "linear",
    "optimizer.min_lr_ratio": 0.2,
    "finetune.freeze": ["encoder"],
    "finetune.unfreeze": {"encoder": 5},
    "lora.dropout": 0.1,
    "lora.export": "kept",
    "ema.decay": 0.5,
    "length_warmup.start": 4,
    "length_warmup.steps_per_stage": 2,
    "checkpoint.every_n_steps": 1,
    "checkpoint.every_n_tokens": 1000,
    "checkpoint.val_every_n_tokens": 96,
    "checkpoint.monitor": "val/perplexity",
    "checkpoint.mode": "max",
    "generation.max_new_tokens": 9,
    "generation.temperature": 0.5,
    "generation.top_k": 3,
    "generation.top_p": 0.9,
    "generation.min_p": 0.01,
    "generation.repetition_penalty": 1.1,
    "generation.presence_penalty": 0.1,
}

# by the optimizer of the run, and what is said
UNUSED = {
    "optimizer.momentum": ("0.8", "optimizer.momentum is 0.8, which adamw does not use. Leave it out, or choose muon"),
    "optimizer.options": ('{"beta": 0.5}', "optimizer.options are for other optimizers than adamw and muon"),
}
REFUSED = {
    "optimizer.name": "muon",
    "finetune.init_from": "first",
    "finetune.other_tokenizer": True,
    "finetune.lr_of": '{"backbone": 0.5}',
    "lora.rank": 2,
    "lora.alpha": 3.0,
    "lora.targets": ["*.in_proj"],
}


def options(changed: dict[str, Any]) -> list[str]:
    return [
        f"--{key}={json.dumps(value) if isinstance(value, list | dict) else value}" for key, value in changed.items()
    ]


def test_every_key_of_a_configuration_is_decided_here() -> None:
    parser, _ = make_parser({"data": "tasks.test_resume_settings:Numbered", **MODEL_PARTS})
    keys = {key for key in vars(parser.get_defaults().as_flat()) if not key.startswith(("data", "model", "trainer"))}
    assert keys - {"config"} == CHANGED.keys() | UNUSED.keys() | REFUSED.keys()


def test_every_setting_is_used_and_said(run: Path, capsys: pytest.CaptureFixture) -> None:
    SEEN.clear()
    capsys.readouterr()
    packed = {"loader.pack", "length_warmup.start", "length_warmup.steps_per_stage"}  # these exclude each other
    changed = {key: value for key, value in CHANGED.items() if key not in packed}
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=12", *options(changed)]) == 0
    told = capsys.readouterr().err
    for key, value in flatten(changed).items():
        assert f"{key} changed: " in told
        assert f"-> {shown(value)}" in told
    assert "the best score so far no longer counts: it was measured by another metric" in told
    config = OptimizerConfig(**{k.removeprefix("optimizer."): v for k, v in CHANGED.items() if k.startswith("opt")})
    factor = learning_rate_factor(config, 12)
    assert len(SEEN) == 9
    for step, seen in enumerate(SEEN, 3):
        decayed, others = seen["groups"]
        assert decayed["lr"] == others["lr"] == config.lr * factor(step)
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
        assert (decayed["betas"], decayed["eps"]) == (others["betas"], others["eps"]) == ((0.5, 0.7), 1e-6)
        assert len(seen["items"]) == 2
    results = RunFolder(run).read_results()
    assert "val/perplexity" in results
    curve = dict(RunFolder(run).curve("val/perplexity"))
    assert results["val/perplexity"] == pytest.approx(max(curve.values()), rel=1e-5)
    assert (
        load_model(run).card.generation.items()
        >= {"max_new_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.9}.items()
    )


def test_the_seed_decides_the_order_of_what_follows(run: Path) -> None:
    SEEN.clear()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=5", "--seed=5"]) == 0
    assert [item for seen in SEEN for item in seen["items"]] == np.random.default_rng((5, 0)).permutation(20)[
        12:
    ].tolist()


def test_packing_and_shorter_sequences_begin_when_they_are_asked_for(run: Path) -> None:
    SEEN.clear()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=4", "--loader.pack=true"]) == 0
    assert [(len(seen["items"]), seen["length"]) for seen in SEEN] == [(1, 64)]
    SEEN.clear()
    more = ["--loader.pack=false", "--length_warmup.start=4", "--length_warmup.steps_per_stage=3"]
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=7", *more]) == 0
    assert [seen["length"] for seen in SEEN] == [8, 8, 16]


def test_other_batches_leave_no_sequence_out_and_bring_none_twice(run: Path) -> None:
    seen = [item for step in SEEN for item in step["items"]]
    SEEN.clear()
    more = ["--trainer.max_steps=17", "--loader.batch_size=2", "--loader.num_workers=1"]
    assert main(["fit", "--resume", str(run), *more]) == 0
    assert sorted(seen + [item for step in SEEN[:4] for item in step["items"]]) == list(range(20))
    assert sorted(item for step in SEEN[4:] for item in step["items"]) == list(range(20))


@pytest.mark.parametrize(
    ("batches", "size", "former", "now", "expected"),
    [(7, 20, 4, 2, 14), (7, 20, 4, 10, 3), (5, 20, 4, 2, 10), (4, 21, 4, 2, 8), (7, 0, 4, 2, 14), (7, 0, 2, 4, 4)],
)
def test_a_place_in_the_data(batches: int, size: int, former: int, now: int, expected: int) -> None:
    assert moved(batches, size, former, now) == expected


@pytest.mark.parametrize(
    ("former", "now", "told"),
    [
        ((8, 2, 1), (8, 1, 1), "--loader.batch_size 16 or --trainer.accumulate_grad_batches 2 keeps it."),
        ((8, 1, 4), (8, 4, 4), "--loader.batch_size 2 or --trainer.accumulate_grad_batches 1 keeps it."),
        ((8, 1, 1), (8, 3, 1), "batches of a step)."),  # no whole number keeps it
        ((8, 3, 1), (8, 2, 1), "batches of a step). --loader.batch_size 12 keeps it."),
        ((8, 2, 1), (8, 1, 2), ""),
    ],
)
def test_steps_of_other_sizes_are_told_with_what_keeps_them(former: tuple, now: tuple, told: str) -> None:
    found = other_steps(former, now)
    assert found.endswith(told)
    assert bool(found) == bool(told)


def test_saving_more_often_is_used(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    write = lightning.Trainer.save_checkpoint
    monkeypatch.setattr(
        lightning.Trainer,
        "save_checkpoint",
        lambda self, path, *rest, **more: (saved.append((self.global_step, Path(path).name)), write(self, path)),
    )
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=6", "--checkpoint.every_n_steps=1"]) == 0
    assert [step for step, name in saved if name == "last.ckpt"] == [4, 5, 6, 6]
    assert [step for step, _ in RunFolder(run).curve("train/loss")] == [*range(6)]  # none twice, none left out


def test_a_schedule_that_is_stretched_is_said(run: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=30"]) == 0
    told = capsys.readouterr().err
    factor = learning_rate_factor(OptimizerConfig(lr=1e-2), 30)
    assert f"the learning rate continues at {1e-2 * factor(3):.3g}; without the change it would be 0.001 (" in told
    assert SEEN[3]["groups"][0]["lr"] == 1e-2 * factor(3)


def test_a_resume_without_changes_has_nothing_to_say(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "more.yaml").write_text(CONFIG.replace("max_steps: 3", "max_steps: 8"))
    out = tmp_path / "other"
    killer = '[{"class_path": "tasks.test_resume.Killer", "init_args": {"step": 5}}]'
    begin = ["fit", "--config", str(tmp_path / "more.yaml"), "--out", str(out)]
    with pytest.raises(ZeroDivisionError):
        main([*begin, f"--trainer.callbacks={killer}"])
    capsys.readouterr()
    assert main(["fit", "--resume", str(out), "--trainer.callbacks=null"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "trainer.callbacks changed" in told[0]
    assert told[1] == f"{out}: goes on from step 4"


def test_settings_without_effect_are_refused_by_name(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--optimizer.lr=1e-4", "--generation.top_k=2"]) == 2
    told = capsys.readouterr().err
    assert "generation.top_k, optimizer.lr would have no effect" in told
    assert "trainer.max_steps MORE" in told
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_a_run_cannot_change_are_refused_by_name(run: Path, capsys, key: str) -> None:
    capsys.readouterr()
    more = ["--trainer.max_steps=9", *options({key: REFUSED[key]})]
    assert main(["fit", "--resume", str(run), *more]) == 2
    assert f"{key} cannot change in a run that has begun" in capsys.readouterr().err


@pytest.mark.parametrize("key", UNUSED)
def test_settings_that_nothing_would_use_are_refused_by_name(run: Path, capsys, key: str) -> None:
    before = (run / "config.yaml").read_text()
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=9", *options({key: UNUSED[key][0]})]) == 2
    assert UNUSED[key][1] in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=4"]) == 0


@pytest.mark.parametrize("option", ["default_root_dir=elsewhere", "logger=false", "enable_checkpointing=false"])
@pytest.mark.parametrize("resumed", [True, False])
def test_what_a_run_decides_itself_is_refused(run: Path, tmp_path: Path, capsys, option: str, resumed: bool) -> None:
    capsys.readouterr()
    begin = ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "new")]
    which = ["--resume", str(run), "--trainer.max_steps=9"] if resumed else begin
    assert main(["fit", *which, f"--trainer.{option}"]) == 2
    assert f"trainer.{option.partition('=')[0]}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").glob("[!.]*"))


def test_moments_stay_when_the_optimizer_changes(run: Path) -> None:
    before = read_checkpoint(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"][0]["exp_avg"]
    assert (
        main(["fit", "--resume", str(run), "--trainer.max_steps=4", "--optimizer.lr=0", "--optimizer.beta1=0.999"]) == 0
    )
    after = read_checkpoint(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"][0]["exp_avg"]
    assert torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_an_optimizer_without_a_moment_is_refused(run: Path, capsys, name: str) -> None:
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    del checkpoint["optimizer_states"][0]["state"][0][name]
    torch.save(checkpoint, path)
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=4"]) == 2
    assert f"last.ckpt lacks an optimizer's {name} for" in capsys.readouterr().err


def test_a_checkpoint_does_not_say_how_the_optimizer_works() -> None:
    model, config = torch.nn.Linear(2, 2), OptimizerConfig()
    optimizer, schedule = make_optimizer(model, config, 10)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group |= {"amsgrad": True, "maximize": True}
    optimizer.load_state_dict(saved)
    reapply(optimizer, schedule)
    assert not any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups)


def test_what_an_earlier_version_did_not_write_is_no_change(run: Path, capsys: pytest.CaptureFixture) -> None:
    path = run / "config.yaml"
    written = parse_yaml(path.read_text(), "test")
    del written["finetune"], written["data"]["size"], written["model"]["mixer"]["d_conv"], written["optimizer"]["beta2"]
    path.write_text(dump_yaml(written))
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps=4"]) == 0
    told = capsys.readouterr().err
    assert "trainer.max_steps changed: 3 -> 4" in told
    assert told.count(" changed: ") == 1 + told.count("callbacks changed: ")
