"""model.images: the kinds of files that cameras, scanners and PACS write, and the sentences for the rest.

DICOM greyscale and codings are in test_dicom.py, hostile files in tests/reliability/test_fuzz.py.
"""

import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import images
from model.images import ImageRejected, decode, to_png
from tests.model.made import chart, dicom, encode

KINDS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_lossless_kinds_come_back_exactly(kind: str) -> None:
    picture = decode(encode(chart(), kind, **KINDS[kind]))
    assert (picture.format, picture.frames, picture.frame) == (kind, 1, 0)
    assert picture.rgb.dtype == np.uint8
    assert np.array_equal(picture.rgb, chart())


def test_jpeg_comes_back_nearly() -> None:
    picture = decode(encode(chart(), "JPEG", quality=95, subsampling=0))
    assert picture.format == "JPEG"
    assert np.abs(picture.rgb.astype(int) - chart()).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_orientation_is_applied_once(kind: str, orientation: int) -> None:
    straight = {  # what EXIF 2.32 asks for, said with numpy
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
        8: lambda a: np.rot90(a, 1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decode(encode(chart(), kind, exif=exif)).rgb
    want = straight[orientation](chart())
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want)[::5, ::5].mean() < 12


def test_orientation_in_png_and_webp() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(decode(encode(chart(), kind, exif=exif, **options)).rgb, np.rot90(chart(), -1))


def test_damaged_exif_does_not_lose_the_picture() -> None:
    data = encode(chart(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data).rgb.shape == chart().shape


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("top", "dtype"), [(65535, np.uint16), (4095, np.uint16), (1023, np.uint16)])
def test_deep_greyscale_is_scaled_not_clipped(kind: str, top: int, dtype: type) -> None:
    ramp: np.ndarray = np.linspace(0, top, 64 * 64).reshape(64, 64).astype(dtype)
    picture = decode(encode(Image.fromarray(ramp), kind))
    assert np.abs(picture.rgb[..., 1].astype(float) - ramp / top * 255).max() <= 1
    assert picture.fields["stored_max"] == top


def test_float_and_signed_tiff() -> None:
    unit = np.linspace(0, 0.5, 100, dtype=np.float32).reshape(10, 10)
    assert decode(encode(Image.fromarray(unit), "TIFF")).rgb.max() == 128
    wide = np.linspace(-1000, 3000, 100, dtype=np.float32).reshape(10, 10)
    wide[0, 0] = np.nan
    picture = decode(encode(Image.fromarray(wide), "TIFF"))
    assert (picture.rgb.min(), picture.rgb.max()) == (0, 255)
    signed = decode(encode(Image.fromarray(np.arange(-50, 50, dtype=np.int32).reshape(10, 10)), "TIFF"))
    assert (signed.rgb[0, 0, 0], signed.rgb[-1, -1, 0]) == (0, 255)


def test_white_is_zero_tiff_of_16_bits_is_turned() -> None:
    ramp = np.linspace(0, 65535, 100).reshape(10, 10).astype(np.uint16)
    data = bytearray(encode(Image.fromarray(ramp), "TIFF"))
    entry = data.index(b"\x06\x01\x03\x00\x01\x00\x00\x00")  # tag 262, SHORT, one value
    data[entry + 8] = 0
    assert decode(bytes(data)).rgb[0, 0, 0] == 255


def test_palette_alpha_cmyk_and_single_bit() -> None:
    assert np.array_equal(decode(encode(Image.fromarray(chart()).quantize(8), "PNG")).rgb, chart())
    cmyk = decode(encode(Image.fromarray(chart()).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.rgb.astype(int) - chart())[::5, ::5].mean() < 12
    bit = Image.fromarray(np.eye(9, dtype=bool))
    assert np.array_equal(decode(encode(bit, "PNG")).rgb[..., 0], np.eye(9) * 255)
    grey = decode(encode(Image.new("LA", (4, 4), (10, 255)), "PNG"))
    assert grey.rgb[0, 0].tolist() == [10, 10, 10]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_parts_are_white_and_hide_no_colour(kind: str) -> None:
    rgba = np.dstack([chart(), np.full(chart().shape[:2], 255, np.uint8)])
    rgba[:, :10, 3] = 0
    picture = decode(encode(rgba, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (picture.rgb[:, :10] == 255).all()
    assert np.array_equal(picture.rgb[:, 10:], chart()[:, 10:])


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "PNG"])
def test_several_frames_the_first_or_the_chosen_one(kind: str) -> None:
    shades = [Image.new("RGB", (12, 8), (v, v, v)) for v in (0, 100, 200)]
    data = encode(shades[0], kind, save_all=True, append_images=shades[1:], **KINDS[kind])
    first, last = decode(data), decode(data, frame=2)
    assert (first.frames, first.frame, first.rgb.max()) == (3, 0, 0)
    assert (last.frames, last.frame, last.rgb.min()) == (3, 2, 200)
    with pytest.raises(ImageRejected, match="has 3"):
        decode(data, frame=3)


def test_pages_of_different_size() -> None:
    pages = [Image.new("L", (5, 4)), Image.new("L", (9, 7))]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert decode(data, frame=1).rgb.shape == (7, 9, 3)


@pytest.mark.parametrize("frame", [-1, True, 1.0, 2**40])
def test_a_frame_that_is_no_number_is_refused(frame: int) -> None:
    with pytest.raises(ImageRejected, match="frame"):
        decode(encode(chart(), "PNG"), frame=frame)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\0", "no known picture"),
        (b"hello world" * 50, "no known picture"),
        (b"GIF89a" + bytes(300), "GIF"),
        (b"BM" + bytes(300), "BMP"),
        (b"%PDF-1.7\n" + bytes(300), "PDF"),
        (b"PK\x03\x04" + bytes(300), "unpack"),
        (b"\x1f\x8b\x08" + bytes(300), "unpack"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xef\xbb\xbf <?xml version='1.0'?>", "SVG"),
        (b"\0\0\0\x18ftypheic" + bytes(300), "HEIC"),
        (b"MZ" + bytes(126) + b"DICM", "two kinds of file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(120) + b"DICM", "two kinds of file"),
    ],
)
def test_other_files_are_refused_with_a_way_on(data: bytes, says: str) -> None:
    with pytest.raises(ImageRejected, match=says) as caught:
        decode(data)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 300


def test_large_files_are_refused_before_anything_is_done() -> None:
    with pytest.raises(ImageRejected, match="MB"):
        decode(bytes(images.MAX_BYTES + 1))


def test_truncated_and_headers_only() -> None:
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        whole = encode(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8), kind)
        for part in (whole[: len(whole) // 2], whole[:40], whole[:12]):
            with pytest.raises(ImageRejected, match=f"(?i){kind}"):
                decode(part)


def test_read_takes_any_name_and_names_no_path(tmp_path: Path) -> None:
    odd = tmp_path / "‮gnp.exe \U0001f9e0.txt"
    odd.write_bytes(encode(chart(), "PNG"))
    assert images.read(odd).format == "PNG"
    with pytest.raises(ImageRejected, match="check that it is there") as caught:
        images.read(tmp_path / "Jane Doe.png")
    assert "Jane" not in str(caught.value)


SECRET = b"PLANTED SECRET 7"


def secretive() -> dict[str, bytes]:
    """Each kind with the same words planted in every place that its writer offers."""
    from PIL import PngImagePlugin

    words = SECRET.decode()
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = words
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", words)
    text.add_itxt("XML:com.adobe.xmp", words)
    profile = b"\0" * 36 + b"acsp" + bytes(88) + SECRET
    common = {"exif": exif, "icc_profile": profile}
    return {
        "PNG": encode(chart(), "PNG", pnginfo=text, **common),
        "JPEG": encode(chart(), "JPEG", comment=SECRET, xmp=SECRET, **common),
        "TIFF": encode(chart(), "TIFF", description=words, artist=words, icc_profile=profile),
        "WEBP": encode(chart(), "WEBP", lossless=True, xmp=SECRET, **common),
        "DICOM": dicom(chart(), PatientName=words, PatientComments=words, BodyPartExamined=words, Modality=words),
    }


@pytest.mark.parametrize("kind", images.FORMATS)
def test_nothing_but_pixels_survives(kind: str) -> None:
    data = secretive()[kind]
    assert SECRET in data
    picture = decode(data)
    out = to_png(picture.rgb)
    assert SECRET not in out + picture.rgb.tobytes() + repr(picture.fields).encode()
    chunks, at = [], 8
    while at < len(out):
        chunks.append(out[at + 4 : at + 8])
        at += 12 + int.from_bytes(out[at : at + 4], "big")
    assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(out))), picture.rgb)


def test_to_png_wants_bytes_of_colour() -> None:
    assert to_png(chart()) == to_png(chart().copy(order="F"))
    for wrong in (chart().astype(float), chart()[..., :2], chart()[0, 0]):
        with pytest.raises(ValueError, match="to_png takes"):
            to_png(wrong)


def test_ten_at_once_and_a_broken_one_among_them() -> None:
    data = [encode(np.full((30, 30, 3), shade, np.uint8), "PNG") for shade in range(9)]
    found: dict[int, int | str] = {}

    def one(number: int, picture: bytes) -> None:
        try:
            found[number] = int(decode(picture).rgb.max())
        except ImageRejected as refusal:
            found[number] = str(refusal)

    threads = [threading.Thread(target=one, args=job) for job in enumerate([*data, data[0][:50]])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(9)] == list(range(9))
    assert "PNG" in str(found[9])


def test_the_open_dicom_files_match_their_manifest(shared: Path) -> None:
    folder = shared / "data" / "dicom"
    for entry in json.loads((folder / "manifest.json").read_text()):
        path = folder / entry["file"]
        if entry["file"].startswith("edge/"):
            with pytest.raises(ImageRejected):
                images.read(path)
            continue
        picture = images.read(path)
        assert picture.rgb.shape == (entry["rows"], entry["cols"], 3)
        assert picture.frames == entry["frames"]
        if "decoded" in entry:
            extremes = (picture.fields["stored_min"], picture.fields["stored_max"])
            assert extremes == (entry["decoded"]["min"], entry["decoded"]["max"]), entry["file"]
