"""Untrusted bytes (PNG, JPEG, TIFF, WebP, DICOM) to an RGB array, or one plain sentence that says why not.

`decode` never lets a codec near this process: the bytes go to a child (`model._decode_child`) that has 1 GB of memory,
8 s of CPU and 10 s of wall time, and ends after one picture. What it sends back is checked against the limits again.
At most a few children run at once (one per CPU, four at most); further callers wait for their turn, so that ten
uploads cannot take ten gigabytes. POSIX only (it uses resource limits). Needs no torch.

Not covered: what a picture shows (names written into it: see `model.deid`), colour profiles, and everything the
modules `model.raster`, `model.dicom` and `model.voi` name.
"""

from __future__ import annotations

import io
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from model.image_gate import FORMATS, MAX_BYTES, MAX_PIXELS, WALL_SECONDS, ImageRejected, sniff

__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "ImageRejected", "Picture", "decode", "read", "to_png"]

_CHILD: Final = Path(__file__).with_name("_decode_child.py")
_HEAD_BYTES: Final = 16_384
_PIECE: Final = 1 << 16
_ENVIRONMENT: Final = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE")
"""What the child may know of this process's environment: enough to start Python, no secrets."""
_turns: Final = threading.BoundedSemaphore(max(1, min(4, os.cpu_count() or 1)))


@dataclass(frozen=True)
class Picture:
    """A decoded picture: `rgb` is uint8 (height, width, 3); `frame` of `frames` (counted from 0) was decoded.

    `fields` holds technical facts only (see `model.deid.safe_fields`): for DICOM the stored extremes `stored_min` and
    `stored_max` (before any window; over `stored_range_of`), the window used, modality and the like.
    """

    rgb: np.ndarray
    format: str
    frames: int
    frame: int
    fields: dict[str, str | int | float]


def decode(data: bytes, *, frame: int | None = None) -> Picture:
    """Decode one picture out of `data`; `frame` counts from 0 (unset: a DICOM's middle frame, else the first).

    Raises:
        ImageRejected: the file is not taken; its text is one plain sentence with what to do next.
    """
    kind = sniff(data)
    if frame is not None and (isinstance(frame, bool) or not isinstance(frame, int) or not 0 <= frame < 2**31):
        raise ImageRejected(f"Frame {frame!r} is not a frame number; give a whole number from 0.")
    with _turns:
        head, pixels = _ask_child(kind, data, frame)
    rgb = np.frombuffer(pixels, np.uint8).reshape(head["height"], head["width"], 3)
    return Picture(rgb, kind, head["frames"], head["frame"], head["fields"])


def read(path: Path, *, frame: int | None = None) -> Picture:
    """Decode the picture in the file at `path`; its name plays no part.

    Raises:
        ImageRejected: the file cannot be read, or is not taken.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ImageRejected(
            f"The file cannot be read ({error.strerror or type(error).__name__}); check that it is there and readable."
        ) from error
    return decode(data, frame=frame)


def to_png(rgb: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) or (H, W) as PNG with nothing but pixels in it: no text, no time, no profile.

    Raises:
        ValueError: another dtype or shape.
    """
    from PIL import Image

    if rgb.dtype != np.uint8 or rgb.ndim not in (2, 3) or (rgb.ndim == 3 and rgb.shape[2] != 3):
        raise ValueError(f"to_png takes uint8 of shape (H, W, 3) or (H, W), not {rgb.dtype} of shape {rgb.shape}")
    target = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).save(target, "PNG", compress_level=6)
    return target.getvalue()


def _ask_child(kind: str, data: bytes, frame: int | None) -> tuple[dict[str, Any], bytearray]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    request = json.dumps({"format": kind, "frame": frame}).encode() + b"\n"
    deadline = time.monotonic() + WALL_SECONDS
    child = subprocess.Popen(
        [sys.executable, "-P", str(_CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment, bufsize=0, cwd="/",
    )  # fmt: skip
    try:
        talk = _Talk(child, request, data, deadline)
        head = talk.head()
        if head is None:
            raise ImageRejected(_death(kind, _end(child), talk.late))
        if "refused" in head:
            raise ImageRejected(str(head["refused"])[:400])
        _check_head(head)
        pixels = talk.pixels(head["height"] * head["width"] * 3)
        if pixels is None:
            raise ImageRejected(_death(kind, _end(child), talk.late))
        return head, pixels
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()


def _end(child: subprocess.Popen[bytes]) -> int:
    """The exit code of a child that closed its answer; 0 for one that had to be stopped because it went on."""
    try:
        return child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return 0


class _Talk:
    """Feeds a child and reads its answer at the same time, until a deadline, without keeping a copy of either."""

    def __init__(self, child: subprocess.Popen[bytes], request: bytes, data: bytes, deadline: float) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._in, self._out = child.stdin, child.stdout
        self._unsent = [memoryview(request), memoryview(data)]
        self._deadline = deadline
        self._rest = b""
        self.late = False
        for pipe in (self._in, self._out):
            os.set_blocking(pipe.fileno(), False)

    def head(self) -> dict[str, Any] | None:
        """The child's line of JSON; None when it ended, or the time did, without one."""
        line = bytearray()
        while b"\n" not in line:
            piece = self._next(_PIECE)
            if not piece or len(line) > _HEAD_BYTES:
                return None
            line += piece
        first, _, self._rest = bytes(line).partition(b"\n")
        try:
            head = json.loads(first)
        except ValueError:
            return None
        return head if isinstance(head, dict) else None

    def pixels(self, size: int) -> bytearray | None:
        """Exactly `size` bytes; None when fewer come, or more, or not in time."""
        pixels = bytearray(size)
        view = memoryview(pixels)
        at = min(len(self._rest), size)
        view[:at] = self._rest[:at]
        while at < size:
            piece = self._next(min(_PIECE, size - at))
            if not piece:
                return None
            view[at : at + len(piece)] = piece
            at += len(piece)
        return pixels if len(self._rest) <= size and not self._next(1) else None

    def _next(self, size: int) -> bytes:
        """The next piece of the answer (empty at its end or at the deadline), sending what is unsent meanwhile."""
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._out, selectors.EVENT_READ)
            if self._unsent:
                waiting.register(self._in, selectors.EVENT_WRITE)
            while (left := self._deadline - time.monotonic()) > 0:
                ready = {key.fileobj for key, _ in waiting.select(left)}
                if self._out in ready:
                    return self._out.read(size) or b""
                if self._in in ready and not self._send():
                    waiting.unregister(self._in)
                    self._in.close()
        self.late = True
        return b""

    def _send(self) -> bool:
        """Send one piece; False when nothing is left to send or the child no longer listens."""
        try:
            sent = os.write(self._in.fileno(), self._unsent[0][: 1 << 20])
        except BlockingIOError:
            return True
        except BrokenPipeError:
            self._unsent = []
            return False
        self._unsent[0] = self._unsent[0][sent:]
        if not self._unsent[0]:
            self._unsent.pop(0)
        return bool(self._unsent)


def _check_head(head: dict[str, Any]) -> None:
    """Believe nothing that a child may have been made to say."""
    numbers: list[Any] = [head.get(name) for name in ("width", "height", "frames", "frame")]
    fields = head.get("fields")
    sound = (
        all(type(n) is int for n in numbers)
        and min(numbers[:3]) >= 1
        and numbers[0] * numbers[1] <= MAX_PIXELS
        and 0 <= numbers[3] < numbers[2]
        and isinstance(fields, dict)
        and all(isinstance(v, str | int | float) and len(str(v)) <= 80 for v in fields.values())
    )
    if not sound:
        raise ImageRejected("The picture's decoder gave an answer that makes no sense; export the picture again.")


def _death(kind: str, code: int, late: bool) -> str:
    """The sentence for a child that ended without an answer."""
    if late or code in (-signal.SIGXCPU, -signal.SIGKILL):
        return (
            f"This {kind} file takes longer than {WALL_SECONDS:.0f} seconds to decode, so it was stopped; "
            "export it smaller or uncompressed."
        )
    return f"This {kind} file is damaged in a way that ends its decoder; export it again from its source."
