"""Axial phantom slices of the trunk: chest CT, abdomen CT and MRI (head: `phantom_head`). Way in: `phantoms`.

As displayed in radiology: seen from the feet, front of the body up, the patient's left on the picture's right (x > 0),
so the liver is on the picture's left. A scene draws its anatomy from `rng` alone: same seed, same body, with or
without a finding.
"""

from __future__ import annotations

import math

import numpy as np

from model.phantom_findings import Finding, spots
from model.phantom_shapes import Canvas, Mask, Points, blob, mirrored, smooth

_TISSUES = {  # level of each tissue in each look
    "CT": {
        "fat": 0.24,
        "muscle": 0.46,
        "bone": 0.95,
        "marrow": 0.72,
        "liver": 0.58,
        "spleen": 0.60,
        "kidney": 0.66,
        "pelvis": 0.50,
        "vessel": 0.68,
        "bowel": 0.44,
        "air": 0.02,
        "fluid": 0.36,
        "cord": 0.45,
        "cyst": 0.27,
        "mass": 0.80,
        "stone": 1.0,
    },
    "MRI": {
        "fat": 0.80,
        "muscle": 0.20,
        "bone": 0.06,
        "marrow": 0.48,
        "liver": 0.34,
        "spleen": 0.52,
        "kidney": 0.60,
        "pelvis": 0.85,
        "vessel": 0.05,
        "bowel": 0.42,
        "air": 0.02,
        "fluid": 0.9,
        "cord": 0.92,
        "cyst": 1.0,
        "mass": 0.80,
        "stone": 0.0,
    },
}
_LUNG = [
    (0.10, -0.40),
    (0.30, -0.46),
    (0.55, -0.36),
    (0.71, -0.05),
    (0.68, 0.26),
    (0.48, 0.46),
    (0.24, 0.46),
    (0.16, 0.22),
    (0.14, 0.0),
]


def _turned(points: Points, rng: np.random.Generator, amount: float = 0.03) -> list[tuple[float, float]]:
    jitter = (amount * (2 * rng.random((len(points), 2)) - 1)).tolist()
    return smooth([(x + dx, y + dy) for (x, y), (dx, dy) in zip(points, jitter, strict=True)], 5)


def _trunk(canvas: Canvas, rng: np.random.Generator, tissue: dict[str, float], wide: float, deep: float) -> Mask:
    """Skin, fat, muscle wall, vertebra with its canal; returns the inside of the wall."""
    fat = 0.05 + 0.04 * rng.random()
    outer = [
        (0, -deep),
        (wide * 0.62, -deep * 0.92),
        (wide, -0.02),
        (wide * 0.87, deep * 0.70),
        (wide * 0.42, deep * 1.14),
        (0, deep * 1.10),
    ]
    outer = smooth(outer + mirrored(outer[1:-1])[::-1], 6)
    canvas.paint(canvas.polygons([outer], 0.02), tissue["fat"])
    wall = canvas.polygons([[(x * (1 - fat / wide), y * (1 - fat / deep)) for x, y in outer]], 0.02)
    canvas.paint(wall, tissue["muscle"])
    return wall


def _spine(canvas: Canvas, tissue: dict[str, float], y: float) -> None:
    for sign in (-1, 1):
        canvas.paint(canvas.ellipse(sign * 0.24, y + 0.16, 0.15, 0.11, sign * 0.3, 0.03), tissue["muscle"], 0.8)
    arch: list[tuple[Points, float]] = [
        ([(-0.20, y + 0.14), (-0.10, y + 0.15), (0, y + 0.24), (0.10, y + 0.15), (0.20, y + 0.14)], 0.055),
        ([(0, y + 0.22), (0, y + 0.31)], 0.05),
    ]
    canvas.paint(canvas.strokes(arch, 0.015), tissue["bone"])
    canvas.paint(canvas.ellipse(0, y, 0.155, 0.125, soft=0.02), tissue["bone"])
    canvas.paint(canvas.ellipse(0, y, 0.130, 0.100, soft=0.03), tissue["marrow"])
    canvas.paint(canvas.ellipse(0, y + 0.135, 0.07, 0.05, soft=0.02), tissue["cord"])


def _ring_of_ribs(canvas: Canvas, tissue: dict[str, float], wide: float, deep: float, at: float) -> None:
    parts = []
    for index in range(12):
        angle = 2 * math.pi * (index + 0.5 + at) / 12
        arc = [(wide * math.cos(angle + d), deep * math.sin(angle + d)) for d in (-0.10, 0.0, 0.10)]
        parts.append((arc, 0.055))
    canvas.paint(canvas.strokes(parts, 0.015), tissue["bone"], 0.9)


def chest(canvas: Canvas, rng: np.random.Generator, finding: Finding | None) -> None:
    """An axial chest CT. Findings: nodule, effusion, pneumonia; zones: front, back."""
    tissue = _TISSUES["CT"]
    _trunk(canvas, rng, tissue, 0.90 + 0.05 * rng.random(), 0.66 + 0.05 * rng.random())
    lung = _turned(_LUNG, rng, 0.02)
    lungs = canvas.polygons([lung, mirrored(_turned(_LUNG, rng, 0.02))], 0.02)
    canvas.paint(lungs, 0.05)
    _lung_vessels(canvas, rng, lungs)
    if finding is not None:
        _chest_finding(canvas, finding, lungs)
    canvas.paint(canvas.polygons([blob(rng, 0.16, -0.06, 0.31, 0.25, 0.05, 0.6)], 0.02), 0.52)
    canvas.paint(canvas.ellipse(0.04, -0.16, 0.13, 0.12, soft=0.05), 0.62, 0.7)
    canvas.paint(canvas.ellipse(0.25, -0.02, 0.16, 0.12, 0.6, 0.06), 0.66, 0.7)
    canvas.paint(canvas.ellipse(0.13, 0.26, 0.085, 0.085, soft=0.02), tissue["vessel"])
    canvas.paint(canvas.ellipse(0.02, 0.20, 0.04, 0.035, soft=0.02), 0.3)
    _ring_of_ribs(canvas, tissue, 0.79, 0.56, rng.random())
    canvas.paint(canvas.ellipse(0, -0.54, 0.13, 0.035, soft=0.02), tissue["bone"])
    _spine(canvas, tissue, 0.39)


def _chest_finding(canvas: Canvas, finding: Finding, lungs: Mask) -> None:
    large = finding.size == "large"
    front = finding.zone == "front"
    if finding.kind == "nodule":
        radius = 0.105 if large else 0.055
        centres = [(0.61, -0.10), (0.47, -0.31), (0.34, -0.40)] if front else [(0.34, 0.34), (0.54, 0.19), (0.52, 0.36)]
        for x, y in spots(finding, centres[:2] if large else centres, 0.02):
            canvas.paint(canvas.ellipse(x, y, radius, radius, soft=0.03), 0.62)
    elif finding.kind == "effusion":
        top = 0.04 if large else 0.20
        crescent = [(0.86, top - 0.04), (0.66, top), (0.45, top + 0.07), (0.10, top + 0.14), (0.10, 0.6), (0.86, 0.6)]
        fluid = canvas.polygons([[(finding.sign * x, y) for x, y in crescent]], 0.03)
        canvas.pixels += (np.float32(0.40) - canvas.pixels) * fluid.weights * lungs.weights
    else:
        own = np.random.default_rng(finding.seed)
        scale = 1.2 if large else 0.75
        haze = canvas.polygons(
            [blob(own, finding.sign * 0.48, -0.20 if front else 0.25, 0.18 * scale, 0.17 * scale, 0.35)], 0.10
        )
        cloud = np.clip(canvas.texture(own, 20) * np.float32(0.12) + np.float32(0.42), 0.1, 0.7)
        canvas.pixels += haze.weights * lungs.weights * cloud


def _lung_vessels(canvas: Canvas, rng: np.random.Generator, lungs: Mask) -> None:
    lines: list[tuple[Points, float]] = []
    for sign in (-1, 1):
        for _ in range(8):
            angle, length = math.pi * (rng.random() - 0.5), 0.25 + 0.25 * rng.random()
            near, drop = 0.18 + 0.14 * rng.random(), 0.14 * (rng.random() - 0.3)
            ends = [
                (sign * (near + t * length * math.cos(angle)), drop + t * length * math.sin(angle)) for t in (0, 0.5, 1)
            ]
            lines += [(ends[:2], 0.028), (ends[1:], 0.015)]
    canvas.add(canvas.strokes(lines, 0.015), 0.28, lungs)


_LIVER = [
    (-0.06, -0.40),
    (-0.30, -0.50),
    (-0.58, -0.40),
    (-0.76, -0.10),
    (-0.74, 0.22),
    (-0.56, 0.36),
    (-0.42, 0.16),
    (-0.26, 0.0),
    (-0.06, -0.12),
    (0.10, -0.30),
]
_SPLEEN = [(0.60, -0.12), (0.74, -0.02), (0.77, 0.20), (0.66, 0.42), (0.52, 0.44), (0.54, 0.18)]
_SITES = {
    ("liver", "right"): [(0.56, -0.20), (0.28, -0.30), (0.62, 0.08)],
    ("spleen", "left"): [(0.645, 0.16)],
    ("kidney", "left"): [(0.36, 0.28)],
    ("kidney", "right"): [(0.36, 0.28)],
}


def abdomen(canvas: Canvas, rng: np.random.Generator, finding: Finding | None, modality: str) -> None:
    """An axial slice at the kidneys, CT or MRI. Findings: cyst, mass, stone; zones: liver, spleen, kidney."""
    tissue = _TISSUES[modality]
    _trunk(canvas, rng, tissue, 0.90 + 0.05 * rng.random(), 0.66 + 0.06 * rng.random())
    canvas.paint(canvas.polygons([blob(rng, 0, -0.02, 0.78, 0.52, 0.02, corners=14)], 0.02), tissue["fat"], 0.85)
    if modality == "CT":
        _ring_of_ribs(canvas, tissue, 0.82, 0.57, rng.random())
    canvas.paint(canvas.polygons([_turned(_LIVER, rng, 0.02)], 0.02), tissue["liver"])
    canvas.paint(canvas.polygons([_turned(_SPLEEN, rng, 0.015)], 0.02), tissue["spleen"])
    stomach = canvas.polygons([blob(rng, 0.36, -0.24, 0.25, 0.19, 0.10, 0.3)], 0.02)
    canvas.paint(stomach, tissue["bowel"])
    canvas.add(canvas.ellipse(0.36, -0.34, 0.17, 0.06, soft=0.03), tissue["air"] - tissue["bowel"], stomach)
    loops = [blob(rng, x, y, 0.085, 0.07, 0.15) for x, y in ((0.10, 0.02), (0.26, 0.06), (0.48, 0.02), (-0.10, 0.03))]
    canvas.paint(canvas.polygons(loops, 0.02), tissue["bowel"], 0.9)
    canvas.paint(canvas.ellipse(0.06, 0.13, 0.055, 0.055, soft=0.02), tissue["vessel"])
    canvas.paint(canvas.ellipse(-0.10, 0.14, 0.06, 0.045, soft=0.02), tissue["vessel"])
    for sign in (-1, 1):
        tall = 0.16 + 0.02 * rng.random()
        canvas.paint(canvas.ellipse(sign * 0.37, 0.29, 0.13, tall, -sign * 0.5, 0.025), tissue["kidney"])
        canvas.paint(canvas.ellipse(sign * 0.30, 0.28, 0.055, 0.08, -sign * 0.5, 0.04), tissue["pelvis"])
    _spine(canvas, tissue, 0.30)
    organs = canvas.texture(rng, 30)
    canvas.pixels += organs * np.float32(0.012 if modality == "CT" else 0.02) * (canvas.pixels > 0.1)
    if finding is not None:
        _abdomen_finding(canvas, finding, tissue)
    if modality == "MRI":
        coil(canvas, rng)


def _abdomen_finding(canvas: Canvas, finding: Finding, tissue: dict[str, float]) -> None:
    large = finding.size == "large"
    own = np.random.default_rng(finding.seed)
    radius = 0.105 if large else 0.055
    centres = _SITES[finding.zone, finding.side]
    if finding.kind == "stone":
        x, y = spots(finding, centres, 0.01)[0]
        canvas.paint(
            canvas.ellipse(x - finding.sign * 0.05, y, 0.06 if large else 0.037, 0.055 if large else 0.034, soft=0.015),
            tissue["stone"],
        )
        return
    for x, y in spots(finding, centres[:2] if large else centres, 0.02):
        if finding.kind == "cyst":
            canvas.paint(canvas.ellipse(x, y, radius, radius, soft=0.02), tissue["cyst"], 0.97)
        else:
            canvas.paint(canvas.polygons([blob(own, x, y, radius * 1.25, radius * 1.05, 0.30)], 0.03), tissue["mass"])
            canvas.paint(canvas.ellipse(x, y, radius * 0.4, radius * 0.35, soft=0.06), tissue["liver"], 0.5)


def coil(canvas: Canvas, rng: np.random.Generator) -> None:
    """The uneven brightness of a surface coil."""
    slope = np.float32(0.14 * (2 * rng.random() - 1))
    canvas.pixels *= 1 + slope * canvas.ys[:, None] - np.float32(0.08) * canvas.xs[None, :] ** 2
