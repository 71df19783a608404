"""Models loaded in 16 bits, for every command that applies one: what comes out is near, and states stay in float32."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from mambaseq_text.tokenization import ByteTokenizer

from mambaseq.arguments import DTYPES
from mambaseq.checkpoints import ModelCard, load_model, save_model
from mambaseq.checkpoints.dtypes import cast_
from mambaseq.cli.main import main
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError
from mambaseq.mixers.base import State
from mambaseq.models import causal_lm
from mambaseq.runs.generation import generate_from
from mambaseq.runs.run import load

NARROW = [name for name in DTYPES if name != "float32"]
PROMPT = "All happy families are alike; every unhappy family is unhappy in its own way. "


def saved(folder: Path, mixer: str = "mamba") -> Path:
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    options = {"head_dim": 16} if mixer == "mamba2" else {}
    model = causal_lm(tokenizer.vocab_size, 64, 2, mixer, **options)
    card = ModelCard(
        spec=model.spec,
        tokenizer={"name": "text/bytes", "options": tokenizer.options},
        length=32,
        reader="text/text",
        writer="text/text",
        task="next_token",
    )
    save_model(folder, model, card, tokenizer)
    return folder


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "gated_delta", "s4d"])
@pytest.mark.parametrize("dtype", NARROW)
def test_logits_are_near_and_states_in_float32(mixer: str, dtype: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, mixer)
    whole, narrow = load_model(folder).model, load_model(folder, dtype=dtype).model
    assert {one.dtype for one in narrow.backbone.layers[0].norm.parameters()} == {getattr(torch, dtype)}
    assert {one.dtype for one in whole.parameters()} == {torch.float32}
    ids = torch.frombuffer(bytearray(PROMPT.encode()), dtype=torch.uint8).long()[None]
    with torch.inference_mode():
        wanted, found = whole(ids).logits, narrow(ids, return_state=True)
        first = narrow(ids[:, :40], return_state=True)
        later = narrow(ids[:, 40:], state=first.state, return_state=True)
    assert found.logits.dtype == torch.float32
    apart = (found.logits.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert 1e-5 < apart < (0.03 if dtype == "bfloat16" else 0.01)
    again = (later.logits - found.logits[:, 40:]).float().square().mean().sqrt() / wanted.square().mean().sqrt()
    assert again < (0.03 if dtype == "bfloat16" else 0.01)  # the state is handed on
    for layer in later.state:
        assert isinstance(layer, State)
        assert {one.dtype for one in layer.tensors().values()} <= {torch.float32, torch.complex64}


@pytest.mark.parametrize("mixer", [entry.name for entry in catalog()["mixers"] if entry.origin.startswith("mambaseq")])
def test_weights_in_16_bits_are_right_for_every_mixer(mixer: str) -> None:
    """Rounded frequencies, of S4D or of Hyena's filters, would put outputs off by 10 to 50 %."""
    torch.manual_seed(0)
    model = causal_lm(256, 64, 2, mixer, **({"head_dim": 16} if mixer == "mamba2" else {})).eval()
    ids = torch.randint(0, 250, (1, 300))
    with torch.inference_mode():
        wanted = model(ids).logits
        cast_(model, torch.bfloat16)
        found = model(ids).logits
    assert model.encoder.embedding.weight.dtype == torch.bfloat16
    assert 1e-4 < (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt() < 0.03


@pytest.mark.parametrize("dtype", NARROW)
def test_commands_take_it(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = saved(tmp_path / "m"), tmp_path / "in.txt"
    text.write_text(PROMPT)
    asked: list[str | None] = []

    def loads(path: Path, device: object = "cpu", dtype: str | None = None) -> object:
        asked.append(dtype)
        return load_model(path, "cpu", dtype)

    for module in ("planning", "prediction"):
        monkeypatch.setattr(f"mambaseq.runs.{module}.load_model", loads)
    bits = []
    for words in ([], ["--dtype", dtype]):
        out = ["--out", str(tmp_path / "p.csv"), "--device", "cpu"]
        assert main(["predict", "--checkpoint", str(folder), str(text), *out, *words]) == 0
        (row,) = csv.DictReader((tmp_path / "p.csv").open())
        bits.append(float(row["bits_per_token"]))
        out = ["--out", str(tmp_path / "g.txt"), "--device", "cpu", "-n", "8", "--temperature", "0"]
        assert main(["generate", "--checkpoint", str(folder), "--prompt-text", PROMPT, *out, *words]) == 0
        assert (tmp_path / "g.txt").read_bytes().startswith(PROMPT.encode())
    assert asked == [None, None, dtype, dtype]
    assert bits[0] != bits[1]
    assert bits[1] == pytest.approx(bits[0], rel=0.01)
    assert load(folder).model("cpu", dtype).model is not load(folder).model("cpu").model


@pytest.mark.parametrize(("made", "own"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_state_of_attention_is_for_weights_in_its_dtype(
    made: str, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, state = saved(tmp_path / "m", "attention"), tmp_path / "s.safetensors"
    words = ["generate", "--checkpoint", str(folder), "--device", "cpu", "-n", "2"]
    assert main([*words, "--prompt-text", PROMPT, "--save-state", str(state), "--dtype", made]) == 0
    assert main([*words, "--from-state", str(state), "--dtype", made]) == 0
    capsys.readouterr()
    assert main([*words, "--from-state", str(state), "--dtype", own]) == 2
    assert f"made with weights in {made}, and these are in {own}. Give --dtype {made}" in capsys.readouterr().err


def test_a_run_is_tested_in_it_and_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["--data.length=32", "--model.d_model=16", "--model.backbone.n_layers=1", "--loader.batch_size=4"]
    small += ["--trainer.max_steps=2", "--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2"]
    small += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", "text/demo", "--out", str(run), *small]) == 0
    found = []
    for words in ([], ["--dtype", "bfloat16"], []):
        assert main(["test", "--checkpoint", str(run), *words]) == 0
        found.append(json.loads((run / "results.json").read_text()))
    assert [one.get("test/dtype") for one in found] == [None, "bfloat16", None]
    assert found[0]["test/bits_per_byte"] == found[2]["test/bits_per_byte"] != found[1]["test/bits_per_byte"]
    assert found[1]["test/bits_per_byte"] == pytest.approx(found[0]["test/bits_per_byte"], rel=0.01)


def test_another_dtype_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path)
    for wrong in ("float8", "bf16", 16, torch.bfloat16):
        with pytest.raises(ConfigError, match="dtype must be float32, bfloat16, float16, not"):
            load_model(folder, dtype=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dtype must be float32"):
        generate_from(folder, prompt_text="a", dtype="int8")
    assert main(["generate", "--checkpoint", str(folder), "--dtype", "bf17"]) == 2
    assert "'bf17'" in capsys.readouterr().err
