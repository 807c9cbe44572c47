"""Rounds by stick, the coordinator's side: write the next round as a signed file, take the clinics' signed replies.

One round is either over the link or by stick. What is asked, the gate, the aggregation and the checkpoint are those of
`server.rounds`; only the way differs. A file that is damaged, of an unknown key, of another round, or there twice stops
the whole call before anything has changed, so that a person can sort it out. Not here: releases by stick
(`server.usb_release`).
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from model import bundle, wire
from model.bundle import Bundle, BundleRejected
from model.files import write_atomic
from server import checkpoint as store
from server import guard, members, registry, rounds, signing
from server.checkpoint import RoundCheckpoint
from server.link import Link
from server.settings import Settings

FOLDER = "sticks"  # beside the checkpoints: what was asked in each round by stick


@dataclass(frozen=True)
class Stick:
    """Stands where a Flower Grid stands: every clinic that may take part is there."""

    clinics: Mapping[int, str]

    def get_nodes(self) -> list[Any]:
        """The clinics as nodes, numbered in the order of their names."""
        return [SimpleNamespace(node_id=number, name=name) for number, name in self.clinics.items()]


@dataclass(frozen=True)
class Letter:
    """A reply from a stick in the form in which the gate takes a message."""

    content: Any

    def has_error(self) -> bool:
        """A clinic that could not train wrote no reply."""
        return False


def issue(link: Link, settings: Settings, path: Path) -> tuple[int, bool]:
    """Write the next round to `path` and note what was asked; returns its number, and whether it asks something else
    than a file of this round that was written before.

    Replies to the file before are refused then; a clinic that has answered it answers this one, too. Raises
    SettingsRejected, CertsError, BundleRejected.
    """
    bundle.check_replaceable(path, "round")
    run = rounds.Federation(Stick(_clinics(link)), settings)
    ask = run.next_ask()
    key = signing.load(signing.signing_key(link.certs))
    arrays = {wire.key(factor): wire.pack(ask.state, factor) for factor in wire.FACTORS}
    record = {"config": rounds.asked(ask, settings), "series": _series(run.root / FOLDER)}
    digest = bundle.write(path, "round", record, arrays, key.sign)
    folder = run.root / FOLDER
    before = json.loads((folder / _name(ask.round)).read_bytes()) if (folder / _name(ask.round)).exists() else {}
    note = {"sha256": digest, "settings": asdict(settings)}
    write_atomic(folder / _name(ask.round), (json.dumps(note, indent=1) + "\n").encode())
    run.events.add("stick", round=ask.round, sha256=digest)
    return ask.round, before.get("sha256", digest) != digest


def _series(folder: Path) -> str:
    """What the rounds of this folder are called by clinics, who count the rounds of each series."""
    folder.mkdir(exist_ok=True)
    path = folder / "series"
    if not path.exists():
        write_atomic(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8").strip()


def take(link: Link, root: Path, paths: Sequence[Path]) -> RoundCheckpoint:
    """Conclude the round that was issued last from the rounds' folder `root` with these replies.

    Raises BundleRejected and CheckpointDamaged; then nothing has changed.
    """
    clinics, (now, _) = _clinics(link), store.latest(root)
    number = now.round + 1 if now else 1
    asked, wanted = _issued(root / FOLDER / _name(number), number)
    asked = replace(asked, checkpoint_dir=str(root))  # the folder may have moved to another computer since
    if len(clinics) < asked.quorum:
        raise BundleRejected(f"There are {len(clinics)} clinics, and a round needs {asked.quorum}; register more.")
    keys = {key: name for name, key in _keys(link).items()}
    nodes = {name: node for node, name in clinics.items()}
    replies: dict[int, Bundle] = {}
    for path in paths:
        name, reply = _reply(path, keys, wanted, number)
        node = nodes[name]
        if node in replies:
            raise BundleRejected(f"{path} is the second reply of {name}; leave one of them out.")
        replies[node] = reply
    if len(replies) < asked.quorum:
        raise BundleRejected(f"There are {len(replies)} replies, and the round needs {asked.quorum}; wait for more.")

    def exchange(*_: Any) -> Iterator[tuple[int, Any]]:
        for node, reply in replies.items():
            metrics, arrays = reply.record["metrics"], reply.arrays
            content = SimpleNamespace(
                config_records={}, array_records={"arrays": arrays}, metric_records={"metrics": metrics}
            )
            yield node, Letter(content)

    return rounds.Federation(Stick(clinics), asked, exchange=exchange).single()


def _issued(path: Path, number: int) -> tuple[Settings, str]:
    """Settings and digest of the round file that was written last."""
    try:
        note = json.loads(path.read_bytes())
        known = {entry.name for entry in fields(Settings)}
        return Settings(**{name: value for name, value in note["settings"].items() if name in known}), note["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleRejected(
            f"Round {number} was not written to a stick yet; run `afya-server export-round FILE` first."
        ) from error


def _reply(path: Path, keys: Mapping[str, str], wanted: str, number: int) -> tuple[str, Bundle]:
    """Clinic and content of a reply to the file with the digest `wanted`. Raises BundleRejected."""

    def verify(record: dict[str, Any], signature: bytes, signed: bytes) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key

        claimed = str(record.get("key"))
        if claimed not in keys:
            raise BundleRejected(f"{path} is signed with a key that no clinic of this federation has.")
        public: Any = load_ssh_public_key(claimed.encode())
        try:
            public.verify(signature, signed, ec.ECDSA(hashes.SHA384()))
        except InvalidSignature as error:
            raise BundleRejected(f"{path} was changed, or was not signed by {keys[claimed]}.") from error
        if record.get("answers") != wanted:
            raise BundleRejected(
                f"{path} answers another file than the last one of round {number} (its round is "
                f"{str(record.get('round'))[:20]}); it is too late, or the file was written again since."
            )
        if not isinstance(record.get("metrics"), dict):
            raise BundleRejected(f"{path} holds no metrics; ask {keys[claimed]} for the file again.")

    found = bundle.read(path, "reply", verify)
    return keys[str(found.record["key"])], found


def _clinics(link: Link) -> dict[int, str]:
    return dict(enumerate(sorted(_keys(link)), 1))


def _keys(link: Link) -> dict[str, str]:
    """Name -> public key of every clinic that may take part: registered, or with a folder here, and not revoked."""
    folders = sorted((link.certs / "clinics").glob("*/node.pub"))
    known = {path.parent.name: path.read_text(encoding="utf-8") for path in folders} | registry.registered(link.state)
    revoked = guard.read_revoked(link.state)
    plain = {name: " ".join(key.split()[:2]) for name, key in known.items()}
    return {name: key for name, key in plain.items() if members.pem(key) not in revoked}


def _name(number: int) -> str:
    return f"round-{number:05d}.json"
