"""Weights of a linear layer in blocks of 4 or 8 bits, as ONNX Runtime's MatMulNBits reads them.

A block is `block` neighbouring inputs of one output. Its values are (q - zero) * scale; zero is a whole number, so that
a weight of 0 is exact. At 8 bits zero is always 128. At 4 bits each block has its own, and its scale is searched: of
several candidates, refitted by least squares to the rounded values, the one with the smallest squared error wins. No
calibration data is needed: the result depends on the weights alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_ROWS = 1 << 22  # weights handled at a time: bounds the memory of the search
_CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the scale that just reaches the smallest and the largest weight


def pack(weight: Any, bits: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What MatMulNBits reads of a torch weight (out, in): packed weights, scales and zeros.

    Packed weights are uint8 (out, blocks, block * bits / 8), at 4 bits the first of two values in the lower half;
    scales float32 (out * blocks); zeros uint8 (out, blocks / 2 rounded up) in the same packing, None at 8 bits.
    """
    import torch

    out_features, in_features = weight.shape
    blocks = -(-in_features // block)
    rows = max(1, _ROWS // (blocks * block))
    parts = []
    for start in range(0, out_features, rows):
        part = weight[start : start + rows].to(torch.float32)
        part = torch.nn.functional.pad(part, (0, blocks * block - in_features)).reshape(len(part), blocks, block)
        values, scale, zero = _eight(part) if bits == 8 else _four(part)
        stored = values.to(torch.uint8)
        parts.append([(stored if bits == 8 else _halves(stored)).numpy(), scale.numpy(), _halves(zero).numpy()])
    packed, scales, zeros = (np.concatenate(part) for part in zip(*parts, strict=True))
    return packed, scales.reshape(-1), None if bits == 8 else zeros


def unpack(packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int, in_features: int) -> np.ndarray:
    """The (out, in) float32 weights that `pack` stored."""
    blocks = packed.shape[1]
    values = packed if bits == 8 else _wholes(packed)
    zero = np.float32(128) if zeros is None else _wholes(zeros)[:, :blocks, None].astype(np.float32)
    found = (values.astype(np.float32) - zero) * scales.reshape(*packed.shape[:2], 1)
    return found.reshape(len(packed), -1)[:, :in_features]


def _halves(values: Any) -> Any:
    """Two values of four bits in a byte; an odd one has 0 beside it."""
    import torch

    values = torch.nn.functional.pad(values.to(torch.uint8), (0, values.shape[-1] % 2))
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _wholes(packed: np.ndarray) -> np.ndarray:
    """The values of four bits in bytes."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def _eight(part: Any) -> tuple[Any, Any, Any]:
    """Values 0 to 255 around 128 and scales (rows, blocks) of float32 weights (rows, blocks, block); no zeros."""
    largest = part.gather(-1, part.abs().argmax(-1, keepdim=True))
    scale = largest / -128
    values = (part / _usable(scale)).round_().clamp_(-128, 127) + 128
    return values, scale[..., 0], scale[..., 0] * 0


def _four(part: Any) -> tuple[Any, Any, Any]:
    """Values 0 to 15, scales and zeros (rows, blocks) of float32 weights (rows, blocks, block)."""
    import torch

    low, high = part.amin(-1, keepdim=True).clamp_max(0), part.amax(-1, keepdim=True).clamp_min(0)
    span = _usable((high - low) / 15)
    zero = (-low / span).round_().clamp_(0, 15)
    best: list[Any] = []
    for candidate in _CANDIDATES:
        values = torch.minimum(torch.maximum((part / (span * candidate)).round_(), -zero), 15 - zero)
        scale = (values * part).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True).clamp_min(1)
        error = (part - values * scale).square_().sum(-1, keepdim=True)
        if best:
            better = error < best[2]
            best = [torch.where(better, new, old) for new, old in zip((values, scale, error), best, strict=True)]
        else:
            best = [values, scale, error]
    return best[0] + zero, best[1][..., 0], zero[..., 0]


def _usable(scale: Any) -> Any:
    """The scale with ones for zeros, to divide by."""
    import torch

    return torch.where(scale == 0, 1, scale)
