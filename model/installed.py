"""Where a clinic's released adapters lie: $AFYA_HOME/adapters/<name>/ and the pointer current.json.

Installing copies and then moves one pointer, so a kiosk that reads the pointer sees the old adapter or the new one.
A passport is kept beside the adapter it came with. The federated client's user may write here, so everything is read as
a stranger's. Not covered: telling a running kiosk, which looks at the pointer by itself and answers with a copy of its
own (`model.verified`), and whether a passport is valid (`model.passport`).
"""

import contextlib
import datetime
import json
import os
import re
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.files import read_plain, sync_folder, write_atomic

POINTER = "current.json"
_MAX_POINTER = 1 << 16  # bytes
MAX_ROUND = 10**9  # beyond it a number of a round is no number of a round
_NAME = re.compile(r"round-\d{1,18}-[0-9a-f]{12}")  # the round, and how the adapter's hash begins
_ENTRIES = {
    "name": _NAME.pattern,
    "sha256": "[0-9a-f]{64}",
    "base_sha256": "[0-9a-f]{64}",
    "installed_at": r"[\dT:.Z+-]{9,40}",
}


@dataclass(frozen=True)
class Installed:
    """One adapter of the clinic: is it the one in use, which round made it, and what its passport says."""

    name: str
    current: bool
    round: int
    installed_at: str | None
    verdict: str | None
    problem: str | None


def install(home: Path, folder: Path, *, evidence: dict[str, Any], passport: str | None = None) -> str:
    """Copy a checked adapter folder into the clinic's home and make it the current one; returns its name.

    `evidence` (round, contributors, losses) is written beside the weights as release.json, `passport` as passport.json
    and for people. The pointer keeps the name of the adapter before it, so `rollback` can go back. Raises
    AdapterRejected, and changes nothing, when the folder is not a sound adapter or the round cannot be.
    """
    from model import adapters
    from model import passport as passports

    adapters.load(folder)
    found, digest = adapters.spec(folder), adapters.sha256(folder)
    round_number = evidence.get("round", 0)
    if type(round_number) is not int or not 0 <= round_number <= MAX_ROUND:
        raise adapters.AdapterRejected(f"The round of a release cannot be {str(round_number)[:40]!r}; ask for another.")
    name = f"round-{round_number:04d}-{digest[:12]}"
    store = home / "adapters"
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _same(store / name, digest):
        _copy(folder, store, name, {**evidence, "sha256": digest, "base_sha256": found.base_sha256})
    if passport is not None:
        passports.write(store / name, passport)
    before = _read_pointer(store)
    previous = before["name"] if before and before["name"] != name else (before or {}).get("previous")
    if passport is not None and passports.read(passport)[0].get("kind") == "rollback":
        previous = _older(home, name)  # the one before was taken back by the coordinator
    pointer = {
        "name": name,
        "sha256": digest,
        "base_sha256": found.base_sha256,
        "round": round_number,
        "installed_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "previous": previous,
    }
    _write_pointer(store, pointer)
    return name


def current(home: Path) -> Path | None:
    """Folder of the adapter in use, or None when the bare base model answers.

    Raises AdapterRejected when the pointer is damaged or the files are not the ones that were installed.
    """
    from model import adapters

    store = home / "adapters"
    pointer = _read_pointer(store)
    if pointer is None:
        return None
    folder = store / pointer["name"]
    if adapters.sha256(folder) != pointer["sha256"]:
        raise adapters.AdapterRejected(f"{folder} is not what was installed; run `afya-client rollback`.")
    return folder


def pointer(home: Path) -> dict[str, Any] | None:
    """Record of the adapter in use (name, sha256, base_sha256, round, installed_at) or None. Raises AdapterRejected."""
    return _read_pointer(home / "adapters")


def rollback(home: Path, to: str | None = None) -> str | None:
    """Go back to the adapter before the current one, or to the installed one called `to`; returns its name.

    Where there is none before, the bare base model answers (None). The kiosk is told that this adapter may be an older
    one (`verified.allow`). Raises AdapterRejected, and changes nothing, when the adapter to go to is not there, not
    sound, or without a valid passport where the coordinator's key is known; OSError when nothing can be written.
    """
    from model import adapters, passport, verified

    store, target = home / "adapters", to if to is not None else before(home)
    if target is None:
        (home / verified.ALLOWED).unlink(missing_ok=True)
        _set_aside(store / POINTER)
        if store.is_dir():
            sync_folder(store)
        return None
    folder = store / target
    if not _NAME.fullmatch(target) or not folder.is_dir():
        raise adapters.AdapterRejected("There is no adapter of that name here; `afya-kiosk adapter list` names them.")
    found, digest = adapters.spec(folder), adapters.sha256(folder)
    if not digest.startswith(target[-12:]):
        raise adapters.AdapterRejected(f"{folder} is not what was installed; choose another adapter.")
    passport.check(home, folder)
    record = {
        "name": target,
        "sha256": digest,
        "base_sha256": found.base_sha256,
        "round": _round_of(target),
        "installed_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "previous": _older(home, target),
    }
    verified.allow(home, target, digest)
    _write_pointer(store, record)
    return target


def _older(home: Path, name: str) -> str | None:
    """Name of the newest adapter here of an earlier round than that of `name` that may answer; None: there is none."""
    from model import adapters, passport

    found = [path.name for path in (home / "adapters").glob("round-*") if _NAME.fullmatch(path.name)]
    rounds = {other: _round_of(other) for other in [*found, name]}
    for other in sorted(found, key=lambda other: (rounds[other], other), reverse=True):
        if rounds[other] < rounds[name]:
            with contextlib.suppress(adapters.AdapterRejected):
                passport.check(home, home / "adapters" / other)
                return other
    return None


def before(home: Path) -> str | None:
    """Name of the adapter before the current one; None where that is the bare base model, or nobody can say."""
    from model import adapters

    try:
        return (pointer(home) or {}).get("previous")
    except adapters.AdapterRejected:
        return None  # the pointer itself is damaged: the bare base model is the only sound state to go to


def listing(home: Path) -> list[Installed]:
    """Every adapter that was installed here, the newest round first, with what is wrong with it. Raises AdapterRejected
    when the pointer is damaged."""
    from model import adapters, passport

    store, now = home / "adapters", pointer(home) or {}
    found = []
    for folder in sorted(path for path in store.glob("round-*") if _NAME.fullmatch(path.name)):
        problem, verdict, number = None, None, _round_of(folder.name)
        try:
            adapters.load(folder)
            problem = passport.check(home, folder)
            known = (folder / passport.FILE).exists()
            verdict = str(passport.read(passport.text_of(folder))[0].get("verdict")) if known else None
        except adapters.AdapterRejected as error:
            problem = str(error)
        current = folder.name == now.get("name")
        at = str(now.get("installed_at")) if current else None
        found.append(Installed(folder.name, current, number, at, verdict, problem))
    return sorted(found, key=lambda row: (-row.round, row.name))


def _round_of(name: str) -> int:
    """The round in an adapter's name, round-NUMBER-HASH."""
    return int(name[len("round-") : -13])


def _same(folder: Path, digest: str) -> bool:
    from model import adapters

    try:
        return adapters.sha256(folder) == digest
    except adapters.AdapterRejected:
        return False


def _copy(folder: Path, store: Path, name: str, evidence: dict[str, Any]) -> None:
    """Copy under a temporary name, flush, rename; a damaged folder of the same name is moved out of the way first."""
    from model import adapters

    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=store))
    try:
        for file in adapters.FILES:
            write_atomic(partial / file, b"".join(adapters.pieces(folder, file)))
        write_atomic(partial / adapters.RELEASE, (json.dumps(evidence, indent=1, sort_keys=True) + "\n").encode())
        _set_aside(store / name)
        os.rename(partial, store / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(store)


def _set_aside(path: Path) -> None:
    """Rename what lies at `path`, if anything, and remove it as far as this user may: it can be another's or a link."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.former")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink()


def _write_pointer(store: Path, record: dict[str, Any]) -> None:
    if (store / POINTER).is_dir():  # which a file cannot replace
        _set_aside(store / POINTER)
    write_atomic(store / POINTER, (json.dumps(record, indent=1) + "\n").encode())


def _read_pointer(store: Path) -> dict[str, Any] | None:
    """The pointer file as a dict, None when there is none. Raises AdapterRejected when it is not a sound pointer."""
    from model import adapters

    path = store / POINTER
    try:
        record = json.loads(read_plain(store.resolve() / POINTER, _MAX_POINTER))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise adapters.AdapterRejected(f"{path} is damaged ({error}); run `afya-client rollback`.") from error
    if not _sound(record):
        raise adapters.AdapterRejected(f"{path} does not name an installed adapter; run `afya-client rollback`.")
    return record


def _sound(record: Any) -> bool:
    """Whether a pointer has every entry, of its kind, and a name that is the adapter's."""
    try:
        before, named = record.get("previous"), record["sha256"].startswith(record["name"][-12:])
        texts = all(re.fullmatch(pattern, record[entry]) for entry, pattern in _ENTRIES.items())
        return texts and named and type(record["round"]) is int and (before is None or bool(_NAME.fullmatch(before)))
    except (KeyError, TypeError, AttributeError):
        return False
