"""How much a clinic may lay on the server's disk: so much an hour, and nothing while the disk is nearly full.

Flower keeps what a registered key sends until the run ends and has no bound. Both refusals are of the kind that a
SuperNode repeats (503): a clinic that meets one waits, and its reply of that round is lost when it waits for more than
three minutes. Announcing a reply makes rows for all its parts in one transaction, so each part is counted as much
larger than it is. Only calls that the SuperLink has accepted are counted; a restart forgets them. Not here: the size of
one call (`server.proxy`) and what the server reads of a reply (`server.pulling`).
"""

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

ANNOUNCE, OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"
AN_HOUR = 4 << 30  # bytes of a key: a hundred replies of 24 MiB, which 1.5B at rank 16 has with both factors
EACH = 2048  # bytes that any object costs beside its content, however small it is
PART = 64 << 10  # bytes that each announced part counts: 65,000 parts an hour, a minute of the database's time
NAME = 68  # bytes of a part's name in an announcement
FREE = 1 << 30  # bytes that stay free on the disk for checkpoints, logs and the SuperLink's own work
LOOK, TELL = 5.0, 60.0  # seconds between two looks at the disk, and between two words to the coordinator


def free(state: Path) -> int:
    """Bytes that can still be written: on the disk, and in pages that the SuperLink's database has given up.

    Raises OSError where there is no such folder.
    """
    there = shutil.disk_usage(state).free
    try:
        with closing(sqlite3.connect(f"file:{state / 'superlink.db'}?mode=ro", uri=True, timeout=0.1)) as database:
            pages, size = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_size"))
    except sqlite3.Error:
        return there
    return there + int(pages) * int(size)


def full(state: Path) -> str:
    """A sentence when clinics' replies are refused for want of space, else an empty string."""
    try:
        left = free(state)
    except OSError:
        return ""
    if left >= FREE:
        return ""
    return f"{left / 1e9:.1f} GB are free for {state}, and below {FREE / 1e9:.1f} no clinic's reply is taken; make room"


class Quota:
    """A bucket for each key that holds an hour's bytes and fills up again evenly. `clock` is there for tests.

    `say` gets a sentence at most once a minute; `name` gives the clinic of a key for it.
    """

    def __init__(
        self,
        state: Path,
        an_hour: int = AN_HOUR,
        say: Callable[[str], None] = lambda _: None,
        name: Callable[[bytes], str] = lambda _: "a clinic",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state, self.an_hour, self.say, self.name, self.clock = state, an_hour, say, name, clock
        self._used: dict[bytes, tuple[float, float]] = {}  # bytes, and when that was so
        self._full, self._looked, self._told = "", -LOOK, dict[str, float]()

    def refusal(self, path: str, key: bytes) -> tuple[int, str] | None:
        """HTTP status and reason, or None when the call may go on to the SuperLink."""
        if path not in (ANNOUNCE, OBJECT):
            return None
        if self._now(key) >= self.an_hour:
            gib = f"{self.an_hour / (1 << 30):g}"
            self._tell(f"{self.name(key)} has sent {gib} GiB within an hour and has to wait.")
            return 503, "This clinic has sent as much as it may in an hour."
        if self.clock() - self._looked >= LOOK:
            self._full, self._looked = full(self.state), self.clock()
        if self._full:
            self._tell(f"{self._full}.")
            return 503, "The server's disk is nearly full."
        return None

    def spend(self, path: str, key: bytes, size: int) -> None:
        """Count a call that was accepted: `size` bytes."""
        if path in (ANNOUNCE, OBJECT):
            cost = size + (EACH if path == OBJECT else PART * (1 + size // NAME))
            self._used[key] = self._now(key) + cost, self.clock()

    def _now(self, key: bytes) -> float:
        used, at = self._used.get(key, (0.0, 0.0))
        return max(0.0, used - (self.clock() - at) * self.an_hour / 3600)

    def _tell(self, text: str) -> None:
        if self.clock() - self._told.get(text, -TELL) >= TELL:
            self._told = {text: self.clock()}
            self.say(text)
