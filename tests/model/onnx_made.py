"""Quantized tiny models and requests for the ONNX tests."""

from pathlib import Path

import numpy as np

from model import quantize
from model.backends import Answer, Backend, Request

PICTURES = [np.random.default_rng(n).integers(0, 256, (40 + 9 * n, 50, 3), dtype=np.uint8) for n in range(3)]
QUESTIONS = ["Is there a nodule?", "What modality is used to take this image, and where?", "left"]
REQUESTS = [Request(PICTURES[n % 3], QUESTIONS[n % 2], max_new_tokens=6) for n in range(5)]


def quantized(model: Path, out: Path, bits: int) -> Path:
    """The ONNX copy of a model folder at 32, 8 or 4 bits."""
    quantize.quantize(model, out, quantize.plan(bits))
    return out


def answers(backend: Backend, requests: list[Request]) -> list[Answer]:
    """The answers in the order of the requests."""
    found: dict[int, Answer] = dict(item for item in backend.generate(requests) if isinstance(item, tuple))
    return [found[n] for n in range(len(requests))]
