"""model.dicom, model.voi, model.jpeg_frame: what DICOM can say about its pixels, and the files that say it wrongly.

Expected values are computed here from the standard's formulas (PS3.3 C.11.1, C.11.2), not from the code under test.
The decoder runs in this process here, to save a child per file; test_images.py and tests/reliability use the child.
"""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from model import _decode_child
from model.image_gate import ImageRejected, sniff
from model.images import Picture
from tests.model.made import chart, dicom, encode, item

RAMP = np.arange(0, 1000, 10, dtype=np.int16).reshape(10, 10)


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


def test_colour_by_pixel_by_plane_and_deep() -> None:
    assert np.array_equal(decode(dicom(chart())).rgb, chart())
    planes = np.ascontiguousarray(np.moveaxis(chart(), 2, 0))
    assert np.array_equal(decode(dicom(chart(), PlanarConfiguration=1, PixelData=planes.tobytes())).rgb, chart())
    assert np.array_equal(decode(dicom(chart().astype(np.uint16) * 257)).rgb, chart())
    deep = chart().astype(np.uint16) << 4
    assert np.array_equal(decode(dicom(deep, BitsStored=12, HighBit=11)).rgb, chart())
    both = np.stack([chart(), 255 - chart()])
    assert np.array_equal(decode(dicom(both, frames=2)).rgb, 255 - chart())
    assert np.array_equal(decode(dicom(both, frames=2), frame=0).rgb, chart())


def test_ybr_full_is_turned_to_rgb() -> None:
    red = np.tile(np.array([76, 85, 255], np.uint8), (4, 4, 1))
    got = decode(dicom(red, PhotometricInterpretation="YBR_FULL")).rgb
    assert np.abs(got.astype(int) - (254, 0, 0)).max() <= 2


def palette(entries: int, first: int, bits: int, **other: Any) -> bytes:
    index = np.arange(16, dtype=np.uint8).reshape(4, 4)
    scale = 256 if bits == 16 else 1
    ramps = {"Red": range(entries), "Green": range(entries, 0, -1), "Blue": [7] * entries}
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, ramp in ramps.items():
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [entries, first, bits]
        kind = "<u2" if bits == 16 else "u1"
        elements[f"{name}PaletteColorLookupTableData"] = np.array([v * scale for v in ramp], kind).tobytes()
    return dicom(index, **elements | other)


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_colour_also_of_indices_outside_the_table(bits: int) -> None:
    got = decode(palette(12, 2, bits)).rgb
    assert got[0, 0].tolist() == got[0, 2].tolist() == [0, 12, 7]
    assert got[1, 1].tolist() == [3, 9, 7]
    assert got[3, 3].tolist() == [11, 1, 7]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEGLSLossless])
def test_lossless_codings_give_the_same_pixels(syntax: str) -> None:
    window: dict[str, Any] = {"WindowCenter": 500, "WindowWidth": 700}
    made = pydicom.dcmread(io.BytesIO(dicom(RAMP.astype(np.uint16), **window)))
    if syntax in (RLELossless, JPEGLSLossless):
        made.compress(syntax, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        made.PixelData = RAMP.astype(">u2").tobytes()
    target = io.BytesIO()
    made.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(target, made, implicit_vr=syntax == ImplicitVRLittleEndian,
                     little_endian=syntax != ExplicitVRBigEndian, force_encoding=True)  # fmt: skip
    data = target.getvalue()
    assert near(grey(data), linear(RAMP, 500, 700))
    assert decode(data).fields["stored_max"] == 990


@pytest.mark.parametrize("size", [(10, 10), (37, 53), (1, 1)])
def test_jpeg_2000_and_jpeg_baseline(size: tuple[int, int]) -> None:
    pixels = np.linspace(0, 255, size[0] * size[1]).reshape(size).astype(np.uint8)
    jp2 = dicom(
        pixels,
        syntax=JPEG2000Lossless,
        coded=[encode(pixels, "JPEG2000", no_jp2=True)],
        WindowCenter=128,
        WindowWidth=256,
    )
    assert np.abs(grey(jp2) - pixels).max() <= 1
    jpeg = dicom(
        pixels, syntax=JPEGBaseline8Bit, coded=[encode(pixels, "JPEG", quality=98)], WindowCenter=128, WindowWidth=256
    )
    assert np.abs(grey(jpeg) - pixels).max() <= 6


def test_jpeg_colour_with_halved_chroma_and_several_frames() -> None:
    frames = [chart(32, 48), chart(32, 48)[::-1]]
    coded = [encode(np.ascontiguousarray(f), "JPEG", quality=95, subsampling="4:2:2") for f in frames]
    data = dicom(
        np.stack(frames), frames=2, syntax=JPEGBaseline8Bit, coded=coded, PhotometricInterpretation="YBR_FULL_422"
    )
    for number, want in enumerate(frames):
        assert np.abs(decode(data, frame=number).rgb.astype(int) - want).mean() < 8


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_jpeg_lossless(syntax: str, dtype: type, tmp_path: Path) -> None:
    pixels: np.ndarray = (RAMP // (4 if dtype == np.uint8 else 1)).astype(dtype)
    data = lossless(dicom(pixels), syntax, tmp_path)
    picture = decode(data)
    assert picture.fields["stored_max"] == pixels.max()
    assert near(picture.rgb[..., 0].astype(int), pixels / pixels.max() * 255)


def lossless(data: bytes, syntax: str, folder: Path) -> bytes:
    """Code a DICOM file as lossless JPEG with GDCM, the only library here that can."""
    import gdcm

    (folder / "plain.dcm").write_bytes(data)
    reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(folder / "plain.dcm"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(folder / "coded.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (folder / "coded.dcm").read_bytes()


def test_jpeg_that_disagrees_with_its_header(tmp_path: Path) -> None:
    data = lossless(dicom(RAMP.astype(np.uint16)), JPEGLosslessSV1, tmp_path)
    at = data.index(b"\xff\xc3") + 5
    with pytest.raises(ImageRejected, match="do not fit"):
        decode(data[:at] + struct.pack(">HH", 65535, 65535) + data[at + 4 :])


BUNDLED = {
    "JPGExtended.dcm": (1024, 256), "JPEG-lossy.dcm": (1024, 256), "693_J2KI.dcm": (512, 512),
    "JPEG2000.dcm": (1024, 256), "MR_small_jpeg_ls_lossless.dcm": (64, 64), "JPEGLSNearLossless_16.dcm": (50, 10),
    "SC_rgb_jpeg_gdcm.dcm": (100, 100), "GDCMJ2K_TextGBR.dcm": (400, 400), "examples_palette.dcm": (350, 800),
    "SC_rgb_small_odd_jpeg.dcm": (3, 3), "SC_rgb_rle_32bit_2frame.dcm": (100, 100),
    "liver_expb_1frame.dcm": (512, 512), "rtdose_rle.dcm": (10, 10), "SC_ybr_full_422_uncompressed.dcm": (100, 100),
    "examples_ybr_color.dcm": (240, 320),
}  # fmt: skip
REFUSED = {
    "rtstruct.dcm": "without the header", "reportsi.dcm": r"report \(SR\)", "waveform_ecg.dcm": r"\(ECG\)",
    "image_dfl.dcm": "deflated", "meta_missing_tsyntax.dcm": "does not say how", "badVR.dcm": "number of frames",
    "nested_priv_SQ.dcm": "Rows", "no_meta_group_length.dcm": "no picture",
    "rtplan_truncated.dcm": r"plan \(RTPLAN\)", "zipMR.gz": "unpack", "ExplVR_BigEndNoMeta.dcm": "without the header",
    "JPEG2000-embedded-sequence-delimiter.dcm": "damaged",
}  # fmt: skip


def bundled(name: str) -> Picture:
    """One of the files that come with pydicom; never downloaded."""
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"this version of pydicom does not bring {name}")
    return decode(Path(path).read_bytes())


def test_files_that_come_with_pydicom() -> None:
    for name, shape in BUNDLED.items():
        picture = bundled(name)
        assert picture.rgb.shape == (*shape, 3), name
        assert picture.rgb.std() > 1, name
    for name, says in REFUSED.items():
        with pytest.raises(ImageRejected, match=says):
            bundled(name)


def test_extended_jpeg_of_12_bits_keeps_its_values() -> None:
    pixels = bundled("JPGExtended.dcm")  # values that pydicom's own tests name: 244 at (420, 140) and 95 at (230, 120)
    assert (pixels.fields["stored_min"], pixels.fields["stored_max"]) == (0, 264)
    for place, value in (((420, 140), 244), ((230, 120), 95)):
        assert abs(int(pixels.rgb[place][0]) - value / 264 * 255) <= 1


BROKEN = {
    "Rows": (dicom(RAMP, Rows=None), "height"),
    "empty picture": (dicom(RAMP, Rows=0), "shows nothing"),
    "huge": (dicom(RAMP, Rows=65535, Columns=65535), "million"),
    "short": (dicom(RAMP, Rows=11), "cut off"),
    "colours": (dicom(chart(), PhotometricInterpretation="CMYK"), "colour model"),
    "no colour model": (dicom(RAMP, PhotometricInterpretation=None), "colour model"),
    "samples": (dicom(RAMP, SamplesPerPixel=3), "colour model"),
    "bits": (dicom(RAMP, BitsStored=17), "17 of 16"),
    "odd bits": (dicom(RAMP, BitsAllocated=12, BitsStored=12), "12 of 12"),
    "video": (dicom(RAMP, syntax=MPEG2MPML, coded=[b"\0\0\1\xb3"]), "video"),
    "no pixels": (dicom(Modality="MR"), "no picture"),
    "a million frames": (dicom(RAMP, NumberOfFrames=1_000_000), "1000000 frames"),
    "missing frame": (dicom(np.stack([RAMP] * 2), frames=2, syntax=RLELossless, coded=[bytes(64)]), "damaged"),
    "no table": (palette(12, 2, 8, RedPaletteColorLookupTableData=b""), "damaged"),
    "meta only": (dicom(RAMP)[:200], "."),
    "preamble only": (dicom(RAMP)[:132], "does not say"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_get_a_sentence(name: str) -> None:
    data, says = BROKEN[name]
    with pytest.raises(ImageRejected, match=says) as caught:
        decode(data)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_rows_of_another_type_are_refused() -> None:
    data = dicom(RAMP)
    at = data.index(b"\x28\x00\x10\x00US\x02\x00")
    for vr, value in (
        (b"UL\x04\x00", struct.pack("<I", 0x80000001)),
        (b"US\x04\x00", b"\x0a\0\x0a\0"),
        (b"SL\x04\0", bytes(4)),
    ):
        with pytest.raises(ImageRejected, match="height"):
            decode(data[: at + 4] + vr + value + data[at + 10 :])


def test_deflated_files_are_never_inflated() -> None:
    made = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    target = io.BytesIO()
    made.save_as(target)
    with pytest.raises(ImageRejected, match="deflated"):
        decode(target.getvalue())
