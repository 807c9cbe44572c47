"""PNG, JPEG, TIFF and WebP bytes to RGB, with Pillow; runs inside the child process only (`model._decode_child`).

Each Pillow plugin is called by its class, so that no other of Pillow's forty formats can be reached. Orientation
(EXIF) is applied, transparency is laid on white, greyscale of more than 8 bits is scaled to 8. Not covered: colour
profiles (ICC) are ignored, CIELAB is refused, moving parts of phone pictures (MPO) are dropped.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

from model.image_gate import MAX_FRAMES, ImageRejected, check_size, pick_frame

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFile


class Decoded(NamedTuple):
    """What a decoder hands to `model._decode_child`: `rgb` is height x width x 3 bytes, row by row."""

    rgb: bytes | memoryview
    width: int
    height: int
    frames: int
    frame: int
    fields: dict[str, str | int | float]


def decode(kind: str, data: bytes, frame: int | None) -> Decoded:
    """Decode one frame (the first, unless `frame` says another) of a PNG, JPEG, TIFF or WebP file.

    Raises:
        ImageRejected: too large, no such frame, or a colour space that is not read.
        Exception: whatever Pillow raises on damaged bytes; the caller turns it into a sentence.
    """
    if kind == "WEBP":
        check_size(*_webp_size(data))  # before Pillow allocates the canvas
    image = _open(kind, data)
    check_size(*image.size)
    frames = _count_frames(kind, image)
    chosen = pick_frame(frame, frames, default=0)
    if frames > 1:
        image.seek(chosen)
        check_size(*image.size)
    fields: dict[str, str | int | float] = {"mode": image.mode}
    upright = _upright(kind, image, fields)
    rgb = _to_rgb(upright, kind, image, fields)
    return Decoded(rgb.tobytes(), rgb.width, rgb.height, frames, chosen, fields)


def _open(kind: str, data: bytes) -> ImageFile.ImageFile:
    source = io.BytesIO(data)
    if kind == "PNG":
        from PIL.PngImagePlugin import PngImageFile

        return PngImageFile(source)
    if kind == "JPEG":
        from PIL.JpegImagePlugin import JpegImageFile

        return JpegImageFile(source)
    if kind == "TIFF":
        from PIL.TiffImagePlugin import TiffImageFile

        return TiffImageFile(source)
    from PIL.WebPImagePlugin import WebPImageFile

    return WebPImageFile(source)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height as the first chunk of a WebP file gives them (RFC 9649, sections 2.5 to 2.7)."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise ImageRejected("This WebP file ends inside its header, so it is incomplete; copy or export it again.")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _count_frames(kind: str, image: ImageFile.ImageFile) -> int:
    """Frames or pages of the file; a JPEG has one. TIFF pages are walked, so a chain without end is cut off."""
    if kind != "TIFF":
        return int(getattr(image, "n_frames", 1))
    count = 1
    while count <= MAX_FRAMES:
        try:
            image.seek(count)
        except EOFError:
            break
        count += 1
    image.seek(0)
    return count


def _upright(kind: str, image: ImageFile.ImageFile, fields: dict[str, str | int | float]) -> Image.Image:
    """Load the pixels and turn them as the file's orientation says. Pillow turns TIFF by itself while loading."""
    from PIL import ImageOps

    try:
        fields["orientation"] = int(image.getexif().get(0x0112, 1))
    except (ValueError, TypeError, SyntaxError, OSError, KeyError, IndexError, ArithmeticError):
        fields["orientation"] = "unreadable"  # damaged EXIF does not make the pixels worse
    image.load()
    if kind == "TIFF" or fields["orientation"] not in range(2, 9):
        return image
    return ImageOps.exif_transpose(image)


def _to_rgb(
    image: Image.Image, kind: str, source: ImageFile.ImageFile, fields: dict[str, str | int | float]
) -> Image.Image:
    """Any of Pillow's modes to RGB; transparent parts become white, as on the page a person sees."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image, kind, source, fields).convert("RGB")
    if image.mode == "LAB":
        raise ImageRejected("This TIFF file uses the CIELAB colour space, which is not read; save it as RGB.")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        fields["transparency"] = "on white"
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(
    image: Image.Image, kind: str, source: ImageFile.ImageFile, fields: dict[str, str | int | float]
) -> Image.Image:
    """Greyscale of more than 8 bits to 8 bits.

    Whole numbers up to 65535: white is the largest value of the bit depth, which TIFF states if below 16, and which
    else is the smallest of 8, 10, 12, 14 and 16 bits that holds the data (scanners write 12 bits into 16). Numbers
    outside that, and floating point outside 0 to 1, are stretched from their minimum to their maximum.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    low, high = _finite_range(values)
    tags = getattr(source, "tag_v2", {}) if kind == "TIFF" else {}
    bits = int((tags.get(258) or (16,))[0])
    if values.dtype.kind == "f":
        black, white = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    elif low < 0 or high > 65535:
        black, white = low, high
    else:
        depth = bits if 8 < bits < 16 else next(b for b in (8, 10, 12, 14, 16) if high < 2**b)
        black, white = 0.0, float(2**depth - 1)
        fields["bits"] = depth
    fields["stored_min"], fields["stored_max"] = low, high
    grey = np.empty(values.shape, np.uint8)
    for top in range(0, values.shape[0], 256):  # in strips: floating point of a whole radiograph is 8 times its size
        strip = np.nan_to_num(values[top : top + 256].astype(np.float64), nan=black, posinf=white, neginf=black)
        scaled = (strip / 2 - black / 2) / (white / 2 - black / 2 or 1)  # halves: no overflow at the ends of float64
        grey[top : top + 256] = np.clip(scaled, 0, 1) * 255 + 0.5
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow turns itself only up to 8 bits
        np.subtract(255, grey, out=grey)
    return Image.fromarray(grey)


def _finite_range(values: np.ndarray) -> tuple[float, float]:
    import numpy as np

    if values.dtype.kind != "f":
        return float(values.min()), float(values.max())
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
