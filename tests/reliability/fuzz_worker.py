"""Decode mutated pictures in this one process, as the child of model.images would, and say what came of each.

Run by test_fuzz.py as `python -m tests.reliability.fuzz_worker FIRST LAST`; prints one line per case: number, kind and
"ok" or the sentence. A case that ends this process is left to the caller, who hands it to `model.images.decode`.
"""

import functools
import io
import random
import resource
import sys
import warnings
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from model import _decode_child
from model.image_gate import MEMORY_LIMIT, ImageRejected, sniff
from tests.model.made import chart, dicom, encode, item


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Honest files of every kind and coding, small enough to mutate by the hundred."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    grey = np.asarray(Image.fromarray(noise).convert("L"))
    deep = grey.astype(np.uint16) * 16
    rich: dict[str, Any] = {
        "WindowCenter": [40, 80],
        "WindowWidth": [400, 80],
        "RescaleSlope": "2",
        "RescaleIntercept": "-9",
    }
    native = dicom(deep, **rich, ReferencedStudySequence=[item(PatientID="1")], PixelPaddingValue=3)
    made = [encode(noise, "PNG"), encode(noise, "JPEG"), encode(noise, "TIFF"), encode(noise, "WEBP"), native]
    made.append(encode(Image.fromarray(deep), "TIFF", compression="tiff_lzw"))
    made.append(encode(chart(), "JPEG", progressive=True, exif=Image.Exif()))
    made.append(dicom(np.stack([noise, noise]), frames=2, syntax=ExplicitVRLittleEndian))
    made.append(dicom(grey, syntax=JPEGBaseline8Bit, coded=[encode(grey, "JPEG")]))
    made.append(dicom(grey, syntax=JPEG2000Lossless, coded=[encode(grey, "JPEG2000", no_jp2=True)]))
    for syntax in (RLELossless, JPEGLSLossless):
        dataset = pydicom.dcmread(io.BytesIO(native))
        dataset.compress(syntax, generate_instance_uid=False)
        target = io.BytesIO()
        dataset.save_as(target)
        made.append(target.getvalue())
    return tuple(made)


def mutated(number: int) -> bytes:
    """Case `number`: one of the seeds, cut, shortened, lengthened, or with some bytes changed; always the same."""
    chance = random.Random(number)
    data = bytearray(seeds()[number % len(seeds())])
    at, way = chance.randrange(12, len(data)), chance.random()
    if way < 0.12:
        return bytes(data[:at])
    if way < 0.22:
        return bytes(data[:at] + data[at + chance.randrange(1, 64) :])
    if way < 0.32:
        return bytes(data[:at]) + chance.randbytes(chance.randrange(1, 64)) + bytes(data[at:])
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        end = len(data) if chance.random() < 0.5 else min(len(data), 800)
        data[chance.randrange(12, end)] = chance.choice((0, 255, 127, 128, chance.randrange(256)))
    return bytes(data)


def main(first: int, last: int) -> None:
    """Decode the cases first..last-1."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    warnings.simplefilter("ignore")
    for number in range(first, last):
        data = mutated(number)
        try:
            kind = sniff(data)
            found = _decode_child.decode(kind, data, None)
            answer = "ok" if len(found.rgb.tobytes() if isinstance(found.rgb, memoryview) else found.rgb) else "empty"
        except ImageRejected as refusal:
            answer = str(refusal)
        print(number, answer, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
