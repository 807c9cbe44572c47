"""How much a clinic may lay on the server's disk: so much an hour, and nothing while the disk is nearly full.

Flower keeps what a registered key sends until the run ends and has no bound. Both refusals are of the kind that a
SuperNode waits for (503), so an honest clinic that meets one is slowed down and loses nothing. Only calls that the
SuperLink has accepted are counted; a restart forgets them. Not here: one call's size (`server.proxy`) and what the
server reads of a reply (`server.pulling`).
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

PUSHES = frozenset(("/v1/fleet/push-messages", "/v1/fleet/push-object"))
AN_HOUR = 4 << 30  # bytes of a key: 170 replies of 24 MiB, which 1.5B at rank 16 has with both factors
OBJECT = 2048  # bytes that any object costs beside its content, however small it is
FREE = 1 << 30  # bytes that stay free on the disk for checkpoints, logs and the SuperLink's own work


class Quota:
    """A bucket for each key that holds an hour's bytes and fills up again evenly. `clock` is there for tests."""

    def __init__(self, state: Path, an_hour: int = AN_HOUR, clock: Callable[[], float] = time.monotonic) -> None:
        self.state, self.an_hour, self.clock = state, an_hour, clock
        self._used: dict[bytes, tuple[float, float]] = {}  # bytes, and when that was so

    def refusal(self, path: str, key: bytes) -> tuple[int, str] | None:
        """HTTP status and reason, or None when the call may go on to the SuperLink."""
        if path not in PUSHES:
            return None
        if self._now(key) >= self.an_hour:
            return 503, "This clinic has sent as much as it may in an hour; what is missing is taken later."
        try:
            free = shutil.disk_usage(self.state).free
        except OSError:
            return None  # the SuperLink, which writes there, says what is wrong
        return (503, "The server's disk is nearly full.") if free < FREE else None

    def spend(self, path: str, key: bytes, size: int) -> None:
        """Count a call that was accepted."""
        if path in PUSHES:
            self._used[key] = self._now(key) + size + OBJECT, self.clock()

    def _now(self, key: bytes) -> float:
        used, at = self._used.get(key, (0.0, 0.0))
        return max(0.0, used - (self.clock() - at) * self.an_hour / 3600)
