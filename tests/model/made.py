"""Picture files made in code for the tests (no binary lies in the repository), and what a standard says they show."""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, ExplicitVRLittleEndian

from model import _decode_child
from model.image_gate import sniff
from model.images import Picture


def chart(height: int = 24, width: int = 40) -> np.ndarray:
    """RGB uint8 whose four corners differ, so that a turned or mirrored picture is seen to be."""
    rgb = np.full((height, width, 3), 60, np.uint8)
    rgb[: height // 2, : width // 2] = (250, 0, 0)
    rgb[: height // 2, width // 2 :] = (0, 250, 0)
    rgb[height // 2 :, : width // 2] = (0, 0, 250)
    return rgb


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """One of Pillow's formats, as bytes."""
    target = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(target, kind, **options)
    return target.getvalue()


def dicom(
    pixels: np.ndarray | None = None,
    *,
    syntax: str = ExplicitVRLittleEndian,
    coded: list[bytes] | None = None,
    frames: int | None = None,
    preamble: bytes = bytes(128),
    **elements: Any,
) -> bytes:
    """A DICOM file of `pixels`, (H, W) or (H, W, 3) or with frames in front if `frames` is given; `elements` win.

    `coded` gives the frames of a compressed syntax; then `pixels` only describes them. An element set to None is left
    out.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = UID("1.2.3")
    dataset.Modality = "OT"
    if pixels is not None:
        _describe(dataset, pixels, frames)
        if coded is not None:
            dataset.PixelData = encapsulate(coded)
            dataset["PixelData"].VR = "OB"
            dataset["PixelData"].is_undefined_length = True
        else:
            raw = pixels.tobytes()
            dataset.PixelData = raw + b"\0" * (len(raw) % 2)
            dataset["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    target = io.BytesIO()
    dcmwrite(target, dataset, enforce_file_format=True)
    return preamble + target.getvalue()[128:]


def _describe(dataset: Dataset, pixels: np.ndarray, frames: int | None) -> None:
    shape = pixels.shape[1:] if frames else pixels.shape
    bits = pixels.dtype.itemsize * 8
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 3 if len(shape) == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    if len(shape) == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if frames:
        dataset.NumberOfFrames = frames


def item(**elements: Any) -> Dataset:
    """A DICOM sequence item."""
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


RAMP: np.ndarray = np.arange(0, 1000, 10, dtype=np.int16).reshape(10, 10)


def decode(data: bytes, frame: int | None = None) -> Picture:
    """What model.images.decode does, in this process; a codec's or pydicom's warnings are no errors here."""
    kind = sniff(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _decode_child.decode(kind, data, frame)
    rgb = np.frombuffer(found.rgb, np.uint8).reshape(found.height, found.width, 3)
    return Picture(rgb, kind, found.frames, found.frame, found.fields)


def grey(data: bytes, frame: int | None = None) -> np.ndarray:
    rgb = decode(data, frame).rgb
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0].astype(int)


def linear(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, to 0..255."""
    out = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    return np.where(
        values <= center - 0.5 - (width - 1) / 2, 0, np.where(values > center - 0.5 + (width - 1) / 2, 255, out)
    )


def near(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.abs(got - want).max() <= 0.51)
