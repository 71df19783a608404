"""Compiled code is run from a cache only if nobody else can have written it."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import re
import stat
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core import caching

from mambaseq import compiled as kept
from mambaseq import resources
from mambaseq.benchmarking import diagnosis
from mambaseq.cli.main import main
from mambaseq.data import cache
from mambaseq.data.store import TokenStore
from mambaseq.errors import ConfigError
from mambaseq.ops.gpu import nvrtc
from mambaseq.resources import make_private, why_unsafe

SOURCE, MACROS, ARCHITECTURE = "source", {"N": 1}, "90"


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were compiled, in a cache of the test's own; cuda-core is not needed."""
    done: list[str] = []

    def compile_to_cubin(source: str, macros: dict[str, int], architecture: str) -> bytes:
        done.append(source)
        return f"code of {source}".encode()

    monkeypatch.setattr(nvrtc, "compile_to_cubin", compile_to_cubin)
    monkeypatch.setattr(nvrtc.importlib.metadata, "version", lambda name: "1")
    monkeypatch.setenv("MAMBASEQ_CACHE", str(tmp_path / "cache"))
    nvrtc._told.cache_clear()
    return done


def cubin(source: str = SOURCE) -> bytes:
    return nvrtc._cubin(source, MACROS, ARCHITECTURE)


def test_kernels_are_kept_for_this_user_alone(compiled: list[str], tmp_path: Path) -> None:
    assert cubin() == cubin() == b"code of source"
    assert compiled == ["source"]
    for folder in (tmp_path / "cache", tmp_path / "cache" / "kernels"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("what", ["flipped bit", "cut", "empty", "other kernel's", "as before", "a folder", "huge"])
def test_content_that_is_not_what_was_compiled_is_compiled_again(
    compiled: list[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "_LARGEST", 1000)
    cubin()
    (file,) = nvrtc.kernel_folder().iterdir()
    whole = file.read_bytes()
    if what == "a folder":
        file.unlink()
        file.mkdir()
    elif what == "other kernel's":
        cubin("another")
        (other,) = set(nvrtc.kernel_folder().iterdir()) - {file}
        file.write_bytes(other.read_bytes())
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        contents = {"flipped bit": flipped, "cut": whole[:-1], "empty": b"", "as before": whole[32:]}
        file.write_bytes(contents.get(what, whole * 100))
    compiled.clear()
    assert cubin() == b"code of source"
    assert compiled == ["source"]
    if what != "a folder":
        assert file.read_bytes() == whole


@pytest.mark.parametrize("shared", ["kernels", ".", ".."])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to_is_not_read(
    compiled: list[str], tmp_path: Path, shared: str, mode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cubin()
    (tmp_path / "cache" / shared).chmod(mode)
    (file,) = nvrtc.kernel_folder().iterdir()
    before = file.read_bytes()
    compiled.clear()
    assert cubin() == cubin() == b"code of source"
    assert compiled == ["source", "source"]
    assert file.read_bytes() == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "may be written to by others" in said
    assert "MAMBASEQ_CACHE" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user, which root may do")
@pytest.mark.parametrize("what", ["folder", "link"])
def test_a_folder_of_another_user_is_not_read(compiled: list[str], tmp_path: Path, what: str) -> None:
    cubin()
    folder = nvrtc.kernel_folder()
    if what == "folder":
        os.chown(folder, 12345, 12345)
    else:  # who owns a link may let it lead elsewhere tomorrow
        folder.rename(tmp_path / "kernels")
        folder.symlink_to(tmp_path / "kernels")
        os.lchown(folder, 12345, 12345)
    compiled.clear()
    cubin()
    assert compiled == ["source"]
    assert "belongs to another user" in (why_unsafe(folder) or "")


def test_links_are_followed_and_judged(tmp_path: Path) -> None:
    (shared := tmp_path / "shared").mkdir()
    (inner := shared / "inner").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(Path("shared") / ".." / "shared" / "inner")
    assert why_unsafe(tmp_path / "link") is None
    shared.chmod(0o777)
    assert str(shared) in (why_unsafe(tmp_path / "link") or "")
    shared.chmod(0o1777)  # as /tmp is: what is in it stays in its place
    assert why_unsafe(inner) is None
    assert why_unsafe(tmp_path / "link") is None
    assert str(shared) in (why_unsafe(shared) or "")
    (tmp_path / "loop").symlink_to("loop")
    assert "too many links" in (why_unsafe(tmp_path / "loop") or "")
    assert why_unsafe(tmp_path / "none" / "yet") is None


def test_private_folders_leave_others_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o755)
    make_private(tmp_path / "a" / "b" / "c")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/b/c")]
    assert modes == [0o755, 0o700, 0o700]


def test_a_home_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(ConfigError, match="MAMBASEQ_CACHE"):
        resources.cache_dir()


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_numbas_pickles_are_not_read_from_a_shared_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What somebody put there runs in Numba alone, or this test would prove nothing."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    (tmp_path / "one.py").write_text("def one(x):\n    return x + 1\n")
    (tmp_path / "numba").mkdir(mode=0o700)
    monkeypatch.syspath_prepend(str(tmp_path))
    one = importlib.import_module("one").one
    assert kept.kept_njit()(one)(1) == 2
    (index,) = (tmp_path / "numba").rglob("*.nbi")  # kept, in a folder that is this user's alone
    version = pickle.dumps(pickle.loads(index.read_bytes()))
    index.write_bytes(version + pickle.dumps(Runs(f"touch {tmp_path / 'pwned'}")))
    (tmp_path / "numba").chmod(0o777)
    kept.why_not_kept.cache_clear()
    assert kept.kept_njit()(one)(1) == 2
    assert not (tmp_path / "pwned").exists()
    assert "may be written to by others" in capsys.readouterr().err
    with contextlib.suppress(Exception):
        numba.njit(cache=True)(one)(1)
    assert (tmp_path / "pwned").exists()


def test_kernels_are_compiled_anew_when_what_they_take_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba looks at a kernel's own file alone, and kernels take functions from others."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    (tmp_path / "numba").mkdir(mode=0o700)
    (tmp_path / "taken_anew.py").write_text("def taken_anew(x):\n    return x + 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    function = importlib.import_module("taken_anew").taken_anew

    def hits_and_misses() -> tuple[int, int]:
        made = kept.kept_njit()(function)
        assert made(1) == 2
        return sum(made.stats.cache_hits.values()), sum(made.stats.cache_misses.values())

    assert hits_and_misses() == (0, 1)
    assert hits_and_misses() == (1, 0)
    monkeypatch.setattr(kept, "_digest", lambda: "others")
    assert hits_and_misses() == (0, 1)


def test_all_that_kernels_take_is_looked_at() -> None:
    ops = Path(kept.__file__).parent / "ops"
    taken = [path for path in ops.rglob("*.py") if re.search(r"@(inner_njit|intrinsic)\b", path.read_text())]
    assert len(taken) > 5
    assert set(taken) <= set(kept.sources())


def test_without_a_folder_numba_compiles_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    @kept.kept_njit(nogil=True)
    def two(x: int) -> int:
        return 2 * x

    assert two(3) == 6
    assert kept.folder_of_numba()[0] is None


def test_the_doctor_tells_of_unsafe_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(0o777)
    for variable in ("MAMBASEQ_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "mine"))
    whole = "\n".join(diagnosis._caches())
    assert "others" not in whole
    monkeypatch.setenv("MAMBASEQ_CACHE", str(shared))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(shared / "triton"))
    head, kernels, numbas, triton, inductor, _ = diagnosis._caches()
    assert str(shared) in head
    assert f"not used: {shared} may be written to by others" in kernels
    assert "others" not in numbas
    assert "TRITON_CACHE_DIR" in triton
    assert "others" not in inductor


def test_stores_and_fingerprints_are_in_private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "REMEMBERED_FROM", 0)
    monkeypatch.setattr(cache, "_SETTLED", -1)
    (source := tmp_path / "a").write_bytes(b"a")
    cache.fingerprint(source, tmp_path / "one")
    tokens = np.arange(3, dtype=np.uint8)
    TokenStore.cached("a", lambda: [("a", tokens)], "uint8", {}, cache=tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "one" / "fingerprints", tmp_path / "two", tmp_path / "two" / "stores"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_resource_imports_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding a package inside of another would import the outer one."""
    (package := tmp_path / "outer_of_a_stranger").mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    (package / "inner.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("outer_of_a_stranger.inner:x", "__main__:x", ".x:y", "a b:c", ":x", "outer_of_a_stranger:none"):
        with pytest.raises(ConfigError, match=r"not installed|does not exist"):
            resources.find(name)
    assert not (tmp_path / "pwned").exists()
    assert resources.find("mambaseq.data:store.py").is_file()  # of a package that was imported


def test_names_of_cache_folders_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("a\0b", str(tmp_path / ("x" * 300))):
        assert main(["data", "fetch", "text8", "--cache", name]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert len(said) < 1000
    assert main(["data", "list", "--cache", str(tmp_path / ("x" * 300))]) == 0
