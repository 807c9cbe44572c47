"""The one file from the coordinator: read, checked against its sum, and unpacked into $AFYA_HOME/federation.

The folder appears whole or not at all, for its owner only, and never takes the place of another federation's without
being told to. The sum finds a damaged copy; who the file is from is known because it was handed over in person.
Not here: whether the server answers (`client.doctor`).
"""

import binascii
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.files import sync_folder, write_atomic

FORMAT, VERSION = "afya-invitation", 1
MAX_BYTES = 65_536  # an invitation has about 3 KB
RECORD = "invitation.json"  # what is kept of the file, without the key
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,40}[a-z0-9])?")
_TEXTS = ("clinic", "made", "server", "ca", "key", "release_key", "flwr")


class InvitationRejected(ValueError):
    """The file cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Invitation:
    """What a coordinator gave this clinic; `plan` is what rounds will ask."""

    clinic: str
    made: str
    server: str
    ca: str
    key: str
    release_key: str
    base_name: str
    base_sha256: str
    plan: dict[str, Any]
    flwr: str


def read(path: Path) -> Invitation:
    """The invitation in a file, checked. Raises InvitationRejected."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvitationRejected(f"{path} is no invitation: it is larger than {MAX_BYTES} bytes.")
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise InvitationRejected(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise InvitationRejected(f"{path} is no invitation or was cut off; ask the coordinator again.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InvitationRejected(f"{path} is no invitation; ask the coordinator for the file of afya-server invite.")
    if record.get("version") != VERSION:
        raise InvitationRejected(
            f"{path} is of version {record.get('version')!r}, this Afya reads {VERSION}; update it."
        )
    if record.get("sha256") != checksum(record):
        raise InvitationRejected(f"{path} was damaged on its way (check-sum); copy it again or ask for a new one.")
    return _typed(path, record)


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of an invitation's content without the sum itself, as the coordinator makes it."""
    kept = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _typed(path: Path, record: dict[str, Any]) -> Invitation:
    """The entries of a whole record, each of its kind. Raises InvitationRejected."""
    base, plan = record.get("base"), record.get("plan")
    wrong = [name for name in _TEXTS if not isinstance(record.get(name), str)]
    wrong += [name for name, value in (("base", base), ("plan", plan)) if not isinstance(value, dict)]
    if wrong or not isinstance(base, dict) or not isinstance(plan, dict):
        raise InvitationRejected(f"{path} lacks {', '.join(wrong)}; ask the coordinator for a new one.")
    if not _NAME.fullmatch(record["clinic"]) or not re.fullmatch(r"[^\s/@]{1,253}:\d{1,5}", record["server"]):
        raise InvitationRejected(
            f"{path} names a clinic or a server that cannot be; ask the coordinator for a new one."
        )
    _parse_keys(path, record["ca"], record["key"])
    return Invitation(
        **{name: record[name] for name in _TEXTS},
        base_name=str(base.get("name", "")),
        base_sha256=str(base.get("sha256", "")),
        plan=plan,
    )


def _parse_keys(path: Path, ca: str, key: str) -> None:
    """Raise InvitationRejected unless authority and key are what they should be."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        x509.load_pem_x509_certificate(ca.encode())
        found = serialization.load_ssh_private_key(key.encode(), None)
    except (ValueError, TypeError, binascii.Error) as error:
        raise InvitationRejected(f"{path} holds no usable certificate or key ({error}).") from error
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise InvitationRejected(f"{path} holds a key of another kind; ask the coordinator for a new one.")


def unpack(home: Path, invitation: Invitation, replace: bool = False) -> Path:
    """Write the federation's folder into the clinic's home; returns it.

    The same invitation again changes nothing. Another federation's folder is refused; with `replace` it is kept aside
    as federation.before-N. What root unpacks belongs to the home's owner. Raises InvitationRejected.
    """
    folder = home / "federation"
    files = _files(invitation)
    if folder.exists():
        if _same(folder, files):
            give(home, folder)
            return folder
        if not replace:
            raise InvitationRejected(
                f"{folder} holds another invitation or federation; pass --replace to use this one and keep that aside."
            )
    partial = Path(tempfile.mkdtemp(prefix=".federation.", suffix=".partial", dir=home))
    try:
        for name, data in files.items():
            write_atomic(partial / name, data)
        give(home, partial)
        if folder.exists():
            os.rename(folder, _aside(home))
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(home)
    return folder


def give(home: Path, folder: Path) -> None:
    """As root, give a folder of the federation and its files to the owner of `home`, who has to read them."""
    if os.geteuid() != 0:
        return
    owner = home.stat()
    for path in (folder, *folder.iterdir()):
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if path == folder or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1):  # not another's under this name
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
        finally:
            os.close(descriptor)


def closed(path: Path) -> str:
    """What to say of a file of the federation that may not be read."""
    return f"{path} may not be read by this user; run `sudo chown -R $USER: {path.parent}` as the clinic's user."


def _files(invitation: Invitation) -> dict[str, bytes]:
    """Names and contents of the federation's folder; the record is the file that says what the rest belongs to."""
    kept = {n: getattr(invitation, n) for n in ("clinic", "made", "server", "base_name", "base_sha256", "plan", "flwr")}
    files = {"ca.crt": invitation.ca, "node.key": invitation.key, "release.pub": invitation.release_key}
    return {
        **{name: text.encode() for name, text in files.items()},
        RECORD: (json.dumps(kept, indent=1, sort_keys=True) + "\n").encode(),
    }


def _same(folder: Path, files: dict[str, bytes]) -> bool:
    try:
        return all((folder / name).is_file() and (folder / name).read_bytes() == data for name, data in files.items())
    except PermissionError as error:
        raise InvitationRejected(closed(folder / RECORD)) from error


def _aside(home: Path) -> Path:
    number = 1
    while (home / f"federation.before-{number}").exists():
        number += 1
    return home / f"federation.before-{number}"


def record(home: Path) -> dict[str, Any]:
    """What is kept of the invitation; empty when the clinic got a folder instead. Raises InvitationRejected."""
    path = home / "federation" / RECORD
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except PermissionError as error:
        raise InvitationRejected(closed(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InvitationRejected(f"{path} cannot be read ({error}); run afya-client join FILE --replace.") from error
    return found if isinstance(found, dict) else {}
