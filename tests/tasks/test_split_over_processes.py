"""Processes that share training sequences train as one process does."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from parallel.ranks import contexts, on_ranks
from tiny import TinyRagged

from mambaseq.batch import Batch
from mambaseq.checkpoints.export import load_model
from mambaseq.checkpoints.lightning_io import read_checkpoint
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError
from mambaseq.metrics.likelihood import BitsPerByte, BitsPerToken, TokenAccuracy
from mambaseq.models import causal_lm
from mambaseq.reporting.runs import RunFolder
from mambaseq.tasks import task as task_module
from mambaseq.tasks.contexts import make_context
from mambaseq.tasks.fitting import check_shares
from mambaseq.tasks.task import Task

CONFIG = """
metrics: [bits_per_token, token_accuracy]
data: {name: "tiny:TinyTokens", size: 32}
model:
  d_model: 8
  backbone: {name: residual, n_layers: 2, chunk_length: 3}
  mixer: {name: mamba, d_state: 4, backend: reference}
optimizer: {lr: 1.0e-2}
loader: {batch_size: 2}
trainer:
  {max_steps: 5, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1, accumulate_grad_batches: 2}
"""


def config(folder: Path) -> list[str]:
    (folder / "c.yaml").write_text(CONFIG)
    return ["fit", "--allow-import", "tiny", "--config", str(folder / "c.yaml")]


def documented(fit: list[str], out: Path) -> list[str]:
    """What the page on several devices says for one machine, for this configuration and two devices."""
    page = (Path(__file__).parents[2] / "docs" / "several_devices.md").read_text(encoding="utf-8")
    told = page[page.index("    mambaseq fit ") :].partition("\n\n")[0]
    words = shlex.split(told.replace("\\\n", " "))
    at, place, devices = words.index("--config"), words.index("--out"), words.index("--trainer.devices")
    words[devices + 1], words[place + 1] = "2", str(out)
    return ["-m", "mambaseq", *fit, *words[at + 2 :]]


def run(folder: Path, arguments: list[str]) -> None:
    """Python with these arguments, in processes of its own."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def same_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last checkpoints of the runs one and two, which have had the same batches."""
    one, two = (read_checkpoint(folder / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    assert one["SequenceDataModule"] == two["SequenceDataModule"]
    for name, tensor in one["state_dict"].items():
        assert (tensor - two["state_dict"][name]).abs().max() <= 1e-4 * tensor.abs().max().clamp(min=1e-3), name
    return one, two


def noted(path: str) -> None:
    """Have this process write down, with its step, each batch that it is given in training."""
    began = Task.on_train_batch_start

    def noting(self: Task, batch: Batch, number: int) -> None:
        with Path(path).open("a") as file:
            file.write(json.dumps([self.global_step, batch.inputs.tolist()]) + "\n")
        began(self, batch, number)

    Task.on_train_batch_start = noting  # type: ignore[method-assign]


def fit_noted(monkeypatch: pytest.MonkeyPatch, path: Path, arguments: list[str]) -> None:
    """The same in this process, for one run."""
    with monkeypatch.context() as patched:
        patched.setattr(Task, "on_train_batch_start", Task.on_train_batch_start)
        noted(str(path))
        assert main(arguments) == 0


def steps_of(paths: Iterable[Path]) -> dict[int, list[Any]]:
    """The sequences of each step, of all processes, sorted."""
    found: dict[int, list[Any]] = {}
    for path in paths:
        for step, rows in map(json.loads, path.read_text().splitlines()):
            found[step] = sorted([*found.get(step, []), *rows])
    return found


@pytest.mark.slow
def test_a_sharded_run_goes_from_one_process_to_four_to_two_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2, with sequences split over two processes, whose states are gathered, and layers that are run again. All
    have the batches of one process, in its order; each process writes its part of a checkpoint, beside training."""
    fit = [*config(tmp_path), "--model.backbone.chunk_length=null", "--optimizer.schedule=constant"]
    fit += ["--checkpoint.every_n_steps=1"]
    here = functools.partial(fit_noted, monkeypatch)
    here(tmp_path / "one.batches", [*fit, "--out", str(tmp_path / "one")])
    out, batches = str(tmp_path / "two"), [tmp_path / f"{name}.batches" for name in ("1", "4-0", "4-2", "2-0", "last")]
    here(batches[0], [*fit, "--out", out, "--trainer.max_steps=1"])
    resume = ["fit", "--allow-import=tiny", "--resume", out]
    split = ["--model.backbone.context_parallel=2", "--model.backbone.context_states=gathered"]
    sharded = [*split, "--trainer.strategy=fsdp2", "--model.backbone.checkpoint=true"]
    for size, batch, steps in ((4, 1, 3), (2, 2, 4)):
        more = [f"--trainer.devices={size}", f"--loader.batch_size={batch}", f"--trainer.max_steps={steps}"]
        notes = {rank: functools.partial(noted, str(tmp_path / f"{size}-{rank}.batches")) for rank in range(size)}
        ranks = launching.start([*resume, *sharded, *more], tmp_path, size=size, before=notes)
        assert ranks.wait(250) == [0] * size, ranks.told(0) + ranks.told(1)
        (parts,) = (tmp_path / "two" / "checkpoints").glob("last.ckpt.*.parts")
        assert len(list(parts.glob("*.distcp"))) == size
        assert load_model(tmp_path / "two" / "model").card.step == steps
    rest = ["--trainer.devices=1", "--trainer.strategy=auto", "--model.backbone.context_parallel=1"]
    here(batches[-1], [*resume, *rest, "--trainer.max_steps=5"])
    assert steps_of(batches) == steps_of([tmp_path / "one.batches"])
    assert [len(rows) for rows in steps_of(batches).values()] == [4] * 5
    same_weights(tmp_path)
    losses = [dict(RunFolder(tmp_path / name).curve("train/loss")) for name in ("one", "two")]
    for step in (0, 3, 4):  # with four processes it is that of one of two groups
        assert losses[1][step] == pytest.approx(losses[0][step], rel=1e-4)
    exported = [load_model(tmp_path / name / "model").model.state_dict() for name in ("one", "two")]
    assert exported[0].keys() == exported[1].keys()
    assert not list((tmp_path / "two" / "checkpoints").glob("*.parts"))  # the last file is whole


@pytest.mark.slow
def test_two_processes_share_sequences_and_learn_what_one_does(tmp_path: Path) -> None:
    fit = config(tmp_path)
    assert main([*fit, "--out", str(tmp_path / "one")]) == 0
    run(tmp_path, documented(fit, tmp_path / "two"))
    one, two = same_weights(tmp_path)
    tokens = [checkpoint["callbacks"]["Throughput"]["tokens"] for checkpoint in (one, two)]
    assert tokens[0] == tokens[1]
    for curve in ("train/loss", "train/grad_norm", "val/bits_per_token", "val/token_accuracy"):
        curves = [RunFolder(tmp_path / name).curve(curve) for name in ("one", "two")]
        assert curves[0]
        for (step, value), (other_step, other) in zip(*curves, strict=True):
            assert step == other_step
            assert value == pytest.approx(other, rel=1e-4), curve


def test_processes_that_cannot_share_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fit = [*config(tmp_path), "--out", str(tmp_path / "run"), "--model.backbone.context_parallel"]
    assert main([*fit, "2"]) != 0
    told = capsys.readouterr().err
    assert "splits each sequence over 2 processes, but there are 1" in told
    assert "trainer.devices" in told
    with monkeypatch.context() as patched:  # before another process is started, which would say it once more
        patched.setattr("subprocess.Popen", None)
        two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
        assert main([*fit, "3", *two]) == 2
        assert "over 3 processes, but there are 2" in capsys.readouterr().err
        whole = ["--model.backbone.name=unet", "--model.backbone.chunk_length=null", "--model.mixer.name=attention"]
        assert main([*fit, "2", *two, *whole]) == 2
        assert "A unet over a part of sequences needs" in capsys.readouterr().err
        gathered = ["--model.backbone.context_states=gathered", *whole[1:2], "--model.mixer.name=kda"]
        assert main([*fit, "2", *two, *gathered]) == 2
    assert "context_states: gathered needs states that are decayed sums over positions; KDA" in capsys.readouterr().err
    assert main([*fit, "0"]) != 0
    assert "context_parallel" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"trainer\.strategy is SingleDeviceStrategy\. Set it to one of them"):
        make_context(1, SingleDeviceStrategy("cpu"))


def test_sequences_shorter_than_their_processes_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The step that has no other may come late. Packed, such a sequence is not alone."""
    fit = [*config(tmp_path), "--out", str(tmp_path / "run"), "--trainer.devices=2", "--trainer.strategy=ddp"]
    fit += ["--model.backbone.context_parallel=2", "--data.name=tiny:TinyRagged", "--data.shortest=1"]
    monkeypatch.setattr("subprocess.Popen", None)  # before another process is started
    assert main(fit) == 2
    told = capsys.readouterr().err
    assert "context_parallel splits each sequence over 2 processes" in told
    assert "'tiny:TinyRagged' gives one of 1 (row 1). Set context_parallel to at most 1" in told
    assert "data.length" in told
    assert main([*fit, "--data.shortest=2", "--length_warmup.start=1"]) == 2
    assert "length_warmup.start is 1. Set it to at least 2" in capsys.readouterr().err
    assert not RunFolder(tmp_path / "run").config.exists()
    check_shares(2, TinyRagged(shortest=2), "'x'", warmup=2)
    check_shares(4, TinyRagged(shortest=1), "'x'", in_a_row=4)
    with pytest.raises(ConfigError, match="gives one of 1"):
        check_shares(4, TinyRagged(shortest=1), "'x'", in_a_row=3)


@pytest.mark.parametrize(
    "strategy", ["ddp_fork", "ddp_spawn", "{class_path: DDPStrategy, init_args: {start_method: fork}}"]
)
def test_copies_of_a_process_are_no_processes_of_a_run(strategy: str, tmp_path: Path, capsys) -> None:
    """Their weights would be lost when training is over."""
    assert (
        main(
            [*config(tmp_path), "--out", str(tmp_path / "run"), "--trainer.devices=2", f"--trainer.strategy={strategy}"]
        )
        == 2
    )
    assert "Set trainer.strategy to ddp or fsdp2" in capsys.readouterr().err


class Whole(BitsPerToken):
    """One that no part can update."""

    splits_time = False


def test_validation_is_shared_where_metrics_are_sums_over_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = causal_lm(7, 8, 2, "mamba", d_state=3)
    tokens, targets = torch.randint(0, 7, (2, 3, 9))
    targets[0, :7] = -100
    units = torch.tensor([40])
    batches = [
        Batch(tokens, targets, n_units=units),
        Batch(tokens[:, :1], targets[:, 1:2], n_units=units),  # too short for two
        Batch(tokens[:1], targets[:1], cu_seqlens=torch.tensor([0, 2, 9], dtype=torch.int32), n_units=units),
    ]
    named = {"bits_per_byte": BitsPerByte(), "token_accuracy": TokenAccuracy()}
    seen: list[list[int]] = [[], []]

    class Module:
        sharing = sharing_validation = 0

    def measured(rank: int | None, metrics: dict[str, Any]) -> tuple[dict[str, float], int]:
        task = Task(model, metrics=metrics).eval()
        trainer = type("Trainer", (), {"datamodule": Module(), "strategy": None})()
        monkeypatch.setattr(Task, "trainer", trainer)
        if rank is not None:
            run = task.run_model
            task.run_model = lambda batch, *rest: (seen[rank].append(batch.inputs.shape[1]), run(batch, *rest))[1]
        task.setup("fit")
        with torch.no_grad():
            for batch in batches:
                task._evaluate(batch, "val", 0)
        held = {"loss": task.losses["val_"], **task._metrics("val")}
        sums = {f"{n}.{k}": float(getattr(m, k)) for n, m in held.items() for k in m._defaults}
        return sums, trainer.datamodule.sharing_validation

    whole, shared = measured(None, named)
    assert shared == 1
    model.backbone.context_parallel = 2
    found = contexts(2)
    rank_of = {}
    monkeypatch.setattr(task_module, "make_context", lambda shared, strategy: found[rank_of[threading.get_ident()]])

    def on_rank(rank: int) -> tuple[dict[str, float], int]:
        rank_of[threading.get_ident()] = rank
        return measured(rank, named)

    parts = on_ranks(2, on_rank)
    assert [shared for _, shared in parts] == [2, 2]
    assert seen == [[4, 1, 4], [5, 5]]
    for name, value in whole.items():
        assert sum(one[name] for one, _ in parts) == pytest.approx(value, rel=1e-5), name
    rank_of[threading.get_ident()] = 0
    again, shared = measured(None, {"bits_per_token": Whole()})
    assert shared == 1
    assert again["loss.nll"] == pytest.approx(whole["loss.nll"])


def test_processes_share_a_chunk() -> None:
    """So that each holds the activations of its share of it."""
    tokens, targets = torch.randint(0, 7, (2, 1, 22), generator=torch.Generator().manual_seed(0))
    first = causal_lm(7, 8, 2, "mamba", d_state=3, chunk_length=5)
    with torch.no_grad():
        whole = float(first(tokens, targets).loss)

    def on_rank(rank: int) -> float:
        model = copy.deepcopy(first)
        ran, run = [], model.backbone._run
        model.backbone._run = lambda x, *rest: (ran.append(x.shape[1]), run(x, *rest))[1]  # type: ignore[method-assign]
        task = Task(model)
        task._context = contexts(2)[rank]
        with torch.no_grad():
            loss = float(task._run_shared(Batch(tokens, targets))[0].loss)
        assert len(ran) == 4
        assert max(ran) == 3
        return loss

    assert on_ranks(2, on_rank) == pytest.approx([whole, whole], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text/ddp_context", "text/ddp_context_chunks", "text/fsdp2_context"])
def test_a_configuration_for_four_processes_trains_what_its_base_does(name: str, tmp_path: Path) -> None:
    small = ["--model.d_model=16", "--model.backbone.n_layers=1", "--model.mixer.backend=reference", "--data.length=72"]
    small += ["--optimizer.warmup_steps=0", "--trainer.max_steps=4", "--trainer.limit_val_batches=1"]
    small += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    out, alone = tmp_path / "run", tmp_path / "one"
    ranks = launching.start(["fit", "--config", name, "--out", str(out), *small], tmp_path, size=4)
    assert ranks.wait(200) == [0] * 4, ranks.told(0) + ranks.told(1)
    assert main(["fit", "--config", "text/demo", "--out", str(alone), *small]) == 0
    found, expected = (load_model(folder / "model").model.state_dict() for folder in (out, alone))
    assert found.keys() == expected.keys()
    ((step, value),), ((last, wanted),) = (RunFolder(folder).curve("val/loss") for folder in (out, alone))
    assert step == last
    assert value == pytest.approx(wanted, rel=5e-3)  # which bf16 is within
    assert wanted < 0.97 * math.log(256)  # learned


@pytest.mark.slow
def test_a_run_that_was_lost_at_its_very_end_is_finished_with_its_best_weights(tmp_path: Path) -> None:
    """Each process knows before it has met the others what is left to do, and on which sequences a score was found."""
    fit = [*config(tmp_path), "--model.backbone.context_parallel=2", "--trainer.devices=2", "--trainer.strategy=ddp"]
    fit += ["--model.backbone.chunk_length=null", "--trainer.max_steps=3", "--trainer.val_check_interval=2"]
    fit += ["--trainer.limit_val_batches=1", "--checkpoint.monitor=val/loss", "--checkpoint.mode=max"]  # step 1
    run, whole = RunFolder(tmp_path / "run"), []
    for how in ([*fit, "--out", str(run.path)], *[["fit", "--allow-import", "tiny", "--resume", str(run.path)]] * 2):
        ranks = launching.start(how, tmp_path)
        assert ranks.wait(60) == [0, 0], ranks.told(0) + ranks.told(1)
        results = run.read_results()
        whole.append({key: results[key] for key in ("steps", "exported_step", "val/bits_per_token")})
        if len(whole) == 2:
            assert "nothing to do" in ranks.told(0)
            run.results.unlink()
    assert whole[0]["exported_step"] < whole[0]["steps"]
    assert whole[0] == whole[1] == whole[2]
