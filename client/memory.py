"""The memory that training may take: a cap on the process, and telling that memory has run out from other failures.

The cap is the kernel's limit on a process's own data, so an allocation beyond it fails like one on a full machine and
training takes smaller parts (`client.steps`). Not covered: a cap on a graphics card's memory; there only what the
process holds in main memory is looked at.
"""

import contextlib
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
_PHRASES = ("out of memory", "can't allocate memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
_STATUS = Path("/proc/self/status")


class MemoryShort(RuntimeError):
    """Training needs more memory than the clinic allows; the message says how much there is."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory has run out, whatever library says so and however."""
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in _PHRASES)


def free() -> None:
    """Hand back what a failed attempt left behind."""
    import sys

    from model import memory

    gc.collect()
    memory.give_back()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def check(most_mib: int) -> None:
    """Raise MemoryShort when the process holds more than `most_mib` (0: no limit)."""
    from model import memory

    held = memory.resident_bytes() // MIB
    if most_mib and held > most_mib:
        raise MemoryShort(
            f"training holds {held} MiB of memory, this clinic allows {most_mib} (max_memory_mib in afya.toml)"
        )


@contextlib.contextmanager
def capped(most_mib: int) -> Iterator[None]:
    """Let the process grow to `most_mib` of memory within the block (0: no limit). Raises MemoryShort if it is above.

    What it may still take is reckoned from what it holds now, since addresses and memory are not the same.
    """
    check(most_mib)
    data = _own_data()
    if not most_mib or data is None or _on_gpu():  # CUDA reserves addresses by the terabyte
        yield
        return
    from model import memory

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = data + most_mib * MIB - memory.resident_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard < 0 else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _own_data() -> int | None:
    """Bytes that count against RLIMIT_DATA; None where the system does not say."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return None


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
