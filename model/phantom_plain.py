"""Frontal phantom radiographs: chest and hand. See `phantoms` for the way in.

A scene draws its anatomy from `rng` alone, so that the same seed gives the same body with or without a finding. As
displayed, the patient's left is on the picture's right (x > 0). For a hand: seen from its back, fingers up, so that the
thumb of a right hand points to the picture's left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from model.phantom_shapes import Canvas, Mask, Points, blob, mirrored, smooth


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
    return [(finding.sign * (centres[i][0] + dx), centres[i][1] + dy)
            for i, (dx, dy) in zip(chosen, jitter, strict=True)]


_LUNG = [(0.28, -0.70), (0.47, -0.62), (0.62, -0.36), (0.70, 0.0), (0.73, 0.46), (0.58, 0.38), (0.40, 0.31),
         (0.22, 0.38), (0.15, 0.10), (0.14, -0.25), (0.15, -0.55)]
_TORSO = [(0.16, -1.1), (0.18, -0.90), (0.42, -0.80), (0.85, -0.66), (1.05, -0.45), (1.08, -0.1), (0.92, -0.02),
          (0.86, 0.30), (0.88, 1.15)]
_NODULES = {"upper": [(0.36, -0.52), (0.54, -0.30), (0.32, -0.22)], "lower": [(0.58, 0.04), (0.36, 0.14), (0.60, 0.30)]}


def chest(canvas: Canvas, rng: np.random.Generator, finding: Finding | None) -> None:
    """A frontal chest radiograph. Findings: nodule, effusion, pneumonia; zones: upper, lower."""
    wide, tall = 0.97 + 0.06 * rng.random(), 0.97 + 0.06 * rng.random()

    def place(points: Points) -> list[tuple[float, float]]:
        return [(x * wide, y * tall) for x, y in points]

    torso = canvas.polygons([place(_TORSO) + mirrored(place(_TORSO))[::-1]], 0.05)
    canvas.paint(torso, 0.42)
    canvas.pixels += torso.weights * (canvas.axis[:, None] * np.float32(0.07) + np.float32(0.03))
    canvas.add(canvas.ellipse(0, 0.95, 0.85, 0.62, soft=0.3), 0.16, torso)
    lung = smooth(place(_LUNG))
    lungs = canvas.polygons([[(x, y + 0.05) for x, y in lung], mirrored(lung)], 0.035)
    canvas.paint(lungs, 0.13, 0.92)
    _vessels(canvas, rng, lungs)
    canvas.add(canvas.strokes([([(0, -1.1), (0, 1.1)], 0.24)], 0.10), 0.17, torso)
    canvas.add(canvas.strokes([([(-0.09, y / 10), (0.09, y / 10)], 0.02) for y in range(-10, 11)], 0.03), -0.08)
    canvas.add(canvas.strokes([([(0.01, -1.0), (0.0, -0.34)], 0.09)], 0.04), -0.16)
    canvas.paint(canvas.polygons([blob(rng, 0.02, -0.24, 0.17, 0.24, 0.06)], 0.08), 0.62, 0.7)
    big = 0.94 + 0.12 * rng.random()
    canvas.paint(canvas.polygons([blob(rng, 0.13, 0.17, 0.31 * big, 0.25 * big, 0.03, 0.45)], 0.06), 0.66, 0.92)
    if finding is not None:
        _chest_finding(canvas, finding, lungs, place)
    _ribs(canvas, rng, torso, wide)
    canvas.add(canvas.ellipse(0.42, 0.53, 0.12, 0.07, soft=0.08), -0.22)


def _vessels(canvas: Canvas, rng: np.random.Generator, lungs: Mask) -> None:
    lines = []
    for sign in (-1, 1):
        for _ in range(9):
            angle, length = math.pi * (rng.random() - 0.5) * 0.95, 0.28 + 0.22 * rng.random()
            bend = 0.25 * (rng.random() - 0.5)
            points = [(sign * (0.16 + length * t * math.cos(angle + bend * t)), -0.02 + length * t * math.sin(angle + bend * t))
                      for t in (0, 0.35, 0.7, 1)]
            lines += [(points[:2], 0.035), (points[1:], 0.02)]
    canvas.add(canvas.strokes(lines, 0.03), 0.13, lungs)
    canvas.pixels += canvas.texture(rng, 20) * lungs.weights * np.float32(0.018)


def _ribs(canvas: Canvas, rng: np.random.Generator, torso: Mask, wide: float) -> None:
    back, front = [], []
    lift = 0.03 * (rng.random() - 0.5)
    for index in range(9):
        top = -0.78 + 0.155 * index + lift
        reach = (0.50, 0.60, 0.67, 0.72, 0.75, 0.77, 0.78, 0.79, 0.79)[index] * wide
        arc = [(0.06 + (reach - 0.06) * math.sin(1.571 * t), top - 0.07 * math.sin(3.1416 * t) + 0.26 * t ** 3)
               for t in (0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1)]
        edge = [(reach, top + 0.26), (reach * 0.86, top + 0.38), (reach * 0.62, top + 0.47), (reach * 0.40, top + 0.50)]
        back += [(arc, 0.062), (mirrored(arc), 0.062)]
        if index < 6:
            front += [(edge, 0.05), (mirrored(edge), 0.05)]
    canvas.add(canvas.strokes(back, 0.014), 0.10, torso)
    canvas.add(canvas.strokes(front, 0.02), 0.055, torso)
    collar = smooth([(0.07, -0.60), (0.25, -0.63), (0.50, -0.74), (0.78, -0.72)], closed=False)
    canvas.add(canvas.strokes([(collar, 0.075), (mirrored(collar), 0.075)], 0.02), 0.17, torso)


def _chest_finding(canvas: Canvas, finding: Finding, lungs: Mask, place) -> None:  # type: ignore[no-untyped-def]
    large = finding.size == "large"
    if finding.kind == "nodule":
        radius = 0.115 if large else 0.062
        for x, y in place(spots(finding, _NODULES[finding.zone], 0.025)):
            canvas.paint(canvas.ellipse(x, y, radius, radius * 0.95, soft=0.03), 0.72, 0.95)
    elif finding.kind == "effusion":
        top = -0.18 if large else 0.14
        level = [(0.95, top - 0.06), (0.72, top), (0.60, top + 0.14), (0.40, top + 0.20), (0.10, top + 0.18), (0.10, 0.7), (0.95, 0.7)]
        fluid = canvas.polygons([place([(finding.sign * x, y) for x, y in level])], 0.05)
        canvas.pixels += (np.float32(0.70) - canvas.pixels) * fluid.weights * lungs.weights
    else:
        rng = np.random.default_rng(finding.seed)
        x, y = place([(finding.sign * 0.43, -0.36 if finding.zone == "upper" else 0.10)])[0]
        scale = 1.25 if large else 0.75
        haze = canvas.polygons([blob(rng, x, y, 0.19 * scale, 0.17 * scale, 0.35)], 0.16)
        cloud = np.clip(canvas.texture(rng, 14) * np.float32(0.10) + np.float32(0.42), 0.15, 0.7)
        canvas.pixels += haze.weights * lungs.weights * cloud


_TIPS = ((-0.40, -0.64), (-0.13, -0.83), (0.14, -0.75), (0.36, -0.50))  # index, middle, ring, little of a right hand
_KNUCKLES = ((-0.30, -0.02), (-0.09, -0.08), (0.11, -0.04), (0.29, 0.05))
_BASES = ((-0.16, 0.40), (-0.04, 0.38), (0.08, 0.39), (0.19, 0.42))


def _along(a: tuple[float, float], b: tuple[float, float], t: float) -> tuple[float, float]:
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t


def _bone(a: tuple[float, float], b: tuple[float, float], width: float) -> list[tuple[float, float]]:
    """An hour-glass outline from a to b, `width` at its ends."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = math.hypot(dx, dy)
    nx, ny = -dy / length, dx / length
    half = [(0.0, 0.30), (0.03, 0.48), (0.12, 0.50), (0.3, 0.33), (0.6, 0.31), (0.86, 0.46), (0.97, 0.42), (1.0, 0.25)]
    left = [(a[0] + dx * t + nx * w * width, a[1] + dy * t + ny * w * width) for t, w in half]
    right = [(a[0] + dx * t - nx * w * width, a[1] + dy * t - ny * w * width) for t, w in reversed(half)]
    return left + right


def hand(canvas: Canvas, rng: np.random.Generator, finding: Finding | None, side: str) -> None:
    """The back of a hand. Findings: fracture, cyst; zones: fingers, wrist."""
    sign = 1 if side == "right" else -1  # drawn as a right hand, thumb to the picture's left
    spread, size = 0.9 + 0.25 * rng.random(), 0.95 + 0.08 * rng.random()

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return sign * point[0] * size * spread, point[1] * size + 0.03

    rays = []
    for tip, knuckle, base in zip(_TIPS, _KNUCKLES, _BASES, strict=True):
        end = (tip[0] + 0.05 * (rng.random() - 0.5), tip[1] + 0.05 * (rng.random() - 0.5))
        rays.append([place(p) for p in (base, knuckle, _along(knuckle, end, 0.46), _along(knuckle, end, 0.75), end)])
    thumb = [place(p) for p in ((-0.25, 0.44), (-0.48, 0.20), (-0.64, 0.0), (-0.72, -0.18))]
    _flesh(canvas, rays, thumb, place)
    bones = [_bone(ray[i], _along(ray[i], ray[i + 1], 0.94), w)
             for ray in rays for i, w in enumerate((0.125, 0.115, 0.10, 0.085))]
    bones += [_bone(thumb[i], _along(thumb[i], thumb[i + 1], 0.93), w) for i, w in enumerate((0.14, 0.125, 0.10))]
    arms = [_bone(place((-0.12, 1.25)), place((-0.10, 0.66)), 0.27), _bone(place((0.15, 1.25)), place((0.15, 0.68)), 0.17)]
    carpals = [blob(rng, *place(p), 0.075, 0.068, 0.15)
               for p in ((-0.19, 0.50), (-0.06, 0.48), (0.06, 0.47), (0.17, 0.50), (-0.13, 0.60), (0.0, 0.59), (0.12, 0.60))]
    cortex = canvas.polygons(bones + arms + carpals, 0.014)
    canvas.paint(cortex, 0.86, 0.95)
    marrow = canvas.strokes([([_along(ray[i], ray[i + 1], 0.16), _along(ray[i], ray[i + 1], 0.78)], 0.024)
                             for ray in [*rays, thumb] for i in range(len(ray) - 1)], 0.016)
    canvas.add(marrow, -0.30)
    canvas.pixels += canvas.texture(rng, 40) * cortex.weights * np.float32(0.03)
    if finding is not None:
        _hand_finding(canvas, finding, rays, place, cortex)


def _flesh(canvas: Canvas, rays: list, thumb: list, place) -> None:  # type: ignore[no-untyped-def,type-arg]
    tips = [([ray[1], _along(ray[3], ray[4], 1.16)], 0.17) for ray in rays]
    tips.append(([thumb[0], thumb[1], _along(thumb[2], thumb[3], 1.2)], 0.2))
    rounds = [[(x + 0.085 * math.cos(a / 2), y + 0.085 * math.sin(a / 2)) for a in range(13)]
              for x, y in [end[-1] for end, _ in tips]]
    palm = smooth([place(p) for p in ((-0.34, 0.0), (-0.10, -0.08), (0.12, -0.06), (0.36, 0.04), (0.36, 0.36), (0.27, 0.62),
                                      (0.28, 1.2), (-0.28, 1.2), (-0.26, 0.64), (-0.42, 0.36))])
    shape = canvas.polygons([palm, *rounds], 0.03)
    fingers = canvas.strokes(tips, 0.03)
    canvas.paint(Mask(shape.rows, shape.columns, np.maximum(shape.weights, fingers.weights)), 0.30)


def _hand_finding(canvas: Canvas, finding: Finding, rays: list, place, bones: Mask) -> None:  # type: ignore[no-untyped-def,type-arg]
    rng = np.random.default_rng(finding.seed)
    if finding.zone == "fingers":
        picked = [rays[i] for i in rng.permutation(4)[: finding.count].tolist()]
        sites = [(ray[1], ray[2], 0.5 + 0.1 * rng.random()) for ray in picked]
        width = 0.13
    else:
        sites = [(place((-0.12, 1.25)), place((-0.10, 0.66)), 0.70 + 0.06 * rng.random()),
                 (place((0.15, 1.25)), place((0.15, 0.68)), 0.70 + 0.06 * rng.random())][: finding.count]
        width = 0.28
    for a, b, t in sites:
        x, y = _along(a, b, t)
        if finding.kind == "cyst":
            radius = 0.050 if finding.zone == "fingers" else 0.085
            canvas.paint(canvas.ellipse(x, y, radius, radius, soft=0.03), 0.16, 0.95)
            continue
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = math.hypot(dx, dy)
        ux, uy = dx / length, dy / length
        tilt = 0.5 if rng.random() < 0.5 else -0.5
        ends = [(x + k * width * 0.55 * (-uy + tilt * ux), y + k * width * 0.55 * (ux + tilt * uy)) for k in (-1, 0, 1)]
        canvas.add(canvas.strokes([(ends, 0.034)], 0.012), -0.75, bones)
        canvas.pixels[:] = np.maximum(canvas.pixels, 0.05)
