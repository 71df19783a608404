"""Published models of DNA give the outputs of their definitions (`published_definitions`); what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from mambaseq_dna.published.command import import_published
from mambaseq_dna.published.folders import read_published
from published_definitions import (
    CAUSAL,
    IDS,
    MASK,
    MASKED,
    STATES,
    WIDTH,
    Weights,
    caduceus,
    caduceus_by_definition,
    hyenadna,
    hyenadna_by_definition,
    some,
    write,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambaseq.checkpoints import load_model, load_upstream
from mambaseq.cli.main import main
from mambaseq.errors import UserError


def close(actual: Tensor, expected: Tensor) -> None:
    error = float((actual - expected).norm() / expected.norm())
    assert error <= 2e-6, error


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional_strategy": "ew_multiply", "bidirectional_weight_tie": False, "rms_norm": False},
        {"bidirectional": False},
        {"rcps": True, "ssm_cfg": {"d_state": STATES, "bias": True}},
        {"rcps": True, "bidirectional": False},
        {"rcps": True, "fused_add_norm": True, "ssm_cfg": {"d_state": STATES, "bias": True}, "rms_norm": False},
        {"rcps": True, "fused_add_norm": True, "n_layer": 3, "bidirectional_weight_tie": False},
    ],
)
@torch.no_grad()
def test_caduceus(tmp_path: Path, options: dict[str, Any]) -> None:
    config, weights = caduceus(**options)
    ids = torch.randint(0, 12, (2, 23))
    logits, hidden = caduceus_by_definition(config, weights, ids)
    found = read_published(write(tmp_path / "theirs", config, weights, shared=len(options) != 2))
    assert found.kind == f"Caduceus-{'PS' if config['rcps'] else 'Ph'}"
    assert (found.task, found.length) == ("masked", 131_072)
    ours = torch.tensor(MASKED)[ids]
    close(found.model(ours).logits[..., MASKED], logits)
    own = found.model.backbone(found.model.encoder(ours))
    if config["rcps"]:  # the second strand's channels run backwards there
        own = torch.cat([own[..., :WIDTH], own[..., WIDTH:].flip(-1)], -1)
    close(own, hidden)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["caduceus", "hyenadna"])
@torch.no_grad()
def test_on_a_gpu(tmp_path: Path, kind: str) -> None:
    config, weights = caduceus(rcps=True, fused_add_norm=True) if kind == "caduceus" else hyenadna()
    ids = torch.randint(0, 12, (2, 34))
    definition: Any = caduceus_by_definition if kind == "caduceus" else hyenadna_by_definition
    places = MASKED if kind == "caduceus" else CAUSAL
    found = read_published(write(tmp_path / "theirs", config, weights)).model.cuda()
    logits = found(torch.tensor(places)[ids].cuda()).logits.cpu()[..., places]
    expected = definition(config, weights, ids)[0]
    assert float((logits - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"train_freq": False}])
@torch.no_grad()
def test_hyenadna(tmp_path: Path, options: dict[str, Any]) -> None:
    config, weights = hyenadna(**options)
    ids = torch.randint(0, 12, (2, 34))
    logits, streams = hyenadna_by_definition(config, weights, ids)
    found = read_published(write(tmp_path / "theirs", config, weights, shared=not options))
    ours, backbone = torch.tensor(CAUSAL)[ids], found.model.backbone
    assert (found.kind, found.task, found.length) == ("HyenaDNA", "next_token", 34)
    close(found.model(ours).logits[..., CAUSAL], logits)
    seen: list[Tensor] = []
    for layer in backbone.layers[1::2]:  # a Hyena and an MLP are one layer there
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0] + output[1]))
    last = backbone(found.model.encoder(ours))
    for one, expected in zip([*seen, last], streams, strict=True):
        close(one, expected)
    state = found.model.init_state(2)
    close(torch.stack([found.model.step_(ours[:, t], state) for t in range(34)], 1)[..., CAUSAL], logits)
    # tied: the head's weight may be left out, or be there and the same
    weights["lm_head.weight"] = weights["hyena.backbone.embeddings.word_embeddings.weight"]
    tied = read_published(write(tmp_path / "tied", config | {"tie_word_embeddings": True}, weights, shared=False))
    close(tied.model(ours).logits[..., CAUSAL], hyenadna_by_definition(config, weights, ids)[0])


BASES = "ACGTNNACCGTAGGATTACAGATTACACCGGTTTAACG"[:33]


@torch.no_grad()
def expected_bits(kind: str, config: dict[str, Any], weights: Weights) -> float:
    """Mean bits of the bases that are no N: each given those before it, or those that are not hidden with it."""
    ids = torch.tensor([[IDS[letter] for letter in BASES]])
    if kind == "hyenadna":
        losses = F.cross_entropy(hyenadna_by_definition(config, weights, ids)[0][0, :-1], ids[0, 1:], reduction="none")
        return float(losses[ids[0, 1:] != IDS["N"]].mean()) / math.log(2)
    losses = torch.zeros(len(BASES))
    for first in range(7):
        hidden = ids.clone()
        hidden[:, first::7] = MASK
        found = F.cross_entropy(caduceus_by_definition(config, weights, hidden)[0][0], ids[0], reduction="none")
        losses[first::7] = found[first::7]
    return float(losses[ids[0] != IDS["N"]].mean()) / math.log(2)


@pytest.mark.parametrize("kind", ["caduceus", "hyenadna"])
def test_an_imported_model_predicts_embeds_and_is_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "cache"))
    config, weights = caduceus(rcps=True, fused_add_norm=True) if kind == "caduceus" else hyenadna()
    lines = (Path(__file__).parents[2] / "docs" / "dna" / "published_models.md").read_text().splitlines()
    import_, bits_, vectors_, ratios_, fit = [line.split()[1:] for line in lines if line.startswith("    mambaseq ")]
    folder = write(tmp_path / import_[1], config, weights)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    assert main(import_) == 0
    told = capsys.readouterr().out
    assert told.startswith("caduceus: Caduceus-PS, " if kind == "caduceus" else "caduceus: HyenaDNA, ")
    Path("genome.fa").write_text(f">one\n{BASES}\n")
    assert [main([*command, "--device", "cpu"]) for command in (bits_, vectors_)] == [0, 0]
    bits = pandas.read_csv("bits.csv")["bits_per_token"]
    assert bits.tolist() == pytest.approx([expected_bits(kind, config, weights)], rel=1e-5)
    ids = torch.tensor([[IDS[letter] for letter in BASES]])
    with torch.no_grad():
        if kind == "caduceus":
            one, two = caduceus_by_definition(config, weights, ids)[1][0].mean(0).chunk(2)
            mean = torch.cat([one, two.flip(0)])
        else:
            mean = hyenadna_by_definition(config, weights, ids)[1][-1][0].mean(0)
    found = pandas.read_csv("vectors.csv")[[f"embedding_{number}" for number in range(1, len(mean) + 1)]]
    np.testing.assert_allclose(found.to_numpy()[0], mean.numpy(), rtol=1e-4, atol=1e-5)
    if kind == "caduceus":
        Path("calls.vcf").write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\none\t17\t.\tT\tA\n")
        assert main([*ratios_, "--window", str(len(BASES)), "--device=cpu"]) == 0
        ids[0, 16] = MASK
        with torch.no_grad():
            logits = caduceus_by_definition(config, weights, ids)[0][0, 16]
        ratio = float(logits[IDS["A"]] - logits[IDS["T"]])
        assert pandas.read_csv("ratios.csv")["llr"].tolist() == pytest.approx([ratio], rel=1e-4)
    # every weight, and the rows of the bases and of the mask token, go on
    Path("genome.fa").write_text(">long\n" + "ACGTTGCAGATTACA" * 60 + "\n")
    fit += ["--trainer.accelerator=cpu", "--optimizer.lr=0", "--data.length=32", "--trainer.max_steps=1"]
    fit += ["--trainer.val_check_interval=1", "--trainer.limit_val_batches=1", "--loader.batch_size=2"]
    assert main(fit) == 0
    source, after = load_model("caduceus").model.state_dict(), load_model("further").model.state_dict()
    rows = [0, 1, 2, 3, 4, *([15] if kind == "caduceus" else [])]
    for name, tensor in source.items():
        wanted = tensor[rows] if name in ("encoder.embedding.weight", "head.linear.weight") else tensor
        assert torch.equal(after[name], wanted), name


def test_a_folder_for_the_usual_loader_says_which_command_imports_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a 'caduceus' model.*mambaseq dna/import"):
        load_upstream(write(tmp_path / "theirs", *caduceus()))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "esm", "architectures": ["EsmForMaskedLM"]}, "holds a Nucleotide Transformer or another ESM"),
        (
            {"model_type": "bert", "auto_map": {"AutoModel": "zhihan1996/DNABERT-2-117M--bert_layers.BertModel"}},
            "holds a DNABERT-2",
        ),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "holds a BERT"),
        ({"model_type": "stripedhyena", "architectures": ["StripedHyenaModelForCausalLM"]}, "holds an Evo"),
        ({"model_type": "mamba", "hidden_size": 8}, "holds a Mamba. A Mamba or Mamba-2 needs no import"),
        ({"d_model": 8, "layer": {"_name_": "hyena", "l_max": 1026}}, "HyenaDNA in its first form.*ends with -hf"),
        ({"model_type": ["caduceus"]}, "unknown here"),
        ({"model_type": "gpt2"}, "describes a 'gpt2' model, which is unknown here.*Caduceus-Ph and Caduceus-PS"),
        ([], "holds one list instead of"),
    ],
)
def test_other_models_are_named(tmp_path: Path, config: Any, told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told) as error:
        read_published(tmp_path)
    assert len(str(error.value)) < 1000


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_bad_folders_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stem = "caduceus.backbone.layers.1.mixer.mamba_"
    normed = "hyena.backbone.layers.0."
    quantised = {"quantization_config": {"quant_method": "mine"}}
    cases: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
        (caduceus, {}, {f"{stem}rev.A_log": None}, f"has no tensor '{stem}rev.A_log'"),
        (caduceus, {}, {"score.weight": some(2, WIDTH)}, r"does not speak of: score\.weight"),
        (caduceus, {}, {f"{stem}fwd.D": some(3)}, rf"'{stem}fwd.D' is \(3,\), but by the config.json it is \(32,\)"),
        (caduceus, {}, {f"{stem}rev.in_proj.weight": some(64, WIDTH)}, "differ, but the config.json makes them one"),
        (caduceus, {}, {"lm_head.weight": some(16, WIDTH)}, "'lm_head.weight' and .* differ"),
        (caduceus, {}, {f"{stem}fwd.D": torch.full((32,), torch.nan)}, "not finite numbers.*compare their SHA-256"),
        (caduceus, quantised, {f"{stem}fwd.D": torch.ones(32, dtype=torch.int8)}, rf"{stem}fwd.D' is int8: .*'mine'"),
        (caduceus, {"n_layer": 10**7}, {}, "n_layer asks for 10,000,000 layers"),
        (caduceus, {"d_model": 10**9}, {}, "by the config.json it is"),
        (caduceus, {"d_model": "16"}, {}, "d_model must be a whole number"),
        (caduceus, {"rcps": 1}, {}, "rcps must be true or false, not 1"),
        (caduceus, {"vocab_size": 8}, {}, "vocab_size is 8 .*unknown which ids are bases"),
        (caduceus, {"ssm_cfg": {"d_state": STATES, "headdim": 4}}, {}, "ssm_cfg.headdim is no setting of a Mamba"),
        (caduceus, {"ssm_cfg": {"layer": "Mamba2"}}, {}, "ssm_cfg.layer is 'Mamba2'"),
        (caduceus, {"bidirectional_strategy": "concat"}, {}, "must be add or ew_multiply, not 'concat'"),
        (caduceus, {"norm_epsilon": -1}, {}, "norm_epsilon must be a number above 0, not -1"),
        (caduceus, {"rcps": True, "fused_add_norm": True, "bidirectional": False}, {}, "turns time around"),
        (caduceus, {"rcps": True}, {"lm_head.complement_map": torch.arange(16)}, "complement_map' .*differ"),
        (hyenadna, {}, {"hyena.backbone.ln_f.bias": None}, "has no tensor 'hyena.backbone.ln_f.bias'"),
        (hyenadna, {}, {f"{normed}mixer.filter_fn.pos_emb.t": some(1, 34, 1)}, "is not what the published code makes"),
        (hyenadna, {}, {f"{normed}mixer.filter_fn.implicit_filter.3.freq": some(1, 6)}, "differ, but the config.json"),
        (hyenadna, {"hyena_order": 3}, {}, "hyena_order is 3, not 2"),
        (hyenadna, {"max_seq_len": 10**9}, {}, r"pos_emb.z' is .*by the config.json it is \(1, 1000000000, 5\)"),
        (hyenadna, {"layer_norm_epsilon": 1e-6}, {}, "layer_norm_epsilon is 1e-06, not 1e-05"),
        (hyenadna, {"emb_dim": 4}, {}, "emb_dim must be odd"),
    ]
    for number, (make, options, changed, told) in enumerate(cases):
        sound = {key: value for key, value in options.items() if key in ("rcps", "fused_add_norm", "bidirectional")}
        config, weights = make(**sound)
        weights = {name: tensor for name, tensor in (weights | changed).items() if tensor is not None}
        folder = write(tmp_path / str(number), config | options, weights)
        with pytest.raises(UserError, match=told) as error:
            read_published(folder)
        assert len(str(error.value)) < 1000
        assert str(folder) in str(error.value)
    config, weights = hyenadna()
    folder = write(tmp_path / "parts", config, weights, shared=False)
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    places = dict.fromkeys(names, "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    read_published(folder)
    save_file({name: weights[name] for name in names if name != f"{normed}norm1.bias"}, folder / "model-1.safetensors")
    with pytest.raises(UserError, match=rf"parts/model-1\.safetensors has no tensor '{normed}norm1\.bias', which"):
        read_published(folder)
    both = torch.arange(16)
    maps = {"caduceus.backbone.embeddings.word_embeddings.complement_map": both, "lm_head.complement_map": both}
    config, weights = caduceus(rcps=True)
    with pytest.raises(UserError, match=r"does not pair the ids of A \(7\) and T \(10\)"):
        read_published(write(tmp_path / "unpaired", config, weights | maps))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        read_published(tmp_path / "code")
    torch.save({"lm_head.weight": Runs()}, tmp_path / "code" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read.*holds more than tensors"):
        read_published(tmp_path / "code")
    assert not Path("ran").exists()
    for given, told in (("nowhere", "There is no folder nowhere"), (tmp_path, "There is no config.json")):
        with pytest.raises(UserError, match=told):
            read_published(given)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(UserError, match="holds other files than a model's"):
        import_published(write(tmp_path / "good", *caduceus()), tmp_path / "mine")
