"""Axial phantom slices of the head at the ventricles, CT and T2-weighted MRI. See `phantoms` for the way in.

Displayed like `phantom_axial`: forehead up, the patient's left on the picture's right (x > 0).
"""

from __future__ import annotations

import math

import numpy as np

from model.phantom_axial import coil
from model.phantom_findings import Finding, spots
from model.phantom_shapes import Canvas, Mask, Points, blob, smooth

_BRAIN = {
    "CT": {
        "scalp": 0.40,
        "skull": 1.0,
        "rim": 0.36,
        "grey": 0.50,
        "white": 0.44,
        "fluid": 0.22,
        "hemorrhage": 0.82,
        "infarct": 0.27,
        "mass": 0.64,
        "edema": 0.34,
    },
    "MRI": {
        "scalp": 0.72,
        "skull": 0.05,
        "rim": 0.85,
        "grey": 0.55,
        "white": 0.36,
        "fluid": 0.95,
        "hemorrhage": 0.08,
        "infarct": 0.80,
        "mass": 0.62,
        "edema": 0.84,
    },
}


def brain(canvas: Canvas, rng: np.random.Generator, finding: Finding | None, modality: str) -> None:
    """A head slice at the ventricles, CT or T2 MRI. Findings: hemorrhage, infarct, mass; zones: front, back."""
    level = _BRAIN[modality]
    wide, deep = 0.68 + 0.04 * rng.random(), 0.86 + 0.04 * rng.random()
    for grow, name, soft in ((1.07, "scalp", 0.02), (1.03, "skull", 0.015), (0.945, "rim", 0.015)):
        canvas.paint(canvas.ellipse(0, 0, wide * grow, deep * grow, soft=soft), level[name])
    inside = canvas.polygons([blob(rng, 0, 0, wide * 0.92, deep * 0.925, 0.012, corners=24)], 0.015)
    canvas.paint(inside, level["grey"])
    _folds(canvas, rng, wide, deep, level, inside)
    canvas.paint(
        canvas.strokes([([(0, -deep * 0.92), (0, -0.38)], 0.018), ([(0, 0.42), (0, deep * 0.92)], 0.018)], 0.012),
        0.62 if modality == "CT" else 0.8,
        0.8,
    )
    for sign in (-1, 1):
        canvas.paint(canvas.ellipse(sign * 0.21, -0.02, 0.085, 0.15, sign * 0.35, 0.03), level["grey"])
        canvas.paint(canvas.ellipse(sign * 0.12, 0.10, 0.09, 0.07, 0, 0.03), level["grey"])
    grow = 0.85 + 0.35 * rng.random()
    horn = [(0.02, -0.10), (0.03, -0.27), (0.13, -0.37), (0.17, -0.32), (0.09, -0.20), (0.06, -0.06)]
    tail = [(0.10, 0.24), (0.17, 0.30), (0.24, 0.44), (0.20, 0.46), (0.12, 0.36)]
    parts = [smooth([(s * x * grow, y * grow) for x, y in p], 4) for p in (horn, tail) for s in (-1, 1)]
    canvas.paint(
        canvas.polygons([*parts, [(-0.012, -0.02), (0.012, -0.02), (0.012, 0.16), (-0.012, 0.16)]], 0.02),
        level["fluid"],
    )
    if finding is not None:
        _brain_finding(canvas, finding, level, inside)
    if modality == "MRI":
        coil(canvas, rng)


def _folds(
    canvas: Canvas, rng: np.random.Generator, wide: float, deep: float, level: dict[str, float], inside: Mask
) -> None:
    white, furrows = [], []
    turns = 26
    phase = rng.random()
    for index in range(turns * 2):
        angle = math.pi * (index + phase) / turns
        reach = (0.82 if index % 2 else 0.66) + 0.06 * rng.random()
        white.append((wide * reach * math.cos(angle), deep * reach * math.sin(angle)))
        if index % 2 == 0:
            bend = 0.06 * (rng.random() - 0.5)
            furrows.append(
                (
                    [
                        (wide * r * math.cos(angle + b), deep * r * math.sin(angle + b))
                        for r, b in ((0.94, 0), (0.86, bend), (0.75 + 0.05 * rng.random(), bend))
                    ],
                    0.016,
                )
            )
    canvas.paint(canvas.polygons([smooth(white, 3)], 0.02), level["white"])
    canvas.add(canvas.strokes(furrows, 0.012), (level["fluid"] - level["grey"]) * 0.75, inside)


def _brain_finding(canvas: Canvas, finding: Finding, level: dict[str, float], inside: Mask) -> None:
    large = finding.size == "large"
    own = np.random.default_rng(finding.seed)
    radius = 0.155 if large else 0.08
    x, y = spots(finding, [(0.36, -0.38)] if finding.zone == "front" else [(0.36, 0.40)], 0.03)[0]

    def halo(outline: Points, soft: float, opacity: float) -> None:
        area = canvas.polygons([outline], soft)
        canvas.paint(Mask(area.rows, area.columns, area.weights * inside.weights), level["edema"], opacity)

    if finding.kind == "hemorrhage":
        halo(blob(own, x, y, radius * 1.35, radius * 1.2, 0.2), 0.05, 0.8)
        canvas.paint(canvas.polygons([blob(own, x, y, radius, radius * 0.85, 0.2)], 0.02), level["hemorrhage"])
    elif finding.kind == "infarct":
        wedge = [
            (x * 0.5, y * 0.55),
            (x + finding.sign * radius * 1.3, y - radius * 1.1),
            (x + finding.sign * radius * 1.5, y + radius),
            (x, y + radius * 1.2),
        ]
        area = canvas.polygons([smooth(wedge, 5)], 0.04)
        canvas.pixels += (
            (np.float32(level["infarct"]) - canvas.pixels) * area.weights * inside.weights * np.float32(0.95)
        )
    else:
        halo(blob(own, x, y, radius * 1.5, radius * 1.35, 0.25), 0.06, 0.85)
        ring = canvas.polygons([blob(own, x, y, radius, radius, 0.12)], 0.02)
        canvas.paint(ring, level["mass"])
        canvas.paint(canvas.ellipse(x, y, radius * 0.55, radius * 0.5, soft=0.04), level["fluid"], 0.8)
