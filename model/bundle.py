"""A round as one file on a stick: a signed line of JSON and the arrays after it, read within bounds.

Four parts: a mark, the line (kind, record, sizes, SHA-256 of the arrays), its signature, the arrays in npy format. The
signature is looked at before an array is read, and the size of the file before anything is. Whose keys sign and what
the record means is the caller's matter (`server.usb`, `client.rounds_file`). Not covered: secrecy; whoever has the
stick can read the numbers on it.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.files import sync_folder

MARK = b"afya-round-file-1\n"
MAX_LINE, MAX_SIGNATURE = 4 << 20, 1024  # bytes; a layout of 10,000 layers takes one MiB
MAX_BYTES = 1 << 30  # of a whole file: 200 million values (model.wire) take 800 MB
_PURPOSE = b"afya round file\n"  # a signature made for something else is none here


class BundleRejected(ValueError):
    """A round file cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Sent:
    """One array as it arrived, not decoded yet: what `model.wire.unpack` looks at."""

    shape: tuple[int, ...]
    dtype: str
    data: bytes
    stype: str = "numpy.ndarray"


@dataclass(frozen=True)
class Bundle:
    """What a file holds; `digest` names it: the hash of its signed line."""

    record: dict[str, Any]
    arrays: dict[str, Sent]
    digest: str


def write(
    path: Path, kind: str, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], sign: Callable[[bytes], bytes]
) -> str:
    """Write a round file, whole or not at all; returns its digest. `sign` gets the bytes to sign."""
    parts, rows = [], []
    for name in sorted(arrays):
        out = io.BytesIO()
        np.lib.format.write_array(out, arrays[name], version=(1, 0), allow_pickle=False)
        parts.append(out.getvalue())
        shape = list(arrays[name].shape)
        rows.append({"name": name, "shape": shape, "dtype": str(arrays[name].dtype), "bytes": len(parts[-1])})
    body = b"".join(parts)
    head = {"kind": kind, "record": dict(record), "arrays": rows, "sha256": hashlib.sha256(body).hexdigest()}
    line = json.dumps(head, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    signature = base64.b64encode(sign(_PURPOSE + line)) + b"\n"
    copy(path, MARK + line + signature + body)
    return hashlib.sha256(line).hexdigest()


def entry_of(data: bytes, entry: str) -> str:
    """An entry of the record in a file of this clinic's own, which is not checked again."""
    return str(json.loads(data[len(MARK) :].split(b"\n", 1)[0])["record"].get(entry, ""))


def check_replaceable(path: Path, kind: str, key: str = "") -> None:
    """Raise BundleRejected where `path` is a file already, but none of this kind and of the clinic with this `key`."""
    if not os.path.lexists(path):
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        with open(path if path.is_file() else os.devnull, "rb") as source:
            head = json.loads(source.readline(MAX_LINE)) if source.read(len(MARK)) == MARK else {}
        if head["kind"] == kind and head["record"].get("key", "") == key:
            return
    raise BundleRejected(f"{path} is there already and is something else; choose another name.")


def copy(path: Path, data: bytes) -> None:
    """Put bytes on a stick so that a pulled plug leaves the old file or the new one. Sets no modes: FAT has none.

    Raises BundleRejected where the folder is not there.
    """
    if not path.parent.is_dir():
        raise BundleRejected(f"{path.parent} is no folder; is the stick there?")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    with contextlib.suppress(OSError):  # some file systems of sticks cannot flush a folder
        sync_folder(path.parent)


def read(
    path: Path, kind: str, verify: Callable[[dict[str, Any], bytes, bytes], None], most: int = MAX_BYTES
) -> Bundle:
    """Read a round file of this kind and at most `most` bytes. Raises BundleRejected.

    `verify(record, signature, signed)` is called before an array is read; it raises BundleRejected for a signature that
    does not hold.
    """
    try:
        size, plain = path.stat().st_size, path.is_file()
        with open(path if plain else os.devnull, "rb") as source:
            if source.read(len(MARK)) != MARK:
                raise BundleRejected(f"{path} is no round file; choose the file of export-round.")
            if size > most:
                raise BundleRejected(f"{path} has {size} bytes, more than the {most} that such a file may have.")
            line, signature = source.readline(MAX_LINE), source.readline(MAX_SIGNATURE)
            head, rows = _head(path, line, kind)
            verify(head["record"], _signature(path, signature), _PURPOSE + line)
            if source.tell() + sum(row["bytes"] for row in rows) != size:
                raise BundleRejected(f"{path} was cut off or has something added; copy it again.")
            data = [source.read(row["bytes"]) for row in rows]
    except OSError as error:
        raise BundleRejected(f"{path} cannot be read ({error.strerror}).") from error
    if hashlib.sha256(b"".join(data)).hexdigest() != head["sha256"]:
        raise BundleRejected(f"{path} was changed after it was signed; ask for the file again.")
    arrays = {row["name"]: Sent(tuple(row["shape"]), row["dtype"], part) for row, part in zip(rows, data, strict=True)}
    return Bundle(head["record"], arrays, hashlib.sha256(line).hexdigest())


def _signature(path: Path, text: bytes) -> bytes:
    """The signature's bytes from its line, which has one spelling only."""
    with contextlib.suppress(ValueError):
        raw = base64.b64decode(text.removesuffix(b"\n"), validate=True)
        if base64.b64encode(raw) + b"\n" == text:
            return raw
    raise BundleRejected(f"{path} has no readable signature; ask for the file again.")


def _head(path: Path, line: bytes, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The signed line as an object, and its list of arrays; nothing in it is believed yet but its form."""
    try:
        head = json.loads(line)
        rows = head["arrays"]
        sound = (
            isinstance(head["record"], dict)
            and isinstance(head["sha256"], str)
            and all(isinstance(row["name"], str) and isinstance(row["dtype"], str) for row in rows)
            and all(type(n) is int and n >= 0 for row in rows for n in [row["bytes"], *row["shape"]])
        )
        if head["kind"] != kind:
            raise BundleRejected(f"{path} is a {str(head['kind'])[:20]}, not a {kind}.")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, BundleRejected):
            raise
        raise BundleRejected(f"{path} is damaged; ask for the file again.") from error
    if not sound or not line.endswith(b"\n") or len(rows) > 16:
        raise BundleRejected(f"{path} is damaged; ask for the file again.")
    return head, rows
