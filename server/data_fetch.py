"""One file over HTTP into a folder, going on after a cut: `.partial` beside it, Range, back-off, disk checked.

Used by `server.data_download`. The bytes are stored as sent; what they mean is the caller's business.
"""

import contextlib
import os
import re
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import files

_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # answers after which asking again makes sense


class FetchError(Exception):
    """One file could not be had; `missing` says that the server does not have it (no use in asking again now)."""

    def __init__(self, text: str, missing: bool = False) -> None:
        super().__init__(text)
        self.missing = missing


class DiskFull(Exception):
    """Nothing more fits; the whole download has to stop."""


class Stopped(Exception):
    """The user asked to stop; partial files stay and the next run goes on with them."""


@dataclass
class Fetcher:
    """How to fetch: an httpx client, attempts without progress before giving up, seconds of the first pause, the bytes
    of the disk to leave free, the largest file taken, and the flag that stops everything.
    """

    client: Any
    tries: int = 5
    pause: float = 1.0
    keep_free: int = 2 << 30
    largest: int = 1 << 40
    stop: threading.Event = field(default_factory=threading.Event)

    def fetch(self, url: str, path: Path) -> int:
        """Bring `url` to `path` (atomic); returns the number of requests it took.

        Raises FetchError when it cannot be had, DiskFull, Stopped. What has come so far stays in `path`.partial.
        """
        partial = path.with_name(path.name + ".partial")
        failures, best, requests = 0, _size(partial), 0
        while True:
            requests += 1
            try:
                self._once(url, partial)
                break
            except _Interrupted as error:
                failures = failures + 1 if _size(partial) <= best else 0
                best = max(best, _size(partial))
                if failures >= self.tries:
                    raise FetchError(
                        f"{url} failed {requests} times ({error}); run the command again later."
                    ) from error
                if self.stop.wait(min(60.0, error.wait or self.pause * 2**failures)):
                    raise Stopped from error
        os.replace(partial, path)
        _tag(partial).unlink(missing_ok=True)
        files.sync_folder(path.parent)
        return requests

    def room(self, folder: Path, wanted: int) -> None:
        """Raise DiskFull unless `wanted` more bytes leave `keep_free` bytes of the disk."""
        free = shutil.disk_usage(folder).free
        if free - wanted < self.keep_free:
            raise DiskFull(
                f"{folder} has {free / 2**30:.1f} GiB free; {wanted / 2**30:.1f} more would leave less than "
                f"{self.keep_free / 2**30:.1f}. Make room or choose another --out; what is there stays."
            )

    def _once(self, url: str, partial: Path) -> None:
        """One request, from where `partial` ends. Raises _Interrupted if another try may help."""
        import httpx

        have = _size(partial)
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            tag = _tag(partial)
            if tag.exists():
                headers["If-Range"] = tag.read_text()
        try:
            with self.client.stream("GET", url, headers=headers) as answer:
                if self._accept(answer, url, partial, have):
                    self._store(answer, partial)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise FetchError(f"{url} is no address to fetch from ({error}).") from error
        except httpx.TransportError as error:
            raise _Interrupted(str(error) or type(error).__name__) from error

    def _accept(self, answer: Any, url: str, partial: Path, have: int) -> bool:
        """Whether bytes follow; prepares `partial` for them."""
        status = answer.status_code
        if status == 416:  # nothing after what we have: either it is whole or it is another file's beginning
            if answer.headers.get("content-range", "").endswith(f"/{have}"):
                return False
            partial.unlink()
            raise _Interrupted("the part at hand is not of this file")
        if status in _AGAIN:
            raise _Interrupted(f"HTTP {status}", _seconds(answer.headers.get("retry-after", "")))
        if status not in (200, 206):
            raise FetchError(f"{url} cannot be had (HTTP {status}).", missing=status in (404, 410))
        if status == 206 and not _starts_at(answer.headers.get("content-range", ""), have):
            partial.unlink(missing_ok=True)
            raise _Interrupted("the server sent another part than asked for")
        length = int(answer.headers.get("content-length") or 0)
        if length + have * (status == 206) > self.largest:
            raise FetchError(f"{url} has {length} bytes; at most {self.largest} are taken.")
        self.room(partial.parent, length)
        if status == 200:
            partial.write_bytes(b"")
            _remember(partial, answer.headers.get("etag") or answer.headers.get("last-modified") or "")
        return True

    def _store(self, answer: Any, partial: Path) -> None:
        size = _size(partial)
        with open(partial, "ab") as out:
            for chunk in answer.iter_raw():
                if self.stop.is_set():
                    raise Stopped
                size += len(chunk)
                if size > self.largest:
                    raise FetchError(f"{answer.url} has more than {self.largest} bytes; they are not taken.")
                try:
                    out.write(chunk)
                except OSError as error:
                    raise DiskFull(f"{partial} cannot be written ({error.strerror}); make room.") from error
            out.flush()
            os.fsync(out.fileno())


class _Interrupted(Exception):
    """A request that may work next time; `wait` is the pause the server asked for, in seconds."""

    def __init__(self, text: str, wait: float = 0.0) -> None:
        super().__init__(text)
        self.wait = wait


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(partial: Path) -> Path:
    """Beside the part: the version of the file it belongs to, as the server names it."""
    return partial.with_name(partial.name + ".tag")


def _remember(partial: Path, tag: str) -> None:
    _tag(partial).unlink(missing_ok=True)
    if tag and not tag.startswith("W/"):  # a weak tag says nothing about the bytes
        _tag(partial).write_text(tag)


def _starts_at(content_range: str, have: int) -> bool:
    found = re.match(r"bytes (\d+)-", content_range)
    return bool(found) and int(found[1]) == have  # type: ignore[index]


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    return 0.0
