"""One run at a time in a folder of rounds: a lock that ends with its holder, however that happens.

Two runs side by side would ask the same clinics for the same round and lay one result over the other. A ServerApp
outlives the command that submitted it and, for a while, a SuperLink that was killed, so who comes next waits a little.
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from server.settings import SettingsRejected

FILE = "lock"


class Occupied(SettingsRejected):
    """Another run is at work in the folder, and has not ended in time."""


WAIT = 60.0  # seconds: a ServerApp whose SuperLink was killed ends when that is back
_LOOK = 0.5


@contextmanager
def alone(
    root: Path,
    wait: float = WAIT,
    say: Callable[[str], None] | None = None,
    sleep: Callable[[float], None] | None = None,
) -> Iterator[None]:
    """Hold the rounds in `root` for this process; waits up to `wait` seconds for another one, telling so once.

    Raises Occupied when the other one is still at work then.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / FILE, "ab") as stream:
        waited = 0.0
        while not _taken(stream):
            if waited >= wait:
                raise Occupied(
                    f"Another run is at work in {root}; wait until it has ended (afya-server status), or restart"
                    " afya-server start, which ends it."
                )
            if not waited and say:
                say(f"Waiting for the run that is at work in {root}.")
            (sleep or time.sleep)(_LOOK)
            waited += _LOOK
        yield


def _taken(stream: IO[bytes]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
