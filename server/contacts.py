"""When each clinic was last heard of by the proxy: a small table, so that `afya-server status` knows who is there.

A SuperNode asks for messages every few seconds, also between rounds. Only calls that the SuperLink has accepted, and so
whose signature is right, count. Not here: what came of a clinic in a round (`server.events`).
"""

import contextlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from model.files import write_atomic

FILE = "contacts.json"
EVERY = 30.0  # seconds between two writings of the table; a clinic that was not there before is written at once


class Contacts:
    """Keeps STATE/contacts.json. `name` gives the clinic of a key as it stands in the header, or an empty string."""

    def __init__(self, state: Path, name: Callable[[bytes], str], clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.name, self.clock = state / FILE, name, clock
        self._table, self._names, self._wrote = read(state), dict[bytes, str](), -EVERY

    def heard(self, key: bytes) -> None:
        """A call with this key was accepted. A table that cannot be written stops no call."""
        clinic = self._names.get(key) or self.name(key)
        if not clinic:
            return
        new = key not in self._names
        self._names[key] = clinic
        self._table[clinic] = datetime.now(UTC).isoformat(timespec="milliseconds")
        if new or self.clock() - self._wrote >= EVERY:
            self._wrote = self.clock()
            with contextlib.suppress(OSError):
                write_atomic(self.path, (json.dumps(self._table, indent=1, sort_keys=True) + "\n").encode())


def read(state: Path) -> dict[str, str]:
    """Clinic to the time (UTC, ISO 8601) at which it was last heard of; empty where nobody was."""
    try:
        table = json.loads((state / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(name): str(at) for name, at in table.items()} if isinstance(table, dict) else {}
