"""Picture augmentation on the training device: affine, grey-scale look, noise, cut-out. All per picture, seeded.

Works on a batch float32 (n, 3, H, W) in [0, 1]; no flips, because left and right are answers.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths; zero switches a part off."""

    rotate: float = 12.0  # degrees, uniform in +-
    scale: float = 0.15  # relative, uniform in +-
    shift: float = 0.08  # of the side, uniform in +-
    shear: float = 0.05
    gamma: float = 0.35  # log-uniform in exp(+-)
    contrast: float = 0.25
    noise: float = 0.03
    blur: float = 0.0  # probability of a 3x3 box blur
    cutout: float = 0.3  # largest side of the erased square, of the picture's side
    cutout_count: int = 1


def augment(pictures: Any, config: AugmentConfig, generator: Any) -> Any:
    """Return a changed copy of float32 pictures (n, 3, H, W) in [0, 1]."""
    import torch

    def uniform(*shape: int) -> Any:
        return torch.rand(*shape, generator=generator, device=pictures.device) * 2 - 1

    out = _affine(pictures, config, uniform)
    n = out.shape[0]
    low = out.amin((1, 2, 3), keepdim=True)
    span = (out.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-3)
    unit = ((out - low) / span).clamp(0, 1) ** torch.exp(uniform(n, 1, 1, 1) * config.gamma)
    out = low + span * unit
    mean = out.mean((1, 2, 3), keepdim=True)
    out = (
        (out - mean) * (1 + uniform(n, 1, 1, 1) * config.contrast) + mean + uniform(n, 1, 1, 1) * config.contrast * 0.3
    )
    if config.blur:
        soft = torch.nn.functional.avg_pool2d(out, 3, 1, 1, count_include_pad=False)
        out = torch.where(uniform(n, 1, 1, 1) < config.blur * 2 - 1, soft, out)
    if config.noise:
        strength = (uniform(n, 1, 1, 1) + 1) / 2 * config.noise
        out = out + strength * torch.randn(out[:, :1].shape, generator=generator, device=out.device)
    for _ in range(config.cutout_count if config.cutout else 0):
        out = _cutout(out, config.cutout, uniform)
    return out.clamp(0, 1)


def _affine(pictures: Any, config: AugmentConfig, uniform: Any) -> Any:
    import torch

    n = pictures.shape[0]
    angle = uniform(n) * config.rotate * torch.pi / 180
    zoom_x, zoom_y = 1 + uniform(n) * config.scale, 1 + uniform(n) * config.scale
    theta = torch.zeros(n, 2, 3, device=pictures.device)
    theta[:, 0, 0] = torch.cos(angle) * zoom_x
    theta[:, 0, 1] = -torch.sin(angle) + uniform(n) * config.shear
    theta[:, 1, 0] = torch.sin(angle) + uniform(n) * config.shear
    theta[:, 1, 1] = torch.cos(angle) * zoom_y
    theta[:, :, 2] = uniform(n, 2) * config.shift * 2
    grid = torch.nn.functional.affine_grid(theta, list(pictures.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pictures, grid, padding_mode="zeros", align_corners=False)


def _cutout(pictures: Any, largest: float, uniform: Any) -> Any:
    import torch

    n, _, height, width = pictures.shape
    half = (uniform(n, 1, 1) + 1) / 4 * largest
    centre_y, centre_x = (uniform(n, 1, 1) + 1) / 2, (uniform(n, 1, 1) + 1) / 2
    y = (torch.arange(height, device=pictures.device) / height).view(1, -1, 1)
    x = (torch.arange(width, device=pictures.device) / width).view(1, 1, -1)
    hole = ((y - centre_y).abs() < half) & ((x - centre_x).abs() < half)
    return pictures.masked_fill(hole.unsqueeze(1), 0.5)
