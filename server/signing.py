"""The coordinator's key for adapters (Ed25519): made once, kept where the other keys are, handed out as release.pub.

Whoever holds release.key can release to every clinic, so it is readable by its owner only. Not here: what is signed
(`model.passport`), and replacing a key, which means handing every clinic the new release.pub in person.
"""

import os
from pathlib import Path
from typing import Any

from model.files import write_atomic
from model.passport import PUBLIC
from server.certs import CertsError

PRIVATE = "release.key"


def signing_key(folder: Path) -> Path:
    """The key file in the certificates' folder, made on first use with its release.pub. Raises CertsError."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = folder / PRIVATE
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = Ed25519PrivateKey.generate()
        write_atomic(path, key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public = load(path).public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    _publish(folder / PUBLIC, public)
    return path


def load(path: Path) -> Any:
    """The private key in a file. Raises CertsError when others can read it or it is not an Ed25519 key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        if path.stat().st_mode & 0o077:
            raise CertsError(f"{path} can be read by others; run chmod 600 on it.")
        found = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, CertsError):
            raise
        raise CertsError(f"{path} is no readable key; put its copy back.") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise CertsError(f"{path} is not an Ed25519 key; remove it and run `afya-server certs` again.")
    return found


def hand_out(folder: Path) -> list[Path]:
    """Make the key if there is none and put release.pub into every clinic's folder; returns the files written."""
    before = {path: path.exists() for path in (folder / PRIVATE, folder / PUBLIC)}
    signing_key(folder)
    written = [path for path, there in before.items() if not there]
    public = (folder / PUBLIC).read_bytes()
    for clinic in sorted((folder / "clinics").glob("*/")):
        if _publish(clinic / PUBLIC, public):
            written.append(clinic / PUBLIC)
    return written


def _publish(path: Path, public: bytes) -> bool:
    """Write a public key where it is missing or another one; says whether it wrote."""
    if path.is_file() and path.read_bytes() == public:
        return False
    write_atomic(path, public)
    os.chmod(path, 0o644)
    return True
