"""The releases of a run as they lie on the disk: what was issued in which order, refused, or is the current one.

Folders take each other's places whole, also through a power cut. Not here: examining, signing and bringing a release
(`server.publish`).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import adapters, passport
from model.adapters import AdapterRejected
from model.files import sync_folder
from server import release
from server.checkpoint import RoundCheckpoint
from server.events import Events
from server.settings import Settings, SettingsRejected

ISSUED = "issued.json"  # every release in order, in releases/
Replies = Callable[[Any, str, Mapping[int, str], int, float], Iterator[tuple[int, Any]]]


@dataclass(frozen=True)
class Office:
    """What publishing needs of a run: its folder, settings, events, connected clinics, and a way to ask them."""

    root: Path
    settings: Settings
    events: Events
    clinics: Callable[[], dict[int, str]]
    replies: Replies

    @property
    def releases(self) -> Path:
        """Where the releases lie."""
        return self.root / release.FOLDER


def move(folder: Path, target: Path) -> None:
    """Put a whole folder in the place of another one, which is gone only when the new one is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(target)
    former = _former(target)
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        os.rename(target, former)
    os.rename(folder, target)
    sync_folder(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def _former(target: Path) -> Path:
    return target.with_name(f".{target.name}.former")


def settle(target: Path) -> None:
    """Put a folder back that a power cut left under its former name, between the two renames of `_move`."""
    if not target.exists() and _former(target).is_dir():
        os.rename(_former(target), target)


def history(office: Office) -> list[dict[str, Any]]:
    """Every release in order. Raises SettingsRejected when the list is damaged."""
    path = office.releases / ISSUED
    try:
        return [dict(row) for row in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise SettingsRejected(f"{path} is damaged ({error}); put its copy back, or remove it.") from error


def current(office: Office) -> Path | None:
    """Folder of the last release as it was signed, None when there is none that is sound."""
    for row in reversed(history(office)):
        folder = office.releases / f"round-{row['round']:05d}"
        settle(folder)
        try:
            if adapters.sha256(folder) == row["adapter_sha256"]:
                return folder
        except AdapterRejected:
            continue
    return None


def decided(office: Office, now: RoundCheckpoint) -> bool:
    """Whether an adapter of this round was released or refused already."""
    rows = [row for row in history(office) if row["round"] == now.round]
    return bool(rows) or (office.root / "refused" / f"round-{now.round:05d}").is_dir()


def refused_before(office: Office, folder: Path) -> str:
    """Why this very adapter was refused when it was examined last; empty where it never was."""
    try:
        text = (office.root / "refused" / folder.name / passport.FILE).read_text(encoding="utf-8")
        record = passport.read(text)[0]
    except (OSError, ValueError):
        return ""
    same = record.get("adapter_sha256") == adapters.sha256(folder)
    return str(record["summary"]) if same and record.get("places") else ""


def issued(office: Office, digest: str) -> dict[str, Any] | None:
    """The newest release of the adapter with this hash, where there is one."""
    return next((row for row in reversed(history(office)) if row["adapter_sha256"] == digest), None)
