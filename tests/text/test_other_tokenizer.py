"""A run begins with another's weights only where ids mean the same, or rows of other ids may be new."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from mambaseq.checkpoints import load_model
from mambaseq.cli.main import main
from mambaseq.plain import read_yaml

SMALL = [
    *("--data.files=text.txt", "--data.length=32", "--loader.batch_size=2", "--metrics=[]", "--checkpoint.monitor="),
    *("--model.d_model=16", "--model.backbone.n_layers=1", "--trainer.max_steps=1", "--trainer.val_check_interval=1"),
    *("--trainer.limit_val_batches=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
]


def fit(out: str, *words: str) -> int:
    return main(["fit", "--config", "text/demo", "--out", out, *SMALL, *words])


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Each rule has a number. Each number has a rule.\n" * 100)
    assert fit("first") == 0


def other(tokenizer_json: Path) -> list[str]:
    return ["--init-from=first", "--data.tokenizer=text/hf", f"--data.tokenizer_options={{path: {tokenizer_json}}}"]


def test_another_tokenizer_is_told_with_both_names(pretrained: None, tokenizer_json: Path, capsys) -> None:
    capsys.readouterr()
    assert fit("second", *other(tokenizer_json)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "first/model was trained with the tokenizer text/bytes with {'bos': False" in told
    assert "and these data have text/hf with {'path': " in told
    assert "ids mean something else, the first, " in told
    assert told.endswith(
        "set finetune.other_tokenizer to true: rows of ids that mean the same are then taken, and others initialised."
    )
    assert not Path("second").exists() or not any(Path("second").glob("[!.]*"))


def test_it_begins_with_the_rows_that_mean_the_same(pretrained: None, tokenizer_json: Path, capsys) -> None:
    """Two vocabularies of one alphabet, whose merges differ."""
    trained = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(Path("text.txt").read_text().splitlines(), trainer)
    trained.save("mine.json")
    assert fit("first-hf", *other(tokenizer_json)[1:]) == 0
    begin = ["--init-from=first-hf", *other(Path("mine.json"))[1:], "--optimizer.lr=0", "--seed=1"]
    assert fit("second", *begin) == 2
    assert not Path("second/config.yaml").exists()
    capsys.readouterr()
    assert fit("second", *begin, "--finetune.other_tokenizer=true") == 0
    assert "ids surely mean the same; what belongs to others is initialised" in capsys.readouterr().err
    assert read_yaml("second/config.yaml")["finetune"]["other_tokenizer"] is True
    one, two = load_model("first-hf"), load_model("second")
    rows, theirs = two.model.encoder.embedding.weight, one.model.encoder.embedding.weight
    taken = [n for n in range(len(rows)) if rows[n].equal(theirs[n])]
    letters = [two.tokenizer.decode([n]) for n in taken]
    assert letters == [one.tokenizer.decode([n]) for n in taken]
    assert set(map(chr, range(33, 127))) <= set(letters)
    assert "\ufffd" not in letters  # parts of letters, which do not say of which
    assert len(taken) < 200


def test_the_same_ids_in_another_form_are_no_other_tokenizer(pretrained: None) -> None:
    assert main(["export", "--checkpoint", "first", "--format", "transformers", "--out", "exported"]) == 0
    assert fit("second", *other(Path("exported/tokenizer.json"))) == 0
