"""DP-SGD on the adapter (Abadi et al. 2016, arXiv:1607.00133), one patient being the unit that is protected.

Every step takes each patient with the same probability, clips the gradient of all of that patient's questions as one,
adds Gaussian noise to the sum and divides by the expected number of patients. Who is taken and the noise come from the
system's random source, never from the server's seed. What it costs is in `client.ledger`. Not covered: attacks on the
rounding of floating-point noise (Mironov 2012), and the counts of samples and steps, which leave as they are.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from client.batches import Group
from client.steps import Gradient

Entropy = Callable[[int], bytes]


@dataclass(frozen=True)
class Noise:
    """`multiplier`: noise relative to `clip`; `clip`: largest norm of a patient's gradient; `rate`: share of patients
    in a step."""

    multiplier: float
    clip: float
    rate: float


class PrivateGradient:
    """Stands where `client.steps.Gradient` stands; `patients` holds the groups of rows of each patient."""

    def __init__(
        self, gradient: Gradient, patients: Sequence[Sequence[Group]], noise: Noise, entropy: Entropy = os.urandom
    ) -> None:
        self.gradient, self.patients, self.noise, self.entropy = gradient, patients, noise, entropy
        self.parameters = gradient.parameters

    def step(self) -> float:
        """Noisy mean gradient of the patients taken this time; returns their mean loss, which must not leave."""
        import torch

        chosen = np.flatnonzero(uniform(len(self.patients), self.entropy) < self.noise.rate)
        sums = [torch.zeros_like(parameter) for parameter in self.parameters]
        losses = []
        for number in chosen:
            self.gradient.clear()
            losses.append(self.gradient.of(self.patients[int(number)]))
            scale = self._scale()
            for total, parameter in zip(sums, self.parameters, strict=True):
                if scale and parameter.grad is not None:
                    total.add_(parameter.grad, alpha=scale)
        expected = self.noise.rate * len(self.patients)
        for total, parameter in zip(sums, self.parameters, strict=True):
            spread = self.noise.multiplier * self.noise.clip
            drawn = spread * normal(total.numel(), self.entropy).astype(np.float32)
            total.add_(torch.from_numpy(drawn).reshape(total.shape).to(total.device))
            parameter.grad = total.div_(expected)
        known = [loss for loss in losses if math.isfinite(loss)]
        return float(np.mean(known)) if known else 0.0

    def _scale(self) -> float:
        """Factor that brings the present gradient below the clip; 0 for one that is no number: it adds nothing."""
        squares = sum(float(p.grad.double().square().sum()) for p in self.parameters if p.grad is not None)
        norm = math.sqrt(squares) if math.isfinite(squares) else math.inf
        return 0.0 if math.isinf(norm) else min(1.0, self.noise.clip / max(norm, 1e-30))


def uniform(count: int, entropy: Entropy = os.urandom) -> np.ndarray:
    """`count` numbers in [0, 1) from the system's random source, 53 bits each."""
    return (np.frombuffer(entropy(8 * count), np.uint64) >> np.uint64(11)) * 2.0**-53


def normal(count: int, entropy: Entropy = os.urandom) -> np.ndarray:
    """`count` standard normal numbers from the system's random source (Box and Muller 1958)."""
    half = (count + 1) // 2
    radius = np.sqrt(-2.0 * np.log1p(-uniform(half, entropy)))
    angle = 2.0 * np.pi * uniform(half, entropy)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
