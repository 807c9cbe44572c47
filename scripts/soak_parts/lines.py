"""A clinic on a bad line: cut, down, silent or slow in the middle of a round, with nobody's hand at the clinic.

The clinic reaches the proxy through `scripts.soak_parts.line.Line` only. Survived: the other clinic's round ends by its
deadline, the clinic's replies count again by themselves, and what it holds is what it held.
"""

import time

from scripts.soak_parts import kills
from scripts.soak_parts.deployment import NotSurvived
from scripts.soak_parts.line import Line
from scripts.soak_parts.report import Outcome
from scripts.soak_parts.schedule import Case
from scripts.soak_parts.town import PATIENCE, Town

DEADLINE = 120.0  # seconds of a round
DOWN, SILENT, SLOW = 10.0, 30.0, 256.0  # seconds, seconds, kbit/s


def trouble(town: Town, case: Case) -> Outcome:
    """One trouble of the line. Raises NotSurvived with the reason."""
    now = town.ready("line", "quick", {"min-clinics": 1, "round-deadline": DEADLINE})
    host, _, port = now.server.rpartition(":")
    if now.line is None:
        now.line = Line((host, int(port)))
        now.line.__enter__()
        now.leave(kills.VICTIM)
        now.join(kills.VICTIM, server=now.line.address)
        now.wait("a reply over the line", PATIENCE, lambda: kills.counts(now, len(now.seen) - 1, kills.VICTIM))
    line, held = now.line, kills.holdings(town)
    place = kills.into_a_round(now, case.share * town.usual["quick"]["round"])
    began, passed, pid = time.monotonic(), line.bytes, now.processes[kills.VICTIM].pid
    {"cut": line.cut, "down": lambda: line.down(DOWN), "silent": lambda: line.silent(SILENT)}.get(
        case.kind, lambda: setattr(line, "kbit", SLOW)
    )()
    number = kills.running(now, place)
    now.wait(f"the end of round {number} by its deadline", DEADLINE + kills.SLACK, lambda: kills.done(now, number))
    late = next((e["reason"] for e in now.seen if e["event"] == "rejected" and e["round"] == number), "")
    # A reply of the running round may have been on its way already: the next one has crossed the line for certain.
    now.wait("a reply of the next round", PATIENCE, lambda: kills.counts(now, place, kills.VICTIM, number + 1))
    recovery = time.monotonic() - began
    line.kbit = 0.0
    now.sound(number)
    kills.unharmed(town, held)
    if now.processes[kills.VICTIM].poll() is not None or now.processes[kills.VICTIM].pid != pid:
        raise NotSurvived("the clinic's SuperNode ended by itself")
    words = f"the round ended without it ({late})" if late else "its reply of the same round counted"
    return Outcome(True, words, recovery, 0, {"at": round(case.share, 3), "bytes": line.bytes - passed})
