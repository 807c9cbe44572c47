"""Files that must survive a power cut, their hashes, and the one home folder.

Everything that persists is written under a temporary name in the same folder, flushed to the disk and renamed, so a
reader sees the old file or the new one, never half of one. What others may write to is read as a stranger's
(`plain_pieces`). Does not cover the case database: SQLite does that itself.
"""

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 20  # bytes read at a time when hashing: large enough to be fast, small enough for a tiny machine


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash leaves either the old content or all of the new.

    The folder must exist. An existing file keeps its permission bits; a new one is readable by its owner only, since
    most of what is written here belongs to a clinic. In a folder that was given to a group (set-group-ID) that group
    may read it too. If the disk refuses, raises OSError and leaves no temporary file.
    """
    path = Path(path)
    shared = _shared(path.parent)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o640 if shared else 0o600
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    sync_folder(path.parent)


def _shared(folder: Path) -> bool:
    """Whether a folder was given to a group; one made just now inside such a folder is opened to the group as well."""
    found = folder.stat()
    if not found.st_mode & stat.S_ISGID:
        return False
    if found.st_uid == os.geteuid() and found.st_mode & 0o050 != 0o050:
        os.chmod(folder, stat.S_IMODE(found.st_mode) | 0o050)
    return True


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes in lower-case hexadecimal, read in chunks. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def plain_pieces(path: Path, limit: int) -> Iterator[bytes]:
    """The bytes, piece by piece, of a plain file of at most `limit` bytes in a folder that others may write to.

    Never waits for a pipe or a device and follows no link, neither of the file nor of the folder that it lies in.
    Raises OSError for anything else than such a file, and for one that grows beyond the limit meanwhile.
    """
    path = Path(path)
    folder = _open(path.parent, os.O_DIRECTORY, None)
    try:
        descriptor = _open(Path(path.name), os.O_NONBLOCK, folder)
    finally:
        os.close(folder)
    try:
        found, too_large = os.fstat(descriptor), OSError(f"{path.name} is larger than {limit} bytes")
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path.name} is no plain file")
        if found.st_size > limit:
            raise too_large
        while piece := os.read(descriptor, _CHUNK):
            limit -= len(piece)
            if limit < 0:
                raise too_large
            yield piece
    finally:
        os.close(descriptor)


def read_plain(path: Path, limit: int) -> bytes:
    """The bytes of a plain file as `plain_pieces` gives them. Raises OSError."""
    return b"".join(plain_pieces(path, limit))


def _open(path: Path, kind: int, folder: int | None) -> int:
    """Open for reading what is no link. Raises OSError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise OSError(f"{path.name} is a link, or no {'file' if folder else 'folder'}") from error
        raise


class HomeError(RuntimeError):
    """The clinic's folder is not there and cannot be made; the message says which."""


def home() -> Path:
    """The folder of this clinic: $AFYA_HOME, or ~/.afya. Created on first use, for its owner only (0700).

    Raises HomeError.
    """
    folder = Path(os.environ.get("AFYA_HOME") or Path.home() / ".afya").expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HomeError(f"{folder} cannot be this clinic's folder ({error.strerror}); set AFYA_HOME to one.") from error
    return folder
