"""What may enter as a picture: the kinds of file, told by their first bytes, and the hard limits.

Imports nothing outside the standard library, because both sides of the wall use it: the program that asks
(`model.images`) and the child process that decodes (`model._decode_child`). A file's name is never looked at.
Does not look at pixels: that is the child's work.
"""

from __future__ import annotations

from typing import Final

MAX_BYTES: Final = 128 * 1024 * 1024
"""Largest file: an enhanced CT of 240 slices; more than any single radiograph (a mammogram is 56 MB uncompressed)."""
MAX_PIXELS: Final = 40_000_000
"""Largest picture, width times height: a mammogram at 50 micrometres has 28 million; phones send 12 million."""
MAX_FRAMES: Final = 10_000
"""Most frames or pages that one file may announce: a heart film has a few hundred, a large CT about 2,000."""
MEMORY_LIMIT: Final = 1024 * 1024 * 1024
"""Address space of the child process, in bytes: the largest allowed picture needs about 0.8 GB."""
CPU_SECONDS: Final = 8
WALL_SECONDS: Final = 10.0
"""A decoder that needs longer is stopped: the slowest honest picture measured takes about 3 s on one CPU."""

FORMATS: Final = ("PNG", "JPEG", "TIFF", "WEBP", "DICOM")
SAVE_ALONE: Final = "open it in a viewer and save the picture alone."
CHOICES: Final = "save it as PNG, JPEG, TIFF, WebP or DICOM and choose that file"

_OTHER_KINDS: Final = (
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"Rar!", "a RAR archive"),
    (b"%!PS", "a PostScript (EPS) drawing"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript (EPS) drawing"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"#!", "a program"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL picture"),
    (b"\x00\x00\x00\x0cjP  ", "a bare JPEG 2000 picture"),
    (b"\xff\x4f\xff\x51", "a bare JPEG 2000 picture"),
    (b"II+\x00", "a BigTIFF picture"),
    (b"MM\x00+", "a BigTIFF picture"),
    (b"8BPS", "a Photoshop file"),
    (b"\x89HDF", "an HDF5 file"),
)


class ImageRejected(ValueError):
    """These bytes are not taken as a picture; the text is one plain sentence that says what to do next."""


def _magic(data: bytes) -> str | None:
    """The format that the first bytes announce, DICOM's marker at byte 128 aside."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith((b"II*\x00", b"MM\x00*")):
        return "TIFF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def _other_kind(data: bytes) -> str | None:
    """What a file outside the allow-list probably is, for a helpful sentence."""
    for start, name in _OTHER_KINDS:
        if data.startswith(start):
            return name
    if data[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file"
    if data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "a web page or SVG drawing"
    if data[344:348] in (b"n+1\0", b"ni1\0"):
        return "a NIfTI volume"
    return None


def sniff(data: bytes) -> str:
    """Return the format of `data` (one of FORMATS), told by its first bytes alone.

    Raises:
        ImageRejected: empty, too large, of no allowed kind, or two kinds of file in one.
    """
    if not data:
        raise ImageRejected("The file is empty; choose it again, or export the picture again.")
    if len(data) > MAX_BYTES:
        raise ImageRejected(
            f"The file has {len(data) / 1e6:.0f} MB, more than the {MAX_BYTES / 1e6:.0f} MB that are taken; "
            "export a single picture instead of a whole series."
        )
    kind = _magic(data)
    other = _other_kind(data)
    if data[128:132] == b"DICM":
        if other or kind not in (None, "TIFF"):  # standard: a DICOM preamble may be a TIFF header (PS3.10, 7.1)
            raise ImageRejected(
                f"This DICOM file begins like {other or f'a {kind} picture'}, so it is two kinds of file in one; "
                "export it again from its source."
            )
        return "DICOM"
    if kind is None:
        raise ImageRejected(_unknown(data, other))
    _refuse_stowaways(data, kind)
    return kind


def _unknown(data: bytes, other: str | None) -> str:
    if other and "archive" in other:
        return f"This file is {other}; unpack it and choose a picture inside it."
    if other:
        return f"This file is {other}, which is not taken; {CHOICES}."
    if b"1.2.840.10008." in data[:4096]:  # the root of every identifier that DICOM itself defines
        return (
            "This looks like DICOM data without the header that says how to read it; "
            "export it again as a DICOM file (Part 10)."
        )
    return f"The first bytes of this file are those of no known picture; {CHOICES}."


def _refuse_stowaways(data: bytes, kind: str) -> None:
    """Refuse a picture that also is a document, script or archive: browsers and viewers would open the other one."""
    head, tail = data[:1024], data[-66_000:]
    for mark, name in ((b"%PDF-", "a PDF document"), (b"<script", "a script"), (b"<?php", "a script")):
        if mark.lower() in head.lower():
            raise ImageRejected(f"This {kind} file also holds {name}; {SAVE_ALONE}")
    if b"PK\x05\x06" in tail:
        raise ImageRejected(f"This {kind} file also holds a ZIP archive; {SAVE_ALONE}")
    if kind == "PNG" and (end := data.find(b"\x00\x00\x00\x00IEND\xaeB`\x82")) >= 0 and len(data) - end - 12 > 4096:
        raise ImageRejected(f"This PNG file goes on after its picture ends; {SAVE_ALONE}")


def check_size(width: int, height: int) -> None:
    """Refuse pictures of no area or of more than MAX_PIXELS pixels.

    Raises:
        ImageRejected: with the size found and the size allowed.
    """
    if width < 1 or height < 1:
        raise ImageRejected(f"The picture is {width} x {height} pixels, so it shows nothing; export it again.")
    if width * height > MAX_PIXELS:
        raise ImageRejected(
            f"The picture is {width} x {height} pixels, more than the {MAX_PIXELS // 1_000_000} million taken; "
            "export it smaller."
        )


def pick_frame(asked: int | None, frames: int, default: int) -> int:
    """The frame to decode (counted from 0): the one asked for, else `default`.

    Raises:
        ImageRejected: when the file announces too many frames or has no such frame.
    """
    if not 1 <= frames <= MAX_FRAMES:
        raise ImageRejected(f"The file announces {frames} frames; export one of them as a single picture.")
    if asked is None:
        return default
    if not 0 <= asked < frames:
        raise ImageRejected(f"Frame {asked} was asked for, but the file has {frames} (counted from 0); choose another.")
    return asked
