"""A kiosk without screens that writes cases until it is killed: `python -m tests.reliability.writer HOME SECONDS`.

Forked before every kill from a process that has imported everything, so that a kill costs no start-up. After each
operation returns it prints what is promised from then on: `case ID`, `answer TURN`, `training CASE`, `care CASE`.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import PIL.Image  # noqa: F401  (imported before the fork, like the next)
import sqlite_utils.migrations  # noqa: F401

from kiosk import export
from kiosk.store import CaseStore
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import answer


def write_for_ever(home: Path, seed: int, out: int) -> None:
    """Ask, answer, review, consent, withdraw; say on `out` what is done only when the store says so."""
    chance = random.Random(seed)
    store = CaseStore(home / "kiosk.db")
    export.reconcile(store, home)

    def promise(what: str, number: int) -> None:
        os.write(out, f"{what} {number}\n".encode())

    while True:
        case_id, turn_id = store.add_case(picture(chance.randrange(20, 250)), "NA", "Is it bright?")
        promise("case", case_id)
        store.answer_turn(turn_id, answer("yes"))
        promise("answer", turn_id)
        export.review(store, home, turn_id, "confirmed", "NA")
        export.set_consent(store, home, case_id, "training", "NA", True)
        promise("training", case_id)
        if chance.random() < 0.5:
            export.set_consent(store, home, case_id, "care", "NA")
            promise("care", case_id)


def main(home: Path, kills: int, seed: int) -> None:
    """Fork a writer and kill it at a random moment after a few promises, `kills` times; pass its promises on."""
    chance = random.Random(seed)
    for number in range(kills):
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(home, seed + number, told)
            finally:
                os._exit(1)  # it never ends by itself: an error must not go on as a second parent
        os.close(told)
        promises = b""
        wanted = chance.randrange(1, 9)
        while promises.count(b"\n") < wanted and (more := os.read(heard, 4096)):
            promises += more
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        while more := os.read(heard, 4096):
            promises += more
        os.close(heard)
        if not os.WIFSIGNALED(status):
            sys.exit("the writer ended by itself")
        os.write(1, promises + f"killed {number + 1}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
