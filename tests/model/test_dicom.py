"""model.dicom and model.jpeg_frame: codings and colours of DICOM, and the files that are wrong about themselves.

Greyscale is in test_voi.py. The decoder runs in this process here, to save a child per file.
"""

import io
import struct
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

from model.image_gate import ImageRejected
from model.images import Picture
from tests.model.made import RAMP, chart, decode, dicom, encode, grey, linear, near


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
