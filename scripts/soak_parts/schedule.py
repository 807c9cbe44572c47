"""What a soak does, in order: which fault, which case of it, and at which moment of a round.

The moments are drawn from a seed, one in each of as many equal parts of a round as there are points, so that they
spread over all of it and are the same whenever the soak is repeated. Not here: what happens at a moment.
"""

import random
from dataclasses import dataclass

KILLS = {
    "superlink": "kill -9 of the SuperLink",
    "server": "kill -9 of `afya-server start` (the proxy)",
    "serverapp": "kill -9 of the ServerApp",
    "supernode": "kill -9 of a clinic's SuperNode",
    "clientapp": "kill -9 of a clinic's ClientApp",
}
LINES = {
    "cut": "the line is cut",
    "down": "the line is down for 10 s",
    "silent": "the line is silent for 30 s",
    "slow": "the line carries 256 kbit/s",
}
FAULTS = (*KILLS, "line", "poison", "impostor")


@dataclass(frozen=True)
class Case:
    """One fault at one moment: `kind` says which of the fault's kinds, `share` when, as a share of a round's time."""

    fault: str
    kind: str
    number: int
    share: float

    @property
    def key(self) -> str:
        """Name of the case in the report."""
        return f"{self.fault}: {self.kind} {self.number:02d}"


def moments(points: int, seed: int, name: str) -> list[float]:
    """`points` shares of a round, ascending, one in each part of it."""
    draw = random.Random(f"{seed} {name}")
    return [(number + draw.random()) / points for number in range(points)]


def plan(points: int, seed: int, only: tuple[str, ...], lies: tuple[str, ...], tricks: tuple[str, ...]) -> list[Case]:
    """Every case in order: each kill at `points` moments, each trouble of a line at a quarter of them, others once."""
    cases = []
    for fault in FAULTS:
        if only and fault not in only:
            continue
        kinds: dict[str, int] = {}
        if fault in KILLS:
            kinds = {"kill": points}
        elif fault == "line":
            kinds = dict.fromkeys(LINES, max(1, points // 4))
        elif fault == "poison":
            kinds = dict.fromkeys(lies, 1)
        else:
            kinds = dict.fromkeys(tricks, 1)
        for kind, count in kinds.items():
            shares = moments(count, seed, f"{fault} {kind}")
            cases += [Case(fault, kind, number + 1, share) for number, share in enumerate(shares)]
    return cases
