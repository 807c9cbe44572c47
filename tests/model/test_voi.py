"""model.voi: DICOM greyscale, from stored numbers to what a person sees.

Expected values are computed here from the standard's formulas (PS3.3 C.11.1, C.11.2), not from the code under test.
The decoder runs in this process here, to save a child per file; test_images.py and tests/reliability use the child.
"""

import io

import numpy as np
import pydicom
import pytest

from model.image_gate import ImageRejected
from tests.model.made import RAMP, decode, dicom, grey, item, linear, near


def test_no_window_stretches_from_least_to_most_after_rescale() -> None:
    data = dicom(RAMP, RescaleSlope="2", RescaleIntercept="-1024")
    assert near(grey(data), RAMP / 990 * 255)
    fields = decode(data).fields
    assert (fields["stored_min"], fields["stored_max"], fields["display"]) == (0, 990, "min-max")
    assert near(grey(dicom(RAMP, RescaleSlope="-1", RescaleIntercept="0")), 255 - RAMP / 990 * 255)


def test_the_first_of_several_windows_after_rescale() -> None:
    data = dicom(RAMP, RescaleSlope="2", RescaleIntercept="-1024", WindowCenter=[40, 500], WindowWidth=[400, 2000])
    assert near(grey(data), linear(RAMP * 2.0 - 1024, 40, 400))
    assert decode(data).fields["window_center"] == 40


def test_windows_of_width_one_and_of_nonsense() -> None:
    assert np.array_equal(grey(dicom(RAMP, WindowCenter=500, WindowWidth=1)), np.where(RAMP > 499.5, 255, 0))
    for center, width in (("500", "0"), ("500", "-5"), ("", ""), ("500", "")):
        assert near(grey(dicom(RAMP, WindowCenter=center, WindowWidth=width)), RAMP / 990 * 255)


def test_exact_and_sigmoid_windows() -> None:
    exact = grey(dicom(RAMP, WindowCenter=500, WindowWidth=400, VOILUTFunction="LINEAR_EXACT"))
    assert near(exact, np.clip((RAMP - 500) / 400 + 0.5, 0, 1) * 255)
    bent = grey(dicom(RAMP, WindowCenter=500, WindowWidth=400, VOILUTFunction="SIGMOID"))
    assert near(bent, 255 / (1 + np.exp(-4 * (RAMP - 500) / 400)))


def test_lookup_tables_come_before_windows() -> None:
    table = item(LUTDescriptor=[1000, 0, 12], LUTData=[4095 - 4 * v for v in range(1000)])
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    data = dicom(RAMP.astype(np.uint16), VOILUTSequence=[table], WindowCenter=1, WindowWidth=2)
    assert near(grey(data), (4095 - 4.0 * RAMP) / 4095 * 255)
    assert decode(data).fields["display"] == "lookup table"


def test_modality_table_then_window() -> None:
    table = item(LUTDescriptor=[500, 100, 16], LUTData=[3 * v for v in range(500)], ModalityLUTType="US")
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    machine = 3.0 * np.clip(RAMP - 100, 0, 499)
    data = dicom(RAMP.astype(np.uint16), ModalityLUTSequence=[table], WindowCenter=700, WindowWidth=900)
    assert near(grey(data), linear(machine, 700, 900))


def test_monochrome1_is_inverted() -> None:
    assert near(grey(dicom(RAMP, PhotometricInterpretation="MONOCHROME1")), 255 - RAMP / 990 * 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
def test_every_integer_depth(dtype: type) -> None:
    values = np.linspace(np.iinfo(dtype).min, np.iinfo(dtype).max, 64).reshape(8, 8).round()
    pixels: np.ndarray = np.clip(values, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)
    pixels[0, 0], pixels[-1, -1] = np.iinfo(dtype).min, np.iinfo(dtype).max
    picture = decode(dicom(pixels))
    assert np.abs(picture.rgb[..., 0] - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 1
    assert (picture.fields["stored_min"], picture.fields["stored_max"]) == (int(pixels.min()), int(pixels.max()))


def test_signed_12_of_16_bits_ignores_what_lies_above() -> None:
    values = np.array([[-2048, -1, 0, 2047]], np.int16)
    dirty = (values & 0x0FFF) | 0x7000  # the four unused bits hold an overlay
    picture = decode(dicom(dirty.astype(np.int16), BitsStored=12, HighBit=11))
    assert (picture.fields["stored_min"], picture.fields["stored_max"]) == (-2048, 2047)
    assert picture.rgb[0, :, 0].tolist() == [0, 127, 128, 255]


def test_floating_point_pixels_with_holes() -> None:
    values = np.linspace(-1, 3, 100, dtype=np.float32).reshape(10, 10)
    values[5, 5] = np.nan
    made = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    del made.PixelData, made.BitsStored, made.HighBit, made.PixelRepresentation
    made.BitsAllocated, made.FloatPixelData = 32, values.tobytes()
    target = io.BytesIO()
    made.save_as(target)
    picture = decode(target.getvalue())
    assert (picture.rgb[0, 0, 0], picture.rgb[-1, -1, 0], picture.rgb[5, 5, 0]) == (0, 255, 0)
    assert picture.fields["stored_max"] == 3.0


def test_single_bit_pixels() -> None:
    bits = np.zeros((8, 16), bool)
    bits[2:5, 3:9] = True
    packed = np.packbits(bits, bitorder="little")
    data = dicom(bits.view(np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed.tobytes())
    assert np.array_equal(grey(data), bits * 255)


@pytest.mark.parametrize("value", [0, 255])
def test_a_picture_of_one_value_keeps_it(value: int) -> None:
    assert (grey(dicom(np.full((4, 4), value, np.uint8))) == value).all()


def test_padding_does_not_stretch_the_scale() -> None:
    padded = RAMP.copy()
    padded[:2] = -2000
    data = dicom(padded, PixelPaddingValue=-2000)
    want = np.where(padded < 0, 0, (padded - 200) / 790 * 255)
    assert near(grey(data), want)
    assert decode(data).fields["stored_min"] == -2000
    padded[2] = -1990
    assert near(grey(dicom(padded, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1900)),
                np.where(padded < 0, 0, (padded - 300) / 690 * 255))  # fmt: skip
    assert (grey(dicom(np.full((4, 4), 7, np.uint8), PixelPaddingValue=7)) == 7).all()


def test_the_middle_frame_or_the_chosen_one() -> None:
    stack = np.stack([RAMP + 7 * f for f in range(5)])
    data = dicom(stack, frames=5, WindowCenter=500, WindowWidth=1000)
    picture = decode(data)
    assert (picture.frames, picture.frame) == (5, 2)
    assert near(grey(data), linear(stack[2], 500, 1000))
    assert near(grey(data, 4), linear(stack[4], 500, 1000))
    assert (picture.fields["stored_max"], picture.fields["stored_range_of"]) == (1018, "all frames")
    with pytest.raises(ImageRejected, match="has 5"):
        decode(data, frame=5)


def test_windows_of_enhanced_files_belong_to_the_frame() -> None:
    def group(center: float) -> pydicom.Dataset:
        return item(FrameVOILUTSequence=[item(WindowCenter=center, WindowWidth=300)])

    shared = item(PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-10)])
    data = dicom(
        np.stack([RAMP, RAMP]), frames=2, WindowCenter=1, WindowWidth=2,
        SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=[group(100), group(900)],
    )  # fmt: skip
    assert near(grey(data, 0), linear(RAMP * 2.0 - 10, 100, 300))
    assert near(grey(data, 1), linear(RAMP * 2.0 - 10, 900, 300))
