"""The passport of an adapter: what it was held against before its release, signed by the coordinator (Ed25519).

passport.json lies beside the adapter and holds the record, the name of the key and the signature over the record in
its one canonical form (sorted names, no spaces, ASCII); PASSPORT.txt says the same for a person and is written from the
verified record. Neither counts into the adapter's hash; the record names that hash and the base's. A clinic that knows
the coordinator's public key (release.pub in its federation folder) takes no adapter without a valid passport; one that
knows none goes on as before and calls the adapter unsigned. Not covered: changing the key, which is handing out another
release.pub, and whoever can write to the clinic's own federation folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.adapters import AdapterRejected
from model.files import read_plain, write_atomic

FILE, TEXT, PUBLIC = "passport.json", "PASSPORT.txt", "release.pub"
UNSIGNED = "unsigned: this clinic has no release.pub from its coordinator, so nobody vouches for the adapter"
MAX_BYTES = 2 << 20  # of a passport: hundreds of clinics fit, a file that fills the memory does not
_FORMAT = "afya-passport-1"
_PURPOSE = b"afya adapter passport\n"  # a signature made for something else is none here


def canonical(record: Mapping[str, Any]) -> bytes:
    """The one spelling of a record that is signed. Raises ValueError for numbers that are not finite."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def name_of(public: Any) -> str:
    """Short name of a public key: the start of the hash of its 32 bytes."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


def sign(record: Mapping[str, Any], private: Any) -> str:
    """The text of passport.json for a record; `private` is an Ed25519 key, or None for one that nobody signs."""
    whole = {**record, "format": _FORMAT}
    sealed: dict[str, Any] = {"passport": whole, "key": None, "signature": None}
    if private is not None:
        made = private.sign(_PURPOSE + canonical(whole))
        sealed |= {"key": name_of(private.public_key()), "signature": base64.b64encode(made).decode()}
    return json.dumps(sealed, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read(text: str) -> tuple[dict[str, Any], bytes | None]:
    """Record and signature of a passport.json, not verified. Raises AdapterRejected when it is none."""
    try:
        if len(text) > MAX_BYTES:
            raise ValueError("too long")
        found = json.loads(text)
        record, signature = found["passport"], found["signature"]
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise ValueError("another format")
        return record, None if signature is None else base64.b64decode(signature, validate=True)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterRejected("The adapter's passport is not readable; ask the coordinator for another.") from error


def verify(text: str, public: Any, adapter_sha256: str, base_sha256: str) -> dict[str, Any]:
    """The record of a passport that `public` (Ed25519) has signed for this adapter and base. Raises AdapterRejected."""
    from cryptography.exceptions import InvalidSignature

    record, signature = read(text)
    if signature is None:
        raise AdapterRejected("The adapter's passport is not signed; ask the coordinator to release it again.")
    try:
        public.verify(signature, _PURPOSE + canonical(record))
    except (InvalidSignature, ValueError) as error:
        raise AdapterRejected(
            "The adapter's passport was changed or signed with another key; ask the coordinator to release it again."
        ) from error
    if record.get("adapter_sha256") != adapter_sha256:
        raise AdapterRejected("The passport belongs to another adapter; ask the coordinator to release it again.")
    if record.get("base_sha256") != base_sha256:
        raise AdapterRejected("The passport is for another base model; install the base model of the federation.")
    return record


def public_key(path: Path) -> Any:
    """The Ed25519 public key in a PEM file, None where there is none. Raises AdapterRejected for a damaged one."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found = load_pem_public_key(path.read_bytes())
    except FileNotFoundError:
        return None
    except PermissionError as error:
        words = f"{path} may not be read by this user"
        raise AdapterRejected(f"{words}; run `sudo chown -R $USER: {path.parent}` as the clinic's user.") from error
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise AdapterRejected(f"{path} is no readable public key; copy it again from the coordinator.") from error
    if not isinstance(found, Ed25519PublicKey):
        raise AdapterRejected(f"{path} is not an Ed25519 key; copy it again from the coordinator.")
    return found


def trusted(home: Path) -> Any:
    """The coordinator's public key as this clinic knows it, None where it knows none. Raises AdapterRejected."""
    return public_key(home / "federation" / PUBLIC)


def adopt(home: Path, bundle: Path) -> None:
    """Take over release.pub from a coordinator's folder that lies elsewhere; another key than the known one is refused.

    Raises AdapterRejected.
    """
    given, known = public_key(bundle / PUBLIC), trusted(home)
    if given is None or (known is not None and name_of(known) == name_of(given)):
        return
    if known is not None:
        raise AdapterRejected(
            f"{bundle / PUBLIC} is not the key in {home / 'federation' / PUBLIC}; ask the coordinator which one holds."
        )
    (home / "federation").mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(home / "federation" / PUBLIC, (bundle / PUBLIC).read_bytes())


def check(home: Path, folder: Path) -> str | None:
    """Hold an installed adapter against the key this clinic knows; a notice where it knows none.

    Raises AdapterRejected with one sentence when a key is known and the folder has no valid passport.
    """
    from model import adapters

    public = trusted(home)
    if public is None:
        return UNSIGNED
    verify(text_of(folder), public, adapters.sha256(folder), adapters.spec(folder).base_sha256)
    return None


def text_of(folder: Path) -> str:
    """The text of the passport that lies beside an adapter, as a stranger's. Raises AdapterRejected."""
    try:
        return read_plain(folder / FILE, MAX_BYTES).decode()
    except (OSError, ValueError) as error:
        raise AdapterRejected(
            f"The adapter {folder.name} has no readable passport; ask the coordinator to release it again."
        ) from error


def serial_of(record: Mapping[str, Any]) -> int:
    """The number of a release; they only rise. Raises AdapterRejected for a record without one."""
    serial = record.get("serial")
    if type(serial) is not int or serial < 1:
        raise AdapterRejected("The adapter's passport has no number; ask the coordinator to release it again.")
    return serial


def newest(home: Path) -> int:
    """Highest number of a release that the known key has signed and that was installed here, 0 for none."""
    public, found = trusted(home), 0
    for path in (home / "adapters").glob(f"round-*/{FILE}") if public is not None else ():
        try:
            text = text_of(path.parent)
            record, _ = read(text)
            verify(text, public, str(record.get("adapter_sha256")), str(record.get("base_sha256")))
            found = max(found, serial_of(record))
        except AdapterRejected:
            continue  # not signed by this key: it tells nothing
    return found


def write(folder: Path, text: str) -> None:
    """Put a passport beside an adapter, for programs and, last, for people."""
    from model.passport_text import page

    record, signature = read(text)
    write_atomic(folder / FILE, text.encode())
    write_atomic(folder / TEXT, page(record, signed=signature is not None).encode())
