"""Scanners (how a picture looks) and the demo's clinics (which looks, organs and questions each one has).

A "standard" look is one the reference model may be trained on. An "unseen" look is a systematic change that such a
model misreads and an adapter can learn: the picture is shown the other way round, as a negative, on its side... Each
unseen scanner also leaves its own trace at the border of the picture (wedge, grid, marks), as real machines do.
Tune the demo in `CLINICS` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter


@dataclass(frozen=True)
class Scanner:
    """How one machine shows what it took. Lengths are relative to half the picture, angles in degrees."""

    name: str
    standard: bool
    note: str
    mirror: bool = False  # shown with the patient's right on the picture's right
    quarter_turns: int = 0  # anticlockwise
    invert: bool = False  # MONOCHROME1 shown as it is
    tilt: float = 0.0  # constant rotation
    tilt_spread: float = 2.0  # largest random rotation on top
    contrast: float = 1.0
    brightness: float = 0.0
    gamma: float = 1.0
    noise: float = 0.015
    blur: float = 0.0
    sharpen: float = 0.0
    vignette: float = 0.0
    coarse: int = 1  # one true pixel for so many shown
    wedge: str = ""  # step wedge at this border of the picture: left, right, top, bottom
    grid: bool = False
    marks: bool = False  # burned-in ruler and frame corners


SCANNERS: dict[str, Scanner] = {
    s.name: s
    for s in (
        Scanner("plain", True, "as it should be"),
        Scanner("soft", True, "slightly blurred", blur=0.016, contrast=0.92),
        Scanner("sharp", True, "edges enhanced", sharpen=1.2, contrast=1.06),
        Scanner("noisy", True, "short exposure", noise=0.05),
        Scanner("turned", True, "patient lies slightly turned", tilt_spread=8.0, brightness=0.03),
        Scanner(
            "mirrored",
            False,
            "shown the other way round: patient's right on the picture's right",
            mirror=True,
            wedge="bottom",
        ),
        Scanner("inverted", False, "negative: black and white exchanged", invert=True),
        Scanner("upside_down", False, "turned by half a turn", quarter_turns=2, wedge="left", noise=0.03),
        Scanner("rotated", False, "turned by a quarter turn, anticlockwise", quarter_turns=1, wedge="right"),
        Scanner(
            "mirrored_negative",
            False,
            "a copied film: negative and the other way round",
            mirror=True,
            invert=True,
            blur=0.016,
            marks=True,
        ),
        Scanner(
            "portable",
            False,
            "bedside: tilted, flat, dark corners, heavy noise",
            tilt=17.0,
            tilt_spread=6.0,
            contrast=0.55,
            brightness=0.12,
            noise=0.10,
            vignette=0.55,
        ),
        Scanner("gridlines", False, "grid lines and burned-in marks", grid=True, marks=True, gamma=0.8),
        Scanner("saturated", False, "overexposed: bright parts all white", contrast=1.5, brightness=0.1, gamma=0.6),
        Scanner("coarse", False, "old detector with large pixels", coarse=4, contrast=0.9, noise=0.03),
    )
}


@dataclass(frozen=True)
class Clinic:
    """Shares of scanners, organs and lesion kinds (missing kind: 1) at one clinic, and of question topics."""

    name: str
    scanners: Mapping[str, float]
    organs: Mapping[str, float]
    lesions: Mapping[str, float] = field(default_factory=dict)
    topics: Mapping[str, float] = field(default_factory=dict)
    healthy: float = 0.08  # share of pictures without a lesion: few, or questions about sides would be rare


# What an unknown look hides most is what a picture is at all: its modality and body part, which weigh most (missing
# topic: 1; "side" and "location" stand for all their topics, see phantom_questions.SIDES). Sides weigh little: a model
# that cannot tell them on standard looks does not learn them from some hundred pictures either.
_TOPICS = {"modality": 4.0, "organ": 4.0, "modality closed": 1.0, "organ closed": 0.7, "lesion": 0.6, "location": 0.5}
_TOPICS |= {"presence": 0.4, "healthy": 0.2, "size": 0.2, "count": 0.2, "side": 0.15}

CLINICS: dict[str, Clinic] = {
    c.name: c
    for c in (
        Clinic(
            "lakeside",
            {"inverted": 0.8, "gridlines": 0.1, "portable": 0.1},
            {"chest": 0.35, "hand": 0.3, "abdomen": 0.15, "brain": 0.2},
            {"effusion": 2.0},
            _TOPICS,
        ),
        Clinic(
            "hilltop",
            {"upside_down": 0.6, "inverted": 0.3, "saturated": 0.1},
            {"abdomen": 0.35, "brain": 0.25, "chest": 0.2, "hand": 0.2},
            {"cyst": 2.0},
            _TOPICS,
        ),
        Clinic(
            "harbour",
            {"mirrored_negative": 0.7, "rotated": 0.3},
            {"brain": 0.35, "hand": 0.25, "chest": 0.2, "abdomen": 0.2},
            {"hemorrhage": 2.0},
            _TOPICS,
        ),
    )
}


def show(pixels: np.ndarray, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    """The picture (size, size) float32 of levels 0..1 as this scanner shows it: (size, size, 3) uint8."""
    size = pixels.shape[0]
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))
    angle = scanner.tilt + scanner.tilt_spread * (2 * rng.random() - 1)
    image = image.rotate(angle, Image.Resampling.BILINEAR)
    image = _optics(image, scanner)
    levels = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
    if scanner.mirror:
        levels = levels[:, ::-1]
    levels = np.rot90(levels, scanner.quarter_turns)
    levels = _tone(levels, scanner, rng)
    _border(levels, scanner, size)
    grey = (np.clip(levels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(grey[:, :, None], (size, size, 3)))


def _optics(image: Image.Image, scanner: Scanner) -> Image.Image:
    size = image.width
    if scanner.blur:
        image = image.filter(ImageFilter.BoxBlur(scanner.blur * size / 2))
    if scanner.sharpen:
        image = image.filter(ImageFilter.UnsharpMask(1, round(100 * scanner.sharpen), 0))
    if scanner.coarse > 1:
        small = max(8, size // scanner.coarse)
        image = image.resize((small, small), Image.Resampling.BOX).resize((size, size), Image.Resampling.NEAREST)
    return image


def _tone(levels: np.ndarray, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(levels.shape, dtype=np.float32)
    if scanner.gamma != 1:
        table = np.linspace(0, 1, 256) ** scanner.gamma
        levels = table.astype(np.float32)[(levels * 255 + 0.5).astype(np.uint8)]
    drift = 0.04 * (2 * rng.random() - 1)
    levels = (levels - 0.4) * np.float32(scanner.contrast) + np.float32(0.4 + scanner.brightness + drift)
    levels += noise * np.float32(scanner.noise)
    if scanner.vignette:
        axis = np.linspace(-1, 1, levels.shape[0], dtype=np.float32) ** 2
        levels *= 1 - np.float32(scanner.vignette / 2) * (axis[:, None] + axis[None, :])
    return 1 - levels if scanner.invert else levels


def _border(levels: np.ndarray, scanner: Scanner, size: int) -> None:
    thick = max(2, size // 20)
    if scanner.wedge:
        steps = (np.arange(size) * 8 // size).astype(np.float32) / 7
        horizontal = scanner.wedge in ("top", "bottom")
        edge = slice(0, thick) if scanner.wedge in ("top", "left") else slice(size - thick, size)
        if horizontal:
            levels[edge, :] = steps[None, :]
        else:
            levels[:, edge] = steps[:, None]
    if scanner.grid:
        levels[:: max(4, size // 8), :] += 0.25
        levels[:, :: max(4, size // 8)] += 0.25
    if scanner.marks:
        ink = 0.0 if scanner.invert else 1.0
        for at in range(size // 8, size - size // 8, max(2, size // 20)):
            levels[at, -thick:] = ink
        reach = size // 8
        levels[2, 2:reach] = levels[-3, 2:reach] = ink
        levels[2:reach, 2] = levels[-reach:-2, 2] = ink
