"""Does things with a clinic's home as other users; started as root by `tests/client/test_service_home.py`.

Called with the home and with steps "USER:GROUPS:DEED": a user id, the ids of further groups with commas between them,
and what to do. Prints one JSON value a line: what came of a step, or the sentence of the refusal.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from client import doctor, invitation, ledger, limits, node, sealed

HOME = Path(sys.argv[1])
LINK = node.Connection("127.0.0.1:1", HOME / "federation/ca.crt", HOME / "federation/node.key")
COST = ledger.entry(1, 4.0, 0.2, 8)
DEEDS: dict[str, Callable[[], object]] = {
    "charge": lambda: ledger.charge(HOME, COST, 8.0, 1e-5),
    "count": lambda: len(ledger.read(HOME)),
    "seal": lambda: (sealed.open_to_training(HOME, []), sealed._read(HOME).key.hex())[1],
    "record": lambda: invitation.record(HOME),
    "unpack": lambda: invitation.unpack(HOME, invitation.Invitation(*[""] * 8, {}, "")),
    "keys": lambda: doctor._run("keys", lambda: doctor._keys(LINK)).detail,
    "server": lambda: doctor._federation(LINK)[0].detail,
}


def do(user: int, groups: list[int], deed: str) -> object:
    """Become the user, for good, and do it."""
    os.setgroups(groups)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    os.umask(0o077)
    try:
        return DEEDS[deed]()
    except (limits.Refused, invitation.InvitationRejected) as error:
        return str(error)


def main() -> None:
    """Import what lies in root's home, then take each step in a process of its own."""
    assert doctor._run("keys", lambda: "").ok
    if any(step.endswith("charge") for step in sys.argv):
        ledger.epsilon([COST], 1e-5)
    for step in sys.argv[2:]:
        user, groups, deed = step.split(":")
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
        else:
            print(json.dumps(do(int(user), [int(group) for group in groups.split(",") if group], deed)), flush=True)
            os._exit(0)


main()
