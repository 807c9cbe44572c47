"""A tiny random-weight model in the reference format, for tests: same code path, a second to make."""

from pathlib import Path

from model.build import ModelConfig, build

TINY = ModelConfig(
    image_size=32,
    patch_size=16,
    tower_layers=2,
    tower_hidden=64,
    tower_heads=2,
    tower_mlp=128,
    decoder_layers=2,
    decoder_hidden=64,
    decoder_heads=2,
    decoder_mlp=128,
    vocabulary=400,
)
CORPUS = [
    "Is there a pleural effusion in this image?",
    "What modality is used to take this image?",
    "yes no left right X-Ray CT MRI chest abdomen head pneumonia nodule",
] * 8


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write the tiny model and its processor into `folder`; returns the folder."""
    model, processor = build(TINY, CORPUS, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
