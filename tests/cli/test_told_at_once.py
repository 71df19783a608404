"""Wrong names, of options, keys and folders, are told before PyTorch is imported."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.runs.config import SECTIONS as CLASSES
from mambaseq.runs.naming import check_names
from mambaseq.runs.parsing import keys_of
from mambaseq.runs.signatures import SECTIONS, arguments_in
from mambaseq.specs import arguments_of

WORDS = [
    # folders
    ("generate --checkpoint runs/dna-dmo", "There is no model at runs/dna-dmo", "Did you mean 'runs/dna-demo'?"),
    ("predict --checkpoint nowhere x.txt --out o.csv", "There is no model at nowhere"),
    ("serve --checkpoint nowhere", "There is no model at nowhere"),
    ("serve --checkpoint published", "no model.json in published, but a config.json", "mambaseq import --checkpoint"),
    ("export --checkpoint nowhere --out o", "There is no model at nowhere"),
    ("test --checkpoint nowhere", "There is no run at nowhere"),
    ("test --checkpoint runs/dna-dem", "There is no run at runs/dna-dem", "Did you mean 'runs/dna-demo'?"),
    ("test --checkpoint nowhere --tasks hellaswag", "There is no model at nowhere"),
    ("validate --checkpoint nowhere", "There is no run at nowhere"),
    ("fit --resume nowhere", "There is no run at nowhere"),
    ("fit --config dna/demo --init-from nowhere", "finetune.init_from: There is no model at nowhere"),
    ("generate --checkpoint runs/dna-demo/model/model.safetensors", "Did you mean 'runs/dna-demo/model'?"),
    ("predict --checkpoint runs/dna-demo/config.yaml x --out o.csv", "Did you mean 'runs/dna-demo'?"),
    ("serve --checkpoint runs/dna-demo/checkpoints/last.ckpt", "Did you mean 'runs/dna-demo'?"),
    (
        "test --checkpoint runs/dna-demo/model",
        "There is no run at runs/dna-demo/model",
        "Did you mean 'runs/dna-demo'?",
    ),
    ("validate --checkpoint runs/dna-demo/checkpoints/last.ckpt", "Did you mean 'runs/dna-demo'?"),
    ("fit --config runs/dna-demo", "is a run's folder", "`mambaseq fit --resume runs/dna-demo`"),
    ("fit --config runs/dna-dem", "No configuration is named", "Did you mean 'runs/dna-demo'?"),
    ("fit --config ./lenght.yaml", "No configuration is named", "Did you mean 'length.yaml'?"),
    ("fit --config dna/demo --config length.yaml", "--config is given twice", "base: [dna/demo, length.yaml]"),
    ("data audit nowhere", "No configuration is named 'nowhere'"),
    ("data audit runs", "There is no run at runs"),
    (f"data audit {'n' * 300}", "No configuration is named"),  # longer than names of files can be
    (f"fit --config dna/demo --init-from {'n' * 300}", "finetune.init_from: There is no model at"),
    ("fit --config odd.yaml --optimizer.lrr 3", "Did you mean '--optimizer.lr'?"),
    ("sweep nowhere.yaml", "nowhere.yaml does not exist"),
    ("text/perplexity --checkpoint nowhere x.txt", "There is no model at nowhere"),
    ("text/lambada --checkpoint nowhere x.txt", "There is no model at nowhere"),
    ("text/recall --checkpoint nowhere", "There is no model at nowhere"),
    ("dna/variants --checkpoint nowhere --reference a.fa b.vcf", "There is no model at nowhere"),
    ("dna/mutagenesis --checkpoint nowhere --reference a.fa --region a:1-2 --out o.csv", "no model at nowhere"),
    ("audio/score --generated a --real b --classifier nowhere", "There is no model at nowhere"),
    ("audio/compare nowhere --out page.html", "There is no model at nowhere"),
    # files
    ("fit --config broken.yaml", "broken.yaml, line 2, is not valid YAML"),
    ("fit --config unknown.yaml", "unknown.yaml: there is no key 'optimiser'. Did you mean 'optimizer'?"),
    ("fit --config dna/demo --out runs/dna-demo", "runs/dna-demo already holds a run"),
    ("fit --config dna/finetune --data.files nowhere.csv", "data.files: There is no data file 'nowhere.csv'"),
    ("fit --config files.yaml", "data.files: There is no data file 'nowhere.csv'"),
    ("predict --checkpoint runs/dna-demo broken.yaml --out o.xlsx", "A table is written as .csv", "not as o.xlsx"),
    ("predict --checkpoint runs/dna-demo nowhere.fa --out o.csv", "There is no data file 'nowhere.fa'"),
    ("dna/variants --checkpoint runs/dna-demo --reference a.fa b.vcf", "There is no data file 'a.fa'"),
    (
        "dna/mutagenesis --checkpoint runs/dna-demo --reference a.fa --region a:1-2 --out o.csv",
        "There is no data file 'a.fa'",
    ),
    ("generate --checkpoint runs/dna-demo --out x.mp3", "DNA is written as .fa", "not as x.mp3"),
    ("generate --checkpoint runs/dna-demo --writer audio/wav --out x.mp3", "Sound is written as .wav, .flac, .pcm"),
    ("generate --checkpoint runs/dna-demo --writer text/text --out=-.mp3", "Text is written as .txt"),
    ("generate --checkpoint runs/dna-demo --writer csv --out x.tsv", "A signal is written as .csv, not as x.tsv"),
    ("generate --checkpoint runs/dna-demo --writer audio/codes --out x.npz", "Codes are written as .npy"),
    ("generate --checkpoint runs/dna-demo --writer audio/wave --out x.wav", "Did you mean 'audio/wav'?"),
    ("generate --checkpoint runs/dna-demo --out runs", "--out runs is a folder"),
    ("generate --checkpoint runs/dna-demo --draft ngrm", "--draft 'ngrm' is no model", "Did you mean 'ngram'?"),
    ("generate --checkpoint runs/dna-demo --draft nowhere", "--draft 'nowhere' is no model"),
    ("generate --checkpoint runs/dna-demo --prompts p.txt", "There is no file 'p.txt' (--prompts)"),
    ("generate --checkpoint runs/dna-demo --condition-table p.csv", "There is no file 'p.csv' (--condition-table)"),
    ("generate --checkpoint runs/dna-demo --from-state p.safetensors", "no file 'p.safetensors' (--from-state)"),
    ("generate --repeat x.json --out x.wav", "There is no file 'x.json' (--repeat)"),
    ("runs runs --picture x.jpg", "A picture is written as .png, not as x.jpg"),
    ("bench decode --picture x.jpg", "A picture is written as .png, not as x.jpg"),
    # keys and names in files
    ("fit --config length.yaml", "length.yaml: there is no key 'data.lenght'. Did you mean 'data.length'?"),
    ("fit --config inner.yaml", "there is no key 'data.init_args.batchsize'. Under data there is cache, "),
    ("fit --config parts.yaml", "there is no key 'model.backbon.n_layers'. Did you mean 'model.backbone.n_layers'?"),
    ("fit --config mixers.yaml", "no key 'model.mixers.mamba2.head_dm'. Did you mean 'model.mixers.mamba2.head_dim'?"),
    ("fit --config draft.yaml", "there is no key 'generation.draft.tokens'. Under generation there is max_new_tokens"),
    ("fit --config steps.yaml", "steps.yaml: there is no key 'trainer.max_step'. Did you mean 'trainer.max_steps'?"),
    ("fit --config steps.yaml --data.lenght 3", "steps.yaml: there is no key 'trainer.max_step'."),
    ("fit --config named.yaml", "named.yaml: model.mixer.name: no mixer is named 'mambaa'. Did you mean 'mamba'?"),
    ("fit --config metric.yaml", "metric.yaml: metrics: no metric is named 'acuracy'. Did you mean 'accuracy'?"),
    ("fit --config optimizer.yaml", "optimizer.yaml: optimizer.name: no optimizer is named 'adam'. Did you mean"),
    ("fit --config dna/demo --optimizer.name adam", "optimizer.name: no optimizer is named 'adam'. Did you mean"),
    ("data audit length.yaml", "length.yaml: there is no key 'data.lenght'. Did you mean 'data.length'?"),
    ("sweep sweep.yaml", "sweep.yaml: there is no key 'data.lenght'. Did you mean 'data.length'?"),
    ("sweep swept.yaml", "length.yaml: there is no key 'data.lenght'. Did you mean 'data.length'?"),
    # empty ones, of variables of the shell that are not set
    ("predict --checkpoint '' x.txt --out o.csv", "--checkpoint is empty. Give a name"),
    ("predict --checkpoint= x.txt --out o.csv", "--checkpoint is empty."),
    ("predict --checkpoint runs/dna-demo broken.yaml '' --out o.csv", "INPUT is empty."),
    ("predict --checkpoint runs/dna-demo broken.yaml --out ''", "--out is empty."),
    ("generate --checkpoint runs/dna-demo --out ''", "--out is empty."),
    ("generate --checkpoint runs/dna-demo --draft=", "--draft is empty."),
    ("fit --config ''", "--config is empty."),
    ("fit --config dna/demo --out ''", "--out is empty."),
    ("fit --resume ''", "--resume is empty."),
    ("test --checkpoint ''", "--checkpoint is empty."),
    ("sweep ''", "SWEEP.yaml is empty."),
    ("data audit ''", "CONFIG is empty."),
    ("runs ''", "FOLDER is empty."),
    ("audio/compare runs/dna-demo --out ''", "--out is empty."),
    ("bench decode --json . --picture ''", "--picture is empty."),
    ("bench decode --json '' --picture .", "--json is empty."),
    ("runs . ''", "FOLDER is empty."),
    # options
    ("fit --confg dna/demo", "there is no key or option '--confg'", "Did you mean '--config'?"),
    ("generate --chekpoint x", "there is no option --chekpoint", "Did you mean '--checkpoint'?"),
    ("test --chekpoint x", "there is no option --chekpoint", "Did you mean '--checkpoint'?"),
    ("predict --chekpoint=x in.txt --out o.csv", "there is no option --chekpoint", "Did you mean '--checkpoint'?"),
    ("serve --checkpont x", "there is no option --checkpont", "Did you mean '--checkpoint'?"),
    ("serve --checkpoint x --slot 3", "there is no option --slot", "Did you mean '--slots'?"),
    ("generate --check x", "there is no option --check", "Did you mean '--checkpoint'?"),
    ("bench decode --rep 3", "there is no option --rep", ""),
    ("import --chekpoint x --out y", "there is no option --chekpoint", "Did you mean '--checkpoint'?"),
    ("export --checkpoint x --uot y", "there is no option --uot", "Did you mean '--out'?"),
    ("data audit dna/demo --strct", "there is no key or option '--strct'", "Did you mean '--strict'?"),
    ("audio/score --generatd a --real b --classifier c", "no option --generatd", "Did you mean '--generated'?"),
    ("text/perplexity --chekpoint x y", "there is no option --chekpoint", "Did you mean '--checkpoint'?"),
    # keys
    ("fit --config dna/demo --model.backbon.n_layers 3", "Did you mean '--model.backbone.n_layers'?"),
    ("fit --config dna/demo --model.backbone.n_layer=3", "Did you mean '--model.backbone.n_layers'?"),
    ("fit --config dna/demo --model.n_layers 3", "Did you mean '--model.backbone.n_layers'?"),
    ("fit --config dna/demo --model.mixer.name mamba2 --model.mixer.head_dm 3", "Did you mean '--model.mixer.head"),
    ("fit --config dna/demo --data.lenght 3", "Did you mean '--data.length'?"),
    ("fit --config dna/demo --trainer.max_step 3", "Did you mean '--trainer.max_steps'?"),
    ("fit --config dna/demo --optimizer.lrr 3", "Did you mean '--optimizer.lr'?"),
    ("fit --config dna/demo --max_steps 3", "Did you mean '--trainer.max_steps'?"),
    ("fit --config dna/demo --data.batch_size 3", "Did you mean '--loader.batch_size'?", "Under data there is"),
    ("fit --config text/demo --data.batch_size 3", "Did you mean '--data.epoch_size'? Or '--loader.batch_size'?"),
    ("fit --config dna/demo --trainer.seed 3", "Did you mean '--seed'?"),
    ("fit --config dna/demo --trainer.foo 3", "there is no key or option '--trainer.foo'. Under trainer there is"),
    ("fit --config dna/demo --model.mixers.mlp.expnd 3", "Did you mean '--model.mixers.mlp.expand'?"),
    (
        "fit --config text/demo --model.mixer.name gla --model.mixer.normaliser 3",
        "Did you mean '--model.mixer.normalizer'?",
        "`mambaseq fit --config text/demo --model.mixer.name gla --help` lists",
    ),
    ("data audit dna/demo --data.lenght 3", "Did you mean '--data.length'?"),
    ("validate --config text/demo", "`mambaseq validate --checkpoint RUN`, the folder that `mambaseq fit"),
    ("test --checkpoint runs/dna-demo --data.lenght 3", "Did you mean '--data.length'?"),
]

WRITTEN = {
    "length": "data: {name: dna/species, lenght: 3}\n",
    "inner": "data: {name: dna/species, init_args: {batchsize: 3}}\n",
    "parts": "data: {name: dna/species}\nmodel: {backbon: {n_layers: 3}}\n",
    "mixers": "data: {name: dna/species}\nmodel: {mixers: {mamba2: {head_dm: 3}}}\n",
    "draft": "data: {name: dna/species}\ngeneration: {draft: {tokens: 99}}\n",
    "steps": "data: {name: dna/species}\ntrainer: {max_step: 3}\n",
    "named": "data: {name: dna/species}\nmodel: {mixer: {name: mambaa}}\n",
    "metric": "data: {name: dna/species}\nmetrics: [mcc, acuracy]\n",
    "optimizer": "data: {name: dna/species}\noptimizer: {name: adam}\n",
    "sweep": "config: dna/demo\ngrid: {data.lenght: [3, 4]}\n",
    "swept": "config: length.yaml\ngrid: {seed: [3, 4]}\n",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """Exit code and messages of each, in one process that cannot import PyTorch."""
    folder = tmp_path_factory.mktemp("told")
    run = folder / "runs" / "dna-demo"
    run.mkdir(parents=True)
    (folder / "published").mkdir()
    (folder / "published" / "config.json").write_text("{}")
    (run / "config.yaml").write_text("data: {name: dna/species}\n")
    (folder / "odd.yaml").write_text("data: {name: [a]}\nmodel: {head: {name: {b: 1}}}\n")
    (folder / "broken.yaml").write_text("data: [a\n")
    (folder / "unknown.yaml").write_text("data: {name: dna/species}\noptimiser: {lr: 1}\n")
    for name, text in WRITTEN.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "files.yaml").write_text("data: {name: dna/labelled, files: nowhere.csv}\n")
    for name in ("model/model.json", "model/model.safetensors", "checkpoints/last.ckpt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text('{"writer": "dna/fasta"}')
    code = f"""
import contextlib, io, json, sys
for name in ("torch", "pandas", "transformers", "scipy"):
    sys.modules[name] = None  # its import fails
from mambaseq.cli.main import main
found = []
for words in {[shlex.split(one[0]) for one in WORDS]!r}:
    with contextlib.redirect_stderr(io.StringIO()) as error:
        found.append((main(words), error.getvalue()))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    found: list[tuple[int, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("number", range(len(WORDS)), ids=[one[0][:80] for one in WORDS])
def test_what_is_misspelt_is_told_at_once(number: int, told: list[tuple[int, str]]) -> None:
    code, error = told[number]
    for message in WORDS[number][1:]:
        assert message in error
    assert code == 2
    assert error.count("\n") == 1


@pytest.mark.parametrize("key", ["trainer.foo", "data.x", "loader.shuffle", "model.mixer.foo"])
def test_a_key_that_is_like_no_other_is_not_said_to_be(key: str) -> None:
    """What keys of one section have in common does not make them alike."""
    with pytest.raises(ConfigError, match=f"no key or option '--{key}'. Under {key.rpartition('.')[0]} there is"):
        check_names([f"--{key}=1"], "mambaseq fit --config dna/demo", [], "dna/demo")


def test_every_key_of_a_configuration_may_be_given() -> None:
    """What sources tell of classes is all that the parser takes."""
    for entry in catalog()["configs"]:
        words = [f"--{key}=1" for key in keys_of(entry.name, []) if not key.endswith(".name")]
        check_names(words, "mambaseq fit", [], entry.name)


def test_keys_of_a_class_that_the_command_line_replaces(tmp_path: Path) -> None:
    """They are dropped; and the file may have keys of the class that is given."""
    file = tmp_path / "own.yaml"
    file.write_text("data: {name: dna/species}\nmodel: {encoder: {k: 6}, mixer: {name: mamba2, head_dim: 8}}\n")
    check_names(["--model.encoder.name", "dna/kmer", "--model.mixer.name=mamba"], "mambaseq fit", [], str(file))
    file.write_text("data: {name: dna/species}\nmodel: {mixer: {name: mamba2, head_dm: 8}}\n")
    with pytest.raises(ConfigError, match=r"no key 'model\.mixer\.head_dm'"):
        check_names(["--model.mixer.name=mamba"], "mambaseq fit", [], str(file))


@pytest.mark.parametrize("kind", ["datasets", "encoders", "backbones", "mixers", "heads"])
def test_arguments_in_sources_are_those_of_the_classes(kind: str) -> None:
    entries = [entry for entry in catalog()[kind] if not entry.target.startswith("tiny")]
    read = {entry.name: arguments_in(entry.target) for entry in entries}
    assert sum(names is not None for names in read.values()) > 0.8 * len(read)
    for entry in entries:
        if (names := read[entry.name]) is not None:
            assert names == set(arguments_of(entry.load())), entry.name


def test_sections_are_those_of_the_configuration() -> None:
    import lightning

    assert {name: kind.__name__ for name, kind in {**CLASSES, "trainer": lightning.Trainer}.items()} == {
        name: target.partition(":")[2] for name, target in SECTIONS.items()
    }
    for name, kind in {**CLASSES, "trainer": lightning.Trainer}.items():
        assert arguments_in(SECTIONS[name]) == set(arguments_of(kind)), name


def test_sources_that_do_not_say_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "told_of_sources"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "parts.py").write_text(
        "from elsewhere import Other\n"
        "class Base:\n    def __init__(self, a, *, b=1): ...\n"
        "class Inherits(Base): ...\n"
        "class HandsOn(Base):\n    def __init__(self, c, **options): ...\n"
        "class OfOthers(Other):\n    def __init__(self, c, **options): ...\n"
        "class Anything:\n    def __init__(self, **options): ...\n"
    )
    (package / "broken.py").write_text("class Base(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, names in {
        "parts:Base": {"a", "b"},
        "parts:Inherits": {"a", "b"},
        "parts:HandsOn": {"a", "b", "c"},
        "parts:OfOthers": None,
        "parts:Anything": None,
        "parts:Nothing": None,
        "broken:Base": None,
        "missing:Base": None,
    }.items():
        assert arguments_in(f"told_of_sources.{name}") == names, name
    assert arguments_in("no_such_package.parts:Base") is None
