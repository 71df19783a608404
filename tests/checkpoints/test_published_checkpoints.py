"""Published checkpoints as runs, and runs as folders that transformers loads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tokenizers
import torch
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer
from pages import blocks, run_cell
from safetensors.torch import load_file, save_file

import mambaseq as ms
from mambaseq.checkpoints import LoadedModel, ModelCard, load_model, save_model
from mambaseq.checkpoints.beginning import load_source
from mambaseq.checkpoints.hub import from_pretrained
from mambaseq.checkpoints.to_transformers import save_transformers
from mambaseq.checkpoints.upstream import load_upstream, options_from_config
from mambaseq.cli.main import main
from mambaseq.errors import UserError
from mambaseq.models import causal_lm
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.published import import_checkpoint

transformers = pytest.importorskip("transformers")

_NEW = int(transformers.__version__.partition(".")[0]) >= 5
PAGE = Path(__file__).parents[2] / "docs" / "text" / "checkpoints.md"
TEXT = "the cat sat on the mat, and the dog sat on the log. "
KINDS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "use_conv_bias": False},
    "falcon_mamba": {"state_size": 4, "mixer_rms_eps": 1e-3, "tie_word_embeddings": False, "use_bias": True},
    "mamba2": {"state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 2, "tie_word_embeddings": False},
}
BAMBA = {
    **{"num_hidden_layers": 3, "attn_layer_indices": [1], "intermediate_size": 40, "rms_norm_eps": 1e-4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "rope_theta": 100.0},
}
KINDS["bamba"] = BAMBA
PUBLISHERS = "Download them again, .* compare their SHA-256 with the publisher's"
CLASSES = {"bamba": "Bamba", "mamba": "Mamba", "falcon_mamba": "FalconMamba", "mamba2": "Mamba2"}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BPE tokenizer of 117 ids, that puts a mark before a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>"], show_progress=False)
    made.train_from_iterator([TEXT, *map(chr, range(32, 127))], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": "{{ messages }}"}))
    return folder


def made(kind: str, folder: Path, tokenizer: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers with random weights, in a folder."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(3)
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**{**sizes, **KINDS[kind]})
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may hide behind an initial value
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype)
    model.save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return model


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, **given)[0].tolist()


def opened(folder: Path) -> Any:
    """A folder as transformers loads it, in the dtype that it names."""
    key = "dtype" if _NEW else "torch_dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{key: "auto"})


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if kind in ("mamba2", "bamba") and not _NEW:
        pytest.skip("transformers before 5 norms all groups of heads as one, which mamba-ssm and later ones do not")
    theirs = made(kind, tmp_path / "theirs", tokenizer_file)
    run, back = tmp_path / "run", tmp_path / "back"
    assert main(["import", "--checkpoint", str(tmp_path / "theirs"), "--out", str(run)]) == 0
    assert "11 of the 128 ids are padding" in capsys.readouterr().out
    loaded = load_model(run)
    tokenizer = loaded.tokenizer
    assert isinstance(tokenizer, HFTokenizer)
    assert (tokenizer.bos, tokenizer.eos) == ("<s>", "</s>")
    ids = torch.from_numpy(tokenizer.encode("the dog").astype("int64"))[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert ((loaded.model(ids).logits - expected).norm() / expected.norm()) <= 1e-5
    if kind == "bamba":  # the description with most in it; others are evaluated and trained in the next test
        settings = parse_config(str(run / "config.yaml"), []).settings
        assert settings["model"]["mixers"]["attention"]["rope_dims"] == 4
    ours = ms.generate(loaded.model, ids, 6, temperature=0)[0].tolist()
    assert ours == greedy(theirs, ids)

    assert main(["export", "--checkpoint", str(run), "--format", "transformers", "--out", str(back)]) == 0
    again = opened(back)
    assert type(again) is type(theirs)
    named = transformers.AutoTokenizer.from_pretrained(back)
    assert named("the dog")["input_ids"] == ids[0].tolist()
    assert named.chat_template == "{{ messages }}"
    assert greedy(again, ids) == ours
    assert again.generation_config.eos_token_id == 1
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    assert main(["import", "--checkpoint", str(back), "--out", str(tmp_path / "run2")]) == 0
    first, second = (load_file(path / "model" / "model.safetensors") for path in (run, tmp_path / "run2"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((run / "model" / "model.json").read_text())["spec"] == load_model(tmp_path / "run2").card.spec


def test_a_run_is_evaluated_predicted_and_trained_further(tokenizer_file: Path, tmp_path: Path) -> None:
    made("mamba", tmp_path / "theirs", tokenizer_file)
    run, texts = tmp_path / "run", tmp_path / "texts.txt"
    assert main(["import", "--checkpoint", str(tmp_path / "theirs"), "--out", str(run), "--length", "32"]) == 0
    texts.write_text(TEXT * 40)
    found = ms.load(run).evaluate("test", progress=False, **{"data.files": str(texts)})
    assert found["test/bits_per_byte"] > 1
    table = ms.load(run).predict(texts)
    assert main(["generate", "--checkpoint", str(run), "--prompt", "the dog", "--max-new-tokens", "2", "--out",
                 str(tmp_path / "out.txt")]) == 0  # fmt: skip
    assert (tmp_path / "out.txt").read_text().startswith("the dog")
    assert table is not None
    assert len(table) == 1
    tuned = ms.fit(
        str(run / "config.yaml"), out=tmp_path / "tuned", progress=False,
        settings={"data.files": str(texts), "trainer.max_steps": 1, "optimizer.lr": 0.0, "optimizer.weight_decay": 0.0,
                  "optimizer.warmup_steps": 0, "trainer.val_check_interval": 1, "trainer.limit_val_batches": 1},
    )  # fmt: skip
    ours, theirs = (load_model(folder).model.state_dict() for folder in (tuned.path, run))
    assert torch.equal(ours["backbone.layers.1.mixer.A_log"], theirs["backbone.layers.1.mixer.A_log"])
    assert torch.equal(ours["encoder.embedding.weight"], theirs["encoder.embedding.weight"][:117])


def test_dtypes_are_kept_or_converted(tokenizer_file: Path, tmp_path: Path) -> None:
    theirs = made("mamba", tmp_path / "theirs", tokenizer_file, torch.bfloat16)
    for dtype, want in (("keep", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        run, back = tmp_path / dtype, tmp_path / f"{dtype} back"
        assert main(["import", "--checkpoint", str(tmp_path / "theirs"), "--out", str(run), "--dtype", dtype]) == 0
        assert {tensor.dtype for tensor in load_file(run / "model" / "model.safetensors").values()} == {want}
        save_transformers(load_model(run), back, shard_bytes=9000)
        assert len(list(back.glob("model-*.safetensors"))) > 2
        assert opened(back).dtype == want
    state = opened(tmp_path / "keep back").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())


def test_a_checkpoint_without_a_tokenizer(tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made("mamba", tmp_path / "theirs")
    run = tmp_path / "run"
    assert main(["import", "--checkpoint", str(tmp_path / "theirs"), "--out", str(run)]) == 0
    assert "no tokenizer came with it, so generate, predict and serve cannot read text. What works: fit" in (
        capsys.readouterr().out
    )
    assert main(["generate", "--checkpoint", str(run), "--prompt", "the", "--out", str(tmp_path / "out.txt")]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["predict", "--checkpoint", str(run), str(tmp_path / "text.txt"), "--out", str(tmp_path / "o.csv")])
    assert "has no tokenizer, so it reads" in capsys.readouterr().err
    assert main(["test", "--checkpoint", str(run)]) == 2
    told = capsys.readouterr().err
    for part in ("holds a model without a run", "--tokenizer FILE", f"--init-from {run}"):
        assert part in told
    _, bare = load_source(run, HFTokenizer(str(tokenizer_file / "tokenizer.json")))
    assert bare  # so that a vocabulary without the padding takes its rows
    assert "since the model has none: give it ids" in save_transformers(load_model(run), tmp_path / "back")[0]
    assert not (tmp_path / "back" / "tokenizer.json").exists()
    given = ["import", "--checkpoint", str(tmp_path / "theirs"), "--out", str(tmp_path / "with"), "--tokenizer"]
    assert main([*given, str(tokenizer_file)]) == 0
    assert load_model(tmp_path / "with").tokenizer.vocab_size == 117  # type: ignore[union-attr]
    assert main([*given[:-2], str(run), *given[-1:], str(tokenizer_file)]) == 2
    assert "is there already" in capsys.readouterr().err


def small_tokenizer(folder: Path, size: int) -> None:
    words = {f"w{number}": number for number in range(size)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: small_tokenizer(folder, 200), r"makes 200 ids, but the model's vocabulary has 128"),
        (lambda folder: spoiled(folder, torch.nan), rf"not finite numbers \(in backbone\.layers\.0.*{PUBLISHERS}"),
        (lambda folder: spoiled(folder, -torch.inf), rf"not finite numbers \(in backbone\.layers\.0.*{PUBLISHERS}"),
        (lambda folder: without(folder), rf"layers\.1\.mixer\.D is missing\. {PUBLISHERS}"),
        (
            lambda folder: parts(folder)[1].write_bytes(b"\x00" * 40),
            rf"model-2\.safetensors cannot be read.*{PUBLISHERS}",
        ),
        (lambda folder: cut(parts(folder)[1]), r"model-2\.safetensors cannot be read"),
        (lambda folder: parts(folder)[1].unlink(), r"names 'model-2\.safetensors', which is no file beside it"),
        (lambda folder: renamed(folder, "jamba"), r"a 'jamba' model, a hybrid of Mamba, attention and mixtures"),
        (lambda folder: renamed(folder, "granitemoehybrid"), r"'granitemoehybrid' model, a hybrid with multipliers"),
        (lambda folder: renamed(folder, "llama"), r"a 'llama' model; only"),
        (
            lambda folder: eight_bits(folder),
            r"'backbone.embeddings.weight' is int8: the weights are quantised, and only",
        ),
        (
            lambda folder: packed(folder),
            r"proj.weight' is uint8: the weights are quantised \(quantization_config in config.json: 'hqq'\)",
        ),
    ],
    ids=[
        "vocabulary",
        "nan",
        "infinite",
        "missing tensor",
        "zeroed",
        "truncated",
        "missing part",
        "jamba",
        "granite",
        "llama",
        "8 bits",
        "packed",
    ],
)
def test_bad_checkpoints_are_refused(spoil: Any, told: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    made("mamba", folder)
    spoil(folder)
    with pytest.raises(UserError, match=told) as error:
        import_checkpoint(folder, tmp_path / "run")
    assert len(str(error.value)) < 1000
    assert "optimizer.lr" not in str(error.value)  # the user did not train it
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "name", "lacks"),
    [
        ("mamba", "backbone.layers.1.mixer.D", "backbone.layers.1.mixer.D is missing"),
        # a part of what is one tensor here
        ("bamba", "model.layers.1.self_attn.k_proj.weight", "but no 'model.layers.1.self_attn.k_proj.weight'"),
        ("bamba", "model.layers.0.mamba.dt_bias", "backbone.layers.0.mixer.dt_bias is missing"),
    ],
)
@pytest.mark.parametrize("listed", [None, True, False], ids=["one file", "listed", "not listed"])
def test_a_tensor_that_is_missing_is_told_with_the_file_that_should_hold_it(
    kind: str, name: str, lacks: str, listed: bool | None, tmp_path: Path
) -> None:
    made(kind, tmp_path)
    file, held = tmp_path / "model.safetensors", tmp_path / "model.safetensors"
    if listed is not None:
        parts(tmp_path)
        held = tmp_path / "model.safetensors.index.json"
        places = json.loads(held.read_text())["weight_map"]
        file = tmp_path / places[name]
        if not listed:
            del places[name]
            held.write_text(json.dumps({"weight_map": places}))
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load_upstream(tmp_path)
    told = str(error.value)
    if listed:
        assert told.startswith(f"{file} has no tensor '{name}', although model.safetensors.index.json says so. ")
    else:
        assert told.startswith(f"The weights in {held} ")
        assert lacks in told
    assert re.search(PUBLISHERS, told)


def test_a_quantisation_that_the_weights_do_not_have_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = made("mamba", tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "plain")
    assert not caplog.messages
    changed(tmp_path / "theirs", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    found = import_checkpoint(tmp_path / "theirs", tmp_path / "run")
    assert caplog.messages == [
        f"{tmp_path / 'theirs' / 'config.json'} has a quantization_config ('bitsandbytes'), but the weights beside "
        "it are not quantised: it is left out."
    ]
    ids = torch.arange(8)[None]
    assert torch.allclose(found.model.model(ids).logits, theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn'"),
        ({"attn_layer_indices": [9]}, r"attn_layer_indices must be numbers of the 3 layers"),
        ({"mamba_d_state": None}, "mamba_d_state must be a whole number"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"time_step_limit": [0.0, 1.0]}, "limits its step sizes"),
    ],
)
def test_hybrids_that_are_not_computed(change: dict[str, Any], told: str) -> None:
    config = {
        "model_type": "bamba",
        "vocab_size": 128,
        "hidden_size": 32,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        **BAMBA,
    }
    assert options_from_config(config)["mixers"]["attention"]["rope_dims"] == 4
    with pytest.raises(UserError, match=told):
        options_from_config(config | change)


def spoiled(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.0.mixer.D"][3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.layers.1.mixer.D"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def packed(folder: Path) -> None:
    """Matrices of layers as two numbers of 4 bits a byte."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers." in name and name.endswith("proj.weight"):
            tensors[name] = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed(folder, quantization_config={"quant_method": "hqq"})


def eight_bits(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.embeddings.weight"] = tensors["backbone.embeddings.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def parts(folder: Path) -> list[Path]:
    """The weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [folder / f"model-{number}.safetensors" for number in (1, 2)]
    places = {name: files[place % 2].name for place, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file.name}, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def renamed(folder: Path, kind: str) -> None:
    changed(folder, model_type=kind)


def changed(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_models_without_such_a_form_are_refused_by_name(tmp_path: Path) -> None:
    half = {"rope_dims": 8}
    for options, told in (
        ({"mixer": "s4d"}, "mixer of layer 0 is a S4D"),
        (
            {"pattern": ["mamba", "wide"], "mixers": {"wide": {"name": "mamba", "d_state": 4}}},
            "layer 1 has other sizes",
        ),
        ({"pattern": ["mamba2", "attention"], "mlp": True}, "layer 2 turns 16 of 16 features, and Bamba's half"),
        ({"pattern": ["mamba2", "attention"], "mlp": True, "mixers": {"attention": half | {"window": 4}}}, "a window"),
        ({"pattern": ["mamba2", "attention"], "mlp": False, "mixers": {"attention": half}}, "layer 1 is a Attention"),
        ({"pattern": ["mamba2*"], "mlp": True}, "share a mixer"),
        ({"mixer": "mamba", "mlp": True}, "layer 0 is a Mamba, not mamba2 or attention"),
        ({"mixer": "mamba2", "mlp": True, "mixers": {"mlp": {"activation": "gelu"}}}, "activation gelu"),
    ):
        model = causal_lm(vocab_size=256, d_model=16, n_layers=2, **options)  # type: ignore[arg-type]
        card = ModelCard(model.spec or {}, {"name": "text/bytes", "options": {}}, task="next_token")
        save_model(tmp_path / "m", model, card, ByteTokenizer())
        with pytest.raises(UserError, match=f"cannot be written as a published Mamba.*{told}"):
            save_transformers(load_model(tmp_path / "m"), tmp_path / "out")
    card.task = "masked"
    with pytest.raises(UserError, match="trained for 'masked'"):
        save_transformers(LoadedModel(model, card, None, tmp_path / "x"), tmp_path / "out")


@pytest.mark.parametrize("marks", [{}, {"bos": True, "eos": True}])
def test_bytes_have_a_form_for_transformers(marks: dict[str, bool], tmp_path: Path) -> None:
    ours = ByteTokenizer(**marks)
    ours.save_for_transformers(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(map(chr, range(1, 300))) + " \n\t€ 𝄞  x"
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text)[1 if marks else 0 :].tolist()
    assert theirs.decode(ids) == text
    assert len(theirs) == ours.vocab_size


def test_by_its_name_on_the_hub(tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tokenizer of its own, as state-spaces publishes it."""
    hub = tmp_path / "hub"
    theirs = made("mamba", hub / "state-spaces" / "mamba-tiny")
    parts(hub / "state-spaces" / "mamba-tiny")
    shutil.copytree(tokenizer_file, hub / "EleutherAI" / "gpt-neox-20b")
    asked: list[str] = []

    def hf_hub_download(repo_id: str, filename: str, **_: Any) -> str:
        asked.append(filename)
        if not (hub / repo_id / filename).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(f"no {filename}")
        return str(hub / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert main(["import", "--checkpoint", "state-spaces/mamba-tiny", "--out", str(tmp_path / "run")]) == 0
    assert "pytorch_model.bin" not in asked
    assert load_model(tmp_path / "run").tokenizer is not None
    loaded = from_pretrained("state-spaces/mamba-tiny")
    ids = torch.arange(8)[None]
    assert torch.allclose(loaded.model(ids).logits, theirs(ids).logits, atol=1e-4)
    told = r"The model \(model\.json, or .*config\.json\) of 'me/none' cannot be downloaded .*: no config\.json"
    with pytest.raises(UserError, match=told):
        from_pretrained("me/none")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [(text, line) for language, text, line in blocks(PAGE) if language == "python"]
    assert cells
    for text, line in cells:
        run_cell(text, PAGE, line, {})
