"""Augmentation: seeded, within range, and never a flip."""

import torch

from server.augment import AugmentConfig, augment

OFF = AugmentConfig(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def pictures() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_same_seed_same_pictures_and_range_is_kept() -> None:
    first, second = (augment(pictures(), AugmentConfig(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    assert not torch.equal(first, augment(pictures(), AugmentConfig(), torch.Generator().manual_seed(6)))


def test_all_strengths_zero_changes_nothing() -> None:
    assert torch.allclose(augment(pictures(), OFF, torch.Generator().manual_seed(5)), pictures(), atol=1e-5)


def test_left_stays_left() -> None:
    half = torch.zeros(64, 3, 32, 32)
    half[..., :16] = 1.0
    changed = augment(half, AugmentConfig(cutout=0), torch.Generator().manual_seed(5))
    assert bool((changed[..., 4:12].mean((1, 2, 3)) > changed[..., 20:28].mean((1, 2, 3))).all())
