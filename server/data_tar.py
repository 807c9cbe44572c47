"""Named pictures out of a tar archive that a stranger made: streamed, size-capped, written under our own names only.

A member's name is compared, never used as a path, so nothing can be written outside the folder. Links, devices, folders
and names that point outside are refused; the rest of the archive is read past.
"""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

_CHUNK = 1 << 16


class TarDamaged(Exception):
    """The archive cannot be read to its end; another download may help."""


class _Capped(io.RawIOBase):
    """A stream that ends with an error after `cap` bytes: an archive that unpacks without end stops here."""

    def __init__(self, source: IO[bytes], cap: int) -> None:
        self._source, self._left = source, cap

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise TarDamaged("it unpacks to more than is taken")
        buffer[: len(data)] = data
        return len(data)


class _Header(tarfile.TarInfo):
    """A header that refuses what tarfile would read into memory without bound: giant long names and sparse maps."""

    _LONG = frozenset(
        (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
    )

    @classmethod
    def frombuf(cls, *arguments: Any, **named: Any) -> Any:
        """As tarfile's own. Raises TarDamaged for a header that no picture archive has."""
        found = super().frombuf(*arguments, **named)
        if found.type == tarfile.GNUTYPE_SPARSE or (found.type in cls._LONG and found.size > 1 << 20):
            raise TarDamaged("it holds a sparse file or a name without end")
        return found


def unsafe(name: str) -> bool:
    """Whether a member's name is absolute, climbs out of its folder or is empty."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name


def extract(
    archive: Path,
    wanted: Mapping[str, Path],
    largest: int = 64 << 20,
    unpacked: int = 16 << 30,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Write each wanted member to its path (atomic); returns what happened by member: "" or why it was not written.

    `largest` and `unpacked` cap the bytes of one member and of everything unpacked. Raises TarDamaged; members written
    before the damage stay. `stopped` is asked before each member and ends the reading early.
    """
    names = {_plain(name): name for name in wanted}
    states = dict.fromkeys(wanted, "not in the archive")
    for name in wanted:
        if unsafe(name):
            states[name] = "its name points outside the archive"
            names.pop(_plain(name), None)
    try:
        with open(archive, "rb") as raw, _unzipped(raw) as stream:
            capped = _Capped(stream, unpacked)
            with tarfile.open(fileobj=capped, mode="r|", tarinfo=_Header) as tar:
                while names and not stopped() and (member := tar.next()):
                    asked = names.pop(_plain(member.name), None)
                    if asked is not None:
                        states[asked] = _take(tar, member, wanted[asked], largest)
                    tar.members.clear()  # type: ignore[attr-defined]  # else every header of a long archive stays in memory
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise TarDamaged(f"{archive.name} is damaged ({error})") from error
    return states


def _plain(name: str) -> str:
    return name[2:] if name.startswith("./") else name


def _unzipped(raw: IO[bytes]) -> Any:
    """The archive's bytes, unzipped if they start as gzip does."""
    start = raw.read(2)
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if start == b"\x1f\x8b" else raw


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, largest: int) -> str:
    if not member.isreg() or member.issparse():
        return "is a link, a folder or a device, not a plain file"
    if member.size > largest:
        return f"has {member.size} bytes, at most {largest} are taken"
    if member.size == 0:
        return "is empty"
    source = tar.extractfile(member)
    assert source is not None
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as out:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return ""
