"""Memory figures against sizes known beforehand."""

import mmap
from pathlib import Path

import pytest

from model import llava, memory


def test_static_bytes_count_shared_weights_once_and_scales_too(tiny: Path) -> None:
    sizes = {bits: memory.static_bytes(llava.load(tiny, bits, device="cpu").core) for bits in llava.BITS}
    plain = (tiny / "model.safetensors").stat().st_size
    assert plain * 0.9 < sizes[32] < plain * 1.1, "float32 in memory is what lies on disk; the tied head is one table"
    assert sizes[32] == pytest.approx(2 * sizes[16], rel=0.01)
    assert sizes[4] < sizes[8] < sizes[32]
    quantized = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 64 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert sizes[32] - sizes[8] == pytest.approx(3 * quantized, rel=0.03)
    assert sizes[4] - (sizes[32] - 4 * quantized) > quantized / 2, "4-bit weights are half a byte each, plus scales"


def test_peak_sees_memory_that_is_gone_again() -> None:
    if not memory.reset_highest():
        pytest.skip("this system cannot reset the highest resident size")
    before = memory.resident_bytes()
    size = 64 * memory.MIB
    with memory.peak("cpu") as found, mmap.mmap(-1, size) as block:  # unmapped at the end; a freed array may stay
        block.write(b"1" * size)
    assert found.bytes >= before + 48 * memory.MIB
    with memory.peak("cpu") as later:
        pass
    assert later.bytes < found.bytes - 32 * memory.MIB


def test_freed_memory_can_be_handed_back() -> None:
    held = [bytes(100_000) for _ in range(2000)]  # small enough to lie in the heap, where freeing alone returns nothing
    before = memory.resident_bytes()
    last = held.pop()
    held.clear()
    if memory.give_back():
        assert memory.resident_bytes() < before - 100 * memory.MIB
    assert len(last) == 100_000


def test_describe_is_this_process() -> None:
    facts = memory.describe()
    assert int(facts["highest_bytes"]) >= int(facts["resident_bytes"]) * 0.9 > 0
