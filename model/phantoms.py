"""Synthetic radiographs with exactly known answers: data for training, demos and tests, no patient in it.

`make` draws pictures and asks several questions about each; `clinic_samples` does so for one clinic of the demo.
The same seed gives the same bytes. Pictures follow the radiological convention, the patient's right on the picture's
left; a side in an answer is the patient's and a place is the body's, however the scanner shows the picture.
`python -m model.phantoms --sheet FILE` draws a contact sheet. The parts: `phantom_{plain,hand,axial,head}` (anatomy),
`phantom_scanners` (looks, clinics), `phantom_questions`. Not here: realism. Nothing learned from these schematic
drawings says anything about patients.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model import phantom_axial, phantom_hand, phantom_head, phantom_plain, phantom_questions
from model.phantom_findings import Finding
from model.phantom_questions import Facts
from model.phantom_scanners import CLINICS, SCANNERS, Clinic, Scanner, show
from model.phantom_shapes import Canvas

if TYPE_CHECKING:
    from model.data import Sample

__all__ = ["CLINICS", "SCANNERS", "Case", "Clinic", "Scanner", "clinic_samples", "draw_case", "make", "render"]

_MODALITIES = {
    "chest": {"X-Ray": 0.65, "CT": 0.35},
    "abdomen": {"CT": 0.5, "MRI": 0.5},
    "brain": {"CT": 0.4, "MRI": 0.6},
    "hand": {"X-Ray": 1.0},
}
_KINDS = {
    "chest": ("nodule", "effusion", "pneumonia"),
    "abdomen": ("cyst", "mass", "stone"),
    "brain": ("hemorrhage", "infarct", "mass"),
    "hand": ("fracture", "cyst"),
}
_COUNTABLE = {"nodule", "cyst", "mass", "fracture"}
_SIZELESS = {"fracture"}


@dataclass(frozen=True)
class Case:
    """Everything that decides a picture. `side` is the patient's; `finding` is None in a healthy one."""

    organ: str
    modality: str
    side: str
    finding: Finding | None
    scanner: Scanner
    seed: int


def _pick(shares: Mapping[str, float], rng: np.random.Generator) -> str:
    names, weights = list(shares), np.array(list(shares.values()), dtype=np.float64)
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]


def _zones(organ: str, modality: str, kind: str, side: str) -> tuple[str, ...]:
    if kind == "effusion":
        return ("lower",) if modality == "X-Ray" else ("back",)
    if kind == "stone":
        return ("kidney",)
    if organ == "abdomen":
        return ("liver" if side == "right" else "spleen", "kidney")
    if organ == "hand":
        return "fingers", "wrist"
    return ("upper", "lower") if modality == "X-Ray" else ("front", "back")


def _room(organ: str, kind: str, zone: str, size: str) -> int:
    """How many lesions of this kind fit."""
    if kind not in _COUNTABLE or organ == "brain" or zone in ("spleen", "kidney"):
        return 1
    return 2 if size == "large" or zone == "wrist" else 3


def draw_case(
    rng: np.random.Generator,
    scanners: Mapping[str, float],
    organs: Mapping[str, float] | None = None,
    lesions: Mapping[str, float] | None = None,
    healthy: float = 0.22,
) -> Case:
    """A random case; `organs` and `lesions` weigh organs and lesion kinds (missing kind: 1); `healthy` is a share."""
    organ = _pick(organs or dict.fromkeys(_KINDS, 1.0), rng)
    modality = _pick(_MODALITIES[organ], rng)
    scanner = SCANNERS[_pick(scanners, rng)]
    side = "left" if rng.random() < 0.5 else "right"
    seed = int(rng.integers(2**62))
    finding = None
    kind = _pick({k: (lesions or {}).get(k, 1.0) for k in _KINDS[organ]}, rng)
    zones = _zones(organ, modality, kind, side)
    zone = zones[int(rng.integers(len(zones)))]
    size = "" if kind in _SIZELESS or organ == "hand" else ("small" if rng.random() < 0.5 else "large")
    count = 1 + int(rng.integers(_room(organ, kind, zone, size)))
    if rng.random() >= healthy:
        finding = Finding(kind, side, zone, size, count, seed=int(rng.integers(2**62)))
    return Case(organ, modality, side, finding, scanner, seed)


def render(case: Case, size: int = 160) -> np.ndarray:
    """The picture of this case as its scanner shows it: (size, size, 3) uint8."""
    zoom, *shift = np.random.default_rng([case.seed, 0]).random(3).tolist()
    canvas = Canvas(size, 0.93 + 0.11 * zoom, (0.06 * shift[0] - 0.03, 0.06 * shift[1] - 0.03))
    rng = np.random.default_rng(case.seed)
    if case.organ == "hand":
        phantom_hand.hand(canvas, rng, case.finding, case.side)
    elif case.organ == "brain":
        phantom_head.brain(canvas, rng, case.finding, case.modality)
    elif case.organ == "abdomen":
        phantom_axial.abdomen(canvas, rng, case.finding, case.modality)
    elif case.modality == "CT":
        phantom_axial.chest(canvas, rng, case.finding)
    else:
        phantom_plain.chest(canvas, rng, case.finding)
    return show(canvas.pixels, case.scanner, np.random.default_rng([case.seed, 1]))


def facts(case: Case) -> Facts:
    """What can be asked of this case."""
    kinds, finding = _KINDS[case.organ], case.finding
    countable = tuple(kind for kind in kinds if kind in _COUNTABLE and case.organ != "brain")
    zones = _zones(case.organ, case.modality, finding.kind, case.side) if finding else ()
    if finding is None:
        return Facts(case.organ, case.modality, case.side, "", "", "", 0, kinds, countable, ())
    return Facts(
        case.organ,
        case.modality,
        case.side,
        finding.kind,
        finding.zone,
        finding.size,
        finding.count,
        kinds,
        countable,
        zones,
    )


def _samples(case: Case, name: str, rng: np.random.Generator, size: int, topics: Mapping[str, float]) -> list[Sample]:
    from model.data import Sample

    image, known = render(case, size), facts(case)
    rows: list[Sample] = []
    image.setflags(write=False)
    for topic, question, answer in phantom_questions.interview(known, 6 + int(rng.integers(4)), topics, rng):
        meta = {
            "scanner": case.scanner.name,
            "organ": case.organ,
            "modality": case.modality,
            "side": case.side if case.finding or case.organ == "hand" else "",
            "lesion": known.lesion or "none",
            "topic": topic,
        }
        kind = "closed" if topic in phantom_questions.CLOSED else "open"
        rows.append(
            Sample(
                id=f"{name}-q{len(rows)}",
                image=image,
                question=question,
                answer=answer,
                answer_type=kind,
                group=name,
                source="phantoms",
                meta=meta,
            )
        )
    return rows


def make(
    count_images: int,
    scanners: Sequence[str] | Mapping[str, float],
    seed: int,
    size: int = 160,
    *,
    organs: Mapping[str, float] | None = None,
    lesions: Mapping[str, float] | None = None,
    topics: Mapping[str, float] | None = None,
    healthy: float = 0.22,
    prefix: str = "phantom",
) -> list[Sample]:
    """6 to 9 questions about each of `count_images` pictures, (size, size, 3) uint8, one array per picture.

    `scanners` names looks of `SCANNERS`, equally often or with weights; `organs`, `lesions`, `topics` weigh the rest;
    `healthy` is the share of pictures without a lesion. The rows of one picture share one read-only array.
    Picture i depends on the seed and i alone. Raises ValueError for a scanner or organ that does not exist.
    """
    looks = dict(scanners) if isinstance(scanners, Mapping) else dict.fromkeys(scanners, 1.0)
    for given, known, what in ((looks, SCANNERS, "scanner"), (organs or {}, _KINDS, "organ")):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"No {what} is called {unknown[0]!r}; there are: {', '.join(known)}.")
    if not looks:
        raise ValueError(f"No scanner is given; name one or more of: {', '.join(SCANNERS)}.")
    rows: list[Sample] = []
    for index in range(count_images):
        rng = np.random.default_rng([seed, index])
        case = draw_case(rng, looks, organs, lesions, healthy)
        rows += _samples(case, f"{prefix}-{seed}-{index}", rng, size, topics or {})
    return rows


def clinic_samples(name: str, images: int, seed: int, size: int = 160) -> list[Sample]:
    """Questions about `images` pictures of one clinic of `CLINICS`. Raises ValueError for another name."""
    if name not in CLINICS:
        raise ValueError(f"No clinic is called {name!r}; there are: {', '.join(CLINICS)}.")
    clinic = CLINICS[name]
    return make(
        images,
        clinic.scanners,
        seed,
        size,
        organs=clinic.organs,
        lesions=clinic.lesions,
        topics=clinic.topics,
        healthy=clinic.healthy,
        prefix=name,
    )


def sheet(path: Path, size: int = 160, columns: int = 8, seed: int = 0) -> None:
    """A contact sheet: standard looks first, then one row of each unseen one."""
    from PIL import Image

    standard = [name for name, scanner in SCANNERS.items() if scanner.standard]
    rows = [standard] * 6 + [[name] for name, scanner in SCANNERS.items() if not scanner.standard]
    lines = []
    for number, names in enumerate(rows):
        pictures = {row.group: row.image for row in make(columns, names, seed + number, size)}
        lines.append(np.concatenate(list(pictures.values()), axis=1))
    Image.fromarray(np.concatenate(lines)).save(path)


def main() -> None:
    """Draws the contact sheet."""
    parser = argparse.ArgumentParser(prog="python -m model.phantoms", description="Draw a contact sheet of phantoms.")
    parser.add_argument("--sheet", type=Path, required=True, metavar="FILE", help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sheet(arguments.sheet, seed=arguments.seed)


if __name__ == "__main__":
    main()
