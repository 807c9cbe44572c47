"""The server's two small tables of clinics: who may take part (name, public key), and their numbers at the SuperLink.

Files under the state folder, each written whole. Not here: registering and revoking themselves (`server.link`,
`server.members`).
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from model.files import write_atomic

NAMES, NODES = "registered.json", "nodes.json"


def registered(state: Path) -> dict[str, str]:
    """Name -> public key (OpenSSH) of every clinic that may take part."""
    return _read(state / NAMES)


def node_id(state: Path, public_key: str) -> str:
    """Number under which the SuperLink knows a public key; empty when it was never registered here."""
    return _read(state / NODES).get(public_key, "")


def known_to_superlink(state: Path, public_key: str) -> str:
    """Number of the key in the SuperLink's own database (Flower 1.41); empty when it is not there, or shut out."""
    from cryptography.hazmat.primitives import serialization as s

    try:
        key = s.load_ssh_public_key(public_key.encode())
    except ValueError:
        return ""
    pem = key.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    question = "SELECT node_id FROM node WHERE public_key = ? AND unregistered_at IS NULL"
    try:
        with closing(sqlite3.connect(f"file:{state / 'superlink.db'}?mode=ro", uri=True)) as database:
            row = database.execute(question, (pem,)).fetchone()
    except sqlite3.Error:
        return ""
    return str(int(row[0]) % 2**64) if row else ""  # stored as a signed number


def name_of(state: Path, key: bytes) -> str:
    """The clinic whose public key (PEM) this is; an empty string for a key of nobody."""
    from cryptography.hazmat.primitives import serialization as s

    try:
        public = s.load_pem_public_key(key)
    except ValueError:
        return ""
    line = public.public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH).split()[:2]
    return next((name for name, known in registered(state).items() if known.encode().split()[:2] == line), "")


def remember(state: Path, name: str, public_key: str, node: str) -> None:
    """Note that a clinic is registered, under which key and number."""
    _write(state / NODES, {**_read(state / NODES), public_key: node})
    _write(state / NAMES, {**registered(state), name: public_key})


def forget(state: Path, name: str) -> None:
    """Take a clinic out of the table of those who may take part; the SuperLink itself is not told."""
    _write(state / NAMES, {known: key for known, key in registered(state).items() if known != name})


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}


def _write(path: Path, table: dict[str, str]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
