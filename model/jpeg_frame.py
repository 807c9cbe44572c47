"""One frame of JPEG lossless or JPEG extended (8 or 12 bits) inside DICOM, with GDCM; for `model.dicom`, in its child.

GDCM trusts the header it is given, so the size that the JPEG data themselves announce is compared with it first.
Colour is given back as it is stored (no YBR conversion); lossless colour in hospitals is RGB.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from model.image_gate import ImageRejected

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


class Frame(NamedTuple):
    """What the start-of-frame marker of a JPEG stream says."""

    precision: int
    height: int
    width: int
    components: int


def start_of_frame(stream: bytes) -> Frame | None:
    """Walk the markers of a JPEG stream to its start of frame (SOF0 to SOF15; ITU-T T.81, B.2.2)."""
    at = 2
    while at + 10 <= len(stream):
        if stream[at] != 0xFF:
            return None
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in (0x01, *range(0xD0, 0xD9)):  # markers without a length
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return Frame(
                stream[at + 4],
                int.from_bytes(stream[at + 5 : at + 7], "big"),
                int.from_bytes(stream[at + 7 : at + 9], "big"),
                stream[at + 9],
            )
        else:
            at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None


def decode(dataset: Dataset, syntax: str, index: int) -> np.ndarray | None:
    """Decode frame `index` where pydicom's own plugins cannot; None where they can (after the size check).

    Raises:
        ImageRejected: when stream and header disagree, or GDCM gives up.
    """
    from pydicom.encaps import get_frame

    count = int(dataset.get("NumberOfFrames") or 1)
    stream = get_frame(dataset.PixelData, index, number_of_frames=count)
    found = start_of_frame(stream)
    wanted = (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel)
    if found is None or found[1:] != wanted or not 2 <= found.precision <= dataset.BitsAllocated:
        raise ImageRejected("The JPEG data in this DICOM file do not fit its header; export the file again.")
    if not syntax.endswith(".51"):
        return None
    if found.precision == 8:
        return _pillow(stream) if found.components == 1 else None
    if found.components != 1:
        raise ImageRejected("This DICOM file holds JPEG colour of over 8 bits, which is not read; export it as RGB.")
    return _gdcm(stream, dataset, syntax, found.precision)


def _pillow(stream: bytes) -> np.ndarray:
    from PIL.JpegImagePlugin import JpegImageFile

    return np.array(JpegImageFile(io.BytesIO(stream)))


def _gdcm(stream: bytes, dataset: Dataset, syntax: str, precision: int) -> np.ndarray:
    """Decode a greyscale stream of more than 8 bits to uint16, or int16 where the header says signed."""
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(stream)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    kind = gdcm.PhotometricInterpretation.GetPIType(str(dataset.PhotometricInterpretation))
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((dataset.Columns, dataset.Rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, precision, precision - 1, int(dataset.PixelRepresentation)))
    buffer: Any = image.GetBuffer()
    size = dataset.Rows * dataset.Columns
    pixels = np.frombuffer(buffer.encode("utf-8", "surrogateescape") if buffer else b"", "<u2")
    if pixels.size != size:
        raise ImageRejected("The JPEG data in this DICOM file are damaged; export the file again.")
    pixels = pixels.reshape(dataset.Rows, dataset.Columns)
    if dataset.PixelRepresentation == 1:  # spread the sign bit of the `precision`-bit values
        return (pixels << (16 - precision)).view(np.int16) >> (16 - precision)
    return pixels
