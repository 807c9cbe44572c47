"""Shutting a clinic out: its key is refused at once by the proxy, forgotten by the SuperLink, and never comes back.

The key's folder is kept under certs/revoked/ so that it can be seen what was handed out. A clinic may be invited again
under the same name: it then gets another key. Not here: letting a clinic in (`server.invite`, `server.admission`).
"""

import datetime
import json
import os
import re
from pathlib import Path

from model.files import write_atomic
from server import guard, registry
from server import link as links
from server.link import Link, is_up

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,41}")


class MemberError(links.LinkError):
    """A clinic cannot be shut out or let in; the message says why and what to do."""


def key_of(link: Link, name: str) -> str:
    """A clinic's public key as it is registered, or as it lies in certs/; empty when there is none."""
    known = registry.registered(link.state).get(name)
    file = link.certs / "clinics" / name / "node.pub"
    if known or not _NAME.fullmatch(name) or not file.is_file():
        return known or ""
    return file.read_text(encoding="utf-8").strip()


def revoke(link: Link, name: str) -> bool:
    """Shut the clinic out for good; returns whether the running SuperLink was told as well. Raises MemberError.

    The proxy refuses the key from the moment revoked.json is written. A SuperLink that does not run is told nothing:
    the proxy goes on refusing, after a restart too.
    """
    public = key_of(link, name)
    if not public:
        known = sorted({*registry.registered(link.state), *_folders(link)})
        raise MemberError(f"There is no clinic {name!r}; known are {', '.join(known) or 'none'}.")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    table = {**guard.read_revoked(link.state), pem(public): {"clinic": name, "at": now, "key": public}}
    link.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(link.state / guard.FILE, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
    registry.forget(link.state, name)
    _set_aside(link.certs / "clinics" / name, link.certs / "revoked", now)
    node = registry.node_id(link.state, public)
    if not node or not is_up(link):
        return False
    links.flwr(link, "supernode", "unregister", node, "--format", "json")
    return True


def pem(public: str) -> str:
    """An OpenSSH public key in the form in which Flower sends it. Raises MemberError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as s

    try:
        key = s.load_ssh_public_key(public.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MemberError(f"{public[:40]!r} is not a public key ({error}).") from error
    return key.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo).decode()


def _folders(link: Link) -> list[str]:
    folder = link.certs / "clinics"
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _set_aside(folder: Path, revoked: Path, now: str) -> None:
    """Move a clinic's folder out of certs/clinics, so that the next start registers it no more."""
    if not folder.is_dir():
        return
    revoked.mkdir(mode=0o700, exist_ok=True)
    name, number = f"{folder.name}-{now[:10]}", 1
    while (revoked / f"{name}-{number}").exists():
        number += 1
    os.rename(folder, revoked / f"{name}-{number}")
