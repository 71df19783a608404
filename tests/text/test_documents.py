from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mambaseq_text.documents import DocumentData, PackedDocuments
from mambaseq_text.splits import split_of_text

from mambaseq.batch import Batch
from mambaseq.data.loaders import SequenceDataModule
from mambaseq.errors import ConfigError, DataError

LENGTH = 32


@pytest.fixture
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [f"{i}: " + "é" * int(rng.integers(0, 30)) for i in range(200)]


@pytest.fixture
def file(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def data(files: Any, **options: Any) -> DocumentData:
    defaults = {"length": LENGTH, "validation_fraction": 0.2, "test_fraction": 0.2}
    made = DocumentData(**{"files": str(files), **defaults, **options})
    made.setup()
    made.setup()
    return made


def sequences(packs: PackedDocuments | None) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every sequence of every pack."""
    found = []
    assert packs is not None
    for pack in packs:
        assert pack.cu_seqlens is not None
        assert pack.targets is not None
        bounds = pack.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == pack.inputs.shape[1] == pack.targets.shape[1] <= LENGTH
        for a, b in itertools.pairwise(bounds):
            found.append((pack.inputs[0, a:b].tolist(), pack.targets[0, a:b].tolist()))
    return found


def test_every_token_of_every_document_is_predicted_once(file: Path, texts: list[str]) -> None:
    documents = data(file)
    chains = []
    for packs in (documents.train(), documents.validation(), documents.test()):
        assert isinstance(packs, PackedDocuments)
        pieces = sequences(packs)
        for inputs, targets in pieces:
            assert inputs[1:] == targets[:-1]
            assert 0 < len(inputs) <= LENGTH
        chains += [[inputs[0], *targets] for inputs, targets in pieces]
    wanted = []
    for text in texts:
        ids = list(text.encode())
        wanted += [ids[start - 1 : start + LENGTH] for start in range(1, len(ids), LENGTH)]
    assert sorted(chains) == sorted(wanted)


def test_splits_go_by_content(file: Path, texts: list[str], tmp_path: Path) -> None:
    fractions = {"validation": 0.2, "test": 0.2}
    splits = [split_of_text(text, fractions) for text in texts]
    assert splits.count("test") + splits.count("validation") in range(50, 110)
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text(file.read_text() * 2)
    documents = data(doubled)
    train = documents.train()
    assert isinstance(train, PackedDocuments)
    begins = [{bytes([*i, t[-1]]) for i, t in sequences(p)} for p in (train, documents.validation(), documents.test())]
    starts = [{piece for piece in part if b": " in piece[:5]} for part in begins]
    assert all(starts)
    assert not starts[0] & starts[1]
    assert not starts[0] & starts[2]
    assert not starts[1] & starts[2]
    assert sum(map(len, starts)) == len(texts)


def test_units(file: Path, texts: list[str], tokenizer_json: Path) -> None:
    mark = "<|endoftext|>"
    options = {"path": str(tokenizer_json), "bos": mark, "eos": mark}
    documents = data(file, tokenizer="text/hf", tokenizer_options=options)
    test = documents.test()
    assert test is not None
    total = 0
    for pack in test:
        assert pack.n_units is not None
        assert pack.cu_seqlens is not None
        assert len(pack.n_units) == len(pack.cu_seqlens) - 1
        total += int(pack.n_units.sum())
    fractions = {"validation": 0.2, "test": 0.2}
    assert total == sum(len(text.encode()) for text in texts if split_of_text(text, fractions) == "test")


def test_packing_is_a_function_of_the_seed(file: Path) -> None:
    def packs(**options: Any) -> list[list[int]]:
        train = data(file, **options).train()
        assert isinstance(train, PackedDocuments)
        return [pack.inputs[0].tolist() for pack in train]

    assert packs() == packs()
    assert packs() != packs(seed=1)


def test_batches_join_packs(file: Path) -> None:
    documents = data(file)
    test = documents.test()
    assert test is not None
    batch = documents.collate([test[0], test[1]])
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.inputs.shape == (1, test[0].inputs.shape[1] + test[1].inputs.shape[1])
    first = test[0].cu_seqlens
    assert first is not None
    assert batch.cu_seqlens[: len(first)].tolist() == first.tolist()
    assert batch.cu_seqlens[-1] == batch.inputs.shape[1]
    with pytest.raises(IndexError):
        test[len(test)]


def test_plain_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n\nfour")
    documents = data(tmp_path / "a.txt", validation_fraction=0, test_fraction=0)
    train = documents.train()
    assert isinstance(train, PackedDocuments)
    assert sorted(bytes([i[0], *t]) for i, t in sequences(train)) == [b"four", b"one\ntwo", b"three"]
    assert documents.validation() is None


def test_bad_input(tmp_path: Path, file: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(DataError, match=r"No document is in the (train|validation|test) set of .*one\.jsonl"):
        data(tmp_path / "one.jsonl")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"no tokens|No document"):
        data(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"Line 1 of .*rows\.jsonl has no field 'body'"):
        data(file, field="body")
    with pytest.raises(ConfigError, match=r"data\.length"):
        data(file, length=0)


def test_line_ends_stay_in_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    documents = data(tmp_path / "a.txt", validation_fraction=0, test_fraction=0)
    train = documents.train()
    assert isinstance(train, PackedDocuments)
    assert sorted(bytes([i[0], *t]) for i, t in sequences(train)) == [b"one\r\ntwo", b"three\r\n"]


LONG = ["a document that is long enough to be told from others by what it says, number {}", "and another one " * 6]


def test_copies_fall_on_one_side_however_their_lines_end() -> None:
    fractions = {"validation": 0.3, "test": 0.3}
    for number in range(50):
        text = f"line {number}\nand more"
        others = (text + "\n", text.replace("\n", "\r\n"), "\ufeff" + text, text.replace("\n", "\r") + "\r\n")
        assert {split_of_text(other, fractions) for other in others} == {split_of_text(text, fractions)}


@pytest.mark.parametrize("packed", [False, True])
def test_a_copy_in_a_held_out_file_is_refused_or_left_out(tmp_path: Path, packed: bool) -> None:
    """By what it says: with other line ends, in another kind of file, packed, among other documents."""
    texts = [*(f"{LONG[0].format(i)}\nand its end" for i in range(20)), LONG[1], "short"]
    train, test = tmp_path / "train.jsonl", tmp_path / ("test.txt.gz" if packed else "test.txt")
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content = f"short\r\n\r\n{texts[7]}\r\n\r\nof its own".replace("\nand", "\r\nand").encode()
    test.write_bytes(gzip.compress(content) if packed else content)
    options = {"test_files": str(test), "validation_fraction": 0.0, "length": 1000}
    message = (
        rf"train\.jsonl, line 8 \(train\) is a copy of .*{test.name}, paragraph 2, which is in test.*duplicates: drop"
    )
    with pytest.raises(DataError, match=message):
        data(train, **options)
    documents = data(train, duplicates="drop", **options)
    assert documents._store.names.count("train") == len(texts) - 1
    with pytest.raises(DataError, match=message):
        next(iter(stream([str(train)], test_files=str(test)).train()))
    streamed = stream([str(train)], test_files=str(test), duplicates="drop", length=20, shuffle_windows=0).train()
    n = sum(len(text) + 1 for text in texts) // 20
    seen = b"".join(bytes(item.inputs[0].tolist()) for _, item in zip(range(n), streamed, strict=False))
    assert LONG[0].format(6).encode() in seen
    assert LONG[0].format(7).encode() not in seen


def test_a_copy_in_two_held_out_files_is_refused(tmp_path: Path) -> None:
    for name, rows in (("train", ["a"]), ("validation", [LONG[1]]), ("test", ["b", LONG[1]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    files = {f"{name}_files": str(tmp_path / f"{name}.jsonl") for name in ("validation", "test")}
    with pytest.raises(DataError, match=r"test\.jsonl, line 2 \(test\) is a copy of .*validation\.jsonl, line 1"):
        data(tmp_path / "train.jsonl", **files)


def test_sources(file: Path, shards: list[str]) -> None:
    assert data(file).sources() == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    streamed = stream(shards[:1], test_files=shards[1]).sources()
    assert streamed[shards[1]] == hashlib.sha256(Path(shards[1]).read_bytes()).hexdigest()
    status = Path(shards[0]).stat()
    assert streamed[shards[0]] == f"{status.st_size} bytes, changed at {status.st_mtime_ns} ns"


@pytest.mark.parametrize(
    ("key", "value"),
    [("length", 2**63), ("seed", -1), ("seed", 2**63), ("shuffle_windows", -1), ("shuffle_windows", 2**63)],
)
def test_numbers_out_of_range(file: Path, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key} must be"):
        data(file, **{key: value})


def test_settings_that_are_nothing(file: Path) -> None:
    for key in ("validation_fraction", "test_fraction"):
        with pytest.raises(ConfigError, match="leave some of it for training"):
            data(file, **{key: float("nan")})
    with pytest.raises(ConfigError, match=r"data\.files names nothing"):
        DocumentData(files=[]).setup()


# streaming


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(1)
    for shard in range(3):
        rows = [{"text": f"{shard}/{i}:" + "." * int(rng.integers(0, 40))} for i in range(40)]
        (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / f"{shard}.jsonl") for shard in range(3)]


def stream(shards: list[str], **options: Any) -> DocumentData:
    made = DocumentData(**{"files": shards, "streaming": True, "length": LENGTH, "shuffle_windows": 20, **options})
    made.setup()
    return made


def batches(
    shards: list[str],
    n: int,
    *,
    workers: int = 0,
    batch_size: int = 4,
    place: dict[str, int] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Inputs of the first n batches: `(n, batch_size, length)`."""
    documents = stream(shards, **options)
    train = documents.train()
    train.place(batch_size=batch_size, **(place or {}))  # type: ignore[union-attr]
    loader: Any = torch.utils.data.DataLoader(
        train,  # type: ignore[arg-type]
        batch_size=batch_size,
        drop_last=True,
        num_workers=workers,
        collate_fn=documents.collate,
    )
    return torch.stack([batch.inputs for _, batch in zip(range(n), loader, strict=False)])


N = 60  # about two passes of 120 documents


def test_stream_does_not_depend_on_the_workers(shards: list[str]) -> None:
    wanted = batches(shards, N)
    for workers in (1, 2):
        assert torch.equal(batches(shards, N, workers=workers), wanted)


@pytest.mark.parametrize("start", [1, 2, 25, 59])
def test_stream_goes_on_anywhere(shards: list[str], start: int) -> None:
    wanted = batches(shards, N)[start:]
    assert torch.equal(batches(shards, N - start, place={"start_batch": start}), wanted)
    assert torch.equal(batches(shards, N - start, workers=2, place={"start_batch": start}), wanted)


def test_processes_share_the_batches_of_one(shards: list[str]) -> None:
    wanted = batches(shards, 20)
    parts = [batches(shards, 20, batch_size=2, place={"rank": rank, "world_size": 2}) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim=1), wanted)


def test_a_pass_holds_every_window_once_and_the_next_is_mixed_anew(shards: list[str]) -> None:
    plain = stream(shards, shuffle_windows=0).train()
    text = b"".join(
        json.loads(line)["text"].encode() + b"\n" for shard in shards for line in Path(shard).read_text().splitlines()
    )
    n = (len(text) - 1) // LENGTH
    unmixed = [item for _, item in zip(range(n + 1), plain, strict=False)]
    for k, item in enumerate([*unmixed[:n], unmixed[0]]):
        at = k % n * LENGTH
        assert bytes(item.inputs[0].tolist()) == text[at : at + LENGTH]
        assert bytes(item.targets[0].tolist()) == text[at + 1 : at + LENGTH + 1]
    assert torch.equal(unmixed[n].inputs, unmixed[0].inputs)

    def windows(items: list[Batch]) -> list[bytes]:
        return [bytes(item.inputs[0].tolist()) for item in items]

    mixed = windows([item for _, item in zip(range(2 * n), stream(shards).train(), strict=False)])
    assert mixed[:n] != mixed[n:]
    one_file = windows([item for _, item in zip(range(2 * n), stream(shards[:1]).train(), strict=False)])
    m = one_file.index(one_file[0], 1) if one_file[0] in one_file[1:] else 0
    assert m > 0
    only = stream(shards[:1], shuffle_windows=0).train()
    ordered = windows([item for _, item in zip(range(n), only, strict=False)])
    size = ordered.index(ordered[0], 1)
    assert sorted(one_file[:size]) == sorted(ordered[:size])
    assert one_file[:size] != ordered[:size]


def test_stream_depends_on_the_seed(shards: list[str]) -> None:
    assert not torch.equal(batches(shards, 5), batches(shards, 5, seed=1))


def test_streamed_through_the_module(shards: list[str]) -> None:
    module = SequenceDataModule(stream(shards, test_files=shards[2], files=shards[:2]), batch_size=4)
    module.setup("fit")
    module.batches_done = 3
    batch = next(iter(module.train_dataloader()))
    assert torch.equal(batch.inputs, batches(shards[:2], 4)[3])
    assert module.val_dataloader() == []
    for batch in module.test_dataloader()[0]:
        assert batch.cu_seqlens is not None


def test_a_stream_shorter_than_a_window(shards: list[str]) -> None:
    with pytest.raises(DataError, match=r"shorter than one window of 1,000,000 tokens"):
        next(iter(stream(shards, length=1_000_000).train()))


def test_many_files_make_no_long_message(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{'x' * 60}{i}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="shorter than one window") as caught:
        next(iter(stream([str(tmp_path / "*.jsonl")], length=10_000).train()))
    with pytest.raises(DataError, match="No document is in the") as other:
        data(tmp_path / "*.jsonl")
    assert max(len(str(error.value)) for error in (caught, other)) < 1000


def test_packs_are_filled(tmp_path: Path) -> None:
    """Pieces of any length; evaluation keeps the order of the documents."""
    lengths = np.random.default_rng(0).lognormal(3, 1.2, 2000).astype(int) + 1
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in lengths.tolist()))
    documents = data(path, length=64, validation_fraction=0, test_fraction=0, seed=3)
    packs = documents.train()
    assert isinstance(packs, PackedDocuments)
    sizes = [packs[number].inputs.shape[1] for number in range(len(packs))]
    assert max(sizes) <= 64
    assert np.mean(sizes) > 0.97 * 64
    assert sum(sizes) == (lengths - 1).sum()
