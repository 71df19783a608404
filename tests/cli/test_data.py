"""`mambaseq data`: what is fetched into a folder of one's own is found again."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from mambaseq.cli.main import main
from mambaseq.data.cache import locate
from mambaseq.errors import DataError


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Of one file that is in the folder `mine` already, so that nothing is downloaded."""
    (tmp_path / "mine" / "fetched" / "small").mkdir(parents=True)
    (tmp_path / "mine" / "fetched" / "small" / "a.txt").write_bytes(b"abc")
    path = tmp_path / "small.yaml"
    checksum = f"sha256:{hashlib.sha256(b'abc').hexdigest()}"
    path.write_text(
        "name: small\nsummary: a file\nlicence: none\nhomepage: http://127.0.0.1:1\nfiles:\n"
        f"  - {{name: a.txt, url: 'http://127.0.0.1:1/a.txt', checksum: '{checksum}'}}\n"
    )
    return path


def test_what_to_write_in_a_configuration_is_told(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "mine"))
    assert main(["data", "info", str(manifest)]) == 0
    (told,) = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("    use ")]
    assert locate(told)[0].read_bytes() == b"abc"
    assert main(["data", "info", "text8"]) == 0
    assert "use fetched:text8/text8/PATH" in capsys.readouterr().out


def test_a_cache_of_ones_own(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "usual"))
    assert main(["data", "fetch", str(manifest), "--cache", str(tmp_path / "mine")]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(tmp_path / "mine" / "fetched" / "small")
    assert f"MAMBASEQ_CACHE={tmp_path / 'mine'}" in said.err
    with pytest.raises(DataError, match=r"--cache FOLDER, set the variable MAMBASEQ_CACHE"):
        locate("fetched:small/a.txt")
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "mine"))
    assert locate("fetched:small/a.txt")[0].read_bytes() == b"abc"
    for more in ([], ["--cache", str(tmp_path / "mine")]):  # the folder that runs look in: nothing to be told
        assert main(["data", "fetch", str(manifest), *more]) == 0
        assert "MAMBASEQ_CACHE" not in capsys.readouterr().err


def test_a_file_of_data_is_audited_as_that_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bases = ["".join(random.Random(number).choices("ACGT", k=40)) for number in range(60)]
    Path("own.csv").write_text("seq,kind\n" + "".join(f"{one},{number % 2}\n" for number, one in enumerate(bases)))
    for name in ("own.csv", "nope.csv", "nope.fa.gz"):  # there or not
        assert main(["data", "audit", name]) == 2
        assert f"mambaseq data audit dna/labelled --data.files {name}, with" in capsys.readouterr().err
    command = ["data", "audit", "dna/labelled", "--data.files", "own.csv"]
    assert main([*command, "--data.sequence", "seq", "--data.label", "kind"]) == 0
    assert "no word of 32 bases is shared" in capsys.readouterr().out
