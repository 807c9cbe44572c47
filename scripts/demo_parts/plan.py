"""What the demo does, in numbers: one frozen table, fixed before any sealed answer was looked at.

The settings were chosen on pictures of other seeds (`TUNING_SEED`); the seeds below were never used for that.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TUNING_SEED = 900  # settings were tried out on clinics of the seeds 800 to 1000 and on no others


class DemoFailed(RuntimeError):
    """The demo cannot go on; the message says why, where to look and what to do."""


@dataclass(frozen=True)
class Plan:
    """Every number that decides what the demo shows. Seeds of training and sealed pictures differ for each clinic."""

    base: Path
    out: Path
    data: Path | None = None  # SLAKE's folder; None: phantoms
    kiosk: bool = True
    rounds: int = 6
    local_steps: int = 24
    rank: int = 16
    alpha: float = 16.0
    targets: str = "decoder+projector"
    lr: float = 4e-3
    batch: int = 24
    bits: int = 4
    train_images: int = 55  # reviewed and consented pictures of each clinic, which seals about a tenth
    sealed_images: int = 30  # pictures of each clinic that nobody trains on
    train_seed: int = 51_001
    sealed_seed: int = 62_001
    adapter_seed: int = 7
    order_seed: int = 11
    seal_seed: int = 1  # decides which pictures each clinic keeps for examining releases
    size: int = 160  # side of a phantom in pixels
    kiosk_cases: int = 4  # cases of each clinic that the kiosk shows at the end

    @property
    def work(self) -> Path:
        """Where homes, logs, adapters and answers of the run lie."""
        return self.out / "work"

    @property
    def steps(self) -> int:
        """Optimizer steps of one clinic over all rounds, and of the adapter it trains alone."""
        return self.rounds * self.local_steps

    def to_dict(self) -> dict[str, Any]:
        """For the report: plain values, without folders of this machine."""
        values = asdict(self)
        values |= {"base": self.base.name, "out": self.out.name, "data": self.data.name if self.data else None}
        return values | {"steps": self.steps}
