"""TokenStore: what goes in comes out, and a damaged or outdated store is never used."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mambaseq.data.cache import fingerprint, locate
from mambaseq.data.store import Records, StoreError, TokenStore, smallest_dtype
from mambaseq.errors import DataError
from mambaseq.resources import cache_dir

META = {"sources": [{"name": "a.txt", "size": 3}], "tokenizer": "bytes"}


def some_records() -> Records:
    yield "first", np.arange(5, dtype=np.uint8)
    yield "empty", np.zeros(0, dtype=np.uint8)
    yield "in chunks", iter([np.array([250, 251]), np.array([252])])


def test_roundtrip(tmp_path: Path) -> None:
    TokenStore.build(tmp_path / "s", some_records(), "uint8", META)
    store = TokenStore(tmp_path / "s")
    assert store.names == ["first", "empty", "in chunks"]
    assert [store[i].tolist() for i in range(3)] == [[0, 1, 2, 3, 4], [], [250, 251, 252]]
    assert store.starts.tolist() == [0, 5, 5]
    assert store.meta == META
    assert isinstance(store[0], np.memmap)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(5, "uint8"), (256, "uint8"), (257, "uint16"), (70_000, "uint32")])
def test_smallest_dtype(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert smallest_dtype(vocab_size) == dtype
    store = TokenStore.build(tmp_path / "s", [("r", np.array([vocab_size - 1]))], dtype, META)
    assert store[0].dtype == dtype
    assert store[0].tolist() == [vocab_size - 1]


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'r' has token ids outside of \[0, 255\]"):
        TokenStore.build(tmp_path / "s", [("r", np.array([256]))], "uint8", META)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokens to store"):
        TokenStore.build(tmp_path / "s", [], "uint8", META)


def test_pickle_maps_the_same_file(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "s", some_records(), "uint8", META)
    data = pickle.dumps(store)
    assert len(data) < 500
    assert pickle.loads(data)[2].tolist() == [250, 251, 252]


def damage_length(folder: Path) -> None:
    with (folder / "tokens.bin").open("r+b") as file:
        file.truncate(4)


def damage_content(folder: Path) -> None:
    with (folder / "tokens.bin").open("r+b") as file:
        file.write(b"\x09")


def damage_index(folder: Path) -> None:
    (folder / "index.json").write_text('{"format": 1, "dty')


def remove_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def other_format(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format": 0}))


@pytest.mark.parametrize("damage", [damage_length, damage_content, damage_index, remove_index, other_format])
def test_damage_is_seen_and_mended(tmp_path: Path, damage: object) -> None:
    def cached() -> TokenStore:
        return TokenStore.cached("label", some_records, "uint8", META, cache=tmp_path)

    folder = cached().folder
    damage(folder)  # type: ignore[operator]
    with pytest.raises(StoreError, match=str(folder)):
        TokenStore(folder)
    assert cached()[0].tolist() == [0, 1, 2, 3, 4]
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_cut_store_is_seen_without_its_checksum(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "s", some_records(), "uint8", META)
    damage_length(store.folder)
    with pytest.raises(StoreError, match=r"tokens\.bin has 4 bytes and should have 8"):
        TokenStore(store.folder, check=False)


def test_a_lost_stretch_of_a_large_store_is_seen(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 200, 8 * 2**20).astype(np.uint8)
    store = TokenStore.build(tmp_path / "s", [("r", ids)], "uint8", META)
    with (store.folder / "tokens.bin").open("r+b") as file:
        file.seek(3 * 2**20)
        file.write(bytes(2**18))
    with pytest.raises(StoreError, match="damaged"):
        TokenStore(tmp_path / "s")


def test_cached_is_built_once_for_one_meta(tmp_path: Path) -> None:
    calls = []

    def records() -> Iterator[tuple[str, np.ndarray]]:
        calls.append(1)
        yield "r", np.arange(3)

    first = TokenStore.cached("x", records, "uint8", META, cache=tmp_path)
    again = TokenStore.cached("x", records, "uint8", META, cache=tmp_path)
    other = TokenStore.cached("x", records, "uint8", META | {"lowercase": "keep"}, cache=tmp_path)
    assert first.folder == again.folder != other.folder
    assert len(calls) == 2


def slow_records() -> Iterator[tuple[str, np.ndarray]]:
    time.sleep(0.3)
    yield "r", np.arange(200)


def build_in_process(cache: Path, results: multiprocessing.Queue) -> None:
    store = TokenStore.cached("x", slow_records, "uint8", META, cache=cache)
    results.put((str(store.folder), store[0].tolist()))


def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=build_in_process, args=(tmp_path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join(timeout=20)
    assert {folder for folder, _ in found} == {found[0][0]}
    assert all(ids == list(range(200)) for _, ids in found)
    assert len(list((tmp_path / "stores").iterdir())) == 1


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.fa"
    path.write_text(">a\nACGT\n")
    first = fingerprint(path)
    path.touch()
    assert fingerprint(path) == first
    path.write_text(">a\nACGA\n")
    assert fingerprint(path) != first


def test_cache_dir_is_moved_by_variable_and_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "variable"))
    assert cache_dir() == tmp_path / "variable"
    assert cache_dir(tmp_path / "flag") == tmp_path / "flag"
    monkeypatch.delenv("MAMBASEQ_CACHE")
    assert cache_dir().name == "mambaseq"


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path))
    (tmp_path / "b.fa").touch()
    (tmp_path / "a.fa").touch()
    (tmp_path / "fetched" / "apes").mkdir(parents=True)
    (tmp_path / "fetched" / "apes" / "hg38.fa.gz").touch()
    assert locate(tmp_path / "a.fa") == [tmp_path / "a.fa"]
    assert locate(f"{tmp_path}/*.fa") == [tmp_path / "a.fa", tmp_path / "b.fa"]
    assert locate("fetched:apes/hg38.fa.gz") == [tmp_path / "fetched" / "apes" / "hg38.fa.gz"]
    assert locate("mambaseq:data/encode/*.ENm002.fa.gz")[0].name == "cow.ENm002.fa.gz"
    with pytest.raises(DataError, match=r"mambaseq data fetch apes.* --cache .*MAMBASEQ_CACHE"):
        locate("fetched:apes/missing.fa.gz")
    with pytest.raises(DataError, match="no data file"):
        locate(tmp_path / "missing.fa")
    with pytest.raises(DataError, match="not installed"):
        locate("nosuchpackage:data/a.fa")
