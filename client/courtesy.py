"""Standing back for the clinicians: training waits while the kiosk answers, and runs with a low priority.

The kiosk holds a lock on $AFYA_HOME/run/asking while it computes (`kiosk.busy`); the lock of a kiosk that has died is
gone with it. `Courtesy.pause` is called between layers, forwards and backwards, so it takes effect within a layer's
time however large a step is. Not covered: loading the base model, which is not interrupted.
"""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = Path("run") / "asking"
LOOK = 0.02  # seconds between two looks at the mark while training
POLL = 0.05  # seconds between two looks at it while waiting


class TimeOver(Exception):
    """The time for training has run out within a step, or while a clinician was being answered."""


class Courtesy:
    """Watches the kiosk of `home`; `clock` and `sleep` are there for tests. `waited` counts seconds stood still."""

    def __init__(
        self, home: Path, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._path, self._clock, self._sleep = home / MARK, clock, sleep
        self._looked = -1.0
        self.over = False  # whether waiting has ended at the deadline
        self.deadline: float | None = None  # by `clock`; waiting ends there
        self.waited = 0.0

    def asking(self) -> bool:
        """Whether a clinician is being answered now. Nothing is created or changed by looking."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)  # and with it the lock, microseconds after it was taken
        return False

    def pause(self) -> None:
        """Stand still while somebody is asking. Raises TimeOver, once, when the deadline has passed."""
        now = self._clock()
        if self.over or now - self._looked < LOOK:
            return
        self._in_time()
        while self.asking():
            self._sleep(POLL)
            self.waited += POLL
            self._in_time()
        self._looked = self._clock()

    def _in_time(self) -> None:
        if self.deadline is not None and self._clock() > self.deadline:
            self.over = True
            raise TimeOver("the time for training ran out")


def between_layers(model: Any, pause: Callable[[], None]) -> None:
    """Let `pause` be called after each layer of the model on the way forwards and before each on the way back."""
    import torch

    def passed(layer: Any, given: Any, made: Any) -> None:
        pause()
        first = made[0] if isinstance(made, tuple) else made
        if torch.is_tensor(first) and first.requires_grad:
            first.register_hook(lambda gradient: pause())

    for stack in model.modules():
        if isinstance(stack, torch.nn.ModuleList):
            for layer in stack:
                layer.register_forward_hook(passed)


def be_nice(level: int) -> None:
    """Lower this process's priority to `level` (0 to 19), and its later threads'; a lower one stays."""
    now = os.getpriority(os.PRIO_PROCESS, 0)
    if level > now:
        os.setpriority(os.PRIO_PROCESS, 0, level)
