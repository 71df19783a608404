"""Runs from Python, and what comes out of them: tables, embeddings, bits of each token."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from runs.test_prediction import fasta, language_model

import mambaseq as ms
from mambaseq.checkpoints import load_model
from mambaseq.data.records import Record
from mambaseq.errors import ConfigError, UserError
from mambaseq.runs.answers import Found, Span
from mambaseq.runs.embeddings import Embeddings
from mambaseq.runs.run import NotFinished, as_overrides
from mambaseq.runs.tables import ENDINGS, table

CONFIG = """
metrics: [bits_per_token]
data: {name: "tiny:TinyTokens"}
loader: {batch_size: 4}
model: {d_model: 8, backbone: {name: residual, n_layers: 2}, mixer: {name: mamba, d_state: 4}}
trainer: {accelerator: cpu, enable_progress_bar: false, max_steps: 4, val_check_interval: 2, log_every_n_steps: 1}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(CONFIG)
    return path


def test_fit_load_resume_evaluate(config: Path, tmp_path: Path) -> None:
    run = ms.fit(config, out=tmp_path / "a", max_steps=2, settings={"optimizer": {"lr": 0.01}}, progress=False)
    assert run.results["steps"] == 2
    assert [step for step, _ in run.curve("train/loss")] == [0, 1]
    again = ms.load(tmp_path / "a").resume(max_steps=4, progress=False)
    assert again.results["steps"] == 4
    bits = again.evaluate("validation", progress=False)["val/bits_per_token"]
    assert bits == pytest.approx(again.results["val/bits_per_token"], rel=1e-6)
    assert again.model("cpu") is again.model("cpu")
    with pytest.raises(UserError, match="already holds a run"):
        ms.fit(config, out=tmp_path / "a", progress=False)
    with pytest.raises(UserError, match="no run"):
        ms.load(tmp_path / "nowhere")


def test_a_run_that_diverges_raises(config: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFinished, match="diverged"):
        ms.fit(config, out=tmp_path / "a", lr=1e30, progress=False, settings={"trainer.gradient_clip_val": None})


def test_keys_by_their_last_word() -> None:
    found = as_overrides("dna/demo", {"data": {"length": 64}, "metrics": ["a"]}, {"max_steps": 5, "lr": 1e-3})
    assert found == ["--data.length=64", '--metrics=["a"]', "--trainer.max_steps=5", "--optimizer.lr=0.001"]
    deep = {"finetune": {"lr_of": {"a.b": 0.1}}, "model": {"mixer": {"d_state": 4}, "mixers": {"s4d": {"d_state": 2}}}}
    assert as_overrides("dna/demo", deep, {}) == [
        '--finetune.lr_of={"a.b": 0.1}',
        "--model.mixer.d_state=4",
        "--model.mixers.s4d.d_state=2",
    ]
    with pytest.raises(ConfigError, match=r"Several end so: .*model\.head\.name"):
        as_overrides("dna/demo", {}, {"name": "x"})
    with pytest.raises(ConfigError, match=r"Did you mean 'max_steps'"):
        as_overrides("dna/demo", {}, {"max_step": 5})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("lm") / "m")


def hidden(model: Path, text: str) -> torch.Tensor:
    loaded = load_model(model)
    assert loaded.tokenizer is not None
    ids = torch.from_numpy(loaded.tokenizer.encode(text).astype(np.int64))[None]
    with torch.no_grad():
        return loaded.model.backbone(loaded.model.encoder(ids))[0]


def test_predictions_are_a_table(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("=one sentence that is read")
    run = ms.load(model)
    table = run.predict(source)
    assert isinstance(table, pandas.DataFrame)
    assert list(table.columns) == ["file", "record", "start", "stop", "tokens", "bits_per_token", "total_bits", "note"]
    assert run.predict(source, out=tmp_path / "out.csv") is None
    written = pandas.read_csv(tmp_path / "out.csv")
    assert written["bits_per_token"][0] == pytest.approx(table["bits_per_token"][0], rel=1e-7)
    with pytest.raises(
        ConfigError, match=r"as \.csv, \.tsv, \.parquet, \.npz, not as out\.xyz"
    ):  # no tracks, as of DNA
        run.predict(source, out=tmp_path / "out.xyz")
    with pytest.raises(ConfigError, match="at least one file"):
        run.predict()


@pytest.mark.parametrize("long", [False, True])
def test_bits_of_each_token_add_up(model: Path, tmp_path: Path, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if long:  # read part by part, the states handed on
        monkeypatch.setattr("mambaseq.runs.answers.CHUNK", 5)
    source = tmp_path / "in.txt"
    source.write_text("a sentence of some words")
    run = ms.load(model)
    whole, each = run.predict(source), run.predict(source, what="tokens")
    assert whole is not None
    assert each is not None
    assert list(each["start"]) == list(range(1, 24))
    assert (each["stop"] - each["start"]).eq(1).all()
    assert each["bits"].sum() / 23 == pytest.approx(whole["bits_per_token"][0], rel=1e-5)


@pytest.mark.parametrize("chunk", [8192, 5])
def test_embeddings(model: Path, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaseq.runs.answers.CHUNK", chunk)
    monkeypatch.setattr("mambaseq.runs.embeddings.CHUNK", chunk)
    texts = ["a sentence of some words", "another, longer one that is not padded", "a sentence of more words"]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    run = ms.load(model)
    vectors = [hidden(model, text) for text in texts]
    for pool, wanted in (
        ("mean", [one.mean(0) for one in vectors]),
        ("last", [one[-1] for one in vectors]),
        ("positions", [row for one in vectors for row in one]),
    ):
        for batch_size in (1, 2):
            run.embed(source, out=tmp_path / "out.npz", pool=pool, batch_size=batch_size)
            found = np.load(tmp_path / "out.npz")
            assert found["embedding"].dtype == np.float32
            np.testing.assert_allclose(found["embedding"], torch.stack(wanted).numpy(), rtol=2e-5, atol=1e-6)
    assert len(set(found["record"])) == 3
    # behind its last layer the residual stream is what the norm is taken of
    run.embed(source, out=tmp_path / "out.npz", layer=1, pool="last")
    stream = torch.from_numpy(np.load(tmp_path / "out.npz")["embedding"])
    norm = load_model(model).model.backbone.norm_f
    with torch.no_grad():
        normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-5) * norm.weight
    torch.testing.assert_close(normed, torch.stack([one[-1] for one in vectors]), rtol=2e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"--layer must be 1 to 1"):
        run.embed(source, layer=2)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".npz"])
def test_kinds_of_tables(model: Path, tmp_path: Path, ending: str) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / f"out{ending}"
    source.write_text('{"text": ""}\n{"text": "=a few words"}\n{"text": "x"}\n')
    ms.load(model).predict(source, out=out)
    if ending == ".npz":
        arrays = np.load(out)
        table = pandas.DataFrame({name: arrays[name] for name in arrays})
    elif ending == ".parquet":
        table = pandas.read_parquet(out)
        assert str(table["record"].dtype) in ("object", "str", "string")
        assert table["bits_per_token"].dtype == np.float64
    else:
        table = pandas.read_csv(out, sep="\t" if ending == ".tsv" else ",")
    assert list(table["start"]) == [0, 0, 0]
    assert list(table["stop"]) == [0, 12, 1]
    assert [math.isnan(value) for value in table["bits_per_token"]] == [True, False, True]
    assert [bool(note) and note == note for note in table["note"]] == [True, False, True]


@pytest.mark.parametrize("ending", [".tsv", ".parquet", ".npz"])
def test_finished_rows_are_kept_whatever_the_kind(model: Path, tmp_path: Path, ending: str) -> None:
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_text('{"text": "a few words"}\n')
    bad.write_text("no json\n")
    with pytest.raises(UserError, match=rf"finished before it, 1 row, is in .*out\.partial\{ending}"):
        ms.load(model).predict(good, bad, out=tmp_path / f"out{ending}")
    assert not (tmp_path / f"out{ending}").exists()
    kept = tmp_path / f"out.partial{ending}"
    if ending == ".parquet":
        assert len(pandas.read_parquet(kept)) == 1
    elif ending == ".npz":
        assert np.load(kept)["tokens"].tolist() == [10]
    else:
        assert len(pandas.read_csv(kept, sep="\t")) == 1


def test_layers_of_a_model_that_runs_in_chunks(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("a sentence of some words")
    run = ms.load(model)
    whole = run.embed(source, layer=1)
    run.model().model.backbone.chunk_length = 5
    again = embeddings_of(run, source)
    assert whole is not None
    np.testing.assert_allclose(again, whole.filter(like="embedding").to_numpy(), rtol=2e-5, atol=1e-6)


def embeddings_of(run: ms.Run, source: Path) -> np.ndarray:
    loaded = run.model()
    answer = Embeddings(loaded, None, "mean", 1)
    assert loaded.tokenizer is not None
    record = Record("r", loaded.tokenizer.encode(source.read_text()))
    (found,) = answer.answers([(record, Span(0, len(record)))])
    assert isinstance(found, Found)
    return found.values


def test_columns_whose_types_come_late_and_whose_names_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambaseq.runs.columns._GROUP", 2)
    for ending in ENDINGS:
        with table(tmp_path / f"out{ending}") as (rows, _):
            for number in range(5):
                rows.add("f", str(number), 0, 0, None, "empty")
            rows.begin(["predicted", "file", "predicted"])
            rows.add("f", "5", 0, 9, ["cat", 0.25, 0.75])
    found = pandas.read_parquet(tmp_path / "out.parquet")
    assert list(found.columns[4:]) == ["predicted", "file_", "predicted_", "note"]
    assert found["predicted"].tolist()[-1] == "cat"
    assert len(found) == 6
    assert list(pandas.read_csv(tmp_path / "out.csv").columns) == list(found.columns)


def test_generation_keeps_its_prompt_and_knows_its_writer(model: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "past.txt"
    prompt.write_text("abc")
    run = ms.load(model)
    with pytest.raises(ConfigError, match="would be overwritten"):
        run.generate(str(prompt), out=prompt)
    with pytest.raises(ConfigError, match="Did you mean"):
        run.generate("abc", out=tmp_path / "o.txt", writer="text/txet", max_new_tokens=10**6)


def test_generation_is_text(model: Path, tmp_path: Path) -> None:
    run = ms.load(model)
    found = run.generate("abc", max_new_tokens=5, samples=2, seed=3)
    assert all(isinstance(text, str) and text.startswith("abc") for text in found.sequences)
    assert not found.files
    again = run.generate("abc", max_new_tokens=5, samples=2, seed=3, out=tmp_path / "out.txt")
    assert [path.name for path in again.files]
    assert all((one == other).all() for one, other in zip(found.ids, again.ids, strict=True))


def test_what_goes_with_what(model: Path, tmp_path: Path) -> None:
    source = fasta(tmp_path, 20)
    for options, match in (
        ({"what": "other"}, "answers, tokens or embeddings"),
        ({"pool": "last"}, "--what embeddings"),
        ({"what": "embeddings", "pool": "max"}, "mean, last or none"),
    ):
        with pytest.raises(ConfigError, match=match):
            ms.load(model).predict(source, **options)


def test_an_option_that_predict_has_not_is_named(model: Path) -> None:
    for apply in (ms.load(model).predict, ms.load(model).embed):
        with pytest.raises(ConfigError, match=r"predict has no option 'bach_size'\. Did you mean 'batch_size'"):
            apply("x.txt", bach_size=1)
