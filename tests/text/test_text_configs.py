"""Configurations whose data and models are downloaded: set up, built and stepped with small ones in their places."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from mambaseq.checkpoints.export import load_model
from mambaseq.cli.main import main
from mambaseq.models import build_model
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.published import import_checkpoint

PAGE = (Path(__file__).parents[2] / "docs/text/data.md").read_text(encoding="utf-8")
NAMES = ["text/pile", "text/slimpajama", "text/fineweb_edu", "text/wikitext103"]


def rows(path: Path, key: str, values: list[Any]) -> None:
    path.write_text("".join(json.dumps({key: value, "other": 1}) + "\n" for value in values))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_built_and_stepped(name: str, tmp_path: Path, tokenizer_json: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 60), ("validation", 30), ("test", 30)):
        rows(folder / f"{split}.jsonl", "text", [f"the {split} of {n} and the end " * 9 for n in range(count)])
    keys = ("files",) if name == "text/fineweb_edu" else None  # which has no held-out files
    small = {
        **{f"--data.{key}": f"hub:{folder}" for key in keys or ("files", "validation_files", "test_files")},
        **({"--data.validation_fraction": "0.2", "--data.test_fraction": "0.2"} if keys else {}),
        "--data.tokenizer_options.path": str(tokenizer_json),
        "--data.length": "32",
        "--model.d_model": "16",
        "--model.backbone.n_layers": "1",
        "--model.mixer.backend": "reference",
    }
    settings = parse_config(name, [f"{key}={value}" for key, value in small.items()])
    data = settings.make_data(setup=True)
    settings.make_metrics(data)
    train, held_out = data.train(), data.validation()
    batch = data.collate([train[0], train[1]])
    assert held_out is not None
    assert held_out[0].n_units is not None
    torch.manual_seed(0)
    model = build_model(settings.model_spec(data))
    chosen = settings.optimizer()
    step = torch.optim.AdamW(model.parameters(), chosen.lr, betas=(chosen.beta1, chosen.beta2))
    losses = []
    for _ in range(2):
        loss = model(batch.inputs, batch.targets, cu_seqlens=batch.cu_seqlens).loss
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_the_recipe_is_the_papers() -> None:
    """Table 12 of arXiv:2312.00752: 2,048 tokens a window and half a million a step, the rate falls to 1e-5."""
    found = {}
    sizes = re.findall(r"^\| .*?\| `(.*)` \|$", PAGE, re.MULTILINE)
    for name in NAMES[:3]:
        for flags in ("", *(sizes if name == NAMES[0] else ())):
            settings = parse_config(name, flags.split())
            chosen, (model, data) = settings.optimizer(), (settings.settings[key] for key in ("model", "data"))
            steps, loader = settings.trainer["max_steps"], settings.settings["loader"]
            step = loader["batch_size"] * settings.trainer["accumulate_grad_batches"] * data["length"]
            assert step == 2**19
            assert steps * step <= data["max_tokens"] < 1.05 * steps * step
            assert chosen.lr * chosen.min_lr_ratio == pytest.approx(1e-5, rel=0.02)
            assert (chosen.beta1, chosen.beta2, chosen.weight_decay) == (0.9, 0.95, 0.1)
            found[model["d_model"]] = (model["backbone"]["n_layers"], steps, round(chosen.lr / 5, 6))
    assert found == {768: (24, 4800, 6e-4), 1024: (48, 13500, 3e-4), 1536: (48, 29000, 2.5e-4), 2048: (48, 50000, 2e-4)}


def test_an_imported_model_is_tuned_on_conversations(tmp_path: Path, tokenizer_json: Path) -> None:
    """And answers by the template that it was tuned with."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    MambaForCausalLM(
        MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=16)  # rows that pad it
    ).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    import_checkpoint(str(tmp_path / "theirs"), str(tmp_path / "imported"))
    talk = [[{"role": "user", "content": f"the {n}"}, {"role": "assistant", "content": f"end {n}"}] for n in range(40)]
    rows(tmp_path / "chats.jsonl", "messages", [*talk, "not a conversation"])
    given = {
        "data.files": tmp_path / "chats.jsonl",
        "data.validation_files": "null",
        "data.validation_fraction": "0.3",
        "data.tokenizer_options.path": tmp_path / "imported" / "model" / "tokenizer.json",
        "data.length": "64",
        "model.d_model": "16",
        "model.backbone.n_layers": "1",
        "finetune.init_from": tmp_path / "imported",
        "loader.batch_size": "2",
        "loader.num_workers": "0",
        "trainer.max_steps": "2",
        "trainer.accumulate_grad_batches": "1",
        "trainer.accelerator": "cpu",
        "trainer.devices": "1",
        "trainer.precision": "32-true",
        "trainer.val_check_interval": "2",
        "trainer.enable_progress_bar": "false",
    }
    run = tmp_path / "run"
    assert main(["fit", "--config", "text/chat", "--out", str(run), *(f"--{k}={v}" for k, v in given.items())]) == 0
    (left_out,) = (run / "left_out.jsonl").read_text().splitlines()
    assert json.loads(left_out)["line"] == 41
    before, after = load_model(tmp_path / "imported"), load_model(run)
    assert after.tokenizer is not None
    assert after.tokenizer.decode(after.tokenizer.chat(talk[0][:1])[0]) == "<|user|>\nthe 0\n<|assistant|>\n"
    weights = [next(iter(one.model.backbone.parameters())) for one in (before, after)]
    assert not torch.equal(*weights)
    assert (weights[0] - weights[1]).abs().max() < 0.01  # it began with the imported ones


def test_the_page_says_what_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tokenizer_json: Path
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(textwrap.dedent(example), "data.md", "exec"), {"__name__": "page"})
    assert '"line": 401' in capsys.readouterr().out
    # its run is not measured with ids of another vocabulary
    other = ["--data.tokenizer", "text/hf", "--data.tokenizer_options", f"{{path: {tokenizer_json}}}"]
    assert main(["test", "--checkpoint", "run", *other]) == 2
    assert "These data have 280 ids, and the vocabulary of the model at run/model has 257." in capsys.readouterr().err
    small = tokenizer_json.with_name("small.json")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={str(n): n for n in range(10)}, merges=[]))
    made.save(str(small))
    other[-1] = f"{{path: {small}}}"
    assert main(["test", "--checkpoint", "run", *other]) == 2
    assert "10 of 10 ids mean something else" in capsys.readouterr().err
