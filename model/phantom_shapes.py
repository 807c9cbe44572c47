"""Soft, anti-aliased shapes on a square float canvas: the pencil of the phantoms.

Coordinates run from -1 to 1 on both axes (x to the right, y down), levels from 0 (black) to 1 (white), so a scene
looks the same at every size. Only element-wise arithmetic touches the pixels, which keeps them equal from machine to
machine. It knows no anatomy (see `phantom_organs`) and no scanner (see `phantom_scanners`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Points = Sequence[tuple[float, float]]
_OVERSAMPLE = 2  # outlines are drawn this much larger, then averaged down; very soft ones need no such care
_VERY_SOFT = 0.05


class Mask(NamedTuple):
    """Weights 0..1, float32, of one window of the canvas."""

    rows: slice
    columns: slice
    weights: np.ndarray


def smooth(points: Points, steps: int = 6, closed: bool = True) -> list[tuple[float, float]]:
    """A Catmull-Rom curve through the points, `steps` segments between each two of them."""
    p = np.asarray(points, dtype=np.float64)
    if closed:
        p = np.concatenate([p[-1:], p, p[:2]])
    else:
        p = np.concatenate([p[:1], p, p[-1:]])
    a, b, c, d = p[:-3, None], p[1:-2, None], p[2:-1, None], p[3:, None]
    t = (np.arange(steps) / steps)[None, :, None]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t * t + (3 * b - a - 3 * c + d) * t * t * t)
    flat = curve.reshape(-1, 2).tolist()
    if not closed:
        flat.append(p[-1].tolist())
    return [(x, y) for x, y in flat]


def mirrored(points: Points) -> list[tuple[float, float]]:
    """The same points on the other side of the middle line."""
    return [(-x, y) for x, y in points]


def blob(
    rng: np.random.Generator,
    x: float,
    y: float,
    rx: float,
    ry: float,
    wobble: float = 0.1,
    turn: float = 0.0,
    corners: int = 9,
) -> list[tuple[float, float]]:
    """A rounded irregular outline about (x, y); `wobble` is how uneven its radius is; `turn` in radians."""
    radii = 1 + wobble * (2 * rng.random(corners) - 1)
    c, s = math.cos(turn), math.sin(turn)
    points = []
    for index, radius in enumerate(radii.tolist()):
        angle = 2 * math.pi * index / corners
        u, v = rx * radius * math.cos(angle), ry * radius * math.sin(angle)
        points.append((x + u * c - v * s, y + u * s + v * c))
    return smooth(points, 5)


class Canvas:
    """A (size, size) float32 picture, `pixels`, to paint on; `xs` and `ys` are its pixels' coordinates.

    `zoom` and `shift` place the drawing: a point p lands at p * zoom + shift.
    """

    def __init__(self, size: int, zoom: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> None:
        self.size, self.zoom, self.shift = size, zoom, shift
        self.pixels = np.zeros((size, size), dtype=np.float32)
        middles = (np.arange(size, dtype=np.float64) + 0.5) * 2 / size - 1
        self.xs, self.ys = (((middles - move) / zoom).astype(np.float32) for move in shift)

    def _window(self, centre: float, reach: float, move: float) -> slice:
        middle, reach = centre * self.zoom + move + 1, reach * self.zoom
        low = max(0, math.floor((middle - reach) * self.size / 2))
        high = min(self.size, math.ceil((middle + reach) * self.size / 2))
        return slice(low, max(low, high))

    def ellipse(self, x: float, y: float, rx: float, ry: float, turn: float = 0.0, soft: float = 0.03) -> Mask:
        """A filled ellipse with edges `soft` wide; `turn` in radians, clockwise on the screen."""
        reach = max(rx, ry) + soft
        rows, columns = self._window(y, reach, self.shift[1]), self._window(x, reach, self.shift[0])
        dx, dy = (self.xs[columns] - np.float32(x))[None, :], (self.ys[rows] - np.float32(y))[:, None]
        if turn:
            c, s = np.float32(math.cos(turn)), np.float32(math.sin(turn))
            dx, dy = dx * c + dy * s, dy * c - dx * s
        u, v = dx / np.float32(rx), dy / np.float32(ry)
        edge = np.float32(max(soft, 2.0 / self.size) / min(rx, ry))
        t = np.clip((1 - np.sqrt(u * u + v * v)) / edge + np.float32(0.5), 0, 1)
        return Mask(rows, columns, t * t * (3 - 2 * t))

    def polygons(self, outlines: Sequence[Points], soft: float = 0.02) -> Mask:
        """Filled outlines (their union), blurred by `soft`."""
        sheet, draw, scale = self._sheet(soft)
        for points in outlines:
            draw.polygon(self._placed(points, scale), fill=255)
        return self._mask(sheet, soft)

    def strokes(self, lines: Sequence[tuple[Points, float]], soft: float = 0.01) -> Mask:
        """Lines of the given widths (their union), blurred by `soft`."""
        sheet, draw, scale = self._sheet(soft)
        for points, width in lines:
            draw.line(self._placed(points, scale), fill=255, width=max(1, round(width * self.zoom * scale)))
        return self._mask(sheet, soft)

    def _placed(self, points: Points, scale: float) -> list[tuple[float, float]]:
        (right, down), zoom = self.shift, self.zoom
        return [((x * zoom + right + 1) * scale, (y * zoom + down + 1) * scale) for x, y in points]

    def _sheet(self, soft: float) -> tuple[Image.Image, ImageDraw.ImageDraw, float]:
        side = self.size * (1 if soft >= _VERY_SOFT else _OVERSAMPLE)
        sheet = Image.new("L", (side, side))
        return sheet, ImageDraw.Draw(sheet), side / 2

    def _mask(self, sheet: Image.Image, soft: float) -> Mask:
        small = sheet if sheet.width == self.size else sheet.reduce(_OVERSAMPLE)
        radius = soft * self.size / 4
        if radius > 0.25:
            small = small.filter(ImageFilter.BoxBlur(radius)).filter(ImageFilter.BoxBlur(radius))
        whole = slice(0, self.size)
        return Mask(whole, whole, np.asarray(small, dtype=np.float32) * np.float32(1 / 255))

    def paint(self, mask: Mask, level: float, opacity: float = 1.0) -> None:
        """Moves the pixels under the mask towards `level`."""
        view = self.pixels[mask.rows, mask.columns]
        view += (np.float32(level) - view) * (mask.weights * np.float32(opacity))

    def add(self, mask: Mask, amount: float, within: Mask | None = None) -> None:
        """Adds `amount` under the mask (and, given `within` a whole-canvas mask, only there)."""
        weights = mask.weights if within is None else mask.weights * within.weights[mask.rows, mask.columns]
        self.pixels[mask.rows, mask.columns] += weights * np.float32(amount)

    def texture(self, rng: np.random.Generator, cells: int) -> np.ndarray:
        """A smooth random field, about -2..2, (size, size) float32, of `cells` bumps along each side."""
        coarse = rng.standard_normal((cells, cells), dtype=np.float32)
        image = Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(image, dtype=np.float32)
