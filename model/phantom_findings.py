"""What a lesion is, and where its parts go: shared by the anatomy of all phantoms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.phantom_shapes import Points


@dataclass(frozen=True)
class Finding:
    """A lesion to draw: its kind, the patient's side, the zone of the organ, small or large, how many."""

    kind: str
    side: str  # left, right
    zone: str  # of the scene's ZONES
    size: str  # small, large, or empty where the kind has none
    count: int
    seed: int

    @property
    def sign(self) -> int:
        """+1 where the patient's left is (x > 0), -1 for the right."""
        return 1 if self.side == "left" else -1


def spots(finding: Finding, centres: Points, spread: float) -> list[tuple[float, float]]:
    """`count` of the centres (given for the patient's left), on the finding's side, each moved by up to `spread`."""
    rng = np.random.default_rng(finding.seed)
    chosen = rng.permutation(len(centres))[: finding.count].tolist()
    jitter = (spread * (2 * rng.random((len(chosen), 2)) - 1)).tolist()
    return [
        (finding.sign * (centres[i][0] + dx), centres[i][1] + dy) for i, (dx, dy) in zip(chosen, jitter, strict=True)
    ]
