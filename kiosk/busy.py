"""The mark that a clinician is asking: while it is held, the training client of this clinic stands still.

The mark is a lock on $AFYA_HOME/run/asking, so it ends with the kiosk however the kiosk ends; the file itself holds
nothing. Taking it never waits: whoever else holds it cannot stop an answer, and the next token tries again. Not here:
the other side (`client.courtesy`).
"""

import contextlib
import fcntl
import os
import queue
from pathlib import Path
from typing import Any

MARK = Path("run") / "asking"


class Inbox(queue.Queue[Any]):
    """The engine's queue; the mark is held from the moment something is taken out until its worker waits again."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self._path, self._lock_file, self._held = home / MARK, -1, False

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next item, as queue.Queue gives it; waiting for one means that nobody is being answered."""
        if not block:
            self._mark()
            return super().get(False)
        self._clear()
        item = super().get(True, timeout)
        self._mark()
        return item

    def _mark(self) -> None:
        """Take the lock where it is free; a home that cannot be written leaves training unwarned, and answers alone."""
        if self._held:
            return
        with contextlib.suppress(OSError):
            if self._lock_file < 0:
                self._path.parent.mkdir(mode=0o755, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                self._lock_file = os.open(self._path, flags, 0o644)
                os.fchmod(self._lock_file, 0o644)  # the client is another user and has to see the lock, nothing more
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._held = True

    def _clear(self) -> None:
        if self._held:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)
            self._held = False
