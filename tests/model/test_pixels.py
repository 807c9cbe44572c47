"""Pixel values and token ids against transformers' own processors; folders that need those; no PyTorch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import pixels

PICTURES = [np.random.default_rng(n).integers(0, 256, shape, dtype=np.uint8) for n, shape in
            enumerate([(40, 57, 3), (61, 40, 3), (33, 33, 3), (300, 200, 3)])]  # fmt: skip


def clip() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})


def siglip() -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def llava_clip() -> Any:
    from model.checkpoint_tokenizer import image_processor

    return image_processor("clip", 28, "pad", {})


def llava_siglip() -> Any:
    from model.checkpoint_tokenizer import image_processor

    return image_processor("siglip", 28, "pad", {})


@pytest.mark.parametrize("made", [clip, siglip, llava_clip, llava_siglip])
def test_pixels_are_those_of_transformers(made: Any, tmp_path: Path) -> None:
    processor = made()
    processor.save_pretrained(tmp_path)
    ours = pixels.load(tmp_path)
    assert ours is not None
    for picture in PICTURES:
        theirs = processor(images=[picture], return_tensors="np")["pixel_values"][0]
        found = ours(picture)
        assert found.shape == theirs.shape and found.dtype == np.float32
        assert np.abs(found - theirs).max() < 1e-6


def test_tokens_are_those_of_transformers(tiny: Path) -> None:
    from transformers import AutoTokenizer

    from model.prompts import AFYA, encode

    theirs, ours = AutoTokenizer.from_pretrained(tiny, local_files_only=True), pixels.tokenizer(tiny)
    turns = [("Is there a nodule?", "yes"), ("<image> what?", "")]
    assert encode(ours, AFYA, turns, 4) == encode(theirs, AFYA, turns, 4)
    assert set(ours.all_special_ids) == set(theirs.all_special_ids) and len(ours) == len(theirs)


@pytest.mark.parametrize(
    "change", [{"image_processor_type": "Other"}, {"do_rescale": False}, {"image_mean": [0.5]}, {"size": {"max": 3}}]
)
def test_other_settings_are_left_to_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    siglip().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert pixels.load(tmp_path) is None
    assert pixels.tokenizer(tmp_path) is None


def test_neither_needs_torch(tiny: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from model import onnx_backend, onnx_batch, onnx_source; "
        f"onnx_source.inputs(Path({str(tiny)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
