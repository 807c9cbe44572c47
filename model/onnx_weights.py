"""Weights of a linear layer in blocks of 4 or 8 bits, as ONNX Runtime's MatMulNBits reads them.

A block is `block` neighbouring inputs of one output. Its values are (q - 2**(bits - 1)) * scale, so that zero is exact.
At 4 bits the scale is searched: of several candidates, refitted by least squares to the rounded values, the one with
the smallest squared error wins; no calibration data is needed. The result depends on the weights alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_ROWS = 1 << 22  # weights handled at a time: bounds the memory of the search
_CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8, -1.0, -0.93, -0.87)  # of the scale that just reaches the largest weight


def pack(weight: Any, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(out, blocks, block * bits / 8) uint8 and (out * blocks) float32 scales of a torch weight (out, in)."""
    import torch

    out_features, in_features = weight.shape
    blocks = -(-in_features // block)
    rows = max(1, _ROWS // (blocks * block))
    packed = np.empty((out_features, blocks, block * bits // 8), np.uint8)
    scales = np.empty((out_features, blocks), np.float32)
    for start in range(0, out_features, rows):
        part = weight[start : start + rows].to(torch.float32)
        part = torch.nn.functional.pad(part, (0, blocks * block - in_features)).reshape(len(part), blocks, block)
        values, scale = _quantized(part, bits)
        stored = (values + 2 ** (bits - 1)).to(torch.uint8)
        stored = stored[..., 0::2] | (stored[..., 1::2] << 4) if bits == 4 else stored
        packed[start : start + rows] = stored.numpy()
        scales[start : start + rows] = scale.numpy()
    return packed, scales.reshape(-1)


def unpack(packed: np.ndarray, scales: np.ndarray, bits: int, in_features: int) -> np.ndarray:
    """The (out, in) float32 weights that `pack` stored."""
    values = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
    found = (values.astype(np.float32) - 2 ** (bits - 1)) * scales.reshape(*packed.shape[:2], 1)
    return found.reshape(len(packed), -1)[:, :in_features]


def _quantized(part: Any, bits: int) -> tuple[Any, Any]:
    """Whole numbers (rows, blocks, block) and scales (rows, blocks) of float32 weights."""
    import torch

    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = part.gather(-1, part.abs().argmax(-1, keepdim=True))
    if bits == 8:
        scale = largest / low
        values = (part / _nonzero(scale)).round_().clamp_(low, high)
        return values, torch.where(largest == 0, 0, scale)[..., 0]
    best: tuple[Any, Any, Any] | None = None
    for candidate in _CANDIDATES:
        values = (part / _nonzero(largest / low * candidate)).round_().clamp_(low, high)
        scale = (values * part).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True).clamp_min(1)
        error = (part - values * scale).square_().sum(-1, keepdim=True)
        if best is None:
            best = values, scale, error
        else:
            better = error < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip((values, scale, error), best, strict=True))
    assert best is not None  # there is at least one candidate
    return best[0], best[1][..., 0]


def _nonzero(scale: Any) -> Any:
    import torch

    return torch.where(scale == 0, 1, scale)
