"""The server's two small tables of clinics: who may take part (name, public key), and their numbers at the SuperLink.

Files under the state folder, each written whole. Not here: registering and revoking themselves (`server.link`,
`server.members`).
"""

import json
from pathlib import Path

from model.files import write_atomic

NAMES, NODES = "registered.json", "nodes.json"


def registered(state: Path) -> dict[str, str]:
    """Name -> public key (OpenSSH) of every clinic that may take part."""
    return _read(state / NAMES)


def node_id(state: Path, public_key: str) -> str:
    """Number under which the SuperLink knows a public key; empty when it was never registered here."""
    return _read(state / NODES).get(public_key, "")


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
