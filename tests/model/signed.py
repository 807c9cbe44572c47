"""Small adapters with passports, a clinic that knows the coordinator's key, and what a hostile client leaves behind."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from model import adapters, installed, passport, verified

KEY, OTHER = Ed25519PrivateKey.from_private_bytes(b"k" * 32), Ed25519PrivateKey.from_private_bytes(b"o" * 32)
BASE = "cd" * 32


def pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)


def adapter(folder: Path, value: float = 0.1) -> Path:
    """An adapter folder for the base `BASE`, which no model has."""
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    state = {
        f"{name}.lora_A.weight": np.full((2, 6), value, np.float32),
        f"{name}.lora_B.weight": np.full((4, 2), value, np.float32),
    }
    adapters.save(folder, state, adapters.spec_of(state, 8.0, BASE))
    return folder


def signed(folder: Path, key: object = KEY, **entries: object) -> str:
    """The text of a passport for an adapter folder."""
    record = {"round": 1, "serial": 5, "adapter_sha256": adapters.sha256(folder), "base_sha256": BASE, **entries}
    return passport.sign(record, key)


def trust(home: Path, key: Ed25519PrivateKey = KEY) -> None:
    """Let the clinic know the coordinator's key, and no other."""
    (home / "federation").mkdir(mode=0o700, exist_ok=True)
    (home / "federation" / passport.PUBLIC).write_bytes(pem(key))


def put(home: Path, folder: Path, text: str | None) -> Path:
    """Install an adapter with a passport; where it lies then."""
    name = installed.install(home, folder, evidence={"round": 1}, passport=text)
    return home / "adapters" / name


def release(home: Path, tmp_path: Path, serial: int, key: object = KEY) -> Path:
    """Install a signed release with this number; where it lies in adapters/."""
    folder = adapter(tmp_path / f"a{serial}", serial / 100)
    return put(home, folder, signed(folder, key, serial=serial))


def point(home: Path, place: Path, text: str) -> None:
    """What a hostile client does: the pointer, as it was when `text` was current, back in its place."""
    assert place.is_dir()
    (home / "adapters" / installed.POINTER).write_text(text)


def pointer(home: Path) -> str:
    """The pointer's text as it is now."""
    return (home / "adapters" / installed.POINTER).read_text()


def taken(home: Path) -> Path:
    """The kiosk's own copy of the signed adapter that is current."""
    found = verified.take(home)
    assert found is not None and found.unsigned is None
    return found.folder


def pipe(path: Path) -> None:
    """A pipe that nobody ever writes to: whoever opens it to read waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    """A link to a device without an end."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    """Two gigabytes that take no room on the disk, and all of the memory of whoever reads them."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as out:
        out.truncate(2 << 30)


def directory(path: Path) -> None:
    """A folder where a file should be."""
    path.unlink(missing_ok=True)
    path.mkdir()


TRAPS: list[Callable[[Path], None]] = [pipe, endless, huge, directory]


def at_once(call: Callable[[], Any]) -> Any:
    """What `call` returns or raises; AssertionError where it is still waiting after ten seconds."""
    found: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            found.append((True, call()))
        except BaseException as error:
            found.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert found, "it waits for ever"
    well, value = found[0]
    if not well:
        raise value
    return value
