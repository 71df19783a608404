"""TokenStore: what goes in comes out, and a damaged or outdated store is never used."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import xxhash

from mambaseq.data.cache import Unchanged, fingerprint, locate
from mambaseq.data.store import Records, StoreError, TokenStore, content_checksums, smallest_dtype
from mambaseq.errors import DataError, UserError
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
    with pytest.raises(DataError, match=r"'r' has token ids outside \[0, 255\]"):
        TokenStore.build(tmp_path / "s", [("r", np.array([256]))], "uint8", META)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokens in "):
        TokenStore.build(tmp_path / "s", [], "uint8", META)


def test_nothing_to_store_names_the_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokens in a\.fa, b\.fa"):
        TokenStore.build(tmp_path / "s", [], "uint8", {"sources": [{"name": "a.fa"}, {"name": "b.fa"}]})


def test_a_store_that_says_it_is_of_something_else_is_built_again(tmp_path: Path) -> None:
    store = TokenStore.cached("s", some_records, "uint8", META, cache=tmp_path)
    other = TokenStore.build(tmp_path / "other", some_records(), "uint8", {"sources": [1.5]})
    (store.folder / "index.json").write_bytes((other.folder / "index.json").read_bytes())
    assert TokenStore(store.folder).meta == {"sources": [1.5]}
    assert TokenStore.cached("s", some_records, "uint8", META, cache=tmp_path).meta == META


def test_what_follows_from_tokens_is_kept_with_them(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "s", some_records(), "uint8", META)
    made: list[str] = []

    def make(store: TokenStore) -> np.ndarray:
        made.append(store.folder.name)
        return store.tokens[:4].reshape(2, 2)

    for opened in (store, TokenStore(store.folder)):
        found = opened.kept("first", lambda: make(store))
        assert (found.dtype, found.tolist(), made) == (np.dtype("int64"), [0, 1, 2, 3], ["s"])
    kept = store.folder / "first.kept"
    kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
    assert store.kept("first", lambda: make(store)).tolist() == [0, 1, 2, 3]
    other = TokenStore.build(tmp_path / "other", [("r", np.array([9, 8, 7, 6]))], "uint8", META)
    (other.folder / "first.kept").write_bytes(kept.read_bytes())
    assert other.kept("first", lambda: make(other)).tolist() == [9, 8, 7, 6]
    assert made == ["s", "s", "other"]
    (other.folder / "second.kept").mkdir()  # a place that cannot be written
    assert other.kept("second", lambda: make(other)).tolist() == [9, 8, 7, 6]


def test_a_disk_that_fills_up_while_tokens_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mambaseq.data.store._Tokens.write", full)
    records = [("r", np.zeros(2**20, dtype=np.uint8))] * 20
    with pytest.raises(UserError, match="is full"):
        TokenStore.build(tmp_path / "s", records, "uint8", META)
    assert list(tmp_path.iterdir()) == []


def test_long_records_have_their_own_checksums(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 4, length).astype(np.uint8) for length in (3, 2**20, 5, 2**20 + 1, 0, 2**21)]
    store = TokenStore.build(tmp_path / "s", [(str(k), part) for k, part in enumerate(tokens)], "uint8", META)
    assert store.checksums.tolist() == [list(content_checksums(part)) for part in tokens]


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
    (folder / "index.json").write_text('{"format": 2, "dty')


def change_index(folder: Path) -> None:
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace("a.txt", "b.txt"))


def index_of_another_kind(folder: Path) -> None:
    (folder / "index.json").write_text("[" * 100_000)


def index_is_a_folder(folder: Path) -> None:
    remove_index(folder)
    (folder / "index.json").mkdir()


def store_is_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a store")


def change_names(folder: Path) -> None:
    (folder / "names.json").write_text('["first", "empty", "in chunkz"]')


def change_lengths(folder: Path) -> None:
    np.array([4, 1, 3]).tofile(folder / "lengths.bin")


def change_checksums(folder: Path) -> None:
    np.zeros((3, 2), np.uint64).tofile(folder / "checksums.bin")


def seal(folder: Path, name: str) -> None:
    """Make the checksums of a changed file and of the index right again."""
    index = json.loads((folder / "index.json").read_text())
    data = (folder / name).read_bytes()
    index["files"][name] = [len(data), xxhash.xxh3_64_hexdigest(data)]
    del index["checksum"]
    checksum = xxhash.xxh3_64_hexdigest(json.dumps(index, sort_keys=True).encode())
    (folder / "index.json").write_text(json.dumps(index | {"checksum": checksum}))


def negative_length(folder: Path) -> None:
    np.array([-1, 6, 3]).tofile(folder / "lengths.bin")
    seal(folder, "lengths.bin")


def a_record_more(folder: Path) -> None:
    np.array([4, 1, 3, 0]).tofile(folder / "lengths.bin")
    seal(folder, "lengths.bin")


def remove_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def other_format(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format": 0}))


DAMAGE = [
    damage_length,
    damage_content,
    damage_index,
    change_index,
    index_of_another_kind,
    index_is_a_folder,
    store_is_a_file,
    remove_index,
    other_format,
    change_names,
    change_lengths,
    change_checksums,
    negative_length,
    a_record_more,
]


@pytest.mark.parametrize("damage", DAMAGE)
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


def test_one_flipped_bit_is_seen_wherever_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 200, 8 * 2**20).astype(np.uint8)
    folder = TokenStore.build(tmp_path / "s", [("r", ids)], "uint8", META).folder
    for position in [0, ids.size - 1, *rng.integers(0, ids.size, 20).tolist()]:
        for value in (ids[position] ^ 4, ids[position]):
            with (folder / "tokens.bin").open("r+b") as file:
                file.seek(position)
                file.write(bytes([value]))
            if value == ids[position]:
                TokenStore(folder)
            else:
                with pytest.raises(StoreError, match=r"tokens\.bin is damaged"):
                    TokenStore(folder)


def test_workers_do_not_read_all_tokens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pickle.dumps(TokenStore.build(tmp_path / "s", some_records(), "uint8", META))
    damage_content(tmp_path / "s")
    assert pickle.loads(store)[0].tolist() == [9, 1, 2, 3, 4]
    change_names(tmp_path / "s")
    with pytest.raises(StoreError, match="damaged"):
        pickle.loads(store)


def test_a_name_of_none_goes_on_with_the_record(tmp_path: Path) -> None:
    pieces = [("a", np.arange(3)), (None, np.arange(2)), ("b", np.arange(0)), (None, iter([np.arange(4)]))]
    store = TokenStore.build(tmp_path / "s", pieces, "uint16", META)
    assert [(name, store[i].tolist()) for i, name in enumerate(store.names)] == [
        ("a", [0, 1, 2, 0, 1]),
        ("b", [0, 1, 2, 3]),
    ]


def test_checksums_of_records(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "s", [*some_records(), ("again", np.arange(5))], "uint8", META)
    assert store.checksums[:, 0].tolist() == store.checksums[:, 1].tolist()
    assert store.checksums[0, 0] == store.checksums[3, 0]
    assert len(set(store.checksums[:, 0].tolist())) == 3
    both = TokenStore.build(
        tmp_path / "t", some_records(), "uint8", META, checksums=lambda ids: (int(ids.sum()), len(ids))
    )
    assert TokenStore(both.folder).checksums.tolist() == [[10, 5], [0, 0], [753, 3]]


def test_long_labels(tmp_path: Path) -> None:
    label = "\N{GRINNING FACE}" * 60
    assert TokenStore.cached(label, some_records, "uint8", META, cache=tmp_path).names[0] == "first"


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


def test_a_store_is_built_while_its_sources_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaseq.data.store._LONG", 4)
    meta: Future[dict[str, object]] = Future()
    read = []

    def records() -> Iterator[tuple[str, np.ndarray]]:
        for name, tokens in some_records():
            read.append(name)
            yield name, tokens
        if not meta.done():
            meta.set_result(META)

    plain = TokenStore.cached("x", some_records, "uint8", META, cache=tmp_path / "plain")
    ahead = TokenStore.cached("x", records, "uint8", meta, cache=tmp_path)
    assert ahead.folder.name == plain.folder.name
    for file in plain.folder.iterdir():
        assert (ahead.folder / file.name).read_bytes() == file.read_bytes()
    n, again = len(read), Future[dict[str, object]]()

    def late() -> Iterator[tuple[str, np.ndarray]]:
        yield "first", np.arange(5)
        again.set_result(META)
        yield from records()

    assert TokenStore.cached("x", late, "uint8", again, cache=tmp_path).folder == ahead.folder
    assert len(read) == n + 1, "what is there is not built again"
    assert [entry.name for entry in (tmp_path / "stores").iterdir()] == [ahead.folder.name]
    broken: Future[dict[str, object]] = Future()

    def gone() -> Iterator[tuple[str, np.ndarray]]:
        yield "first", np.arange(5)
        broken.set_exception(DataError("a.fa changes while it is read."))

    with pytest.raises(DataError, match="changes while"):
        TokenStore.cached("x", gone, "uint8", broken, cache=tmp_path)
    assert len(list((tmp_path / "stores").iterdir())) == 1


def test_a_source_replaced_after_its_checksum_is_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    files = Unchanged([path, tmp_path / "none.txt"])

    def records() -> Iterator[tuple[str, np.ndarray]]:
        (tmp_path / "b.txt").write_text("new")
        (tmp_path / "b.txt").replace(path)
        yield from some_records()

    with pytest.raises(DataError, match=r"a\.txt changes while it is read"):
        TokenStore.cached("x", records, "uint8", META, unchanged=files.check, cache=tmp_path)
    assert not list((tmp_path / "stores").iterdir())
    TokenStore.cached("x", some_records, "uint8", META, unchanged=Unchanged([path]).check, cache=tmp_path)


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
    assert first == {"name": "a.fa", "size": 8, "sha256": hashlib.sha256(b">a\nACGT\n").hexdigest()}
    path.touch()
    assert fingerprint(path) == first
    path.write_text(">a\nACGA\n")
    assert fingerprint(path) != first


@pytest.fixture
def large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose checksum is worth remembering and that has not changed for long enough."""
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mambaseq.data.cache.REMEMBERED_FROM", 4)
    monkeypatch.setattr("mambaseq.data.cache._SETTLED", -1.0)
    path = tmp_path / "large.fa"
    path.write_text("ACGT")
    return path


def test_a_large_file_is_read_once(large_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(large_file)
    with monkeypatch.context() as patched:
        patched.setattr("mambaseq.data.cache._sha256", lambda *_: pytest.fail("it was read again"))
        assert fingerprint(large_file) == first
    (memory,) = (cache_dir() / "fingerprints").iterdir()
    for damaged in ("[", memory.read_text().replace(first["sha256"], "0" * 64), "{}"):
        memory.write_text(damaged)
        assert fingerprint(large_file) == first


def test_a_changed_file_of_the_same_size_and_time_is_read_again(large_file: Path) -> None:
    first, status = fingerprint(large_file), large_file.stat()
    time.sleep(0.02)
    with large_file.open("r+") as file:
        file.write("ACGA")
    os.utime(large_file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert large_file.stat().st_mtime_ns == status.st_mtime_ns
    assert fingerprint(large_file)["sha256"] == hashlib.sha256(b"ACGA").hexdigest() != first["sha256"]


def test_what_has_just_changed_is_not_remembered(large_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaseq.data.cache._SETTLED", 60.0)
    fingerprint(large_file)
    assert not (cache_dir() / "fingerprints").exists()


def test_fingerprint_without_a_file_or_a_cache(large_file: Path) -> None:
    cache_dir().write_text("a file where the cache should be")
    assert fingerprint(large_file)["size"] == 4
    with pytest.raises(DataError, match=r"none\.fa cannot be read: No such file"):
        fingerprint(large_file.with_name("none.fa"))


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
    with pytest.raises(DataError, match=r"is a folder. Name the files in it.*/fetched/\*'"):
        locate(tmp_path / "fetched")
    for name in ("a" * 300, "a\0b", "~nosuchuser/a.fa"):
        with pytest.raises(DataError, match=r"not a file name|no data file"):
            locate(name)


def test_locate_at_any_depth(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b/c.txt", "b/d/e.txt")]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert locate(f"{tmp_path}/**/*.txt") == files
