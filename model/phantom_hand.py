"""The phantom radiograph of a hand. See `phantoms` for the way in.

Seen from its back, fingers up: the thumb of a right hand points to the picture's left. The anatomy comes from `rng`
alone, so that the same seed gives the same hand with or without a finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from model.phantom_findings import Finding
from model.phantom_shapes import Canvas, Mask, blob, smooth

Point = tuple[float, float]
Ray = list[Point]

_TIPS = ((-0.40, -0.64), (-0.13, -0.83), (0.14, -0.75), (0.36, -0.50))  # index, middle, ring, little of a right hand
_KNUCKLES = ((-0.30, -0.02), (-0.09, -0.08), (0.11, -0.04), (0.29, 0.05))
_BASES = ((-0.16, 0.40), (-0.04, 0.38), (0.08, 0.39), (0.19, 0.42))
_THUMB = ((-0.25, 0.44), (-0.48, 0.20), (-0.64, 0.0), (-0.72, -0.18))
_FOREARM = (((-0.12, 1.25), (-0.10, 0.66)), ((0.15, 1.25), (0.15, 0.68)))
_CARPALS = ((-0.19, 0.50), (-0.06, 0.48), (0.06, 0.47), (0.17, 0.50), (-0.13, 0.60), (0.0, 0.59), (0.12, 0.60))
_PALM = (
    (-0.34, 0.0),
    (-0.10, -0.08),
    (0.12, -0.06),
    (0.36, 0.04),
    (0.36, 0.36),
    (0.27, 0.62),
    (0.28, 1.2),
    (-0.28, 1.2),
    (-0.26, 0.64),
    (-0.42, 0.36),
)


def _along(a: Point, b: Point, t: float) -> Point:
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t


def _bone(a: Point, b: Point, width: float) -> Ray:
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

    def place(point: Point) -> Point:
        return sign * point[0] * size * spread, point[1] * size + 0.03

    rays = []
    for tip, knuckle, base in zip(_TIPS, _KNUCKLES, _BASES, strict=True):
        end = (tip[0] + 0.05 * (rng.random() - 0.5), tip[1] + 0.05 * (rng.random() - 0.5))
        rays.append([place(p) for p in (base, knuckle, _along(knuckle, end, 0.46), _along(knuckle, end, 0.75), end)])
    thumb = [place(p) for p in _THUMB]
    forearm = [(place(elbow), place(wrist)) for elbow, wrist in _FOREARM]
    _flesh(canvas, rays, thumb, place)
    carpals = [blob(rng, *place(p), 0.075, 0.068, 0.15) for p in _CARPALS]
    cortex = canvas.polygons([*_bones(rays, thumb, forearm), *carpals], 0.014)
    canvas.paint(cortex, 0.86, 0.95)
    hollow = [
        ([_along(ray[i], ray[i + 1], 0.16), _along(ray[i], ray[i + 1], 0.78)], 0.024)
        for ray in [*rays, thumb]
        for i in range(len(ray) - 1)
    ]
    canvas.add(canvas.strokes(hollow, 0.016), -0.30)
    canvas.pixels += canvas.texture(rng, 40) * cortex.weights * np.float32(0.03)
    if finding is not None:
        _finding(canvas, finding, rays, forearm, cortex)


def _bones(rays: list[Ray], thumb: Ray, forearm: list[tuple[Point, Point]]) -> list[Ray]:
    bones = []
    for ray, widths in [*((ray, (0.125, 0.115, 0.10, 0.085)) for ray in rays), (thumb, (0.14, 0.125, 0.10))]:
        bones += [_bone(ray[i], _along(ray[i], ray[i + 1], 0.94), width) for i, width in enumerate(widths)]
    return bones + [_bone(*ends, width) for ends, width in zip(forearm, (0.27, 0.17), strict=True)]


def _flesh(canvas: Canvas, rays: list[Ray], thumb: Ray, place: Callable[[Point], Point]) -> None:
    tips = [([ray[1], _along(ray[3], ray[4], 1.16)], 0.17) for ray in rays]
    tips.append(([thumb[0], thumb[1], _along(thumb[2], thumb[3], 1.2)], 0.2))
    rounds = []
    for line, _ in tips:
        x, y = line[-1]
        rounds.append([(x + 0.085 * math.cos(a / 2), y + 0.085 * math.sin(a / 2)) for a in range(13)])
    shape = canvas.polygons([smooth([place(p) for p in _PALM]), *rounds], 0.03)
    fingers = canvas.strokes(tips, 0.03)
    canvas.paint(Mask(shape.rows, shape.columns, np.maximum(shape.weights, fingers.weights)), 0.30)


def _finding(
    canvas: Canvas, finding: Finding, rays: list[Ray], forearm: list[tuple[Point, Point]], bones: Mask
) -> None:
    rng = np.random.default_rng(finding.seed)
    fingers = finding.zone == "fingers"
    if fingers:
        picked = [rays[i] for i in rng.permutation(4)[: finding.count].tolist()]
        sites = [(ray[1], ray[2], 0.5 + 0.1 * rng.random()) for ray in picked]
    else:
        sites = [(elbow, wrist, 0.70 + 0.06 * rng.random()) for elbow, wrist in forearm[: finding.count]]
    for a, b, t in sites:
        x, y = _along(a, b, t)
        if finding.kind == "cyst":
            radius = 0.050 if fingers else 0.085
            canvas.paint(canvas.ellipse(x, y, radius, radius, soft=0.03), 0.16, 0.95)
            continue
        length = math.hypot(b[0] - a[0], b[1] - a[1])
        ux, uy = (b[0] - a[0]) / length, (b[1] - a[1]) / length
        reach, tilt = 0.075 if fingers else 0.155, 0.5 if rng.random() < 0.5 else -0.5
        line = [(x + k * reach * (tilt * ux - uy), y + k * reach * (ux + tilt * uy)) for k in (-1, 0, 1)]
        gap = canvas.strokes([(line, 0.034)], 0.012)
        canvas.paint(Mask(gap.rows, gap.columns, gap.weights * bones.weights), 0.10)
