"""Every command and every Python block of the READMEs runs, in order, in an empty folder."""

from __future__ import annotations

import functools
import json
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from pages import blocks, run_cell

from mambaseq import causal_lm
from mambaseq.benchmarking import backends, timing
from mambaseq.checkpoints import load_upstream
from mambaseq.checkpoints.export import weights
from mambaseq.checkpoints.upstream import to_upstream
from mambaseq.cli.main import main

ROOT = Path(__file__).parents[1]
# what is added to a command of the README, so that it is quick here: all that it says itself is kept
BRIEFLY = {
    "fit": ["--loader.batch_size=2", "--trainer.limit_val_batches=2"],
    "test": ["--trainer.limit_test_batches=2"],
}
# make demo and make test are run by the CI script itself; the others set up environments or need a GPU
NOT_HERE = ("make ", "git ", "cd ", "pip ", "python3 -m venv ", ". .venv/", "python benchmarks/")


def published(folder: Path) -> None:
    """A folder like those of state-spaces/mamba-*, of a small random model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"d_model": 16, "n_layer": 2, "vocab_size": 40}))
    torch.save(to_upstream(weights(causal_lm(vocab_size=40, d_model=16, n_layers=2))), folder / "pytorch_model.bin")


def own_data(folder: Path) -> None:
    """A table of labelled sequences and a folder of recordings, as a reader may have."""
    letters = np.random.default_rng(0).choice(list("ACGT"), (40, 100))
    splits = ["train"] * 24 + ["validation"] * 8 + ["test"] * 8
    rows = [
        f"{number % 2},{split},{''.join(row)}\n"
        for number, (split, row) in enumerate(zip(splits, letters, strict=True))
    ]
    (folder / "mine.csv").write_text("label,split,sequence\n" + "".join(rows))
    (folder / "tones").mkdir()
    for number in range(20):
        name, pitch = ("low", 220) if number % 2 else ("high", 880)
        wave = 0.3 * np.sin(2 * np.pi * (pitch + number) * np.arange(1600) / 16_000)
        soundfile.write(folder / "tones" / f"{name}_{number}.wav", wave, 16_000)


@pytest.mark.slow
@pytest.mark.usefixtures("uninterpreted")
def test_readme_commands_run(tmp_path: Path, drawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    once = functools.partial(timing.measure, warm_up_s=None, budget_s=0.0)  # of doctor: each backend is timed once
    monkeypatch.setattr(backends, "measure", lambda run, device, *_, **__: once(run, device, 1))
    (tmp_path / "data").symlink_to(ROOT / "data")
    published(tmp_path / "mamba-130m")
    own_data(tmp_path)
    names: dict = {}
    ran = 0
    for language, text, line in blocks(ROOT / "README.md"):
        if language == "python":
            run_cell(text, ROOT / "README.md", line, names)
            ran += 1
            continue
        for written in text.replace("\\\n", " ").splitlines():
            command = shlex.split(written, comments=True)
            if not command or written.startswith(NOT_HERE):
                continue
            assert command[0] == "mambaseq", f"README.md has a command that no test runs: {written}"
            assert main(command[1:] + BRIEFLY.get(command[1], [])) == 0, written
            ran += 1
    assert ran >= 8
    first, second = load_upstream("mamba-130m").state_dict(), load_upstream("mine").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert Path("mine/model.safetensors").is_file()


def test_the_first_picture_is_of_the_figures_that_are_kept() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "first_screen.py"))
    kept = made["PICTURE"].read_text(encoding="utf-8")
    assert made["picture"]() == kept, "run `python benchmarks/first_screen.py`"
    assert len(kept) < 150_000
    figures = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [row for row in made["_rows"]("train_gpu.json") if row["shape"]["length"] == 65_536]
    for row in rows:  # as in the table further down
        assert f"{row['tokens_per_s'] / 1000:.0f} k, {row['peak_gib']:.1f} GiB" in figures, row["contender"]
        assert f">{row['peak_gib']:.1f}<" in kept or row["contender"] == "mambaseq, graphs"
    assert len(rows) == 4


def test_the_table_of_decoding_is_of_the_figures_that_are_kept() -> None:
    rows = json.loads((ROOT / "benchmarks" / "decode_gpu.json").read_text())["rows"]
    readme, told = (ROOT / "README.md").read_text(), 0
    for size in ("130M", "1.4B"):
        header, _, *lines = re.search(rf"\| {size}, at once .*?\n\n", readme, re.DOTALL)[0].strip().splitlines()
        batches = [int(cell) for cell in header.split("|")[2:-1]]
        table = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in lines)}
        for row in rows:
            if row["op"] == f"generation, {size}":
                cell = table[row["contender"]][batches.index(row["shape"]["batch"])]
                tokens, ms = (float(text.replace(",", "")) for text in cell.removesuffix(" ms ").split(", "))
                assert tokens == round(row["decode_tokens_per_s"]), (row, cell)
                assert abs(ms - row["prefill_ms"]) <= (0.05 if ms < 10 else 0.5), (row, cell)
                told += 1
    assert told == 24


def test_links_of_all_pages_exist() -> None:
    folders = ("benchmarks", "configs", "data", "docs", "domains", "examples", "mambaseq", "tests")
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    link = re.compile(r"\]\(([^)#:]+)[)#]")
    links = [(page, target) for page in pages for target in link.findall(page.read_text(encoding="utf-8"))]
    dead = [f"{page.relative_to(ROOT)}: {target}" for page, target in links if not (page.parent / target).exists()]
    assert not dead
    assert len({page for page, _ in links}) > 20


def test_pages_of_the_documentation_are_in_its_menu_and_name_what_exists() -> None:
    """`make docs` builds them; here, without its packages: pages and the names of the reference."""
    menu = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    docs = ROOT / "docs"
    made = re.findall(r'": f?"([\w/{}.]+\.md)"', (docs / "site.py").read_text(encoding="utf-8"))
    written = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    assert len(made) >= 4
    assert written <= menu
    elsewhere = {name for name in menu - written if not name.startswith(("domains/", "examples/"))}
    assert elsewhere <= set(made)
    assert {f"examples/{path.parent.name}.md" for path in ROOT.glob("examples/*/README.md")} <= menu
    names = 0
    for page in docs.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE):
            assert pkgutil.resolve_name(name) is not None, f"{page.name} names {name}"
            names += 1
    assert names > 50


def test_the_picture_of_accuracy_by_length_is_of_the_reports_that_are_kept() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "dna_pictures.py"))
    assert made["picture"]() == made["PICTURE"].read_text(encoding="utf-8"), "run `python benchmarks/dna_pictures.py`"
