from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mambaseq_text.baselines import unigram_bigram
from mambaseq_text.corpus import CorpusData, TextTiles

from mambaseq.data.loaders import SequenceDataModule
from mambaseq.errors import ConfigError, DataError


@pytest.fixture
def file(tmp_path: Path, sample: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes((sample * 40).encode())
    return path


def data(files: Any, **options: Any) -> CorpusData:
    made = CorpusData(**{"files": files if isinstance(files, list) else str(files), "length": 50, **options})
    made.setup()
    made.setup()
    return made


def all_targets(tiles: TextTiles | None) -> torch.Tensor:
    assert tiles is not None
    return torch.cat([tiles[i].targets[0] for i in range(len(tiles))])  # type: ignore[index]


def test_fractions_cut_the_file_at_whole_characters(file: Path) -> None:
    corpus = data(file, validation_fraction=0.111, test_fraction=0.077)
    parts = [corpus.raw(split)[0].tobytes() for split in ("train", "validation", "test")]
    assert b"".join(parts) == file.read_bytes()
    assert [part.decode() for part in parts]
    n = file.stat().st_size
    assert 0 <= n * (1 - 0.077) - len(parts[0] + parts[1]) < 4


def test_every_byte_but_the_first_is_predicted_once(file: Path) -> None:
    corpus = data(file)
    for split, tiles in (("validation", corpus.validation()), ("test", corpus.test())):
        assert all_targets(tiles).tolist() == corpus.raw(split)[0][1:].tolist()
        assert tiles is not None
        lengths = [tiles[i].inputs.shape[1] for i in range(len(tiles))]
        assert set(lengths[:-1]) == {50}
        assert 0 < lengths[-1] <= 50
        assert tiles[0].n_units is None
        assert tiles[1].inputs[0, 0] == tiles[0].targets[0, -1]  # type: ignore[index]


@pytest.mark.parametrize(
    ("tokenizer", "options"),
    [("text/bytes", {"bos": True, "eos": True}), ("text/hf", {}), ("text/hf", {"bos": "<|endoftext|>"})],
)
def test_units_are_the_bytes_behind_the_targets(
    file: Path, tokenizer_json: Path, tokenizer: str, options: dict[str, Any]
) -> None:
    if tokenizer == "text/hf":
        options = {"path": str(tokenizer_json), **options}
    corpus = data(file, tokenizer=tokenizer, tokenizer_options=options)
    made = corpus.tokenizer
    assert made is not None
    for split, tiles in (("validation", corpus.validation()), ("test", corpus.test())):
        text = corpus.raw(split)[0].tobytes()
        assert tiles is not None
        units = [tiles[i].n_units for i in range(len(tiles))]
        total = sum(int(unit) for unit in units if unit is not None)
        ids, counts = made.encode_counted(text.decode())  # type: ignore[attr-defined]
        first = 0 if made.bos_id is not None else int(counts[0])  # type: ignore[attr-defined]
        assert total == len(text) - first
        targets = all_targets(tiles)
        assert len(targets) == len(ids) - (first != 0) + (made.eos_id is not None)  # type: ignore[attr-defined]
        assert made.decode(targets.numpy()) == text[first:].decode()
        batch = corpus.collate([tiles[i] for i in range(len(tiles))])
        assert batch.n_units is not None
        assert batch.n_units.shape == (len(tiles),)


def test_training_windows_stay_in_the_training_part(file: Path) -> None:
    corpus = data(file)
    text = corpus.raw("train")[0].tobytes()
    one, two = corpus.train(), data(file).train()
    for index in (0, 999, 5, 10_000):
        item = one[index]
        assert torch.equal(item.inputs, two[index].inputs)
        assert item.targets is not None
        assert bytes([int(item.inputs[0, 0]), *item.targets[0].tolist()]) in text
    assert not torch.equal(one[0].inputs, data(file, seed=1).train()[0].inputs)


def test_files_of_their_own(tmp_path: Path, file: Path) -> None:
    (tmp_path / "test.txt").write_text("a test of its own\n")
    (tmp_path / "more.txt").write_text("more to train on\n" * 20)
    corpus = data([str(file), str(tmp_path / "more.txt")], test_files=str(tmp_path / "test.txt"), validation_fraction=0)
    assert corpus.validation() is None
    assert all_targets(corpus.test()).numpy().astype(np.uint8).tobytes() == b" test of its own\n"
    assert [len(text) for text in corpus.raw("train")] == [file.stat().st_size, 340]


def test_documents_laid_end_to_end(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "train.parquet")
    (tmp_path / "test.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    options = {"test_files": str(tmp_path / "test.jsonl"), "validation_fraction": 0.0, "length": 4}
    corpus = data(tmp_path / "train.parquet", **options)
    assert all_targets(corpus.test()).numpy().astype(np.uint8).tobytes() == b"hree\nfour\n"
    marked = data(tmp_path / "train.parquet", tokenizer_options={"bos": True, "eos": True}, **options)
    assert all_targets(marked.test()).tolist() == [*b"three", 257, 256, *b"four", 257]


def test_a_file_in_two_splits_is_refused(tmp_path: Path, file: Path) -> None:
    (tmp_path / "copy.txt").write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"copy\.txt \(test\) is a copy of .*text\.txt, which is in train"):
        data(file, test_files=str(tmp_path / "copy.txt"))
    with pytest.raises(DataError, match=r"text\.txt \(validation\) is in train too"):
        data(file, validation_files=str(file))


@pytest.mark.parametrize(
    "copy",
    [lambda text: gzip.compress(text), lambda text: text.replace(b"\n", b"\r\n"), lambda text: b"\xef\xbb\xbf" + text],
)
def test_a_copy_that_is_written_otherwise_is_refused(tmp_path: Path, file: Path, copy: Any) -> None:
    (tmp_path / "copy.txt").write_bytes(copy(file.read_bytes()))
    with pytest.raises(DataError, match=r"text\.txt \(train\) is a copy of .*copy\.txt, which is in test"):
        data(file, test_files=str(tmp_path / "copy.txt"))
    with pytest.raises(DataError, match=r"text\.txt \(train\) is a copy of a text in validation or test"):
        data(file, test_files=str(tmp_path / "copy.txt"), duplicates="drop")


def test_copies_of_documents(tmp_path: Path) -> None:
    text = "a document that is long enough to be told from others by what it says"
    rows = [{"text": f"{i}: {text}"} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.txt").write_bytes(f"4: {text}\r\n".encode())
    options = {"test_files": str(tmp_path / "test.txt"), "validation_fraction": 0.0}
    with pytest.raises(DataError, match=r"train\.jsonl, line 5 \(train\) is a copy of .*test\.txt, which is in test"):
        data(tmp_path / "train.jsonl", **options)
    for _ in range(2):  # built, and from the cache
        (raw,) = data(tmp_path / "train.jsonl", duplicates="drop", **options).raw("train")
        assert b"4: a" not in raw.tobytes()
        assert raw.tobytes().count(b": a document") == 8


def test_sources(file: Path) -> None:
    assert data(file).sources() == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}


@pytest.mark.parametrize(("key", "value"), [("epoch_size", 0), ("epoch_size", 2**63), ("seed", -1), ("length", 2**40)])
def test_numbers_out_of_range(file: Path, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key} must be"):
        data(file, **{key: value})


def test_folders_at_any_depth(tmp_path: Path, sample: str) -> None:
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/y/._c.txt"):
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_bytes(name.encode() + sample.encode() * 9)
    assert len(data(tmp_path / "books/**/*.txt").raw("train")) == 3


def test_bad_input(tmp_path: Path, file: Path) -> None:
    with pytest.raises(DataError, match=r"as long as a window, which reads 100,001 tokens.*text\.txt"):
        data(file, length=100_000).train()
    with pytest.raises(ConfigError, match="leave some of it for training"):
        data(file, test_fraction=1.0)
    with pytest.raises(ConfigError, match=r"data\.length must be 1 to"):
        data(file, length=0)
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl holds documents.*text/documents"):
        data(tmp_path / "rows.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9def" * 99)
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text: byte 0xe9 at offset 3 "):
        data(tmp_path / "latin.txt")
    (tmp_path / "short.txt").write_text("x" * 200)
    with pytest.raises(DataError, match=r"test part of .*short\.txt is too short"):
        data(tmp_path / "short.txt", test_fraction=0.005).test()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders(file: Path, num_workers: int) -> None:
    module = SequenceDataModule(data(file), batch_size=4, num_workers=num_workers)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    train = module.data.train()
    assert torch.equal(batch.inputs, module.data.collate([train[i] for i in range(4)]).inputs)
    loader = module.test_dataloader()[0]
    n_targets = sum(int((batch.targets != -100).sum()) for batch in loader)
    assert n_targets == len(module.data.raw("test")[0]) - 1  # type: ignore[attr-defined]


def test_shipped_shakespeare() -> None:
    corpus = CorpusData()
    corpus.setup()
    sizes = [len(corpus.raw(split)[0]) for split in ("train", "validation", "test")]
    assert sizes == [948_084, 55_770, 111_540]
    assert corpus.vocab_size == 256
    assert list(corpus.start_ids) == [10]
    found = unigram_bigram(corpus.raw("train"), corpus.raw("test"))
    assert found["unigram"] == pytest.approx(4.830, abs=1e-3)
    assert found["bigram"] == pytest.approx(3.615, abs=1e-3)


def test_baselines_by_hand() -> None:
    train, test = [np.frombuffer(b"aab", np.uint8)], [np.frombuffer(b"ab", np.uint8)]
    # pairs aa and ab; every count is one higher, for each of 256 bytes: b is 2 of 258, and so it is after a
    found = unigram_bigram(train, test, smoothing=1)
    assert found["unigram"] == pytest.approx(-np.log2(2 / 258))
    assert found["bigram"] == pytest.approx(-np.log2(2 / 258))


def test_masked_text_counts_the_bytes_behind_its_targets(tmp_path: Path, tokenizer_json: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("the beginning of the café and the end of it\n" * 40)
    options: dict[str, Any] = {"files": str(path), "length": 16, "objective": "masked", "validation_fraction": 0.3}
    for more in ({}, {"tokenizer": "text/hf", "tokenizer_options": {"path": str(tokenizer_json)}}):
        data = CorpusData(**options, **more)
        data.setup()
        assert data.tokenizer is not None
        assert data.vocab_size == data.tokenizer.vocab_size + 1
        tiles = data.validation()
        assert tiles is not None
        text = data.raw("validation")[0].tobytes().decode()
        ids, counts = data.tokenizer.encode_counted(text)
        at = 0
        for index in range(len(tiles)):
            item = tiles[index]
            asked = (item.targets != -100)[0].numpy()
            assert asked.any()
            assert item.targets[0].numpy()[asked].tolist() == ids[at : at + len(asked)][asked].tolist()
            if more:
                assert int(item.n_units) == counts[at : at + len(asked)][asked].sum()
            else:
                assert item.n_units is None
            at += len(asked)
        assert at == len(ids)
