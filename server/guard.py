"""What the proxy looks at before a call reaches the SuperLink: keys that were revoked, and signatures used twice.

Flower signs a time, not the call, and accepts it for five minutes; here each signed time of a key counts once. Revoked
keys stand in a file that is read again when it changes, so a revocation needs no restart; signed times are forgotten at
a restart. Not here: whether a signature is right and a key is registered; the SuperLink decides that.
"""

import binascii
import json
import time
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

KEY, TIMESTAMP = b"flwr-public-key", b"flwr-timestamp"
WINDOW = 330.0  # seconds: Flower takes a signed time 305 s after it was signed, and one 5 s ahead
MOST = 150_000  # signed times remembered; the 1,024 connections there can be, polling every 3 s, come to 113,000
LONGEST_KEY, LONGEST_TIME = 2048, 64  # bytes: what is remembered of strangers must stay small
FILE = "revoked.json"


def read_revoked(state: Path) -> dict[str, dict[str, str]]:
    """Public key (PEM) -> clinic and time of every revoked key of a server's state folder."""
    try:
        return json.loads((state / FILE).read_bytes())
    except FileNotFoundError:
        return {}


def decoded(header: bytes) -> bytes | None:
    """The key in a header; None where it is no base64, or not the one spelling of it that a key has here."""
    try:
        key = b64decode(header, validate=True)
    except binascii.Error:
        return None
    return key if b64encode(key) == header else None


class Guard:
    """Says why a call is not passed on. `state` is the server's folder, `clock` is there for tests."""

    def __init__(self, state: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.state, self.clock = state, clock
        self._seen: OrderedDict[tuple[bytes, bytes], float] = OrderedDict()
        self._read_at: tuple[int, int] | None = None
        self._revoked: frozenset[bytes] = frozenset()

    def refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """HTTP status and reason of a refusal, or None when the call may go on to the SuperLink."""
        rows = [(name.lower(), value) for name, value in headers]
        keys, times = ([value for name, value in rows if name == wanted] for wanted in (KEY, TIMESTAMP))
        if len(keys) > 1 or len(times) > 1:
            return 400, "A call carries one key and one time."
        if not keys:
            return None
        if len(keys[0]) > LONGEST_KEY or any(len(value) > LONGEST_TIME for value in times):
            return 400, "The key or the time is longer than any is."
        key = decoded(keys[0])
        if key is None:
            return 400, "The key is not readable."
        if key in self._revoked_keys():
            return 401, "This key was revoked."  # a running SuperNode stops by itself at 401
        if times and not self._first(key, times[0]):
            return 401, "This signature was used before."
        return None

    def _first(self, key: bytes, signed: bytes) -> bool:
        """Whether this key's signed time comes for the first time; remembers it."""
        now = self.clock()
        while self._seen and (len(self._seen) >= MOST or next(iter(self._seen.values())) < now - WINDOW):
            self._seen.popitem(last=False)
        if (key, signed) in self._seen:
            return False
        self._seen[key, signed] = now
        return True

    def _revoked_keys(self) -> frozenset[bytes]:
        """The revoked keys, read again when the file has changed; a file that cannot be read raises."""
        try:
            found = (self.state / FILE).stat()
        except FileNotFoundError:
            return self._revoked
        if self._read_at != (found.st_mtime_ns, found.st_ino):
            self._revoked = frozenset(key.encode() for key in read_revoked(self.state))
            self._read_at = found.st_mtime_ns, found.st_ino
        return self._revoked
