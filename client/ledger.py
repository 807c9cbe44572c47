"""The privacy ledger of a clinic: what every round has cost, and the stop when the budget is spent.

$AFYA_HOME/privacy/ledger.json holds one entry for each update that left or was about to leave: noise, sampling rate and
steps. It is written before the update goes, whole or not at all, under a lock, which holds for rounds by stick and for
the system service alike: both use this one folder. Epsilon is what Opacus's accountant of
Renyi differential privacy (Mironov 2017, arXiv:1702.07476) makes of all entries together. A damaged or missing ledger
stops training, since nobody knows any more what was spent.
"""

import contextlib
import datetime
import fcntl
import hashlib
import importlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.limits import Refused
from model.files import read_plain, write_atomic

FOLDER, FILE, BEGUN = "privacy", "ledger.json", "ledger.begun"
# Orders at which the Renyi divergence is asked. Orders below 1.8 matter only for budgets that protect nothing.
MAX_BYTES = 16 << 20  # of ledger or seal: a hundred thousand rounds or pictures fit, a file without an end does not
LOCK_SECONDS = 60.0  # longest wait for another program that writes here
ORDERS = [x / 10 for x in range(18, 110)] + [float(x) for x in range(11, 65)] + [96.0, 128.0, 256.0, 512.0, 1024.0]


class LedgerDamaged(Refused):
    """The ledger cannot be read; the message says which file and what to do."""


@dataclass(frozen=True)
class Entry:
    """What one round cost: `steps` steps that each took a patient with probability `rate`, with noise `multiplier`."""

    at: str
    round: int
    multiplier: float
    rate: float
    steps: int


def entry(number: int, multiplier: float, rate: float, steps: int) -> Entry:
    """The cost of round `number`, now."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Entry(now, number, multiplier, rate, steps)


def epsilon(entries: Sequence[Entry], delta: float) -> float:
    """Epsilon at `delta` of all entries together, 0 without any. Raises Refused where the accountant is missing."""
    if not entries:
        return 0.0
    try:
        accountants: Any = importlib.import_module("opacus.accountants")
    except ImportError as error:
        raise Refused("dp is on, but the accountant is not installed; run pip install 'afya[privacy]'") from error
    accountant = accountants.RDPAccountant()
    accountant.history = [(e.multiplier, e.rate, e.steps) for e in entries]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)  # `ORDERS` end where they do on purpose
        return float(accountant.get_epsilon(delta, alphas=ORDERS))


def read(home: Path) -> list[Entry]:
    """All entries; none before the first private round. Raises LedgerDamaged, or Refused when it may not be read."""
    path = home / FOLDER / FILE
    try:
        if not path.exists() and not (path.parent / BEGUN).exists():
            return []
        found = json.loads(read_plain(path.parent.resolve() / FILE, MAX_BYTES))
        if found["sha256"] != _digest(found["entries"]):
            raise ValueError("it was changed by hand")
        entries = [Entry(**row) for row in found["entries"]]
        if not all(map(_possible, entries)):
            raise ValueError("it holds an entry that cannot be")
    except PermissionError as error:
        raise Refused(closed(path)) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerDamaged(
            f"the privacy ledger {path} cannot be read ({error}); put back a copy that is not older than this clinic's "
            "last private round, or set dp = false in afya.toml"
        ) from error
    return entries


def check(home: Path, new: Entry, budget: float, delta: float) -> float:
    """Epsilon after `new`. Raises Refused when that is beyond the budget, LedgerDamaged."""
    before = read(home)
    after = epsilon([*before, new], delta)
    if after > budget:
        spent = epsilon(before, delta)
        raise Refused(
            f"the privacy budget does not allow this round: {spent:.2f} of {budget:g} is spent (delta {delta:g}) and "
            f"it would bring that to {after:.2f}"
        )
    return after


def charge(home: Path, new: Entry, budget: float, delta: float) -> float:
    """Write `new` into the ledger and return epsilon after it; only then may its update leave. Raises as `check`, and
    Refused for an entry of no steps, which `read` would not believe."""
    if not _possible(new):
        raise Refused(f"nothing was trained ({new.steps} steps), so nothing leaves")
    with locked(home) as folder:
        _begin(folder)
        after = check(home, new, budget, delta)
        _write(folder, [*read(home), new])
    return after


def _possible(entry: Entry) -> bool:
    return 0 < entry.multiplier < math.inf and 0 < entry.rate <= 1 and entry.steps > 0


@contextlib.contextmanager
def locked(home: Path) -> Iterator[Path]:
    """The folder of ledger and seal, made where there is none, with no other process changing it. Raises Refused."""
    folder = home / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise Refused(f"{folder} cannot be used ({error.strerror}), so nothing is trained") from error
    try:
        end = time.monotonic() + LOCK_SECONDS
        while not _taken(descriptor):
            if time.monotonic() > end:
                raise Refused(f"another program holds {folder}; see what trains here, then try again")
            time.sleep(0.05)
        yield folder
    finally:
        os.close(descriptor)


def closed(path: Path) -> str:
    """What to say of a file of that folder which may not be read: the service wrote it, for its group."""
    return (
        f"{path} may not be read by this user; log out and in again after `afya-client join --service`, "
        "which put this user into the service's group"
    )


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _begin(folder: Path) -> None:
    """Make an empty ledger at the very first time."""
    if not (folder / BEGUN).exists():
        if not (folder / FILE).exists():
            _write(folder, [])
        write_atomic(folder / BEGUN, b"A ledger was begun here; without it nobody knows what was spent.\n")


def _write(folder: Path, entries: Sequence[Entry]) -> None:
    rows = [asdict(row) for row in entries]
    text = json.dumps({"entries": rows, "sha256": _digest(rows)}, indent=1)
    write_atomic(folder / FILE, (text + "\n").encode())


def _digest(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
