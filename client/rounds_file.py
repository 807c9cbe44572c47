"""A round on a stick, the clinic's side: take the coordinator's file, train within the same limits, sign the reply.

The file must be signed with the coordinator's key that this clinic knows (federation/release.pub) and be newer than the
last one answered of its series (a folder of rounds), or that round written again with other settings. The reply is
signed with the clinic's own node key and names the file it answers. Not here: the server's side (`server.usb`), and
what is trained (`client.local_round`).
"""

import datetime
import json
from pathlib import Path
from typing import Any

from client import limits, local_round, received
from model import bundle, passport
from model.adapters import AdapterRejected
from model.bundle import Bundle, BundleRejected
from model.files import write_atomic

UNPACK = "afya-client join FILE --offline"  # with the coordinator's file
FOLDER, REPLY, ANSWERED = "rounds", "reply.afya", "answered.json"


def take(home: Path, path: Path, now: datetime.datetime | None = None) -> dict[str, int | float]:
    """Train what the round file asks and keep the signed reply in `home`; returns its metrics.

    Raises limits.Refused, BundleRejected, AdapterRejected (release.pub is damaged); then nothing has changed.
    """
    key, (found, who) = _node_key(home), _open(home, path, "round")
    config, series = found.record["config"], str(found.record.get("series", ""))[:64]
    number, known = config.get("server-round"), f"{who}/{series}" if series else who
    last, digest = _answered(home).get(known, (0, ""))
    written_again = number == last and digest not in ("", found.digest)
    if type(number) is not int or (number <= last and not written_again):
        raise BundleRejected(
            f"{path} holds round {str(number)[:20]}, and this clinic has answered round {last} already; "
            "`afya-client export-round FILE` writes that answer again."
        )
    reply = local_round.answer(config, found.arrays, home, now)
    folder = home / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    record = {"answers": found.digest, "key": _public(key), "metrics": reply.metrics, "round": number}
    bundle.write(folder / REPLY, "reply", record, reply.arrays, lambda data: _sign(key, data))
    write_atomic(folder / ANSWERED, (json.dumps({**_answered(home), known: (number, found.digest)}) + "\n").encode())
    return reply.metrics


def give(home: Path, path: Path) -> str:
    """Write the last reply to `path`; returns which round it answers.

    Raises BundleRejected when there is none, and for a `path` that is something else.
    """
    try:
        data = (home / FOLDER / REPLY).read_bytes()
    except FileNotFoundError as error:
        raise BundleRejected("There is no answer yet; run `afya-client import-round FILE` first.") from error
    bundle.check_replaceable(path, "reply", bundle.entry_of(data, "key"))
    bundle.copy(path, data)
    return bundle.entry_of(data, "round")


def install(home: Path, path: Path) -> str:
    """Install the adapter of a release file, checked as one from the link; returns its name there. Raises as `take`."""
    found, _ = _open(home, path, "release")
    try:
        return received.install(found.record["config"], found.arrays, home)[0]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, (limits.Refused, limits.SettingsWrong, AdapterRejected)):
            raise
        raise BundleRejected(f"{path} is not readable ({error}); ask the coordinator for another.") from error


def _open(home: Path, path: Path, kind: str) -> tuple[Bundle, str]:
    """A file of the coordinator that this clinic knows, and the short name of that coordinator's key."""
    public = passport.trusted(home)
    if public is None:
        where = home / "federation" / passport.PUBLIC
        raise BundleRejected(f"{where} is missing, so nobody can say whose file this is; run `{UNPACK}`.")
    found = bundle.read(path, kind, lambda record, signature, signed: _verify(path, public, signature, signed))
    if not isinstance(found.record.get("config"), dict):
        raise BundleRejected(f"{path} asks for nothing; ask the coordinator for another.")
    return found, passport.name_of(public)


def _verify(path: Path, public: Any, signature: bytes, signed: bytes) -> None:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, signed)
    except InvalidSignature as error:
        raise BundleRejected(
            f"{path} was changed, or is not from this clinic's coordinator; ask for another."
        ) from error


def _answered(home: Path) -> dict[str, tuple[int, str]]:
    """By the coordinator's key and series of rounds: the last round answered, and the digest of the file that asked.

    Raises BundleRejected for a damaged note.
    """
    path = home / FOLDER / ANSWERED
    try:
        table = json.loads(path.read_bytes())
        rows = {str(name): row if isinstance(row, list) else [row, ""] for name, row in table.items()}
        return {name: (int(number), str(digest)) for name, (number, digest) in rows.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        raise BundleRejected(f"{path} is damaged; correct it or remove it to begin again.") from error


def _node_key(home: Path) -> Any:
    """This clinic's private key. Raises BundleRejected."""
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    named = limits.read_settings(home).get("client", {}).get("key")
    path = Path(str(named)).expanduser() if named else home / "federation" / "node.key"
    try:
        return load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise BundleRejected(f"{path} is no readable key; run `{UNPACK}` first.") from error


def _public(key: Any) -> str:
    from cryptography.hazmat.primitives import serialization as s

    return key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH).decode()


def _sign(key: Any, data: bytes) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return key.sign(data, ec.ECDSA(hashes.SHA384()))
