"""The arithmetic of sizes against models that are really loaded, and the presets against the published counts."""

import json
from pathlib import Path

import pytest

from model import llava, memory, presets, sizes
from model.checkpoints import import_checkpoint
from tests.model import originals


@pytest.fixture(scope="module", params=["siglip", "clip", "reference"])
def folder(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "reference":
        return tiny
    made, place = originals.original(clip=request.param == "clip"), tmp_path_factory.mktemp("sizes")
    src = originals.write_original(made, place / "src")
    return import_checkpoint(src, place / "out", tower=originals.write_tower(made, place / "tower")).out


@pytest.mark.parametrize("bits", llava.BITS)
def test_the_arithmetic_gives_what_is_loaded(folder: Path, bits: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    loaded = llava.load(folder, bits, device="cpu").core
    places = sum(b.numel() * b.element_size() for b in loaded.buffers())  # rotary tables, position numbers
    assert memory.static_bytes(loaded) - places == pytest.approx(sizes.static_bytes(config, bits, 4), rel=0.002)
    if bits == 32:
        assert sizes.parameters(config) == sum(p.numel() for p in loaded.parameters())


def test_the_presets_have_the_published_sizes() -> None:
    """Counts of seed and LLaVA-Med checkpoints; 15.13 GB is also the sum of LLaVA-Med's four files."""
    tiny, med = (presets.size_facts(presets.preset(name)) for name in ("tinyllava-1.5b", "llava-med-v1.5-7b"))
    assert tiny["parameters"] == 1_504_353_824 and tiny["bytes_16"] == 3_008_707_648
    assert med["bytes_16"] == pytest.approx(15.13e9, rel=1e-3)
    for facts in (tiny, med):
        assert facts["bytes_4"] < facts["bytes_8"] < facts["bytes_16"]


def test_presets_are_known_by_name_and_never_pinned_by_guess() -> None:
    names = [p.name for p in presets.PRESETS]
    assert {"reference", "tinyllava-1.5b", "tinyllava-med-f", "llava-med-v1.5-7b", "tiny-llava-v1-hf"} <= set(names)
    assert all(p.revision is None or len(p.revision) == 40 for p in presets.PRESETS)
    assert presets.is_here(presets.preset("reference")) and not presets.is_here(presets.preset("tinyllava-1.5b"))
    with pytest.raises(presets.PresetMissing, match="known are reference"):
        presets.preset("gpt")
