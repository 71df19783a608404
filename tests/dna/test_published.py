"""Published models of DNA: the outputs of their definitions, written down here once more, and what is refused."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambaseq.checkpoints import load_model, load_upstream
from mambaseq.cli.main import main
from mambaseq.errors import UserError

Weights = dict[str, Tensor]
WIDTH, STATES = 16, 3
# their character tokenizer: special tokens 0 to 6, then the bases
IDS = {letter: 7 + place for place, letter in enumerate("ACGTN")}
MASK = 3
PAIRED = [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15]
# ours for each of theirs: bases first, the mask token last where there is one
MASKED = [5, 6, 7, 15, 8, 9, 10, 0, 1, 2, 3, 4, 11, 12, 13, 14]
CAUSAL = [5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 12, 13, 14, 15]


def some(*shape: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape)


def mamba_weights(stem: str, bias: bool) -> Weights:
    inner, rank = 2 * WIDTH, 1
    found = {
        "A_log": some(inner, STATES),
        "D": some(inner),
        "in_proj.weight": some(2 * inner, WIDTH),
        "conv1d.weight": some(inner, 1, 4),
        "conv1d.bias": some(inner),
        "x_proj.weight": some(rank + 2 * STATES, inner),
        "dt_proj.weight": some(inner, rank),
        "dt_proj.bias": some(inner),
        "out_proj.weight": some(WIDTH, inner),
    }
    if bias:
        found |= {"in_proj.bias": some(2 * inner), "out_proj.bias": some(WIDTH)}
    return {f"{stem}{name}": tensor for name, tensor in found.items()}


def caduceus(**options: Any) -> tuple[dict[str, Any], Weights]:
    """A config.json and random weights in its names."""
    config = {
        "model_type": "caduceus",
        "architectures": ["CaduceusForMaskedLM"],
        "d_model": WIDTH,
        "n_layer": 2,
        "vocab_size": 16,
        "pad_vocab_size_multiple": 8,
        "ssm_cfg": {"d_state": STATES, "dt_rank": "auto", "dt_min": 1e-3, "use_fast_path": True, "bias": False},
        "rms_norm": True,
        "fused_add_norm": False,
        "residual_in_fp32": False,
        "norm_epsilon": 1e-5,
        "bidirectional": True,
        "bidirectional_strategy": "add",
        "bidirectional_weight_tie": True,
        "rcps": False,
        **options,
    }
    strands, stem = config["rcps"], "caduceus.backbone."
    # ordered as text, as JSON has it: in the published code the buffer beside the weights is what counts
    config["complement_map"] = {str(i): PAIRED[i] for i in sorted(range(16), key=str)} if strands else None
    table, map_ = some(16, WIDTH), torch.tensor(PAIRED)
    words = f"{stem}embeddings.word_embeddings."
    weights: Weights = {f"{words}embedding.weight" if strands else f"{words}weight": table}
    weights["lm_head.lm_head.weight" if strands else "lm_head.weight"] = table
    if strands:
        weights |= {f"{words}complement_map": map_, "lm_head.complement_map": map_}
    within = "submodule." if strands and not config["fused_add_norm"] else ""
    norms = [f"{stem}layers.{i}.norm.{within}" for i in range(config["n_layer"])] + [f"{stem}norm_f.{within}"]
    for norm in norms:
        weights[f"{norm}weight"] = 1 + some(WIDTH)
        if not config["rms_norm"]:
            weights[f"{norm}bias"] = some(WIDTH)
    for number in range(config["n_layer"]):
        mixer = f"{stem}layers.{number}.mixer.{'submodule.' if strands else ''}"
        weights |= mamba_weights(f"{mixer}mamba_fwd.", config["ssm_cfg"]["bias"])
        if config["bidirectional"]:
            weights |= mamba_weights(f"{mixer}mamba_rev.", config["ssm_cfg"]["bias"])
        if config["bidirectional"] and config["bidirectional_weight_tie"]:
            for name in [n for n in weights if n.startswith(f"{mixer}mamba_rev.") and "_proj." in n]:
                if "in_proj" in name or "out_proj" in name:
                    weights[name] = weights[name.replace("mamba_rev", "mamba_fwd")]
    return config, weights


def mamba(weights: Weights, stem: str, x: Tensor) -> Tensor:
    """Mamba-1 (arXiv:2312.00752, algorithm 2) step by step."""
    w = {name.removeprefix(stem): tensor for name, tensor in weights.items() if name.startswith(stem)}
    x, z = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, -1)
    length = x.shape[1]
    x = F.conv1d(x.transpose(1, 2), w["conv1d.weight"], w["conv1d.bias"], padding=3, groups=x.shape[-1])
    x = F.silu(x[..., :length]).transpose(1, 2)
    dt, B, C = F.linear(x, w["x_proj.weight"]).split([1, STATES, STATES], -1)
    dt = F.softplus(F.linear(dt, w["dt_proj.weight"], w["dt_proj.bias"]))
    state, A = torch.zeros(*x.shape[::2], STATES), -w["A_log"].exp()
    ys = []
    for t in range(length):
        state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((state * C[:, t, None]).sum(-1))
    y = (torch.stack(ys, 1) + x * w["D"]) * F.silu(z)
    return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


def caduceus_by_definition(config: dict[str, Any], weights: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the hidden states before the head, `(batch, length, d_model)` or two halves of that."""
    strands, fused, stem = config["rcps"], config["fused_add_norm"], "caduceus.backbone."
    within = "submodule." if strands and not fused else ""

    def norm(name: str, x: Tensor) -> Tensor:
        weight = weights[f"{stem}{name}.{within}weight"]
        if config["rms_norm"]:
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return F.layer_norm(x, (WIDTH,), weight, weights[f"{stem}{name}.{within}bias"])

    def mixer(number: int, x: Tensor) -> Tensor:
        inner = f"{stem}layers.{number}.mixer.{'submodule.' if strands else ''}mamba_"
        y = mamba(weights, f"{inner}fwd.", x)
        if not config["bidirectional"]:
            return y
        other = mamba(weights, f"{inner}rev.", x.flip(1)).flip(1)
        return y + other if config["bidirectional_strategy"] == "add" else y * other

    def turned(x: Tensor) -> Tensor:
        return x.flip(1, 2)

    words = f"{stem}embeddings.word_embeddings."
    if not strands:
        table = weights[f"{words}weight"]
        x, stream = table[ids], torch.zeros(())
        for number in range(config["n_layer"]):
            stream = stream + x
            x = mixer(number, norm(f"layers.{number}.norm", stream))
        hidden = norm("norm_f", stream + x)
        return F.linear(hidden, weights["lm_head.weight"]), hidden
    table = weights[f"{words}embedding.weight"]
    partner = torch.tensor(PAIRED)
    one, two = table[ids], turned(table[partner[ids.flip(1)]])
    stream_one, stream_two = torch.zeros(()), torch.zeros(())
    for number in range(config["n_layer"]):
        stream_one, stream_two = stream_one + one, stream_two + two
        if fused:  # the published code takes each half for the other here
            stream_one, stream_two = stream_two, stream_one
        name = f"layers.{number}.norm"
        one = mixer(number, norm(name, stream_one))
        two = turned(mixer(number, norm(name, turned(stream_two))))
    one, two = norm("norm_f", stream_one + one), turned(norm("norm_f", turned(stream_two + two)))
    head = weights["lm_head.lm_head.weight"]
    return F.linear(one, head) + F.linear(two.flip(-1), head[partner]), torch.cat([one, two], -1)


def hyenadna(**options: Any) -> tuple[dict[str, Any], Weights]:
    config = {
        "model_type": "hyenadna",
        "architectures": ["HyenaDNAForCausalLM"],
        "activation_freq": 10,
        "d_inner": 24,
        "d_model": WIDTH,
        "emb_dim": 5,
        "embed_dropout": 0.1,
        "filter_order": 6,
        "hyena_order": 2,
        "layer_norm_epsilon": 1e-5,
        "max_seq_len": 34,
        "n_layer": 2,
        "num_inner_mlps": 2,
        "pad_vocab_size_multiple": 8,
        "short_filter_order": 3,
        "tie_word_embeddings": False,
        "train_freq": True,
        "use_bias": True,
        "vocab_size": 12,
        **options,
    }
    length, inner = config["max_seq_len"], config["d_inner"]
    weights = {
        "hyena.backbone.embeddings.word_embeddings.weight": some(16, WIDTH),
        "hyena.backbone.ln_f.weight": 1 + some(WIDTH),
        "hyena.backbone.ln_f.bias": some(WIDTH),
        "lm_head.weight": some(16, WIDTH),
    }
    for number in range(config["n_layer"]):
        layer: Weights = {
            "mixer.short_filter.weight": some(3 * WIDTH, 1, 3),
            "mixer.short_filter.bias": some(3 * WIDTH),
            "mixer.filter_fn.bias": some(WIDTH),
            "mixer.filter_fn.pos_emb.z": some(1, length, 5),
            "mixer.filter_fn.pos_emb.t": torch.linspace(0, 1, length)[None, :, None],
            "mixer.filter_fn.modulation.deltas": torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, WIDTH)[
                None, None
            ],
            "mixer.filter_fn.implicit_filter.6.weight": some(WIDTH, 6),
        }
        for name, rows, columns in (
            ("mixer.in_proj", 3 * WIDTH, WIDTH),
            ("mixer.out_proj", WIDTH, WIDTH),
            ("mlp.fc1", inner, WIDTH),
            ("mlp.fc2", WIDTH, inner),
            ("mixer.filter_fn.implicit_filter.0", 6, 5),
            ("mixer.filter_fn.implicit_filter.2", 6, 6),
            ("mixer.filter_fn.implicit_filter.4", 6, 6),
        ):
            layer |= {f"{name}.weight": some(rows, columns), f"{name}.bias": some(rows)}
        for name in ("norm1", "norm2"):
            layer |= {f"{name}.weight": 1 + some(WIDTH), f"{name}.bias": some(WIDTH)}
        frequency = 10 + some(1, 6)
        if config["train_freq"]:
            layer |= {f"mixer.filter_fn.implicit_filter.{place}.freq": frequency for place in (1, 3, 5)}
        weights |= {f"hyena.backbone.layers.{number}.{name}": tensor for name, tensor in layer.items()}
    return config, weights


def hyenadna_by_definition(config: dict[str, Any], weights: Weights, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the residual stream after each layer, then its norm."""
    x, stem, length = weights["hyena.backbone.embeddings.word_embeddings.weight"][ids], "hyena.backbone.", ids.shape[1]
    streams = []
    for number in range(config["n_layer"]):
        prefix = f"{stem}layers.{number}."
        w = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        y = F.layer_norm(x, (WIDTH,), w["norm1.weight"], w["norm1.bias"])
        y = F.linear(y, w["mixer.in_proj.weight"], w["mixer.in_proj.bias"]).transpose(1, 2)
        y = F.conv1d(y, w["mixer.short_filter.weight"], w["mixer.short_filter.bias"], padding=2, groups=3 * WIDTH)
        gate, other, v = y[..., :length].split(WIDTH, 1)
        h = w["mixer.filter_fn.pos_emb.z"][0, :length]
        for place in (0, 2, 4):
            inner = f"mixer.filter_fn.implicit_filter.{place}"
            frequency = w.get(f"mixer.filter_fn.implicit_filter.{place + 1}.freq", torch.tensor(10.0))
            h = (frequency * F.linear(h, w[f"{inner}.weight"], w[f"{inner}.bias"])).sin()
        h = F.linear(h, w["mixer.filter_fn.implicit_filter.6.weight"])
        time, rates = w["mixer.filter_fn.pos_emb.t"][0, :length], w["mixer.filter_fn.modulation.deltas"][0]
        h = (h * ((-time * rates.abs()).exp() + 0.05)).t()
        v = v * other
        sums = [(v[..., : t + 1] * h[:, : t + 1].flip(1)).sum(-1) for t in range(length)]
        v = torch.stack(sums, -1) + v * w["mixer.filter_fn.bias"][:, None]
        x = x + F.linear((v * gate).transpose(1, 2), w["mixer.out_proj.weight"], w["mixer.out_proj.bias"])
        y = F.layer_norm(x, (WIDTH,), w["norm2.weight"], w["norm2.bias"])
        y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]), approximate="tanh")
        x = x + F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
        streams.append(x)
    x = F.layer_norm(x, (WIDTH,), weights[f"{stem}ln_f.weight"], weights[f"{stem}ln_f.bias"])
    return F.linear(x, weights["lm_head.weight"]), [*streams, x]


def write(folder: Path, config: dict[str, Any], weights: Weights, shared: bool = True) -> Path:
    """A folder as published. shared: with tensors that are one under all of their names (pytorch_model.bin); otherwise
    each once, in model.safetensors, as transformers saves them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shared:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    once: dict[int, str] = {}
    for name, tensor in weights.items():
        once.setdefault(tensor.data_ptr(), name)
    save_file({name: weights[name] for name in once.values()}, folder / "model.safetensors", {"format": "pt"})
    return folder


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
