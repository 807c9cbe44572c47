"""DICOM bytes to RGB with pydicom; runs inside the child process only (`model._decode_child`).

Reads the file from the preamble on with its own, short, allow-list of transfer syntaxes, so that nothing is ever
inflated (a deflated file of half a megabyte can hold a gigabyte). Each coding has one decoder, named here: native and
RLE pydicom, JPEG and JPEG 2000 Pillow, JPEG-LS CharLS (pyjpegls), lossless and 12-bit JPEG GDCM. Greyscale goes
through `model.voi`. Not covered: deflated files, video (MPEG, HEVC), high-throughput JPEG 2000, overlays, segmented
whole-slide tiles put together.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from model import deid, voi
from model.image_gate import MAX_FRAMES, MAX_PIXELS, ImageRejected, check_size, pick_frame
from model.raster import Decoded

if TYPE_CHECKING:
    from pydicom.tag import BaseTag

Fields = dict[str, str | int | float]

DEFLATED: Final = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.8.1")
RLE: Final = "1.2.840.10008.1.2.5"
EXTENDED: Final = "1.2.840.10008.1.2.4.51"
JPEG_2000: Final = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
DECODERS: Final = {
    "1.2.840.10008.1.2": "",  # implicit little endian
    "1.2.840.10008.1.2.1": "",  # explicit little endian
    "1.2.840.10008.1.2.2": "",  # explicit big endian
    RLE: "pydicom",
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    EXTENDED: "pillow",  # JPEG extended, 8 bits; of 12 bits: model.jpeg_frame
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "gdcm",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81": "pyjpegls",  # JPEG-LS near-lossless
    JPEG_2000[0]: "pillow",
    JPEG_2000[1]: "pillow",
}
PIXELS: Final = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
GREY: Final = ("MONOCHROME1", "MONOCHROME2")
COLOUR: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PICTURELESS: Final = {
    "RTPLAN": "a radiotherapy plan", "RTSTRUCT": "a set of radiotherapy contours", "RTRECORD": "a treatment record",
    "SR": "a written report", "KO": "a list of chosen images", "PR": "a display setting", "DOC": "a document",
    "ECG": "an electrocardiogram", "EEG": "an electroencephalogram", "HD": "a pressure recording", "AU": "a sound",
    "REG": "an alignment of images", "FID": "a set of marks", "SEG": "a segmentation",
}  # fmt: skip


def read(data: bytes) -> tuple[Dataset, str]:
    """Parse a DICOM file without decoding its pixels; returns the data set and its transfer syntax.

    Raises:
        ImageRejected: when the header or the transfer syntax is missing or not allowed.
    """
    source = io.BytesIO(data)
    source.seek(132)
    meta = read_dataset(source, is_implicit_VR=False, is_little_endian=True, stop_when=_after_meta)
    syntax = str(meta.get("TransferSyntaxUID") or "")
    if syntax in DEFLATED:
        raise ImageRejected(
            "This DICOM file is deflated (zip-compressed), which is not read because such files can be bombs; "
            "export it uncompressed."
        )
    if not syntax:
        raise ImageRejected(
            "This DICOM file does not say how it is coded (its header lacks the transfer syntax); export it again."
        )
    if syntax not in DECODERS:
        raise ImageRejected(
            "This DICOM file is coded in a way that is not read (video, or a rare compression); "
            "export it uncompressed or as JPEG 2000."
        )
    implicit, little = syntax == "1.2.840.10008.1.2", syntax != "1.2.840.10008.1.2.2"
    dataset = read_dataset(source, is_implicit_VR=implicit, is_little_endian=little)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    return dataset, syntax


def _after_meta(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag.group != 2


def decode(data: bytes, frame: int | None) -> Decoded:
    """Decode one frame of a DICOM file (the middle one, unless `frame` says another) to RGB.

    Raises:
        ImageRejected: no picture, a coding that is not read, impossible sizes, missing pixels.
        Exception: whatever pydicom and the codecs raise on damaged bytes; the caller turns it into a sentence.
    """
    dataset, syntax = read(data)
    keyword = _pixel_keyword(dataset)
    rows, columns = _sides(dataset)
    frames = _frames(dataset)
    chosen = pick_frame(frame, frames, default=frames // 2)
    _check_layout(dataset, keyword)
    stored, photometric = _stored(dataset, syntax, chosen)
    if stored.shape[:2] != (rows, columns):
        raise ImageRejected("The DICOM header and its pixels disagree about the size; export the file again.")
    fields = deid.safe_fields(dataset)
    fields.update(transfer_syntax=UID(syntax).name[:64], **_extremes(dataset, syntax, stored, frames, chosen))
    if photometric in GREY:
        grey = voi.render(stored, dataset, chosen, fields)
        rgb = np.repeat(grey[:, :, None], 3, axis=2)
    elif photometric == "PALETTE COLOR":
        rgb = _palette(stored, dataset)
    else:
        rgb = _eight_bits(stored, dataset)
    return Decoded(np.ascontiguousarray(rgb).data, columns, rows, frames, chosen, fields)


def _pixel_keyword(dataset: Dataset) -> str:
    for keyword in PIXELS:
        if keyword in dataset:
            return keyword
    modality = str(dataset.get("Modality") or "")
    what = PICTURELESS.get(modality)
    if "DirectoryRecordSequence" in dataset:
        raise ImageRejected("This is the index of a DICOM disc (DICOMDIR), not a picture; choose one of its images.")
    if what:
        raise ImageRejected(
            f"This DICOM file is {what} ({modality}) without a picture; choose an image series instead."
        )
    raise ImageRejected("This DICOM file holds no picture, or is cut off before it; choose an image series instead.")


def _count(dataset: Dataset, keyword: str, name: str) -> int:
    """A header number that must be one unsigned 16-bit value: anything else is how overflows are made."""
    try:
        raw = dataset.get_item(keyword) if keyword in dataset else None
        value: Any = dataset.get(keyword)
    except (ValueError, TypeError, NotImplementedError, AttributeError, OverflowError):
        raw = value = None
    vr = getattr(raw, "VR", None)
    if not isinstance(value, int) or isinstance(value, bool) or vr not in ("US", None, "UN") or not 0 <= value < 65536:
        raise ImageRejected(f"This DICOM file has no valid {name} ({keyword}); export it again from its source.")
    return value


def _sides(dataset: Dataset) -> tuple[int, int]:
    rows, columns = _count(dataset, "Rows", "height"), _count(dataset, "Columns", "width")
    check_size(columns, rows)
    return rows, columns


def _frames(dataset: Dataset) -> int:
    if "NumberOfFrames" not in dataset:
        return 1
    found = voi.number(dataset, "NumberOfFrames")
    if found is None:
        if dataset.get_item("NumberOfFrames").value in (None, b"", ""):
            return 1
        raise ImageRejected("This DICOM file has no valid number of frames (NumberOfFrames); export it again.")
    return max(1, int(found))


def _check_layout(dataset: Dataset, keyword: str) -> None:
    """Refuse impossible combinations before any codec sees them."""
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    samples = _count(dataset, "SamplesPerPixel", "number of colours")
    expected = 3 if photometric in COLOUR else 1
    if photometric not in (*GREY, *COLOUR, "PALETTE COLOR") or samples != expected:
        raise ImageRejected(
            "This DICOM file uses a colour model that is not read; export it as greyscale (MONOCHROME2) or RGB."
        )
    allocated = _count(dataset, "BitsAllocated", "number of bits")
    if keyword != "PixelData":
        return
    stored = _count(dataset, "BitsStored", "number of used bits")
    if allocated not in (1, 8, 16, 32) or not 1 <= stored <= allocated:
        raise ImageRejected(
            f"This DICOM file says that {stored} of {allocated} bits are used, which is not read; export it again."
        )


def _stored(dataset: Dataset, syntax: str, frame: int) -> tuple[np.ndarray, str]:
    """Pixels of one frame as pydicom's `pixel_array` gives them (YBR already turned to RGB), and their colour model."""
    from model import jpeg_frame

    if syntax == RLE:
        _check_run_lengths(dataset, frame)
    try:
        if DECODERS[syntax] == "gdcm" or syntax == EXTENDED:
            special = jpeg_frame.decode(dataset, syntax, frame)
            if special is not None:
                return special, str(dataset.PhotometricInterpretation)
        try:
            pixels, facts = get_decoder(UID(syntax)).as_array(dataset, index=frame, decoding_plugin=DECODERS[syntax])
        except RuntimeError:
            if syntax not in JPEG_2000:
                raise  # Pillow does not read JPEG 2000 of more than 8 bits a colour, nor bare components: GDCM does
            pixels, facts = get_decoder(UID(syntax)).as_array(dataset, index=frame, decoding_plugin="gdcm")
    except ValueError as error:
        if "less than expected" in str(error):
            raise ImageRejected(
                "The pixels of this DICOM file end too early, so it is cut off; copy or export it again."
            ) from error
        raise
    return pixels, str(facts["photometric_interpretation"])


def _check_run_lengths(dataset: Dataset, frame: int) -> None:
    """Refuse run lengths that take more room than the picture: honest ones never double it, bombs unpack 64-fold."""
    stream = get_frame(dataset.PixelData, frame, number_of_frames=_frames(dataset))
    plain = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated // 8
    if len(stream) > 2 * plain + 4096:
        raise ImageRejected("The coded pixels of this DICOM file are larger than its picture; export the file again.")


def _extremes(dataset: Dataset, syntax: str, stored: np.ndarray, frames: int, chosen: int) -> Fields:
    """Smallest and largest stored value: over all frames where that is cheap, else of the decoded frame alone."""
    low, high = _finite(stored)
    whole = frames > 1 and frames * stored.size <= (MAX_PIXELS if DECODERS[syntax] == "" else MAX_PIXELS // 8)
    if whole and frames <= MAX_FRAMES:
        for other in range(frames):
            if other != chosen:
                a, b = _finite(_stored(dataset, syntax, other)[0])
                low, high = min(low, a), max(high, b)
    exact = stored.dtype.kind in "uib"
    scope = "all frames" if whole or frames == 1 else "this frame"
    return {
        "stored_min": int(low) if exact else low,
        "stored_max": int(high) if exact else high,
        "stored_range_of": scope,
    }


def _finite(values: np.ndarray) -> tuple[float, float]:
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (values.min().item(), values.max().item()) if values.size else (0.0, 0.0)


def _palette(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    from pydicom.pixels.processing import apply_color_lut

    colours = apply_color_lut(stored, dataset)[:, :, :3]
    if colours.dtype.itemsize == 1:
        return colours
    deep = int(colours.max()) > 255  # some machines announce 16 bits and write 8
    return (colours >> 8 if deep else colours).astype(np.uint8)


def _eight_bits(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """RGB of any depth to 8 bits a colour, white being the largest value that BitsStored allows."""
    bits = int(dataset.BitsStored)
    if bits == 8 and stored.dtype == np.uint8:
        return stored
    if bits > 8:
        return np.clip(stored >> (bits - 8), 0, 255).astype(np.uint8)
    return (np.clip(stored, 0, 2**bits - 1).astype(np.float32) * (255 / (2**bits - 1)) + 0.5).astype(np.uint8)
