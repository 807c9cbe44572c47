"""The child process of `model.images`: takes one file on its standard input, gives back pixels, and ends.

It limits its own memory, CPU time, open files and (once everything is imported) its right to write files before it
reads a byte of the picture. The answer is one line of JSON and then the raw pixels: never pickle. The standard output
and error that codecs may write to are closed off, so that nothing of a file's content reaches a log. Not covered:
system calls are not filtered; an attacker who takes the codec over still runs as the same user.

Run by hand: printf '{"format": "PNG", "frame": null}\\n' | cat - picture.png | python model/_decode_child.py | head -1
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if __name__ == "__main__":  # run by its path: make the package findable whatever the working folder is
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.image_gate import CPU_SECONDS, MAX_BYTES, MAX_PIXELS, MEMORY_LIMIT, ImageRejected

if TYPE_CHECKING:
    from model.raster import Decoded


def decode(kind: str, data: bytes, frame: int | None) -> Decoded:
    """Decode `data` in this process, importing only what `kind` needs.

    Raises:
        ImageRejected: for every file that is not taken, whatever the codec raised.
    """
    try:
        if kind == "DICOM":
            from model import dicom

            return dicom.decode(data, frame)
        from model import raster

        return raster.decode(kind, data, frame)
    except ImageRejected:
        raise
    except MemoryError as error:
        raise ImageRejected(
            f"This {kind} file needs more memory than one picture may take, so it was not opened; export it smaller."
        ) from error
    except Exception as error:  # the one place: Pillow and pydicom let a dozen kinds out, each means a damaged file
        raise ImageRejected(
            f"This {kind} file is damaged or incomplete; copy or export it again from its source."
        ) from error


def _prepare(kind: str) -> None:
    """Import the decoders before the right to write files is taken away (Python caches compiled modules)."""
    if kind == "DICOM":
        sys.modules.setdefault("requests", None)  # type: ignore[arg-type]  # pydicom's downloader: never needed here
        import model.dicom
        import model.jpeg_frame
    else:
        import PIL.ImageOps

        import model.raster  # noqa: F401

        PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def _limit(name: str, value: int) -> None:
    import resource

    resource.setrlimit(getattr(resource, name), (value, value))


def main() -> None:
    """Serve one request and end; exit code 0 also when the picture is refused."""
    answer = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_CPU", CPU_SECONDS)
    _limit("RLIMIT_AS", MEMORY_LIMIT)
    _limit("RLIMIT_NOFILE", 64)
    request = json.loads(sys.stdin.buffer.readline(256))
    _prepare(request["format"])
    _limit("RLIMIT_FSIZE", 0)
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    _answer(answer, request, data)


def _answer(answer: BinaryIO, request: dict[str, Any], data: bytes) -> None:
    try:
        picture = decode(request["format"], data, request["frame"])
    except ImageRejected as refusal:
        answer.write(json.dumps({"refused": str(refusal)}).encode() + b"\n")
    else:
        head = picture._asdict()
        pixels = head.pop("rgb")
        answer.write(json.dumps(head, allow_nan=False).encode() + b"\n")
        answer.write(pixels)
    answer.flush()
    os._exit(0)  # skip the interpreter's tidying up: some codecs crash in it after a damaged file


if __name__ == "__main__":
    main()
