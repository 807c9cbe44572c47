"""Pixel values of a picture for a vision tower, and the tokenizer, both without PyTorch.

Does what the processors of CLIP, SigLIP and LLaVA do with the settings in processor_config.json (or the older
preprocessor_config.json): pad to a square in the mean colour, resize, cut the centre, scale, normalize. `load` gives
None where a folder's settings ask for anything else, so that the caller can use transformers' own classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_KINDS = ("SiglipImageProcessor", "CLIPImageProcessor", "LlavaImageProcessor")
_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


@dataclass(frozen=True)
class Pixels:
    """How a picture becomes pixel values; `size` is (height, width), or the shorter side alone."""

    size: tuple[int, ...]
    resample: int
    crop: tuple[int, int] | None
    pad: bool
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(3, height, width) float32 of an RGB uint8 picture (height, width, 3)."""
        from PIL import Image

        if self.pad:
            image = _square(image, [int(part * 255) for part in self.mean])
        height, width = self._target(*image.shape[:2])
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(self.resample)))
        if self.crop:
            top, left = (resized.shape[0] - self.crop[0]) // 2, (resized.shape[1] - self.crop[1]) // 2
            resized = resized[top : top + self.crop[0], left : left + self.crop[1]]
        scaled = (resized.astype(np.float64) * self.scale).astype(np.float32)
        normal = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if len(self.size) == 2:
            return self.size[0], self.size[1]
        short, longer = min(height, width), max(height, width)
        long = int(self.size[0] * longer / short)
        return (self.size[0], long) if height <= width else (long, self.size[0])


def load(folder: Path) -> Pixels | None:
    """The preparation that a model folder asks for, None where it is one this module does not do."""
    try:
        settings = _settings(Path(folder))
        kind = str(settings["image_processor_type"]).removesuffix("Fast").removesuffix("Pil")
        if kind not in _KINDS or not all(
            settings.get(f"do_{part}", True) for part in ("resize", "rescale", "normalize")
        ):
            return None
        found = Pixels(
            size=_size(settings["size"]),
            resample=int(settings.get("resample", 3)),
            crop=_crop(settings, kind),
            pad=bool(settings.get("do_pad")) and kind == "LlavaImageProcessor",
            scale=float(settings["rescale_factor"]),
            mean=_three(settings["image_mean"]),
            std=_three(settings["image_std"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    small = found.crop and min(found.size) < max(found.crop)  # the cut would have to add a border
    return None if small else found


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder that needs no class of its own, else None; PyTorch is not imported."""
    path = Path(folder) / "tokenizer_config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return None
    if kind not in _TOKENIZERS or not (Path(folder) / "tokenizer.json").is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "processor_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("image_processor") if path.is_file() else None
    return dict(found or json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8")))


def _size(size: dict[str, int]) -> tuple[int, ...]:
    if set(size) == {"shortest_edge"}:
        return (int(size["shortest_edge"]),)
    return int(size["height"]), int(size["width"])


def _crop(settings: dict[str, Any], kind: str) -> tuple[int, int] | None:
    if not settings.get("do_center_crop", kind != "SiglipImageProcessor"):
        return None
    return int(settings["crop_size"]["height"]), int(settings["crop_size"]["width"])


def _three(values: list[float]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _square(image: np.ndarray, colour: list[int]) -> np.ndarray:
    """The picture in the middle of a square of one colour."""
    height, width = image.shape[:2]
    side = max(height, width)
    found = np.empty((side, side, 3), np.uint8)
    found[:] = colour
    top, left = (side - height) // 2, (side - width) // 2
    found[top : top + height, left : left + width] = image
    return found
