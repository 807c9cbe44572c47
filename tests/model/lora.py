"""Small random adapters for tests: real PEFT folders that change the answers of a tiny model."""

from pathlib import Path

import numpy as np

from model import adapters, llava


def random_adapter(base: Path, folder: Path, seed: int = 0, scale: float = 1.0, base_sha256: str | None = None) -> Path:
    """Write an adapter for `base` with both factors random, so that answers differ; returns the folder."""
    state = adapters.initial(base, 4, 8, "decoder", seed)
    draw = np.random.default_rng(seed)
    for name in state:
        if adapters.factor(name) == "B":
            state[name] = (scale * draw.standard_normal(state[name].shape)).astype(np.float32)
    adapters.save(folder, state, adapters.spec_of(state, 8, base_sha256 or llava.base_sha256(base)))
    return folder
