"""kill -9 of one process in the middle of a round, and whether the federation comes back as it must.

After every kill: the last checkpoint loads, at most one round is done twice, every clinic's replies count again
without anybody's hand at a clinic, and what the clinics hold is what they held. After a kill on the server's side the
adapter of the interrupted round is bit for bit that of an undisturbed run; after one at a clinic the round of the
others ends by its deadline.
"""

import time
from typing import Any

import psutil

from scripts.federation import family
from scripts.soak_parts.deployment import Deployment, NotSurvived, fingerprint, gone
from scripts.soak_parts.report import Outcome
from scripts.soak_parts.schedule import Case
from scripts.soak_parts.town import FOLLOWED, HONEST, PATIENCE, Town

VICTIM = HONEST[0]
DEADLINES = {"supernode": 30.0, "clientapp": 90.0}  # seconds; a SuperNode learns in 30 to 60 that its ClientApp died
TOLD = 5  # one ServerApp in so many is missed by `afya-server rounds` itself, after a minute; else by the coordinator
SLACK = 10.0  # seconds that closing a round may take after its deadline, on a machine with other work


def kill(town: Town, case: Case) -> Outcome:
    """One kill. Raises NotSurvived with the reason."""
    return at_a_clinic(town, case) if case.fault in ("supernode", "clientapp") else at_the_server(town, case)


def at_the_server(town: Town, case: Case) -> Outcome:
    """Kill the SuperLink, the proxy or the ServerApp; start again what systemd starts, then `afya-server rounds`."""
    settings = {"min-clinics": len(HONEST), "round-deadline": PATIENCE}
    mode = FOLLOWED if case.fault == "serverapp" else "server"
    now = town.ready(mode, "quick", settings, compared=True)
    held = holdings(town)
    into_a_round(now, case.share * town.usual["quick"]["round"])
    killed = time.monotonic()
    former = _strike(now, case)
    number = running(now, len(now.look()))
    now.sound(number - 1)
    place = len(now.look())
    now.submit(now.settings)
    whole = _both_count(now, place)
    recovery = time.monotonic() - killed
    now.same(whole, town.reference)
    unharmed(town, held)
    if former is not None and gone([former], PATIENCE):
        raise NotSurvived("the ServerApp of the former run goes on beside the new one")
    numbers = [event["round"] for event in now.seen if event["event"] == "round"]
    repeated = len(numbers) - len(set(numbers)) - now.repeated
    now.repeated += repeated
    if repeated > 1:
        raise NotSurvived(f"{repeated} rounds were done again")
    return Outcome(True, _words(repeated), recovery, repeated, {"at": round(case.share, 3)})


def _strike(now: Deployment, case: Case) -> psutil.Process | None:
    """Kill, and start again what systemd starts; the ServerApp that may still be there."""
    if case.fault == "serverapp":
        _kill(now.wait("a ServerApp", PATIENCE, lambda: now.find("serverapp")))
        if case.number % TOLD == 1:
            now.wait("the end of `afya-server rounds`", PATIENCE, lambda: now.processes["rounds"].poll())
        now.leave("rounds")
        return None
    rest, former = family(now.processes["server"].pid), now.find("serverapp")
    target = now.find("superlink") if case.fault == "superlink" else rest[0]
    if target is None:
        raise NotSurvived("there was no SuperLink to kill")
    _kill(target)
    # A ServerApp that cannot reach its SuperLink is ending, but may wait for it until it is back.
    now.restart_server([process for process in rest if process not in (target, former)])
    return former


def _words(repeated: int) -> str:
    return "the round was done again, bit for bit the same" if repeated else "nothing was lost"


def at_a_clinic(town: Town, case: Case) -> Outcome:
    """Kill north's SuperNode (and start it again) or its ClientApp (which nobody starts again)."""
    trains, deadline = ("quick" if case.fault == "supernode" else "train"), DEADLINES[case.fault]
    now = town.ready(case.fault, trains, {"min-clinics": 1, "round-deadline": deadline})
    held, usual, former = holdings(town), town.usual[trains], None
    if case.fault == "supernode":
        into_a_round(now, case.share * usual["round"])
        rest, former = family(now.processes[VICTIM].pid), now.find("clientapp", VICTIM)
        _kill(rest[0])
        killed, place = time.monotonic(), len(now.look()) - 1
        now.processes[VICTIM].wait()
        # A ClientApp that was just starting may wait for its SuperNode until one is back, and then ends.
        now.rejoin(VICTIM, [process for process in rest[1:] if process != former])
        now.wait("its SuperNode", PATIENCE, lambda: True if now.is_there(VICTIM) else None)
        back = len(now.look())  # what counted before was sent before the kill
    else:
        place = _kill_the_training(now, case.share, usual)
        killed, back = time.monotonic(), place + 1
    number = running(now, place)
    others = now.wait(f"the end of round {number} by its deadline", deadline + SLACK, lambda: done(now, number))
    reason = next((e["reason"] for e in now.seen if e["event"] == "rejected" and e["round"] == number), "")
    now.wait("a later reply of the clinic that counts", PATIENCE, lambda: counts(now, back, VICTIM))
    recovery = time.monotonic() - killed
    now.sound(number)
    unharmed(town, held)
    if former is not None and gone([former], PATIENCE):
        raise NotSurvived("the killed SuperNode's ClientApp goes on beside the new one")
    came = any(e["event"] == "accepted" and e["clinic"] == VICTIM for e in _of(now.seen[:back], number))
    words = "its reply had come already" if came else "its reply of the same round still counted"
    words = f"the others' round ended without it ({reason})" if reason else words
    return Outcome(True, words, recovery, 0, {"at": round(case.share, 3), "round_seconds": others["seconds"]})


def _of(events: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    return [event for event in events if event.get("round") == number]


def _kill_the_training(now: Deployment, share: float, usual: dict[str, float]) -> int:
    """Kill north's ClientApp at a share of its usual life; the place in the events before that.

    One that ends earlier is let pass and tells what is usual now: how long it takes depends on what else runs.
    """
    for _ in range(5):
        process = _training(now, now.seen[into_a_round(now, 0.0)])
        born = process.create_time()
        while _lives(process) and time.time() < born + share * usual["clientapp"]:
            time.sleep(0.02)
        place = len(now.look()) - 1
        if _lives(process):
            _kill(process)
            return place
        usual["clientapp"] = time.time() - born
    raise NotSurvived("no ClientApp lived long enough to be killed")


def _lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and is not yet fetched by its parent does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _training(now: Deployment, begun: dict[str, Any]) -> psutil.Process:
    """North's ClientApp of a round; one that is older than the round has answered before and is about to end."""
    return now.wait("a ClientApp", PATIENCE, lambda: now.find("clientapp", VICTIM, now.age(begun)))


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess as error:
        raise NotSurvived("the process had ended before it could be killed") from error


def into_a_round(now: Deployment, seconds: float) -> int:
    """Wait until a round has run for so long since it began, the next one where that has gone by; its event's place."""
    count = len(now.look())
    place = max((n for n, event in enumerate(now.seen) if event["event"] == "round"), default=None)
    done = place is None or any(event["event"] == "round-done" for event in now.seen[place:])
    if place is None or done or now.age(now.seen[place]) > max(seconds, 1.0):
        place = now.wait("the next round", PATIENCE, lambda: begun(now, count))
    time.sleep(max(0.0, seconds - now.age(now.seen[place])))
    return place


def begun(now: Deployment, place: int) -> int | None:
    """Place of the first round's event at or behind a place."""
    return next((n for n, event in enumerate(now.seen) if n >= place and event["event"] == "round"), None)


def running(now: Deployment, place: int) -> int:
    """Number of the round that was running at a place in the events."""
    return int([event["round"] for event in now.look()[: place + 1] if event["event"] == "round"][-1])


def done(now: Deployment, number: int) -> dict[str, Any] | None:
    """The event of a round's end, or None."""
    return next((e for e in now.seen if e["event"] == "round-done" and e["round"] == number), None)


def counts(now: Deployment, place: int, clinic: str, number: int = 0) -> bool | None:
    """Whether a reply of a clinic counted behind a place in the events, in round `number` or later."""
    later = [e for e in now.seen[place:] if e["event"] == "accepted" and e["clinic"] == clinic]
    return True if any(e["round"] >= number for e in later) else None


def _both_count(now: Deployment, place: int) -> int:
    """Wait for the end of a round in which every clinic's reply counted; its number."""

    def whole() -> int | None:
        later = now.seen[place:]
        if failed := [event for event in later if event["event"] in ("failed", "rejected")]:
            raise NotSurvived(f"after the restart: {failed[0].get('reason')}")
        ended = [event["round"] for event in later if event["event"] == "round-done"]
        return int(ended[0]) if ended else None

    number: int = now.wait("a round with every clinic after the restart", 2 * PATIENCE, whole)
    counted = {e["clinic"] for e in now.seen[place:] if e["event"] == "accepted" and e["round"] == number}
    if counted != set(HONEST):
        raise NotSurvived(f"after the restart only {', '.join(sorted(counted)) or 'nobody'} took part")
    return number


def holdings(town: Town) -> dict[str, str]:
    """Fingerprints of what the honest clinics hold."""
    return {name: fingerprint(town.homes[name]) for name in HONEST}


def unharmed(town: Town, held: dict[str, str]) -> None:
    """Raise NotSurvived unless the clinics hold what they held."""
    for name, was in held.items():
        if fingerprint(town.homes[name]) != was:
            raise NotSurvived(f"training/ or adapters/ of {name} are not what they were")
