"""Codes of neural codecs: books are shifted and shifted back, files are read without trust, models learn and
write them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mambaseq_audio.code_data import CodeData
from mambaseq_audio.code_files import read_codes, write_codes
from mambaseq_audio.codes import CodeFrames

import mambaseq as ms
from mambaseq.errors import ConfigError, DataError
from mambaseq.runs.generation import generate_to
from mambaseq.runs.prediction import predict


def test_three_frames_of_two_books_by_hand() -> None:
    frames = np.array([[1, 4], [2, 5], [3, 6]])
    delayed = CodeFrames(2, 8)
    assert delayed.encode(frames).tolist() == [[8, 8], [1, 8], [2, 4], [3, 5], [8, 6]]
    assert CodeFrames(2, 8, delay=False).encode(frames).tolist() == [[8, 8], [1, 4], [2, 5], [3, 6]]
    prompt, given = delayed.continued(delayed.encode(frames[:2]), 2)
    assert prompt.tolist() == [[8, 8], [1, 8], [2, 4]]
    assert given is not None
    assert given.tolist() == [[-1, 5], [-1, -1], [8, -1]]  # the second code of the last frame is known
    start, given = delayed.continued(np.array([8]), 1)
    assert (start.tolist(), given.tolist()) == ([[8, 8]], [[-1, 8], [8, -1]])  # type: ignore[union-attr]


@pytest.mark.parametrize("delay", [True, False])
def test_there_and_back_at_ragged_lengths(delay: bool) -> None:
    rng = np.random.default_rng(0)
    for books in (1, 2, 5):
        codec = CodeFrames(books, 300, delay)
        for length in (0, 1, books - 1, books, 17):
            frames = rng.integers(0, 300, (length, books))
            rows = codec.encode(frames)
            assert rows.shape == (1 + length + (books - 1 if delay else 0), books)
            assert rows.dtype == np.uint16
            assert (codec.decode(rows) == frames).all()
            assert (codec.decode(rows[1:]) == frames).all()  # without the row that generation begins with
    whole = CodeFrames(3, 300).encode(np.arange(30).reshape(10, 3))
    assert CodeFrames(3, 300).decode(whole[:-4]).tolist() == np.arange(18).reshape(6, 3).tolist()  # cut short
    for wrong in ([[300, 0, 0]], [[-1, 0, 0]], [[0, 0]]):
        with pytest.raises(ValueError, match=r"codes are in \[0, 300\)|frames of 3 codes"):
            CodeFrames(3, 300).encode(np.array(wrong))
    with pytest.raises(ConfigError, match=r"data\.books must be 1 to 256"):
        CodeFrames(0, 300)


def folder_of(path: Path, books_first: bool = False, dtype: str = "int64") -> Path:
    rng = np.random.default_rng(0)
    path.mkdir()
    for word in ("one", "two"):
        for take, length in enumerate((40, 9, 1)):
            frames = rng.integers(0, 20, (length, 3)).astype(dtype)
            np.save(path / f"{word}_{take}.npy", frames.T if books_first else frames)
    return path


def test_items(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "codes", dtype="int16")
    named = {"pattern": r"(?P<word>[a-z]+)_(?P<take>\d)", "condition": ["word"], "test": "0"}
    data = CodeData(files=str(folder), vocabulary=20, length=16, **named)  # type: ignore[arg-type]
    data.setup()
    assert (data.vocab_size, data.n_codes, data.start_ids) == (21, 3, (20,))
    original = np.load(folder / "one_0.npy")
    assert (data.clips("test")[0] == original).all()
    tiles = data.test()
    assert tiles is not None
    pieces = [tiles[i] for i in range(len(tiles))]
    assert [piece.inputs.shape[1] for piece in pieces] == [18, 18, 10] * 2
    assert sum(int(piece.n_targets) for piece in pieces) == 2 * 40 * 3  # each code once
    codec = CodeFrames(3, 20)
    first = pieces[1]
    assert first.targets is not None
    rows = torch.cat([first.inputs[0, :1], first.targets[0].masked_fill(first.targets[0] == -100, 20)])
    assert (codec.decode(rows.numpy()) == original[16:32]).all()
    assert (first.inputs[0, 1:] == rows[1:-1]).all()
    train = data.train()
    assert [train[i].inputs.shape[1] for i in range(4)].count(3) == 2  # a stream of one frame
    turned = CodeData(files=str(folder_of(tmp_path / "turned", True)), vocabulary=20, layout="books_frames")
    turned.setup()
    assert len(turned.clips("train")) == 6
    assert turned.clips("train")[0].shape == (40, 3)
    both = CodeData(files=[str(folder), str(folder_of(tmp_path / "more"))], vocabulary=20, **named)  # type: ignore[arg-type]
    both.setup()
    assert [len(both.clips(split)) for split in ("train", "test")] == [8, 4]
    told = r"_0\.npy' \(has 40 book\(s\), read as frames_books, but 3 .* with data.layout: books_frames"
    with pytest.raises(DataError, match=told):
        CodeData(files=str(tmp_path / "turned"), vocabulary=20, books=3).setup()


def test_bad_files_are_named(tmp_path: Path) -> None:
    good = np.arange(12).reshape(4, 3)
    np.save(tmp_path / "good.npy", good)
    whole = (tmp_path / "good.npy").read_bytes()
    content: dict[str, tuple[bytes | np.ndarray, str]] = {
        "floats": (good.astype(np.float32), "holds float32, but codes are whole numbers"),
        "negative": (good - 1, "has the code -1 in book 0 of frame 0, but codes are 0 to 19"),
        "large": (good + 9, "has the code 20 in book 2 of frame 3, but codes are 0 to 19"),
        "unequal": (good[:, :2], r"has 2 book\(s\), read as frames_books, but 3 are wanted"),
        "batch": (good[None], r"has the shape \(1, 4, 3\), but two axes are wanted"),
        "nothing": (good[:0], r"has the shape \(0, 3\), so it holds no code"),
        "cut": (whole[:-5], "is cut short: it has 219 bytes, and 224 by its header"),
        "longer": (whole + b"x", "has something after its end"),
        "header": (whole[:40], r"is no \.npy file that can be read"),
        "open": (whole.replace(b"(4, 3)", b"(4, 3("), r"is no \.npy file that can be read"),
        "empty": (b"", r"is no \.npy file that can be read"),
        "pickle": (pickle.dumps([1]), r"is no \.npy file that can be read"),
        "text": (b"1,2,3\n" * 50, r"is no \.npy file that can be read"),
    }
    for name, (made, _) in content.items():
        if isinstance(made, bytes):
            (tmp_path / f"{name}.npy").write_bytes(made)
        else:
            np.save(tmp_path / f"{name}.npy", made)
    np.save(tmp_path / "objects.npy", np.array([[1, None]], dtype=object), allow_pickle=True)
    content["objects"] = b"", "holds pickled Python objects, which could run anything"
    content["missing"] = b"", r"missing\.npy .*line 2\): there is no such file of codes"
    for name, (_, told) in content.items():
        with pytest.raises(DataError, match=told) as error:
            list(read_codes(tmp_path / f"{name}.npy", CodeFrames(3, 20)) if name != "missing" else _missing(tmp_path))
        assert name in str(error.value)
    with pytest.raises(DataError, match=r"14 of 15 recordings cannot be used"):
        CodeData(files=str(tmp_path), vocabulary=20, books=3).setup()
    data = CodeData(files=str(tmp_path), vocabulary=20, books=3, skip_bad=True)
    data.setup()
    assert [stream.tolist() for stream in data.clips("train")] == [good.tolist()]


def test_most_files_say_how_many_books_there_are(tmp_path: Path) -> None:
    for name, books in {"a": 2, "b": 3, "c": 3, "d": 4}.items():
        np.save(tmp_path / f"{name}.npy", np.ones((5, books), dtype=np.int64))
    with pytest.raises(DataError, match=r"2 of 4 recordings cannot be used: .*a\.npy' \(has 2 book.*but 3 are wanted"):
        CodeData(files=str(tmp_path), vocabulary=20).setup()
    data = CodeData(files=str(tmp_path), vocabulary=20, skip_bad=True)
    data.setup()
    assert (data.n_codes, len(data.clips("train"))) == (3, 2)


def _missing(folder: Path) -> list:
    (folder / "list.csv").write_text("file\nmissing.npy\n")
    return list(read_codes(folder / "list.csv", CodeFrames(3, 20)))


def test_written_and_read_again(tmp_path: Path) -> None:
    codec, frames = CodeFrames(3, 20), np.arange(18).reshape(6, 3)
    for layout in ("frames_books", "books_frames"):
        (file,) = write_codes(tmp_path / f"{layout}.npy", [codec.encode(frames)], codec, layout=layout)  # type: ignore[arg-type]
        array = np.load(file)
        assert array.dtype == np.int64
        assert (array == (frames if layout == "frames_books" else frames.T)).all()
        (record,) = read_codes(file, codec, layout=layout)  # type: ignore[arg-type]
        assert record.ids is not None
        assert (record.ids == codec.encode(frames)).all()
    files = write_codes(tmp_path / "out", [codec.encode(frames)] * 2, codec)
    assert [file.name for file in files] == ["000.npy", "001.npy"]
    with pytest.raises(ConfigError, match=r"Codes are written as \.npy, not as x\.wav"):
        write_codes(tmp_path / "x.wav", [codec.encode(frames)], codec)


def test_a_model_is_trained_measured_and_writes_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of the page: numbers that count up in every book are learned, and continued from a prompt."""
    folder = tmp_path / "codes"
    folder.mkdir()
    for take in range(8):
        frames = (take + np.arange(24)[:, None] + 2 * np.arange(3)) % 8
        np.save(folder / f"a_{take}.npy", frames.T)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "audio" / "codes.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    Path("codes.yaml").write_text(written, encoding="utf-8")
    settings = {
        "data": {"vocabulary": 8, "length": 24},
        "loader": {"batch_size": 4},
        "model": {"d_model": 32, "backbone": {"n_layers": 1}},
        "optimizer": {"lr": 0.02, "warmup_steps": 5},
        "trainer": {"max_steps": 30, "accelerator": "cpu"},
    }
    run = ms.fit("codes.yaml", out=tmp_path / "run", settings=settings, progress=False)
    tested = run.evaluate()
    # but for a stream's first code, all follow from others
    assert tested["test/bits_per_token"] < 0.35
    assert tested["test/token_accuracy"] > 0.95
    found = predict(run.path, [folder / "a_7.npy"], None)
    row = found.table.iloc[0]
    assert row["tokens"] == 24 * 3
    assert row["bits_per_token"] == pytest.approx(tested["test/bits_per_token"], abs=1e-4)
    each = predict(run.path, [folder / "a_7.npy"], None, what="tokens").table
    assert each["bits"].sum() == pytest.approx(row["total_bits"], rel=1e-4)
    np.save(tmp_path / "begun.npy", np.load(folder / "a_7.npy")[:, :10])
    generated = generate_to(
        run.path, tmp_path / "out.npy", prompt=str(tmp_path / "begun.npy"), max_new_tokens=14, temperature=0
    )
    assert (np.load(generated.files[0]) == np.load(folder / "a_7.npy")).all()
    several = generate_to(run.path, tmp_path / "new", samples=2, max_new_tokens=5)
    assert [np.load(file).shape for file in several.files] == [(3, 5)] * 2
