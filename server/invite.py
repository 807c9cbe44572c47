"""One file that lets a clinic join: the server's address, its authority, the clinic's key, what the rounds will ask.

The file holds the clinic's private key: it is readable by its owner only and is handed over in person. The check-sum
finds a damaged copy, not a forger: who can change the file can also write a new sum. Not here: reading it
(`client.invitation`), shutting a clinic out (`server.members`).
"""

import datetime
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.files import write_atomic
from model.passport import PUBLIC
from server import admission, guard, signing
from server import certs as keys
from server import link as links
from server.link import Link, is_up
from server.members import pem

FORMAT, VERSION = "afya-invitation", 1
PLAN = ("targets", "rank", "alpha", "local-steps", "lr", "batch-size")  # what a round asks of a clinic


class InviteError(keys.CertsError):
    """An invitation cannot be made; the message says why and what to do."""


def invite(
    link: Link,
    clinic: str,
    out: Path,
    server: str | None = None,
    base: Path | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> bool:
    """Write the invitation of `clinic` to `out` (0600); returns whether the running server has registered its key.

    Makes the clinic's key where there is none yet. `server` is "HOST:PORT" as the clinic reaches it, `base` the
    federation's base model (default: the reference model). What the rounds will ask is written down, so that a clinic
    can hold it against its limits: the settings of the last round, else the defaults, and before them `chosen`.
    Raises InviteError, CertsError, CheckpointDamaged, SettingsRejected.
    """
    if out.exists():
        raise InviteError(f"{out} exists and was left as it is; remove it or choose another name.")
    if faults := keys.check(link.certs):
        raise InviteError("; ".join(faults) + ".")
    address = _address(link.certs, server)
    model = _base(base)
    plan = _plan(link.state / "rounds", chosen or {})
    keys.make(link.certs, [clinic])
    signing.hand_out(link.certs)
    folder = link.certs / "clinics" / clinic
    if pem((folder / "node.pub").read_text(encoding="utf-8").strip()) in guard.read_revoked(link.state):
        raise InviteError(f"The key in {folder} was revoked; move that folder away to invite {clinic} with a new key.")
    record = _record(link.certs, folder, clinic, address, model, plan)
    write_atomic(out, (json.dumps(record, indent=1) + "\n").encode())
    if not is_up(link):
        return False
    admission.register_all(link)
    return True


def _plan(root: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What a round will ask of a clinic, as far as anybody knows today."""
    from server import runs, settings

    known = {name: default for name, (default, _) in settings.names().items()}
    found = {**known, **runs.settings_so_far(root)[1], **chosen}
    settings.read({**found, "checkpoint-dir": str(root)})
    return {name: found[name] for name in PLAN}


def _record(
    certs: Path, folder: Path, clinic: str, address: str, model: dict[str, str], plan: dict[str, Any]
) -> dict[str, Any]:
    """Everything in the file, with its check-sum."""
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "clinic": clinic,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "server": address,
        "ca": (certs / "ca.crt").read_text(encoding="utf-8"),
        "key": (folder / "node.key").read_text(encoding="utf-8"),
        "release_key": (certs / PUBLIC).read_text(encoding="utf-8"),
        "base": model,
        "plan": plan,
        "flwr": links.FLWR,
    }
    return {**record, "sha256": checksum(record)}


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of an invitation's content without the sum itself."""
    kept = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _base(folder: Path | None) -> dict[str, str]:
    """Name and hash of the federation's base model."""
    from model.llava import base_sha256
    from model.presets import reference_path

    chosen = folder or reference_path()
    return {"name": "reference" if folder is None else chosen.resolve().name, "sha256": base_sha256(chosen)}


def _address(certs: Path, server: str | None) -> str:
    """HOST:PORT for the clinic, which the server's certificate must name. Raises InviteError."""
    names = keys.server_names(certs)
    outside = next((name for name in names if name not in ("localhost", "127.0.0.1", "::1")), names[0])
    address = server or (f"[{outside}]:8443" if ":" in outside else f"{outside}:8443")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InviteError(f"The server's address {address!r} is not HOST:PORT.")
    if host.strip("[]") not in names:
        what = ", ".join(names)
        raise InviteError(
            f"The server's certificate is for {what} and not for {host}; name one of these with --server, or remove "
            f"{certs / 'server.pem'} and run `afya-server certs --host {host}` for another certificate."
        )
    return address
