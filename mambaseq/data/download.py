"""A downloader for pooch that goes on where an interrupted download stopped (pooch itself starts again)."""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from mambaseq.errors import UserError

_CHUNK = 1 << 14  # what a broken connection can lose
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class Unreachable(UserError):
    """The server cannot be reached, or keeps breaking off."""


class ResumingDownloader:
    """Downloads to `.NAME.part` beside the file and continues that part by an HTTP range request.

    The part is continued only if the server says that the file is still the same one (`If-Range` with its
    ETag or date, kept in `.NAME.part.version`); otherwise it starts again. An interruption, by the network or
    by Ctrl-C, leaves the part. attempts: how often in a row it is tried without getting a byte. wait: seconds
        between them.
    """

    def __init__(self, *, progress: bool = True, attempts: int = 3, wait: float = 2.0, timeout: float = 60.0) -> None:
        self.progress, self.attempts, self.wait, self.timeout = progress, attempts, wait, timeout

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Called by pooch with a temporary output file; the finished part takes its place."""
        import filelock

        name = next(name for name, address in pooch.urls.items() if address == url)
        part = Path(pooch.path) / f".{name}.part"
        with filelock.FileLock(part.with_name(part.name + ".lock")):
            self._complete(url, part)
            part.replace(output_file)
            _version(part).unlink(missing_ok=True)

    def _complete(self, url: str, part: Path) -> None:
        import requests

        failures = 0
        while True:
            before = _size(part)
            try:
                self._continue(url, part)
                return
            except requests.HTTPError as error:
                answer = error.response
                if answer is None or answer.status_code not in _TRANSIENT:
                    said = f"{answer.status_code} ({answer.reason})" if answer is not None else str(error)
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
                    f"{urlsplit(url).netloc} cannot be reached, or broke off ({type(reason).__name__})"
                ) from reason
            time.sleep(self.wait)

    def _continue(self, url: str, part: Path) -> None:
        import requests

        have = _size(part)
        headers = {"Accept-Encoding": "identity"}  # the bytes that the checksum is of
        version = _version(part)
        if have and version.exists():
            headers |= {"Range": f"bytes={have}-", "If-Range": version.read_text(encoding="latin-1")}
        with requests.get(url, headers=headers, stream=True, timeout=self.timeout) as response:
            if response.status_code == 416:  # nothing after the part: it is whole, or not of this file
                if response.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                    return
                part.unlink()
                raise requests.ConnectionError("the part did not fit; it is loaded again")
            response.raise_for_status()
            range_ = response.headers.get("Content-Range", "")
            if response.status_code != 206 or not range_.startswith(f"bytes {have}-"):
                have = 0
            rest = int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
            total = None if rest is None else have + rest
            if rest is not None and rest > (free := shutil.disk_usage(part.parent).free):
                raise _no_space(part, f"{rest:,} bytes are missing and {free:,} are free")
            _remember(version, response.headers)
            bar = tqdm(
                total=total,
                initial=have,
                desc=part.name[1:].removesuffix(".part"),
                unit="B",
                unit_scale=True,
                disable=not self.progress,
            )
            with bar, part.open("ab" if have else "wb") as file:
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
        if total is not None and _size(part) != total:
            raise requests.ConnectionError("the connection ended early")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _version(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _remember(version: Path, headers: Any) -> None:
    etag = headers.get("ETag", "")
    tag = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    if tag:
        version.write_text(tag, encoding="latin-1")
    else:
        version.unlink(missing_ok=True)


def _no_space(part: Path, reason: str) -> UserError:
    return UserError(
        f"The disk has no room for {part.name[1:].removesuffix('.part')} in {part.parent}: {reason}. Free "
        "some space, or choose another cache folder (--cache, or the variable MAMBASEQ_CACHE). What was "
        "downloaded is kept."
    )
