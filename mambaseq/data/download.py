"""Downloads that continue where an interrupted one stopped."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from mambaseq.errors import DataError, UserError
from mambaseq.limits import DOWNLOADED_BYTES

_CHUNK = 1 << 14  # bytes that a broken connection can lose
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_TAG = re.compile(r"[!-~][ -~]{0,199}")  # characters of a header's value that is sent back


class Unreachable(UserError):
    """The server cannot be reached, or the connection keeps breaking."""


class ResumingDownloader:
    """Downloads to `.NAME.part` next to the file, and continues that part with an HTTP range request.

    The part is continued only if the server says that the file is still the same one (`If-Range` with its ETag or date,
    kept in `.NAME.part.version`); otherwise it starts again. An interruption by the network or Ctrl-C leaves the part.
    attempts: tries in a row without a new byte. wait: seconds between them.
    """

    def __init__(self, *, progress: bool = True, attempts: int = 3, wait: float = 2.0, timeout: float = 60.0) -> None:
        self.progress, self.attempts, self.wait, self.timeout = progress, attempts, wait, timeout

    def __call__(self, url: str, path: Path, size: int | None = None) -> Path:
        """Download the file for `path`; returns the part, complete but not verified. The caller moves it to its place
        or calls `forget`.

        size: its bytes, None if unknown.
        Raises Unreachable; UserError if the server has no such file or sends more than `size` bytes (or
        `limits.DOWNLOADED_BYTES`), or the disk is full.
        """
        import requests

        part = _part(path)
        failures = 0
        while True:
            before = _size(part)
            try:
                self._continue(url, part, size)
                return part
            except requests.HTTPError as error:
                answer = error.response
                if answer is None or answer.status_code not in _TRANSIENT:
                    said = f"{answer.status_code} ({answer.reason[:80]})" if answer is not None else str(error)[:200]
                    raise UserError(
                        f"{url} cannot be downloaded: the server answers {said}. The file may have moved; "
                        f"look for it on the data set's page."
                    ) from error
                reason: Exception = error
            except requests.RequestException as error:
                reason = error
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise _no_space(part, str(error)) from error
            failures = failures + 1 if _size(part) <= before else 0
            if failures >= self.attempts:
                raise Unreachable(
                    f"{urlsplit(url).netloc} cannot be reached, or broke the connection ({type(reason).__name__})"
                ) from reason
            time.sleep(self.wait)

    def _continue(self, url: str, part: Path, size: int | None) -> None:
        import requests

        have = _size(part)
        headers = {"Accept-Encoding": "identity"}  # the bytes that the checksum covers
        if have and (version := _remembered(part)):
            headers |= {"Range": f"bytes={have}-", "If-Range": version}
        with requests.get(url, headers=headers, stream=True, timeout=self.timeout) as response:
            if response.status_code == 416:  # nothing after the part: it is complete, or belongs to another file
                if response.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                    return
                part.unlink()
                raise requests.ConnectionError("the part did not fit; downloading again")
            response.raise_for_status()
            range_ = response.headers.get("Content-Range", "")
            if response.status_code != 206 or not range_.startswith(f"bytes {have}-"):
                have = 0
            length = response.headers.get("Content-Length", "")
            rest = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
            total = None if rest is None else have + rest
            _check_size(url, part, total or have, size)
            if rest is not None and rest > (free := shutil.disk_usage(part.parent).free):
                raise _no_space(part, f"{rest:,} bytes are needed, but only {free:,} are free")
            _remember(part, response.headers)
            bar = tqdm(
                total=total,
                initial=have,
                desc=part.name[1:].removesuffix(".part"),
                unit="B",
                unit_scale=True,
                disable=not self.progress,
            )
            with bar, _opened(part, "ab" if have else "wb") as file:
                for chunk in response.iter_content(_CHUNK):
                    have += len(chunk)
                    _check_size(url, part, have, size)
                    file.write(chunk)
                    bar.update(len(chunk))
        if total is not None and _size(part) != total:
            raise requests.ConnectionError("the connection ended early")


def forget(path: Path) -> None:
    """Remove what an interrupted download left."""
    for left in (_part(path), _version(_part(path))):
        left.unlink(missing_ok=True)


def _check_size(url: str, part: Path, found: int, size: int | None) -> None:
    if size is not None and found > size:
        part.unlink(missing_ok=True)
        raise DataError(
            f"{url} sends more than the {size:,} bytes in the manifest. The download was deleted. If the manifest's "
            "size is wrong, correct it."
        )
    DOWNLOADED_BYTES.check(found, url)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _version(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _opened(path: Path, mode: str) -> IO[bytes]:
    # not through a link that somebody may have put there
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666))


def _remembered(part: Path) -> str:
    version = _version(part)
    tag = version.read_bytes()[:300].decode("latin-1") if version.is_file() else ""
    return tag if _TAG.fullmatch(tag) else ""


def _remember(part: Path, headers: Any) -> None:
    etag = headers.get("ETag", "")
    tag = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    if _TAG.fullmatch(tag):
        with _opened(_version(part), "wb") as file:
            file.write(tag.encode("latin-1"))
    else:
        _version(part).unlink(missing_ok=True)


def _no_space(part: Path, reason: str) -> UserError:
    return UserError(
        f"There is no room for {part.name[1:].removesuffix('.part')} in {part.parent}: {reason}. Free some space, or "
        "choose another cache folder (--cache, or the variable MAMBASEQ_CACHE). What was downloaded is kept."
    )
