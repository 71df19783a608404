"""The commands, one after the other on one small run."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from mambaseq.benchmarking import backends, diagnosis, timing
from mambaseq.cli.main import COMMANDS, main
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.ops import OPS
from mambaseq.runs.naming import check_names
from mambaseq.runs.parsing import KINDS_OF
from mambaseq.runs.settings import check_overrides

DNA = [
    "--data.length=64", "--data.n_validation=4", "--data.n_test=6", "--data.samples_per_epoch=64",
    "--model.d_model=8", "--model.backbone.n_layers=1", "--loader.batch_size=4",
    "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "dna"
    assert main(["fit", "--config", "dna/demo", "--out", str(out), *DNA]) == 0
    return out


def test_a_run_leaves_everything_needed(run: Path) -> None:
    for name in ("config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "model/model.safetensors",
                 "model/model.json", "logs/version_0/metrics.csv", "curves.png", "results.json"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").glob("events*"))
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 4
    assert results["train_tokens"] == 4 * 4 * 64
    assert results["tokens_per_second"] > 0


def test_validate_and_test_agree_with_the_run(run: Path, drawn: None, capsys) -> None:
    before = json.loads((run / "results.json").read_text())["val/accuracy"]
    assert main(["validate", "--checkpoint", str(run)]) == 0
    assert "val/accuracy" in capsys.readouterr().out
    # the exported weights are the best ones, so they are at least as good as the last
    assert json.loads((run / "results.json").read_text())["val/accuracy"] >= before - 1e-6
    assert main(["test", "--checkpoint", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert sum(map(sum, results["test/confusion"])) == 6 * 5
    assert (run / "test_confusion.png").stat().st_size > 1000


def test_predict_writes_a_row_a_window(run: Path, tmp_path: Path) -> None:
    fasta = tmp_path / "in.fa"
    fasta.write_text(">one two\n" + "ACGT" * 40 + "\n>short\nACGTACGTAA\n")
    out = tmp_path / "out.csv"
    assert main(["predict", "--checkpoint", str(run), str(fasta), "--out", str(out), "--device", "cpu"]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [(r["record"], r["start"], r["stop"]) for r in rows] == [
        ("one", "0", "64"),
        ("one", "64", "128"),
        ("one", "128", "160"),
        ("short", "0", "10"),
    ]
    for row in rows:
        shares = [float(row[name]) for name in ("human", "galago", "mouse", "cow", "dog")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == ("human", "galago", "mouse", "cow", "dog")[shares.index(max(shares))]


def test_bad_input_writes_nothing_and_exits_with_2(run: Path, tmp_path: Path, capsys) -> None:
    fasta = tmp_path / "protein.fa"
    fasta.write_text(">p\nMKVLEEQ\n")
    out = tmp_path / "out.csv"
    out.write_text("precious")
    assert main(["predict", "--checkpoint", str(run), str(fasta), "--out", str(out), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "protein.fa" in error
    assert out.read_text() == "precious"


def test_a_window_longer_than_the_data_is_explained(tmp_path: Path, capsys) -> None:
    arguments = [*DNA, "--data.length=100000000"]
    assert main(["fit", "--config", "dna/demo", "--out", str(tmp_path / "r"), *arguments]) == 2
    error = capsys.readouterr().err
    assert "data.length" in error
    assert ".fa.gz" in error


def test_a_classifier_does_not_generate(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["generate", "--checkpoint", str(run), "--out", str(tmp_path / "x.fa"), "--device", "cpu"]) == 2
    assert "lm head" in capsys.readouterr().err


def test_text_generates_after_a_prompt(tmp_path: Path, capsys) -> None:
    out = tmp_path / "text"
    small = ["--data.length=32", "--model.d_model=8", "--model.backbone.n_layers=1", "--loader.batch_size=2",
             "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2",
             "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip
    assert main(["fit", "--config", "text/demo", "--out", str(out), *small]) == 0
    written = []
    for name in ("a.txt", "b.txt"):
        arguments = ["--prompt", "To be", "-n", "40", "--seed", "5", "--device", "cpu", "--out", str(tmp_path / name)]
        assert main(["generate", "--checkpoint", str(out), *arguments]) == 0
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert written[0].startswith(b"To be")
    text = tmp_path / "in.txt"
    text.write_text("To be or not to be")
    assert (
        main(["predict", "--checkpoint", str(out), str(text), "--out", str(tmp_path / "p.csv"), "--device", "cpu"]) == 0
    )
    (row,) = csv.DictReader((tmp_path / "p.csv").open())
    assert int(row["tokens"]) == 17
    assert 3 < float(row["bits_per_token"]) < 12
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(out), "--condition", "7", "--out", str(tmp_path / "c.txt")]) == 2
    assert "not conditional" in capsys.readouterr().err


def test_audio_generates_wavs_on_condition(tmp_path: Path, capsys) -> None:
    import soundfile

    out = tmp_path / "audio"
    small = ["--data.length=200", "--model.d_model=8", "--model.backbone.n_layers=1", "--loader.batch_size=2",
             "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2",
             "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip
    assert main(["fit", "--config", "audio/demo", "--out", str(out), *small]) == 0
    arguments = ["--condition", "3,7", "-n", "160", "--device", "cpu", "--out", str(tmp_path / "said.wav")]
    assert main(["generate", "--checkpoint", str(out), *arguments]) == 0
    files = sorted(tmp_path.glob("said*.wav"))
    assert len(files) == 2
    for file in files:
        samples, rate = soundfile.read(file)
        assert (len(samples), rate) == (160, 8000)
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(out), "--out", str(tmp_path / "x.wav")]) == 2
    assert "--condition" in capsys.readouterr().err


def test_doctor_refuses_an_unknown_device(capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["doctor", "--device", "nope"]) == 2
    assert "'nope' cannot be used" in capsys.readouterr().err


def test_doctor_finds_every_backend_right(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton's interpreter takes seconds: what is timed is small and timed once, and each of the other ops is checked in
    # tests/ops/test_running.py and told by the doctor of tests/test_readme.py
    monkeypatch.setitem(backends.SIZES, "cpu", (1, 8, 64))
    once = functools.partial(timing.measure, warm_up_s=None, budget_s=0.0)
    monkeypatch.setattr(backends, "measure", lambda run, device, *_, **__: once(run, device, 1))
    some = ("selective_scan", "causal_conv", "lti_scan")
    monkeypatch.setattr(diagnosis, "OPS", {name: OPS[name] for name in some})
    assert main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for op in some:
        assert op in printed
    assert "WRONG" not in printed
    assert torch.__version__ in printed


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["list"]])
def test_a_pipe_that_is_closed_early(arguments: list[str]) -> None:
    code = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
        f"from mambaseq.cli.main import main; sys.exit(main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")  # noqa: PTH110
@pytest.mark.parametrize("text", ["too much", "too much\\n" * 10_000])  # at the last flush, and before
def test_a_disk_that_is_full_behind_standard_output(text: str) -> None:
    code = (
        "import sys; sys.stdout = open('/dev/full', 'w'); from mambaseq.cli import main; "
        f"main.usage = lambda: '{text}'; sys.exit(main.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mambaseq: The disk is full")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", ["runs {}", "import --checkpoint {} --out x", "sweep plan.yaml --out x"])
def test_a_name_that_is_too_long_is_told(words: str, tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """Wherever it is asked what is there."""
    monkeypatch.chdir(tmp_path)
    long = "n" * 300
    Path("plan.yaml").write_text(f"config: {long}\ngrid: {{optimizer.lr: [1, 2]}}\n")
    assert main(words.format(long).split()) == 2
    assert "is not a file name: it is too long" in capsys.readouterr().err


def test_every_command_in_a_hint_is_one(capsys) -> None:
    """`mambaseq list KIND` and the others, wherever a message or a help text names them."""
    root = Path(__file__).parents[2]
    sources = [path for folder in ("mambaseq", "domains") for path in (root / folder).rglob("*.py")]
    kinds = {*KINDS_OF.values()}
    for path in sources:
        text = path.read_text(encoding="utf-8")
        kinds |= set(re.findall(r"`mambaseq list (\w+)`", text))
        named = set(re.findall(r"`mambaseq ([a-z]+(?:/[a-z-]+)?)", text))
        assert named <= {*COMMANDS, *(entry.name for entry in catalog()["commands"])}, path
    assert len(kinds) > 5
    for kind in kinds:
        assert main(["list", kind]) == 0, kind


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "--config", "dna/dmo"], "Did you mean 'dna/demo'"),
        (["fit", "--config", "dna/demo", "--alow-import", "x"], "Did you mean '--allow-import'"),
        (["fit", "--config", "dna/demo", "--data.name", "dna/genom"], "Did you mean 'dna/genome'"),
        (["test", "--checkpoint", "r", "--baseline"], "Did you mean '--baselines'"),
        (["validate", "--checkpoint", "r", "--lodaer.batch_size=3"], "Did you mean '--loader'"),
        (["validate", "--checkpoint=r", "--ckeckpoint", "x", "--baselnes"], "Did you mean '--checkpoint'"),
    ],
)
def test_wrong_names_are_told_before_anything_slow(words: list[str], told: str, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    for module in ("training", "evaluation", "parsing", "trainer_classes"):
        monkeypatch.setitem(sys.modules, f"mambaseq.runs.{module}", None)  # its import fails
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_words_that_may_end_a_longer_key_are_for_the_parser(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    for word in ("--length", "--devices", "--d_model", "--lr", "--n_layers", "--encoder.k", "--layout", "--init"):
        for options in (["--config", "--out", "--resume", "--init-from"], ["--checkpoint", "--baselines", "--tasks"]):
            check_names([word, "3"], "mambaseq fit", options)
    for key in ("data.length", "trainer.devices"):
        words = ["--out", str(tmp_path / "run"), f"--{key.rpartition('.')[2]}", "3"]
        assert main(["fit", "--config", "dna/demo", *words]) == 2
        assert f"Did you mean '--{key}'" in capsys.readouterr().err


def test_words_of_a_run_that_is_measured(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    seen: list[list[str]] = []
    told = types.SimpleNamespace(evaluate=lambda run, split, words, **_: seen.append(words) or {})
    (tmp_path / "config.yaml").write_text("data: {name: dna/species}\n")
    monkeypatch.setitem(sys.modules, "mambaseq.runs.evaluation", told)
    for command in ("validate", "test"):
        assert main([command, "--checkpoint", str(tmp_path), "--config", "x"]) == 0, capsys.readouterr().err
        assert seen.pop() == ["--config", "x"]
        for words, key in ((["--devices", "1"], "trainer.devices"), (["--batch_size=3"], "loader.batch_size")):
            assert main([command, "--checkpoint", str(tmp_path), *words]) == 2  # --device and --batch-size: of --tasks
            assert f"Did you mean '--{key}'?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the run has its own configuration"):
        check_overrides(["--config", "x"])
