"""Where a clinic's released adapters lie: $AFYA_HOME/adapters/<name>/ and the pointer current.json.

Installing copies and then moves one pointer, so a kiosk that reads the pointer sees the old adapter or the new one.
A passport is kept beside the adapter it came with. Not covered: telling a running kiosk, which looks at the pointer by
itself (`model.adapters.current`), and whether a passport is valid (`model.passport`).
"""

import datetime
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.files import sync_folder, write_atomic

POINTER = "current.json"


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
    AdapterRejected when the folder is not a sound adapter.
    """
    from model import adapters
    from model import passport as passports

    adapters.load(folder)
    found, digest = adapters.spec(folder), adapters.sha256(folder)
    round_number = int(evidence.get("round", 0))
    name = f"round-{round_number:04d}-{digest[:12]}"
    store = home / "adapters"
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _same(store / name, digest):
        _copy(folder, store, name, {**evidence, "sha256": digest, "base_sha256": found.base_sha256})
    if passport is not None:
        passports.write(store / name, passport)
    before = _read_pointer(store)
    previous = before["name"] if before and before["name"] != name else (before or {}).get("previous")
    pointer = {
        "name": name,
        "sha256": digest,
        "base_sha256": found.base_sha256,
        "round": round_number,
        "installed_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "previous": previous,
    }
    write_atomic(store / POINTER, (json.dumps(pointer, indent=1) + "\n").encode())
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

    Where there is none before, the bare base model answers (None). Raises AdapterRejected, and changes nothing, when
    the adapter to go to is not there, not sound, or without a valid passport where the coordinator's key is known.
    """
    from model import adapters, passport

    store = home / "adapters"
    try:
        now = _read_pointer(store)
    except adapters.AdapterRejected:
        now = {"previous": None}  # the pointer itself is damaged: the bare base model is the only sound state to go to
    target = to if to is not None else (now or {}).get("previous")
    if target is None:
        (store / POINTER).unlink(missing_ok=True)
        if store.is_dir():
            sync_folder(store)
        return None
    folder = store / Path(target).name
    if not folder.is_dir():
        raise adapters.AdapterRejected(f"There is no adapter {folder.name} here; `afya-kiosk adapter list` names them.")
    found = adapters.spec(folder)
    passport.check(home, folder)
    record = {
        "name": folder.name,
        "sha256": adapters.sha256(folder),
        "base_sha256": found.base_sha256,
        "round": _round_of(folder),
        "installed_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "previous": None,
    }
    write_atomic(store / POINTER, (json.dumps(record, indent=1) + "\n").encode())
    return folder.name


def listing(home: Path) -> list[Installed]:
    """Every adapter that was installed here, the newest round first, with what is wrong with it. Raises AdapterRejected
    when the pointer is damaged."""
    from model import adapters, passport

    store, now = home / "adapters", pointer(home) or {}
    found = []
    for folder in sorted(store.glob("round-*")) if store.is_dir() else []:
        problem, verdict, number = None, None, 0
        try:
            number = _round_of(folder)
            adapters.load(folder)
            problem = passport.check(home, folder)
            text = folder / passport.FILE
            verdict = str(passport.read(text.read_text(encoding="utf-8"))[0].get("verdict")) if text.is_file() else None
        except (adapters.AdapterRejected, OSError, ValueError) as error:
            problem = str(error)
        current = folder.name == now.get("name")
        at = str(now.get("installed_at")) if current else None
        found.append(Installed(folder.name, current, number, at, verdict, problem))
    return sorted(found, key=lambda row: (-row.round, row.name))


def _round_of(folder: Path) -> int:
    from model import adapters

    return int(json.loads((folder / adapters.RELEASE).read_bytes()).get("round", 0))


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
        for file in (adapters.CONFIG, adapters.WEIGHTS):
            write_atomic(partial / file, (folder / file).read_bytes())
        write_atomic(partial / adapters.RELEASE, (json.dumps(evidence, indent=1, sort_keys=True) + "\n").encode())
        if (store / name).exists():
            shutil.rmtree(store / name)
        os.rename(partial, store / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(store)


def _read_pointer(store: Path) -> dict[str, Any] | None:
    """The pointer file as a dict, None when there is none. Raises AdapterRejected when it is not a sound pointer."""
    from model import adapters

    path = store / POINTER
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise adapters.AdapterRejected(f"{path} is damaged ({error}); run `afya-client rollback`.") from error
    keys = {"name", "sha256", "base_sha256", "round"}
    if not isinstance(record, dict) or not keys <= set(record) or Path(str(record["name"])).name != record["name"]:
        raise adapters.AdapterRejected(f"{path} does not name an installed adapter; run `afya-client rollback`.")
    return record
