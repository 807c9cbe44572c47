"""Fixtures of the kiosk's tests: a store in a home of its own, and a small picture that is a real PNG."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kiosk.records import NewImage
from kiosk.store import CaseStore


@pytest.fixture
def store(afya_home: Path) -> Iterator[CaseStore]:
    opened = CaseStore(afya_home / "kiosk.db")
    yield opened
    opened.close()


def png(brightness: int = 200, side: int = 24) -> bytes:
    """A grey PNG with a darker corner."""
    from PIL import Image

    pixels = np.full((side, side, 3), brightness, np.uint8)
    pixels[: side // 3, : side // 3] = brightness // 2
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def picture(brightness: int = 200, **fields: str | int | float) -> NewImage:
    """A picture ready to be stored."""
    return NewImage(png(brightness), "PNG", 0, 1, fields)
