"""The wheel: installed (not editable) beside the installed torch, it fits and finds its data from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL_OF_IT = """
import importlib, pkgutil, mambaseq
from mambaseq.cli.main import main

print(mambaseq.__file__)
code = main(["list"]) or main({fit!r})
for module in pkgutil.walk_packages(mambaseq.__path__, "mambaseq."):
    if module.name == "mambaseq.__main__":
        continue  # it is run below
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name.startswith("mambaseq"):
            raise  # others are of extras
raise SystemExit(code)
"""


def run(command: list[str], cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_installed(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    run(build, tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size <= 20e6
    target = tmp_path / "venv"
    venv.create(target, with_pip=False)
    site = next((target / "lib").glob("python*")) / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--no-index"]
    install += ["--target", str(site), str(wheel)]
    run(install, tmp_path)
    # everything else comes from this environment; its editable mambaseq comes later on the path, and must not be used
    (site / "reuse.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = str(target / "bin" / "python")
    options = ["--data.length=64", "--data.n_validation=2", "--model.d_model=8", "--model.backbone.n_layers=1",
               "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu",
               "--trainer.enable_progress_bar=false"]  # fmt: skip
    # kernels are modules as others, and all are imported; to compile those of one step took more than half of this test
    fit = ["fit", "--config", "dna/demo", "--out", "out", "--model.mixer.backend=reference", *options]
    told = run([python, "-c", ALL_OF_IT.format(fit=fit)], tmp_path)  # one process: it spends its time on imports
    assert str(site) in told.splitlines()[0]
    for name in ("dna/species", "audio/clips", "text/corpus", "dna/demo"):
        assert name in told
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert run([python, "-m", "mambaseq", "--version"], tmp_path).strip()
