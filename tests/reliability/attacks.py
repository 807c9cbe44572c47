"""Hostile pictures, made in code: patterns of published flaws in image and DICOM readers, each a few lines.

Nothing of these is stored as a file. `ATTACKS` names each one with the function that makes its bytes; every one of
them must be refused. Patterns: decompression bombs (deflate, PNG, RLE, TIFF, WebP, JPEG), lengths that are trusted,
16-bit fields given as 32 bits, loops, deep nesting, files of two kinds at once. `python -m tests.reliability.attacks`
lists name, size, time and answer.
"""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from tests.model.made import chart, dicom, encode, item

GREY = np.zeros((16, 16), np.uint8)


def _packed_zeros(mebibytes: int, wbits: int = 15) -> bytes:
    packer = zlib.compressobj(9, wbits=wbits)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(mebibytes)) + packer.flush()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, body: bytes, *chunks: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def dicom_deflate_bomb() -> bytes:
    """Half a megabyte that inflates to 512: pydicom itself takes a gigabyte for it."""
    honest = dicom(GREY, syntax=DeflatedExplicitVRLittleEndian)
    body = 144 + struct.unpack("<I", honest[140:144])[0]  # the group that says how the file is coded ends here
    return honest[:body] + _packed_zeros(512, wbits=-15)


def png_flood() -> bytes:
    """164 KB, 169 million pixels: under Pillow's own error limit."""
    return _png(13000, 13000, _packed_zeros(162))


def png_text_bomb() -> bytes:
    return _png(4, 4, zlib.compress(bytes(20)), _chunk(b"zTXt", b"Comment\0\0" + _packed_zeros(256)))


def png_short_data() -> bytes:
    return _png(6000, 6000, zlib.compress(b"\0" * 100))


def png_many_frames() -> bytes:
    return _png(4, 4, zlib.compress(bytes(20)), _chunk(b"acTL", struct.pack(">II", 0x7FFFFFFF, 0)))


def rle_flood() -> bytes:
    """8192 x 8192 in 8 frames: half a gigabyte out of eight megabytes."""
    frame = struct.pack("<16I", 1, 64, *([0] * 14)) + b"\x81\0" * (8192 * 8192 // 128)
    described = dicom(GREY, syntax=RLELossless, coded=[frame] * 8)
    return _resize(described, 8192, 8192)


def rle_overflow() -> bytes:
    """A 16 x 16 picture whose run-length segment unpacks to 256 megabytes."""
    frame = struct.pack("<16I", 1, 64, *([0] * 14)) + b"\x81\0" * (2 << 20)
    return dicom(GREY, syntax=RLELossless, coded=[frame])


def _resize(data: bytes, rows: int, columns: int) -> bytes:
    for tag, value in ((b"\x28\x00\x10\x00US\x02\x00", rows), (b"\x28\x00\x11\x00US\x02\x00", columns)):
        at = data.index(tag) + 8
        data = data[:at] + struct.pack("<H", value) + data[at + 2 :]
    return data


def dicom_sides_of_65535() -> bytes:
    return _resize(dicom(GREY), 65535, 65535)


def dicom_rows_as_32_bits() -> bytes:
    data = dicom(GREY)
    at = data.index(b"\x28\x00\x10\x00US\x02\x00")
    return data[:at] + b"\x28\x00\x10\x00UL\x04\x00" + struct.pack("<I", 0x10000010) + data[at + 10 :]


def dicom_trusted_length() -> bytes:
    """An element that announces four gigabytes and brings ten bytes."""
    data = dicom(GREY)
    at = data.index(b"\xe0\x7f\x10\x00")
    return data[:at] + b"\xe0\x7f\x10\x00OB\0\0" + struct.pack("<I", 0xFFFFFFF0) + bytes(10)


def dicom_nested() -> bytes:
    """Ten thousand sequences inside each other."""
    data = dicom(Modality="OT")
    opened = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return data + opened * 10_000


def dicom_many_frames() -> bytes:
    return dicom(GREY, NumberOfFrames=2**31 - 1)


def dicom_directory_traversal() -> bytes:
    record = item(DirectoryRecordType="IMAGE", ReferencedFileID=["UP", "UP", "ETC", "PASSWD"])
    return dicom(DirectoryRecordSequence=[record]).replace(b"UP", b"..")


def dicom_jpeg_flood() -> bytes:
    """A 16 x 16 picture whose JPEG stream says 65535 x 65535."""
    stream = bytearray(encode(GREY, "JPEG"))
    at = stream.index(b"\xff\xc0") + 5
    stream[at : at + 4] = struct.pack(">HH", 65535, 65535)
    return dicom(GREY, syntax=JPEGBaseline8Bit, coded=[bytes(stream)])


def dicom_jpeg2000_flood() -> bytes:
    stream = bytearray(encode(GREY, "JPEG2000", no_jp2=True))
    at = stream.index(b"\xff\x51") + 6
    stream[at : at + 8] = struct.pack(">II", 60000, 60000)
    return dicom(GREY, syntax=JPEG2000Lossless, coded=[bytes(stream)])


def dicom_program() -> bytes:
    """A Windows program in the preamble (CVE-2019-11687)."""
    return dicom(GREY, preamble=b"MZ\x90\0" + bytes(124))


def _tiff(entries: list[tuple[int, int, int]], body: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of one directory; an entry is (tag, type 3 or 4, value)."""
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + struct.pack("<I", following) + body


_SMALL = [(256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1)]


def tiff_tile_bomb() -> bytes:
    """A 16 x 16 picture in one tile of 65520 x 65520."""
    packed = _packed_zeros(64)
    entries = [*_SMALL, (322, 4, 65520), (323, 4, 65520), (324, 4, 8 + 2 + 9 * 12 + 4), (325, 4, len(packed))]
    return _tiff(entries, packed)


def tiff_flood() -> bytes:
    packed = _packed_zeros(64)
    entries = [(256, 4, 60000), (257, 4, 60000), *_SMALL[2:], (273, 4, 8 + 2 + 8 * 12 + 4), (278, 4, 60000)]
    return _tiff([*entries, (279, 4, len(packed))], packed)


def tiff_loop() -> bytes:
    """A directory that names itself as the next page."""
    return _tiff([*_SMALL, (273, 4, 0), (279, 4, 10**9)], following=8)


def tiff_many_pages() -> bytes:
    """Two hundred thousand pages of nothing."""
    page = struct.Struct("<HI")
    return b"II*\0\x08\0\0\0" + b"".join(page.pack(0, 8 + 6 * (n + 1)) for n in range(200_000)) + page.pack(0, 0)


def webp_flood() -> bytes:
    body = b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(64)
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


def jpeg_flood() -> bytes:
    data = bytearray(encode(chart(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


def jpeg_scans() -> bytes:
    """A progressive JPEG of 36 million pixels that repeats a scan 3,000 times: minutes of work in a megabyte."""
    data = encode(Image.new("L", (6000, 6000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 3000 + data[-2:]


def gif_frames() -> bytes:
    target = io.BytesIO()
    Image.new("P", (8, 8)).save(target, "GIF")
    return target.getvalue()[:-1] + b"\x2c\0\0\0\0\x08\0\x08\0\0\x02\x02\x4c\x01\0" * 10_000 + b"\x3b"


def jpeg_and_zip() -> bytes:
    return encode(chart(), "JPEG") + b"PK\x03\x04" + bytes(60) + b"PK\x05\x06" + bytes(18)


def jpeg_and_pdf() -> bytes:
    return encode(chart(), "JPEG", comment=b"%PDF-1.4 1 0 obj")


def png_and_script() -> bytes:
    return _png(4, 4, zlib.compress(bytes(20)), _chunk(b"tEXt", b"Comment\0<SCRIPT>alert(1)</SCRIPT>"))


def png_and_more() -> bytes:
    return _png(4, 4, zlib.compress(bytes(20))) + bytes(8192)


ATTACKS: dict[str, Callable[[], bytes]] = {
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "xml entities": lambda: b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><a>&c;</a>',
    "zip": lambda: b"PK\x03\x04" + bytes(26) + _packed_zeros(64, -15),
    "gzip": lambda: _packed_zeros(64, 31),
} | {
    made.__name__.replace("_", " "): made
    for made in (
        dicom_deflate_bomb, png_flood, png_text_bomb, png_short_data, png_many_frames, rle_flood, rle_overflow,
        dicom_sides_of_65535, dicom_rows_as_32_bits, dicom_trusted_length, dicom_nested, dicom_many_frames,
        dicom_directory_traversal, dicom_jpeg_flood, dicom_jpeg2000_flood, dicom_program, tiff_tile_bomb, tiff_flood,
        tiff_loop, tiff_many_pages, webp_flood, jpeg_flood, jpeg_scans, gif_frames, jpeg_and_zip, jpeg_and_pdf,
        png_and_script, png_and_more,
    )
}  # fmt: skip


def main() -> None:
    """Try each attack and say what came of it."""
    import time

    from model.images import ImageRejected, decode

    for name, make in ATTACKS.items():
        data, start = make(), time.monotonic()
        try:
            answer = f"TAKEN {decode(data).rgb.shape}"
        except ImageRejected as refusal:
            answer = str(refusal)
        print(f"{name:26s} {len(data) / 1000:9.1f} kB {time.monotonic() - start:5.1f} s  {answer}")


if __name__ == "__main__":
    main()
