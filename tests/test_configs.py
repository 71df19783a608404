"""Every shipped configuration is registered, parsed, built and stepped at tiny size; laws 2 and 3 for its model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mambaseq_audio.recipes import sc09, youtubemix

from mambaseq.cli.main import main
from mambaseq.domain import catalog
from mambaseq.models import SequenceModel, build_model
from mambaseq.resources import find, share
from mambaseq.runs.naming import read_layers
from mambaseq.runs.parsing import parse_config

ALIKE = {"dna/five_species": "dna/great_apes"}  # but for their data, which are not here
BASES = {"text": "demo", "dna": "genome", "audio": "digits"}
TODAY = ("mamba3", "gated_delta", "kda", "gla")
MIXERS = {f"{domain}/{mixer}": f"{domain}/{base}" for domain, base in BASES.items() for mixer in TODAY}  # but for these
SHORTER = MIXERS.keys() - {"text/gla"}  # which has MLPs behind its mixers
# of data that are not here either: set up, built and stepped with their recipes (tests/audio/test_published_audio.py,
# tests/text/test_text_configs.py)
OF_RECIPES = {f"text/{name}" for name in ("pile", "slimpajama", "fineweb_edu", "wikitext103", "chat")}
OF_RECIPES |= {variant.config for variant in (*sc09.TABLE_4, *sc09.TABLE_5)}
OF_RECIPES |= {variant.config for variant in (*youtubemix.FIGURE_7, *youtubemix.LEFT, *youtubemix.RIGHT)}
# on several processes: tests/tasks/test_split_over_processes.py
SEVERAL = {"text/ddp_context", "text/ddp_context_chunks", "text/fsdp2_context"}
NAMES = [
    entry.name
    for entry in catalog()["configs"]
    if entry.target.startswith("mambaseq:") and entry.name not in ALIKE.keys() | SHORTER | OF_RECIPES | SEVERAL
]
SMALL = {
    "--model.d_model": "16",
    "--model.backbone.n_layers": "2",
    "--loader.batch_size": "2",
    "--loader.num_workers": "0",
    "--trainer.max_steps": "2",
    "--trainer.accelerator": "cpu",
    "--trainer.devices": "1",
    "--trainer.precision": "32-true",
    "--trainer.limit_val_batches": "2",
    "--trainer.val_check_interval": "2",
    "--trainer.enable_progress_bar": "false",
    "--length_warmup.start": "0",
}


OTHERWISE = {  # data whose length is not a setting of its own
    "synthetic/digits": {},
    "synthetic/pathfinder": {"--data.size": "12"},
}
STAND_INS = {  # for genomes that users fetch
    "dna/hg38": {"--data.fasta": "null", "--data.intervals": "null", "--data.extend": "none"},
    "dna/great_apes": {
        "--data.species": "{a: mambaseq:data/encode/human.*, b: mambaseq:data/encode/dog.*}",
        "--data.test_records": "*.ENm002.*",
        "--data.validation_records": "null",
        "--data.train_records": "null",
        "--data.n_validation": "4",
        "--trainer.accumulate_grad_batches": "1",
    },
}


AS_IT_IS = {  # a model that begins from one that ships
    "dna/finetune": {"--model.d_model": "128", "--model.backbone.n_layers": "4", "--data.length": "null"},
}


def small(name: str) -> list[str]:
    settings = SMALL | OTHERWISE.get(name, {"--data.length": "96"}) | STAND_INS.get(name, {}) | AS_IT_IS.get(name, {})
    return [f"{key}={value}" for key, value in settings.items()]


def model_of(name: str) -> SequenceModel:
    settings = parse_config(name, small(name))
    data = settings.make_data()
    data.setup()
    torch.manual_seed(0)
    return build_model(settings.model_spec(data)).eval()


def test_every_file_is_registered() -> None:
    """Or is a part that lies over the base of one that is."""
    files = [find(entry.target) for entry in catalog()["configs"]]
    read = {path.resolve() for file in files for path, _ in read_layers(file)}
    registered = {file.resolve() for file in files}
    shipped = {path.resolve() for path in (share() / "configs").rglob("*.yaml")}
    assert shipped <= read
    assert {path.parent.name for path in shipped - registered} == {"parts"}


@pytest.mark.parametrize("name", ALIKE)
def test_it_differs_in_its_data_alone(name: str) -> None:
    one, other = (parse_config(config, []).settings for config in (name, ALIKE[name]))
    assert one["data"].keys() == other["data"].keys()
    assert {key: value for key, value in one.items() if key != "data"} == {
        key: value for key, value in other.items() if key != "data"
    }


@pytest.mark.parametrize("name", MIXERS)
def test_it_differs_in_its_mixer_alone(name: str) -> None:
    """With what follows it in its published block. The laws hold for it; it can be made."""
    one, other = (parse_config(config, []).settings for config in (name, MIXERS[name]))
    mixer = one["model"].pop("mixer")
    assert mixer != other["model"].pop("mixer")
    kind = catalog()["mixers"].get(mixer.pop("name"))
    assert one["model"].pop("mixers", {}).keys() == {kind.companion} - {None}
    assert one == other
    with torch.device("meta"):
        kind(one["model"]["d_model"], **mixer)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_built_and_stepped(name: str, tmp_path: Path) -> None:
    assert main(["fit", "--config", name, "--out", str(tmp_path / "run"), *small(name)]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["text/demo", "audio/demo"])
def test_validation_of_a_demo_does_not_grow_with_its_files(name: str) -> None:
    """They are the first that is trained on files of one's own, as many as there are: at most a batch is validated for
    every two that are trained on, and of the files that ship all are."""
    run = parse_config(name, [])
    trainer = run.trainer
    batches = trainer["limit_val_batches"]
    assert batches <= trainer["val_check_interval"] / 2
    data = run.make_data()
    data.setup()
    assert len(data.validation()) <= batches * run.settings["loader"]["batch_size"]


def test_the_configuration_in_the_readme_of_dna(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "domains" / "mambaseq_dna" / "README.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"^```yaml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    path = tmp_path / "apes.yaml"
    path.write_text(written, encoding="utf-8")
    settings = parse_config(str(path), ["--model.d_model=8"])
    data = settings.make_data()  # its genomes are not here, so it is not set up
    settings.make_metrics(data)
    inputs = torch.randint(0, 4, (1, 50))
    assert build_model(settings.model_spec(data))(inputs).logits.shape == (1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_full_chunked_and_stepped_models_agree(name: str) -> None:
    model = model_of(name)
    if not model.head.per_token:
        pytest.skip("a classifier has one output a sequence")
    if not model.backbone.causal:
        pytest.skip("a model of both sides is not stepped")
    vocabulary = model.head.n_labels or model.head.linear.out_features
    codes = [model.head.codes] if model.head.codes else []
    ids = torch.randint(0, vocabulary, (2, 40, *codes))
    table, condition = model.encoder.condition, None
    if table is not None:
        condition = (
            torch.tensor([0, 1]) if table.single else torch.tensor([[0] * len(table.sizes), [1] * len(table.sizes)])
        )
    with torch.no_grad():
        full = model(ids, condition=condition).logits
        one = model(ids[:, :17], condition=condition, return_state=True)
        two = model(ids[:, 17:], condition=condition, state=one.state)
        torch.testing.assert_close(torch.cat([one.logits, two.logits], 1), full, atol=2e-5, rtol=1e-4)
        state = model.init_state(2)
        steps = [model.step_(ids[:, t], state, condition) for t in range(40)]
        told = model.told(model.backbone(model.encoder(ids, condition)))
        torch.testing.assert_close(torch.stack(steps, 1), told, atol=2e-5, rtol=1e-4)
        bounds = torch.tensor([0, 40, 80], dtype=torch.int32)
        packed = model(ids.flatten(0, 1)[None], condition=condition, cu_seqlens=bounds).logits
        torch.testing.assert_close(packed.reshape(full.shape), full, atol=2e-5, rtol=1e-4)
        changed = ids.clone()
        changed[:, 25] = (changed[:, 25] + 1) % vocabulary
        other = model(changed, condition=condition).logits
        torch.testing.assert_close(other[:, :25], full[:, :25], atol=2e-5, rtol=1e-4)
        assert not torch.equal(other[:, 25:], full[:, 25:])


def test_masked_pretraining_says_the_same_of_either_strand() -> None:
    """The mask token, which the tokenizer has not, is its own partner; law 5 with it, and both sides are seen."""
    model, settings = model_of("dna/masked"), parse_config("dna/masked", small("dna/masked"))
    partner = torch.tensor(settings.make_data().complement)
    assert partner.tolist() == [3, 2, 1, 0, 4, 5]
    ids = torch.randint(0, 4, (2, 40))
    ids[:, 7:11] = 5
    with torch.no_grad():
        one, other = model(ids).logits, model(partner[ids].flip(1)).logits
        torch.testing.assert_close(other.flip(1)[..., partner], one, atol=2e-5, rtol=1e-4)
        for place in (3, 30):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % 4
            assert not torch.equal(model(changed).logits[:, 9], one[:, 9])
