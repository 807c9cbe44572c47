"""The kiosk's own copies of adapters, in a folder that the federated client's user cannot reach: $AFYA_HOME/verified/.

adapters/ is shared with a client whose code comes from the coordinator's server: what lies there can be exchanged or
deleted at any moment, or be no file at all. So an adapter is read from there once. The copy is held against the
pointer, the passport and the newest release seen, and whoever answers loads the copy. A clinic that knows no key of a
coordinator has nothing but the pointer to hold it against. Not covered: whether it fits the model (`model.attach`,
`model.onnx_adapter`) and looks at the picture (`model.canary`), and a client that runs as the kiosk's own user.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import adapters, installed, passport
from model.adapters import AdapterRejected
from model.files import sync_folder, write_atomic

FOLDER = Path("verified")
NEWEST = FOLDER / "newest.json"  # by the name of a coordinator's key: the highest number seen, and whose it is
ALLOWED = FOLDER / "allowed.json"  # the adapter that somebody here went back to last, though it may be an older one
ANSWERED = FOLDER / "answered.json"  # the last copy that answered: a kiosk that starts anew falls back on it
KEPT = 3  # copies: the one in use, the one before, and one more for another kiosk of this home that is behind


@dataclass(frozen=True)
class Verified:
    """A copy that nobody else can change; `unsigned`: a sentence where nobody vouches for the adapter. `key`: name of
    the coordinator's key that does."""

    folder: Path
    unsigned: str | None
    sha256: str
    key: str | None


def take(home: Path, using: Path | None = None) -> Verified | None:
    """Copy the adapter that the pointer names, or find its copy; None where the bare base model answers.

    `using` is the copy that answers now, which is kept. Raises AdapterRejected with one sentence: for what is not
    sound, for a signed release that is older than the newest one seen (unless `allow` named it), and for a home that
    cannot be written.
    """
    record = installed.pointer(home)
    if record is None:
        return None
    source, public, serial = home / "adapters" / record["name"], passport.trusted(home), 0
    if public is not None:
        text = passport.text_of(source)
        serial = passport.serial_of(passport.verify(text, public, record["sha256"], record["base_sha256"]))
    try:
        _make(home)
        with _alone(home / FOLDER):
            if public is not None:
                _check_newer(home, passport.name_of(public), serial, record)
            folder = _copy(source, home / FOLDER / record["name"], record["sha256"])
            if public is not None:
                _note_newest(home, passport.name_of(public), serial, record["name"])
            with contextlib.suppress(OSError):
                _tidy(home / FOLDER, {folder, using, last.folder if (last := answered(home)) else None})
    except OSError as error:
        words = f"{home / FOLDER} cannot be written ({error.strerror or error})"
        raise AdapterRejected(f"{words}; look at its disk and its owner, then start the kiosk again.") from error
    return _verified(folder, record["sha256"], public)


def _verified(folder: Path, sha256: str, public: Any) -> Verified:
    unsigned, key = (passport.UNSIGNED, None) if public is None else (None, passport.name_of(public))
    return Verified(folder, unsigned, sha256, key)


def note_answered(home: Path, found: Verified | None) -> None:
    """Remember which copy answers now, None for the bare base model; as well as this disk allows."""
    with contextlib.suppress(OSError):
        if found is None:
            (home / ANSWERED).unlink(missing_ok=True)
        elif answered(home) != found:
            record = {"name": found.folder.name, "sha256": found.sha256, "key": found.key}
            _write(home, ANSWERED, record)


def answered(home: Path) -> Verified | None:
    """The copy that answered last, if it is still what it was then and vouched for by the key known now."""
    try:
        record = json.loads((home / ANSWERED).read_bytes())
        found = _verified(home / FOLDER / str(record["name"]), str(record["sha256"]), passport.trusted(home))
        named = found.folder.name == record["name"] and record["key"] == found.key
        return found if named and adapters.sha256(found.folder) == found.sha256 else None
    except (OSError, ValueError, KeyError, TypeError, AdapterRejected):
        return None


def allow(home: Path, name: str, sha256: str) -> None:
    """Write down that somebody here went back to this adapter: the kiosk takes it though it has seen a newer one.

    It holds until a newer one than those comes. Raises AdapterRejected and OSError.
    """
    public = passport.trusted(home)
    if public is not None:
        _make(home)
        key = passport.name_of(public)
        _write(home, ALLOWED, _permission(key, _newest(home, key), name, sha256))


def _check_newer(home: Path, key: str, serial: int, record: dict[str, Any]) -> None:
    """Raise AdapterRejected for a release from before the newest one seen, unless somebody here went back to it."""
    newest = _newest(home, key)
    if serial >= int(newest.get("serial", 0)):
        return
    try:
        allowed = json.loads((home / ALLOWED).read_bytes())
    except (OSError, ValueError):
        allowed = None  # nobody went back, or nobody can say so
    if allowed != _permission(key, newest, record["name"], record["sha256"]):
        raise AdapterRejected(
            f"It is release number {serial} and this kiosk has seen number {newest['serial']} ({newest['name']}); "
            f"only somebody who wants the older one runs `afya-kiosk adapter rollback --to {record['name']}`."
        )


def _permission(key: str, newest: dict[str, Any], name: str, sha256: str) -> dict[str, Any]:
    """What `ALLOWED` holds; it names the newest release seen, so that a newer one ends it."""
    return {"key": key, "newest": newest, "name": name, "sha256": sha256}


def _newest(home: Path, key: str) -> dict[str, Any]:
    """Serial and name of the newest release seen that this key has signed; empty for none. Raises AdapterRejected."""
    return _seen(home).get(key, {})


def _seen(home: Path) -> dict[str, dict[str, Any]]:
    path = home / NEWEST
    try:
        rows = json.loads(path.read_bytes()).items()
        return {key: {"serial": int(row["serial"]), "name": str(row["name"])} for key, row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterRejected(f"{path} is damaged ({error}); remove it to begin with the adapter of today.") from error


def _note_newest(home: Path, key: str, serial: int, name: str) -> None:
    """Remember a release that is newer than those seen."""
    seen = _seen(home)
    if serial > seen.get(key, {}).get("serial", 0):
        _write(home, NEWEST, {**seen, key: {"serial": serial, "name": name}})


def _copy(source: Path, target: Path, sha256: str) -> Path:
    """The copy of an adapter whose hash is `sha256`: the one that is there, or a new one, whole or not at all."""
    with contextlib.suppress(AdapterRejected):
        if adapters.sha256(target) == sha256:
            with contextlib.suppress(OSError):  # a disk that is read only
                os.utime(target)
            return target
    partial = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=target.parent))
    try:
        for name in adapters.FILES:
            with open(partial / name, "wb") as out:
                out.writelines(adapters.pieces(source, name))
                out.flush()
                os.fsync(out.fileno())
        if adapters.sha256(partial) != sha256:
            raise AdapterRejected(f"{source} is not what was installed; run `afya-client rollback`.")
        sync_folder(partial)
        shutil.rmtree(target, ignore_errors=True)  # one that was damaged
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(target.parent)
    return target


def _tidy(folder: Path, keep: set[Path | None]) -> None:
    """Remove half copies that a power cut left, and all but those to keep and the ones that were used last."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    copies = sorted(folder.glob("round-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for copy in copies[KEPT:]:
        if copy not in keep:
            shutil.rmtree(copy, ignore_errors=True)


def _make(home: Path) -> None:
    """The folder, for its owner only; root leaves it to the owner of the home. Raises OSError."""
    folder = home / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    _give(home, folder)


def _write(home: Path, path: Path, record: dict[str, Any]) -> None:
    write_atomic(home / path, (json.dumps(record, indent=1) + "\n").encode())
    _give(home, home / path)


def _give(home: Path, path: Path) -> None:
    owner = home.stat()
    if os.geteuid() == 0 and path.stat().st_uid != owner.st_uid:
        os.chown(path, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let other kiosks of this home wait; a disk that knows no such locks lets them all through."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
