"""Fetch a model's files at a pinned revision: from the Hugging Face hub, a plain web server, or a local folder.

A plain server offers `manifest.json`: {"revision": ..., "files": [{"name", "size", "sha256"}, ...]}, and the files
beside it. Every file is written as NAME.partial, checked by size and SHA-256, flushed and renamed, so that a fetch that
was cut goes on where it stopped and a file that is there under its name is right. At the end `fetched.json` says what
was fetched. Nothing else in Afya uses the network for models.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

from model import files, presets
from model.checkpoint_facts import FETCHED

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_PATIENCE, _TIMEOUT = 5, 60.0  # tries in a row that bring nothing new; seconds a server may be silent
_SPARE = 64 * 2**20  # bytes of disk that stay free
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

Progress = Callable[[str, int, int], None]  # file, bytes there, bytes in all of it


class FetchError(RuntimeError):
    """A model cannot be fetched; the message says what, where and what to do. What is there already stays."""


@dataclass(frozen=True)
class File:
    """A file of a model: its name (with folders, by slashes), size in bytes and SHA-256; None where not known."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Fetched:
    """What a fetch brought: folder, source, revision, files there, and how many bytes of them came this time."""

    out: Path
    source: str
    revision: str
    files: int
    bytes: int
    new_bytes: int


def fetch(source: str, out: Path, revision: str | None = None, progress: Progress | None = None) -> Fetched:
    """Bring all files of `source` into the folder `out`, which may hold the beginning of them.

    `source` is a preset's name, a local folder, an address of a folder with a manifest, or a hub name (owner/name).
    `revision` is the hub's commit (40 hexadecimal digits), or the manifest's revision or SHA-256; a preset has its own
    once it is pinned. Raises FetchError.
    """
    out, preset = Path(out), next((p for p in presets.PRESETS if p.name == source), None)
    if preset is not None:
        if preset.source is None:
            raise FetchError(f"{preset.name} has no published address here; fetch it from your own server or folder.")
        source, revision = preset.source, revision or preset.revision
        if revision is None:
            raise FetchError(f"{preset.name} ({source}) is not pinned yet; give the commit you trust with --revision.")
    out.mkdir(parents=True, exist_ok=True)
    if "://" in source:
        listing, revision = _manifest(source, revision)
        done = _all(listing, out, lambda file, part: _download(source, file, part, progress))
    elif Path(source).is_dir():
        listing, revision = _local(Path(source), revision)
        done = _all(listing, out, lambda file, part: _copy(Path(source), file, part, progress))
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        from model import fetch_hub

        if revision is None or not _COMMIT.fullmatch(revision):
            raise FetchError(f"{source} is fetched at a commit only: give its 40 digits with --revision, no branch.")
        listing, done = fetch_hub.fetch(source, out, revision)
    else:
        raise FetchError(f"{source} is no known model, folder or address; `afya-model list` shows the known ones.")
    found = Fetched(out, source, revision, len(listing), sum(f.size for f in listing), done)
    _note(found, listing, preset)
    return found


def _note(found: Fetched, listing: list[File], preset: presets.Preset | None) -> None:
    """Write what was fetched beside it; the importer reads source, revision and preset there."""
    local = Path(found.source).is_dir()
    facts: dict[str, Any] = {"preset": preset.name if preset else None, "revision": found.revision}
    facts |= {"source": Path(found.source).name if local else found.source}
    facts |= {"files": [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in listing]}
    files.write_atomic(found.out / FETCHED, json.dumps(facts, indent=1).encode())


def _all(listing: list[File], out: Path, bring: Callable[[File, Path], int]) -> int:
    """Bring every file that is not there yet; returns the new bytes. Raises FetchError."""
    try:
        missing = [file for file in listing if not _is_there(out / file.name, file)]
        free, needs = shutil.disk_usage(out).free, sum(file.size for file in missing) + _SPARE
        held = sum(p.stat().st_size for f in missing if (p := _part(out, f)).is_file())
        if free < needs - held:
            gib = (needs - held) / 2**30
            raise FetchError(f"{out} has {free / 2**30:.1f} GiB free, the model needs {gib:.1f} more; make room.")
        total = 0
        for file in missing:
            part = _part(out, file)
            part.parent.mkdir(parents=True, exist_ok=True)
            total += bring(file, part)
            _accept(file, part, out / file.name)
        return total
    except OSError as error:
        raise FetchError(f"{out} cannot be written: {error}; what is there already stays.") from error


def _part(out: Path, file: File) -> Path:
    return out / f"{file.name}.partial"


def _is_there(path: Path, file: File) -> bool:
    """Whether a file is there and right; a wrong one is fetched again."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return file.sha256 is None or files.sha256_file(path) == file.sha256


def _accept(file: File, part: Path, path: Path) -> None:
    """Check a whole file, flush it and give it its name. A wrong one is removed."""
    size, digest = part.stat().st_size, files.sha256_file(part)
    if size != file.size or (file.sha256 is not None and digest != file.sha256):
        part.unlink()
        raise FetchError(f"{file.name} is not what its list says (SHA-256 or size); it was removed: fetch again.")
    with open(part, "rb") as whole:
        os.fsync(whole.fileno())
    os.replace(part, path)
    files.sync_folder(path.parent)


def _safe(name: Any) -> str:
    """A file name of a listing that stays inside the folder. Raises FetchError for any other."""
    path = PurePosixPath(str(name))
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in str(name) or str(path) != str(name):
        raise FetchError(f"The list of files names {name!r}, which is outside the folder; nothing is written.")
    return str(path)


def listing_of(data: bytes, revision: str | None, where: str) -> tuple[list[File], str]:
    """(files, revision) of a manifest's content; `revision`, if given, must be its revision or SHA-256.

    Raises FetchError.
    """
    digest = hashlib.sha256(data).hexdigest()
    try:
        found = json.loads(data)
        rows = [File(_safe(row["name"]), int(row["size"]), str(row["sha256"]).lower()) for row in found["files"]]
        own = str(found.get("revision") or digest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FetchError(f"{where} holds no list of files with name, size and sha256 ({error}).") from error
    if revision is not None and revision not in (own, digest):
        raise FetchError(f"{where} is of revision {own}, not {revision}; give the right one with --revision.")
    return rows, own


def _local(folder: Path, revision: str | None) -> tuple[list[File], str]:
    """Files of a local folder: those of its manifest, else all of them by their own hashes."""
    if (folder / MANIFEST).is_file():
        return listing_of((folder / MANIFEST).read_bytes(), revision, str(folder / MANIFEST))
    if revision is not None:
        raise FetchError(f"{folder} has no {MANIFEST}, so its revision is not known; leave out --revision.")
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FETCHED and p.suffix != ".partial")
    rows = [File(p.relative_to(folder).as_posix(), p.stat().st_size, files.sha256_file(p)) for p in paths]
    if not rows:
        raise FetchError(f"{folder} holds no files; give the folder of a model.")
    return rows, hashlib.sha256(json.dumps([[f.name, f.sha256] for f in rows]).encode()).hexdigest()


def _copy(folder: Path, file: File, part: Path, progress: Progress | None) -> int:
    """Copy one file of a local folder, going on where an earlier copy stopped."""
    have = part.stat().st_size if part.is_file() else 0
    have = have if have <= file.size else 0
    with open(folder / file.name, "rb") as source, open(part, "r+b" if have else "wb") as out:
        source.seek(have)
        out.seek(have)
        return _pour(iter(lambda: source.read(_CHUNK), b""), out, file, have, progress)


def _pour(chunks: Iterator[bytes], out: Any, file: File, have: int, progress: Progress | None) -> int:
    new = 0
    for chunk in chunks:
        out.write(chunk)
        new += len(chunk)
        if progress is not None:
            progress(file.name, have + new, file.size)
    return new


def _address(source: str, name: str) -> str:
    """Address of a file beside a manifest; plain http only on this machine. Raises FetchError."""
    parts = urllib.parse.urlsplit(source)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise FetchError(f"{source} is not fetched: only https:// addresses are.")
    return f"{source.rstrip('/')}/{urllib.parse.quote(name)}"


def _manifest(source: str, revision: str | None) -> tuple[list[File], str]:
    address = _address(source, MANIFEST)
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
            data = answer.read()
    except (OSError, HTTPException) as error:
        raise FetchError(f"{address} cannot be read ({error}); check the address and the network.") from error
    return listing_of(data, revision, address)


def _download(source: str, file: File, part: Path, progress: Progress | None) -> int:
    """One file over HTTP, asking for the rest as often as it brings something new. Raises FetchError."""
    began, idle, last = part.stat().st_size if part.is_file() else 0, 0, ""
    while idle < _PATIENCE:
        have = part.stat().st_size if part.is_file() else 0
        if have == file.size and part.is_file():
            return have - min(began, have)
        if have > file.size:
            part.unlink()
            continue
        try:
            new = _rest(_address(source, file.name), file, part, have, progress)
        except (HTTPException, urllib.error.URLError, TimeoutError, ConnectionError) as error:
            _final(error, file, part)
            new, last = (part.stat().st_size if part.is_file() else 0) - have, f": {error}"
        idle = 0 if new > 0 else idle + 1
        if new <= 0:
            time.sleep(0.2 * idle)
    raise FetchError(f"{source} stopped sending {file.name}{last}; run the same command again to go on.")


def _final(error: Exception, file: File, part: Path) -> None:
    """Raise FetchError for an answer that trying again cannot change; forget a part that the server finds too long."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code == 416:
            part.unlink(missing_ok=True)
        elif error.code < 500 and error.code not in (408, 429):
            raise FetchError(f"The server has no {file.name} ({error}); its list of files is wrong.") from error


def _rest(address: str, file: File, part: Path, have: int, progress: Progress | None) -> int:
    """Append what the server sends from byte `have` on; a server that cannot do that sends all of it again."""
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        have = have if answer.status == 206 else 0
        with open(part, "r+b" if have else "wb") as out:
            out.seek(have)
            return _pour(iter(lambda: answer.read(_CHUNK), b""), out, file, have, progress)
