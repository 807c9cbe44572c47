"""A clinic of a running federation that lies in every way `scripts.soak_parts.lies` knows, one round each.

Survived: the run goes on; a lie that the gate can tell is refused with its reason and the adapter stays bit for bit as
without the liar; one that it cannot tell moves the adapter by no more than its share, which is at most a half.
"""

import numpy as np

from scripts.soak_parts import kills
from scripts.soak_parts.deployment import Deployment, NotSurvived
from scripts.soak_parts.lies import LIES, PASSING
from scripts.soak_parts.report import Outcome
from scripts.soak_parts.schedule import Case
from scripts.soak_parts.town import HONEST, LATER, PATIENCE, Town
from server import checkpoint

LIAR = LATER[0]


def lie(town: Town, case: Case) -> Outcome:
    """One round in which the liar tells one lie. Raises NotSurvived with the reason."""
    settings = {"min-clinics": len(HONEST), "round-deadline": PATIENCE}
    anew = case.kind in PASSING  # a lie that counts changes every later round
    now = town.ready("poison", "quick", settings, compared=True, anew=anew)
    if LIAR not in now.processes:  # after the undisturbed run, which knows no liar
        now.join(LIAR)
        now.wait("the liar's SuperNode", PATIENCE, lambda: True if now.is_there(LIAR) else None)
        now = town.ready("poison", "quick", settings, compared=True, anew=True)
    town.behave(LIAR, case.kind)
    place = kills.into_a_round(now, 0.0)
    number = kills.running(now, place)
    now.wait("the end of the round", PATIENCE + kills.SLACK, lambda: kills.done(now, number))
    told = [e for e in now.seen if e["event"] in ("accepted", "rejected") and e["round"] == number]
    if {event["clinic"] for event in told} != {*HONEST, LIAR}:
        raise NotSurvived(f"round {number} heard {len(told)} replies instead of three")
    verdict = next(event for event in told if event["clinic"] == LIAR)
    if case.kind in PASSING:
        return _passed(now, number, verdict["event"])
    if verdict["event"] != "rejected" or LIES[case.kind].word not in verdict["reason"]:
        raise NotSurvived(f"the lie was answered with: {verdict.get('reason') or 'accepted'}")
    now.same(number, town.reference)
    return Outcome(True, "refused, the adapter stayed that of a run without it", notes={"reason": verdict["reason"]})


def _passed(now: Deployment, number: int, verdict: str) -> Outcome:
    """A lie that looks like training: counted with at most half of the weight, in a step no longer than it may be."""
    before, after = (checkpoint.load(now.root / f"round-{n:05d}") for n in (number - 1, number))
    row = next((row for row in after.accepted if row.clinic == LIAR), None)
    if verdict != "accepted" or row is None:
        raise NotSurvived("a lie that nobody can tell from training was refused: the soak's lie is wrong")
    step = np.sqrt(sum(float(np.square(after.state[n] - before.state[n]).sum()) for n in after.state))
    most = sum(one.weight * one.norm for one in after.accepted)
    if row.weight > 0.5 or step > most * 1.001:
        raise NotSurvived(
            f"it had a weight of {row.weight:.2f} and moved the adapter by {step:.3f}, at most {most:.3f}"
        )
    notes = {"weight": round(row.weight, 3), "step": round(float(step), 3)}
    return Outcome(True, "counted as training, with no more than its share", notes=notes)
