"""The frontal phantom chest radiograph. See `phantoms` for the way in.

A scene draws its anatomy from `rng` alone, so that the same seed gives the same body with or without a finding. As
displayed, the patient's left is on the picture's right (x > 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from model.phantom_findings import Finding, spots
from model.phantom_shapes import Canvas, Mask, Points, blob, mirrored, smooth

Placing = Callable[[Points], list[tuple[float, float]]]

_LUNG = [
    (0.28, -0.70),
    (0.47, -0.62),
    (0.62, -0.36),
    (0.70, 0.0),
    (0.73, 0.46),
    (0.58, 0.38),
    (0.40, 0.31),
    (0.22, 0.38),
    (0.15, 0.10),
    (0.14, -0.25),
    (0.15, -0.55),
]
_TORSO = [
    (0.16, -1.1),
    (0.18, -0.90),
    (0.42, -0.80),
    (0.85, -0.66),
    (1.05, -0.45),
    (1.08, -0.1),
    (0.92, -0.02),
    (0.86, 0.30),
    (0.88, 1.15),
]
_NODULES = {"upper": [(0.35, -0.53), (0.55, -0.31), (0.34, -0.27)], "lower": [(0.60, 0.09), (0.54, 0.33), (0.50, 0.20)]}


def chest(canvas: Canvas, rng: np.random.Generator, finding: Finding | None) -> None:
    """A frontal chest radiograph. Findings: nodule, effusion, pneumonia; zones: upper, lower."""
    wide, tall = 0.97 + 0.06 * rng.random(), 0.97 + 0.06 * rng.random()

    def place(points: Points) -> list[tuple[float, float]]:
        return [(x * wide, y * tall) for x, y in points]

    torso = canvas.polygons([place(_TORSO) + mirrored(place(_TORSO))[::-1]], 0.05)
    canvas.paint(torso, 0.42)
    canvas.pixels += torso.weights * (canvas.ys[:, None] * np.float32(0.07) + np.float32(0.03))
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
            points = [
                (
                    sign * (0.16 + length * t * math.cos(angle + bend * t)),
                    -0.02 + length * t * math.sin(angle + bend * t),
                )
                for t in (0, 0.35, 0.7, 1)
            ]
            lines += [(points[:2], 0.035), (points[1:], 0.02)]
    canvas.add(canvas.strokes(lines, 0.03), 0.13, lungs)
    canvas.pixels += canvas.texture(rng, 20) * lungs.weights * np.float32(0.018)


def _ribs(canvas: Canvas, rng: np.random.Generator, torso: Mask, wide: float) -> None:
    back, front = [], []
    lift = 0.03 * (rng.random() - 0.5)
    for index in range(9):
        top = -0.78 + 0.155 * index + lift
        reach = (0.50, 0.60, 0.67, 0.72, 0.75, 0.77, 0.78, 0.79, 0.79)[index] * wide
        arc = [
            (0.06 + (reach - 0.06) * math.sin(1.571 * t), top - 0.07 * math.sin(3.1416 * t) + 0.26 * t**3)
            for t in (0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1)
        ]
        edge = [(reach, top + 0.26), (reach * 0.86, top + 0.38), (reach * 0.62, top + 0.47), (reach * 0.40, top + 0.50)]
        back += [(arc, 0.062), (mirrored(arc), 0.062)]
        if index < 6:
            front += [(edge, 0.05), (mirrored(edge), 0.05)]
    canvas.add(canvas.strokes(back, 0.014), 0.10, torso)
    canvas.add(canvas.strokes(front, 0.02), 0.055, torso)
    collar = smooth([(0.07, -0.60), (0.25, -0.63), (0.50, -0.74), (0.78, -0.72)], closed=False)
    canvas.add(canvas.strokes([(collar, 0.075), (mirrored(collar), 0.075)], 0.02), 0.17, torso)


def _chest_finding(canvas: Canvas, finding: Finding, lungs: Mask, place: Placing) -> None:
    large = finding.size == "large"
    if finding.kind == "nodule":
        radius = 0.115 if large else 0.058
        for x, y in place(spots(finding, _NODULES[finding.zone][: 2 if large else 3], 0.015)):
            canvas.paint(canvas.ellipse(x, y, radius, radius * 0.95, soft=0.04), 0.62, 0.95)
    elif finding.kind == "effusion":
        top = -0.18 if large else 0.14
        level = [
            (0.95, top - 0.06),
            (0.72, top),
            (0.60, top + 0.14),
            (0.40, top + 0.20),
            (0.10, top + 0.18),
            (0.10, 0.7),
            (0.95, 0.7),
        ]
        fluid = canvas.polygons([place([(finding.sign * x, y) for x, y in level])], 0.05)
        canvas.pixels += (np.float32(0.70) - canvas.pixels) * fluid.weights * lungs.weights
    else:
        rng = np.random.default_rng(finding.seed)
        x, y = place([(finding.sign * 0.43, -0.38) if finding.zone == "upper" else (finding.sign * 0.50, 0.17)])[0]
        scale = 1.25 if large else 0.75
        haze = canvas.polygons([blob(rng, x, y, 0.19 * scale, 0.17 * scale, 0.35)], 0.16)
        cloud = np.clip(canvas.texture(rng, 14) * np.float32(0.10) + np.float32(0.42), 0.15, 0.7)
        canvas.pixels += haze.weights * lungs.weights * cloud
