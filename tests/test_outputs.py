"""What a user names for results: links stay, devices and pipes are written to, folders are refused."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mambaseq_audio.codes import CodeFrames
from mambaseq_audio.mulaw import MuLaw
from mambaseq_dna.tokenizer import BaseTokenizer
from mambaseq_text.tokenization import ByteTokenizer

from mambaseq.cli.main import main
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError
from mambaseq.outputs import check_taken, is_stream, numbered, output_file

WRITERS = {
    "dna/fasta": (BaseTokenizer(), {}, "out.fa"),
    "audio/wav": (MuLaw(), {"sample_rate": 8000}, "out.wav"),
    "audio/codes": (CodeFrames(1, 4), {}, "out.npy"),
    "text/text": (ByteTokenizer(), {}, "out.txt"),
    "csv": (None, {"columns": ["level"]}, "out.csv"),
}


def values_of(tokenizer: Any) -> np.ndarray:
    ids: np.ndarray = np.arange(50, dtype=np.uint8) % 4
    if tokenizer is None:
        ids = ids[:, None].astype(np.float32)
    elif isinstance(tokenizer, CodeFrames):
        ids = tokenizer.encode(ids[:, None])
    return ids


def write(name: str, path: Path, count: int = 1) -> list[Path]:
    tokenizer, options, _ = WRITERS[name]
    values = [values_of(tokenizer)] * count
    files: list[Path] = catalog()["writers"].get(name)(path, values, tokenizer, **options)
    return files


def test_every_writer_is_tried_here() -> None:
    assert set(WRITERS) == {entry.name for entry in catalog()["writers"] if not entry.name.startswith("ecg/")}


def test_a_writer_says_of_a_position_what_it_cannot_write() -> None:
    taken = set()
    for name, (_, options, _) in WRITERS.items():
        for other, (tokenizer, _, _) in WRITERS.items():
            with contextlib.suppress(ConfigError):
                check_taken(catalog()["writers"].get(name), values_of(tokenizer)[:1], tokenizer, options)
                taken.add((name, other))
    # bases are text as well, and codes are numbers in columns
    assert taken == {(name, name) for name in WRITERS} | {("text/text", "dna/fasta"), ("csv", "audio/codes")}


@pytest.mark.parametrize("name", WRITERS)
def test_links_stay_and_devices_too(tmp_path: Path, name: str) -> None:
    plain = tmp_path / WRITERS[name][2]
    write(name, plain)
    kept, link = tmp_path / "elsewhere" / plain.name, tmp_path / f"link-{plain.name}"
    chain = tmp_path / f"chain-{plain.name}"
    kept.parent.mkdir()
    link.symlink_to(Path("elsewhere") / plain.name)  # nothing stands there yet
    chain.symlink_to(link)
    write(name, link)
    assert link.is_symlink()
    assert kept.read_bytes() == plain.read_bytes()
    kept.write_bytes(b"older")
    write(name, chain)
    assert chain.is_symlink()
    assert link.is_symlink()
    assert kept.read_bytes() == plain.read_bytes()
    assert write(name, Path("/dev/null")) == [Path("/dev/null")]
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert sorted(path.name for path in kept.parent.iterdir()) == [plain.name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_pipe_is_written_to(tmp_path: Path, name: str) -> None:
    plain, pipe = tmp_path / WRITERS[name][2], tmp_path / f"pipe-{WRITERS[name][2]}"
    write(name, plain)
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(name, pipe)
    reader.join(10)
    assert read == [plain.read_bytes()]
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", WRITERS)
def test_another_ending_is_refused_by_name(tmp_path: Path, name: str) -> None:
    for wrong in ("x.ogg", "x.tar.gz"):
        with pytest.raises(ConfigError, match=re.escape(wrong)) as told:
            write(name, tmp_path / wrong)
        assert "written as" in str(told.value)
        assert Path(WRITERS[name][2]).suffix in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["text/lambada", "--checkpoint", "none", "x.txt"],
        ["text/perplexity", "--checkpoint", "none", "x.txt"],
        ["audio/frechet", "--generated", "a", "--real", "b"],
        ["audio/score", "--generated", "a", "--real", "b", "--classifier", "c"],
    ],
)
def test_numbers_are_written_as_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--out", "x.wav"]) == 2
    assert "Numbers are written as .json, not as x.wav" in capsys.readouterr().err


def test_standard_output_goes_where_the_shell_put_it(tmp_path: Path) -> None:
    out = tmp_path / "log.txt"
    out.write_text("before\n")
    inode = out.stat().st_ino
    code = "from mambaseq.outputs import output_file\nwith output_file('/dev/stdout', 'w') as f: f.write('here\\n')"
    with out.open("a") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert out.read_text() == "before\nhere\n"
    assert out.stat().st_ino == inode


def test_streams_are_told_from_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    assert [is_stream(p) for p in ("/dev/stdout", "/dev/null", tmp_path / "link", tmp_path / "x", __file__)] == [
        True, True, True, False, False,
    ]  # fmt: skip


def refused(path: Any, message: str) -> None:
    with pytest.raises(UserError, match=message), output_file(path):
        raise AssertionError("opened")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder, but the result is a file")
    (tmp_path / "linked").symlink_to(tmp_path)
    refused(tmp_path / "linked", "is a folder, but the result is a file")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(tmp_path / "a", "leads back to itself")
    refused("", "is not a file name")
    refused(".", "is not a file name")
    refused("x/..", "is not a file name")
    refused("a\0b", "is not a file name")
    refused(tmp_path / ("n" * 300), "too long for a file's name")
    refused("/proc/nothing/x", "cannot be written")
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(os.path.relpath(tmp_path / "s"))
        refused(tmp_path / "s", "is a socket")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "linked", "s"]


def test_a_full_device_is_told() -> None:
    with pytest.raises(UserError, match="disk is full"), output_file("/dev/full", "w") as file:
        file.write("x")


def test_numbers_sort(tmp_path: Path) -> None:
    assert numbered(Path("a/x.txt"), 1) == [Path("a/x.txt")]
    assert [str(path) for path in numbered(Path("a/x"), 2, ".txt")] == ["a/x-000.txt", "a/x-001.txt"]
    many = numbered(Path("x.wav"), 1001)
    assert many == sorted(many)
    with pytest.raises(ConfigError, match="takes one result"):
        numbered(Path("/dev/null"), 2)
