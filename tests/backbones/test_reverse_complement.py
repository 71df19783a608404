"""Both strands alike: logits turn with the sequence, classes stay, for any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mambaseq_dna.tokenizer import BaseTokenizer

from mambaseq.checkpoints import ModelCard, load_model, save_model
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError
from mambaseq.models import SequenceModel, build_model
from mambaseq.runs.parsing import parse_config

TOKENIZER = BaseTokenizer("keep")
COMPLEMENT = TOKENIZER.complement.tolist()
N_IDS = TOKENIZER.vocab_size
BACKBONES = [
    {},
    {"bidirectional": False},
    {"shared": True, "n_layers": 1},
    {"tie_projections": True, "combine": "multiply", "norm": "layer"},
    {"pattern": ["s4d", "mamba*"], "n_layers": 3, "checkpoint": True},
    {"pattern": ["mamba3", "gated_delta", "kda", "gla"], "n_layers": 4},
    {"pattern": ["mamba3"], "tie_projections": True, "combine": "multiply"},
]


def make(head: str, dtype: torch.dtype = torch.float32, pooling: str = "mean", **backbone: Any) -> SequenceModel:
    torch.manual_seed(0)
    token = {"vocab_size": N_IDS, "complement": COMPLEMENT}
    model = build_model(
        {
            "d_model": 8,
            "tie_embeddings": head == "rc_lm",
            "encoder": {"name": "rc_tokens", **token},
            "backbone": {"name": "reverse_complement", **{"n_layers": 2, **backbone}},
            "mixer": {"name": "mamba", "d_state": 4},
            "head": {"name": head, **(token if head == "rc_lm" else {"n_classes": 3, "pooling": pooling})},
        }
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.to(dtype).eval()


def turned(ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(TOKENIZER.reverse_complement(ids.numpy()).astype(np.int64, order="C"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_turn_with_the_sequence(backbone: dict[str, Any], dtype: torch.dtype) -> None:
    model, ids = make("rc_lm", dtype, **backbone), torch.randint(0, N_IDS, (2, 23))
    lengths = [9, 1, 13]
    bounds = torch.tensor([0, 9, 9, 10, 23], dtype=torch.int32)
    with torch.no_grad():
        logits, other = model(ids).logits, model(turned(ids)).logits
        assert logits.std() > 0.1
        torch.testing.assert_close(other, logits.flip(1)[..., COMPLEMENT], atol=2e-6, rtol=1e-6)
        parts = ids[:1].split(lengths, 1)
        packed = model(ids[:1], cu_seqlens=bounds).logits
        torch.testing.assert_close(packed, torch.cat([model(part).logits for part in parts], 1), atol=1e-5, rtol=1e-4)
        turned_parts = model(torch.cat([turned(part) for part in parts], 1), cu_seqlens=bounds).logits.split(lengths, 1)
        for one, part in zip(turned_parts, packed.split(lengths, 1), strict=True):
            torch.testing.assert_close(one, part.flip(1)[..., COMPLEMENT], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_classes_are_those_of_either_strand(backbone: dict[str, Any], pooling: str, dtype: torch.dtype) -> None:
    model = make("rc_classification", dtype, pooling, **backbone)
    rows = [torch.randint(0, N_IDS, (1, n)) for n in (17, 5, 1)]
    bounds = torch.tensor([0, 17, 22, 23], dtype=torch.int32)

    def padded(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
        out = torch.full((3, 17), fill)
        for i, row in enumerate(rows):
            out[i, : row.shape[1]] = row
        return out

    mask = padded([torch.ones_like(row) for row in rows], 0).bool()
    other = [turned(row) for row in rows]
    with torch.no_grad():
        alone = torch.cat([model(row).logits for row in rows])
        assert alone.std() > 0.01
        for made in (
            torch.cat([model(row).logits for row in other]),
            model(torch.cat(rows, 1), cu_seqlens=bounds).logits,
            model(torch.cat(other, 1), cu_seqlens=bounds).logits,
            model(padded(rows, 2), mask=mask).logits,
            model(padded(other, 3), mask=mask).logits,
        ):
            torch.testing.assert_close(made, alone, atol=5e-6, rtol=1e-5)


def test_the_loss_is_that_of_the_logits_and_trains(tmp_path: Path) -> None:
    model, ids = make("rc_lm").train(), torch.randint(0, N_IDS, (2, 12))
    labels = ids.masked_fill(torch.rand(2, 12) < 0.7, -100)
    output = model(ids, labels, return_logits=True)
    assert output.logits is not None
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(ids, labels).loss, expected)
    model(ids, labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    save_model(tmp_path / "m", model.eval(), ModelCard(spec=model.spec))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m").model(ids).logits, model(ids).logits)


def test_conditions_are_of_both_strands() -> None:
    spec = dict(make("rc_classification").spec or {})
    spec["encoder"] = {**spec["encoder"], "n_conditions": 2}
    model = build_model(spec).eval()
    ids, condition = torch.randint(0, N_IDS, (2, 9)), torch.tensor([1, 0])
    with torch.no_grad():
        logits = model(ids, condition=condition).logits
        torch.testing.assert_close(model(turned(ids), condition=condition).logits, logits, atol=2e-6, rtol=1e-6)
        assert not torch.allclose(model(ids, condition=condition.flip(0)).logits, logits, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    model = make("rc_lm", bidirectional=False)
    assert not model.backbone.causal
    with pytest.raises(ConfigError, match="reverse_complement backbone sees whole sequences"):
        model(torch.zeros(1, 3, dtype=torch.long), return_state=True)
    for part, changed in (
        ("encoder", {"name": "tokens", "vocab_size": N_IDS}),
        ("backbone", {"name": "residual"}),
        ("head", {"name": "lm", "vocab_size": N_IDS}),
    ):
        with pytest.raises(ConfigError, match=r"strands\. The backbone reverse_complement needs"):
            build_model({**(model.spec or {}), part: changed})
    with pytest.raises(ConfigError, match="for layers that read both ways"):
        make("rc_lm", bidirectional=False, tie_projections=True)
    for complement in ([1, 2, 0], [0, 1], [3, 1, 2]):
        with pytest.raises(ConfigError, match="partner of each of the 3 ids"):
            build_model(
                {**(model.spec or {}), "encoder": {"name": "rc_tokens", "vocab_size": 3, "complement": complement}}
            )


def test_the_data_tell_the_complement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = parse_config("dna/strands", ["--data.length=32"])
    spec = run.model_spec(run.make_data())
    assert spec["encoder"]["complement"] == [3, 2, 1, 0, 4]
    assert "complement" not in run.settings["model"]["encoder"]
    run = parse_config("text/demo", ["--model.encoder.name=rc_tokens"])
    data = run.make_data()
    data.vocab_size = 4
    with pytest.raises(ConfigError, match="needs complement, which the dataset"):
        run.model_spec(data)
    # a model that sees both ways learns nothing from the next base
    out = ["--out", str(tmp_path / "run"), "--trainer.accelerator=cpu", "--model.d_model=8", "--data.length=32"]
    for backbone in ("bidirectional", "residual"):
        more = ["--trainer.max_steps=1", "--trainer.precision=32-true", "--trainer.limit_val_batches=0"]
        more += ["--trainer.val_check_interval=1", "--checkpoint.monitor="]
        code = main(["fit", "--config", "dna/genome", f"--model.backbone.name={backbone}", *out, *more])
        assert code == (2 if backbone == "bidirectional" else 0)
        assert ("asks for the next token" in capsys.readouterr().err) == (backbone == "bidirectional")
