"""How much memory a loaded model holds, and how much a piece of work takes at its peak.

On CUDA the peak is the allocator's; on a CPU it is the resident set of this whole process, interpreter and libraries
included, because that is what a small machine has to provide. Not covered: other processes, and memory that a CUDA
context takes outside the allocator.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Filled in when the measured block ends; `bytes` is the highest use seen."""

    bytes: int = 0


def static_bytes(network: Any) -> int:
    """Bytes of all weights and buffers, the scales of quantized layers included; shared tensors count once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())}
    for layer in network.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        for scale in _scales(state):
            tensors[scale.data_ptr()] = scale.numel() * scale.element_size()
        eight = getattr(getattr(layer, "weight", None), "SCB", None)
        if eight is not None:
            tensors[eight.data_ptr()] = eight.numel() * eight.element_size()
    return sum(tensors.values())


def _scales(state: Any) -> list[Any]:
    """The tensors beside 4-bit weights: block maxima, code book and, for double quantization, their own scales."""
    if state is None:
        return []
    found = [t for t in (state.absmax, state.code, getattr(state, "offset", None)) if t is not None]
    return found + _scales(getattr(state, "state2", None))


def resident_bytes() -> int:
    """Memory this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def highest_resident_bytes() -> int:
    """The most this process held since it started, or since the last reset where the kernel allows one."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident_bytes()


def reset_highest() -> bool:
    """Forget the highest use so far; False where the system has no way to (then peaks are since process start)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def give_back() -> bool:
    """Hand memory that was freed in this process back to the system; False where the C library cannot.

    glibc keeps what loading and packing weights freed: 650 MiB of 3.1 GiB for a 1.5B model at 4 bits on a CPU.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    return trim is not None and bool(trim(0))


@contextmanager
def peak(device: str) -> Iterator[Peak]:
    """Measure the block's peak on `device` ("cpu", "cuda", "cuda:N"): `with peak("cpu") as p: ...; p.bytes`."""
    found = Peak()
    start(device)
    try:
        yield found
    finally:
        found.bytes = stop(device)


def start(device: str) -> None:
    """Begin a measurement; one at a time per device."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_highest()


def stop(device: str) -> int:
    """Highest use in bytes since `start`."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return highest_resident_bytes()


def describe() -> dict[str, int | str]:
    """This process now, for a report: its id, resident and highest bytes."""
    return {"pid": os.getpid(), "resident_bytes": resident_bytes(), "highest_bytes": highest_resident_bytes()}
