"""DICOM greyscale: stored numbers to the 8 bits a person sees (DICOM PS3.3, C.11.1 and C.11.2; PS3.4, N.2).

The chain is: modality transform (lookup table, or rescale slope and intercept), then value-of-interest transform
(lookup table, else the first window), else a stretch from the smallest to the largest value, padding left out; then
MONOCHROME1 is inverted. Windows and rescale values of multi-frame files are found in the frame's own group first.
No percentile stretch: it would hide the brightest parts (metal, calcium) where the file itself gives no window.
Not covered: overlays, presentation states, ICC profiles, non-square pixels. Runs inside the child process only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Fields = dict[str, str | int | float]
Curve = Callable[[np.ndarray], np.ndarray]
_STRIP = 256  # rows turned at once where no table can be made: bounds the memory of float64


def number(dataset: Dataset | None, keyword: str) -> float | None:
    """The first value of an element as a finite number; None where it is absent, empty or not a number."""
    try:
        value: Any = dataset.get(keyword) if dataset is not None else None
        if isinstance(value, bytes):
            return None
        if hasattr(value, "__len__") and not isinstance(value, str):
            value = value[0] if len(value) else None
        found = float(value) if value is not None else math.nan
    except (ValueError, TypeError, OverflowError, NotImplementedError, AttributeError, KeyError):
        return None
    return found if math.isfinite(found) else None


def holder(dataset: Dataset, frame: int, macro: str, keyword: str) -> Dataset | None:
    """Where `keyword` stands for this frame: in its own functional group, the shared one, or the file's top level."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    groups = [per_frame[frame]] if frame < len(per_frame) else []
    groups += [shared[0]] if len(shared) else []
    for group in groups:
        items = group.get(macro) or []
        if len(items) and keyword in items[0]:
            return items[0]
    return dataset if keyword in dataset else None


def _table(item: Dataset, signed: bool) -> tuple[Curve, float] | None:
    """A lookup table as a function of its input, and its largest possible output; None if it is not well formed."""
    descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
    if descriptor is None or data is None or len(descriptor) != 3:
        return None
    size, first, bits = (int(v) for v in descriptor)
    size = size or 65536
    if signed and first > 32767:
        first -= 65536
    if isinstance(data, bytes):
        wide = len(data) >= 2 * size
        table = np.frombuffer(data, "<u2" if wide else "u1", count=size) if len(data) >= size else np.empty(0)
    else:
        table = np.atleast_1d(np.asarray(data, np.float64))[:size]
    if table.size != size or not 1 <= bits <= 16:
        return None
    entries = table.astype(np.float64)

    def look_up(values: np.ndarray) -> np.ndarray:
        return entries[np.clip(values - first, 0, size - 1).astype(np.int64)]

    return look_up, float(2**bits - 1)


def _modality(dataset: Dataset, frame: int, signed: bool) -> Curve:
    """Stored values to those of the machine (Hounsfield units, for one)."""
    sequence = dataset.get("ModalityLUTSequence") or []
    if len(sequence) and (table := _table(sequence[0], signed)):
        return table[0]
    source = holder(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")
    slope, intercept = number(source, "RescaleSlope"), number(source, "RescaleIntercept") or 0.0
    if not slope:
        slope = 1.0
    return lambda values: values * slope + intercept


def _window(center: float, width: float, function: str) -> Curve:
    """The three window functions of C.11.2.1.2 and C.11.2.1.3, to the range 0 to 1."""
    if function == "SIGMOID":
        return lambda v: 1 / (1 + np.exp(np.clip(-4 * (v - center) / width, -700, 700)))
    if function == "LINEAR_EXACT" or width < 1:  # LINEAR is not defined below 1; slopes far from 1 do need such widths
        return lambda v: (v - center) / width + 0.5
    if width == 1:
        return lambda v: (v > center - 0.5).astype(np.float64)
    return lambda v: (v - (center - 0.5)) / (width - 1) + 0.5


def _interest(dataset: Dataset, frame: int, signed: bool, fields: Fields) -> Curve | None:
    """The value-of-interest transform that the file gives, if it gives a usable one."""
    sequence = dataset.get("VOILUTSequence") or []
    if len(sequence) and (table := _table(sequence[0], signed)):
        look_up, top = table
        fields["display"] = "lookup table"
        return lambda values: look_up(values) / top
    source = holder(dataset, frame, "FrameVOILUTSequence", "WindowWidth")
    center, width = number(source, "WindowCenter"), number(source, "WindowWidth")
    if source is None or center is None or width is None or width <= 0:
        return None
    fields.update(display="window", window_center=center, window_width=width)
    return _window(center, width, str(source.get("VOILUTFunction") or "LINEAR"))


def _padding(dataset: Dataset, signed: bool) -> tuple[float, float] | None:
    """The range of stored values that mark "outside the picture", if the file names one."""
    first = number(dataset, "PixelPaddingValue")
    if first is None:
        return None
    last = number(dataset, "PixelPaddingRangeLimit")
    ends = [v - 65536 if signed and v > 32767 else v for v in (first, first if last is None else last)]
    return min(ends), max(ends)


def _range(stored: np.ndarray, padding: tuple[float, float] | None) -> tuple[float, float]:
    """Smallest and largest finite value that is not padding; of everything, if everything is padding."""
    low, high = math.inf, -math.inf
    for top in range(0, stored.shape[0], _STRIP):
        strip = stored[top : top + _STRIP]
        good = np.isfinite(strip)
        if padding is not None:
            good &= (strip < padding[0]) | (strip > padding[1])
        if good.any():
            low, high = min(low, float(strip[good].min())), max(high, float(strip[good].max()))
    if low > high:
        return _range(stored, None) if padding is not None else (0.0, 0.0)
    return low, high


def _stretch(machine: Curve, low: float, high: float, full: float) -> Curve:
    """Smallest value to black, largest to white; a picture of one value keeps its share of the full scale."""
    first, last = (float(v) for v in machine(np.array([low, high])))
    black, white = min(first, last), max(first, last)
    if not black < white:
        return lambda values: np.full(values.shape, min(max(low / full, 0.0), 1.0))
    return lambda values: (values / 2 - black / 2) / (white / 2 - black / 2)  # halves: float64 cannot overflow


def render(stored: np.ndarray, dataset: Dataset, frame: int, fields: Fields) -> np.ndarray:
    """Turn the stored values of one greyscale frame, (H, W) of any dtype, into uint8 (H, W).

    Adds to `fields`: display ("lookup table", "window" or "min-max") and the window used.
    """
    signed = number(dataset, "PixelRepresentation") == 1
    bits = number(dataset, "BitsStored") or 1.0
    machine = _modality(dataset, frame, signed)
    interest = _interest(dataset, frame, signed, fields)
    low, high = _range(stored, _padding(dataset, signed))
    if interest is None:
        fields["display"] = "min-max"
        interest = _stretch(machine, low, high, 2.0**bits - 1)
    inverted = str(dataset.get("PhotometricInterpretation")) == "MONOCHROME1"

    def shade(values: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            known = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
            light = np.clip(np.nan_to_num(interest(machine(known))), 0, 1)
            return ((1 - light if inverted else light) * 255 + 0.5).astype(np.uint8)

    if stored.dtype.kind in "ui" and stored.dtype.itemsize <= 2:
        return _by_table(stored, shade)
    grey = np.empty(stored.shape, np.uint8)
    for top in range(0, stored.shape[0], _STRIP):
        grey[top : top + _STRIP] = shade(stored[top : top + _STRIP])
    return grey


def _by_table(stored: np.ndarray, shade: Curve) -> np.ndarray:
    """Shade each possible 8- or 16-bit value once and look the picture up: exact, fast, and small in memory."""
    native = np.ascontiguousarray(stored, stored.dtype.newbyteorder("="))
    unsigned = np.dtype(f"u{native.dtype.itemsize}")
    every = np.arange(2 ** (8 * unsigned.itemsize), dtype=np.int64).astype(unsigned)
    table: Any = shade(every.view(native.dtype))
    return table[native.view(unsigned)]
