"""A federated run with honest clinics that is killed at its N-th change of the disk: run as a program by test_rounds.

usage: python -m tests.server.killed_run FOLDER BASE N   (N = 0: not killed; prints the number of changes)
"""

import os
import sys
from pathlib import Path

from server import rounds
from tests.server import fakes

calls = 0


def _counted(name: str, last: int) -> None:
    real = getattr(os, name)

    def call(*arguments: object, **named: object) -> object:
        global calls
        calls += 1
        if calls == last:
            os._exit(9)  # like kill -9: no handler runs, no buffer is written
        return real(*arguments, **named)

    setattr(os, name, call)


def main() -> None:
    """Four rounds of three clinics whose updates depend on round and clinic only."""
    root, base, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for name in ("fsync", "replace", "rename"):
        _counted(name, last)

    def clinic(node: int, message: object) -> object:
        number, _, _ = fakes.asked(message)  # type: ignore[arg-type]
        return fakes.reply(fakes.moved(message, 0.001 * node * number), number, 10 * node)  # type: ignore[arg-type]

    clock = fakes.Clock()
    grid = fakes.FakeGrid(dict.fromkeys((1, 2, 3), clinic))  # type: ignore[dict-item]
    chosen = fakes.settings(root, base, num_server_rounds=4)
    after = rounds.federate(grid, chosen, sleep=clock.sleep, clock=clock)
    trains = sum(message.metadata.message_type == "train" for message in grid.sent)
    print("RESULT", after.round, trains, calls)


if __name__ == "__main__":
    main()
