"""Which adapter the kiosk's model answers with: looks at the one installed, changes to it, and keeps the former one.

Installing happens elsewhere (`model.installed`, in another process perhaps); here the pointer file is watched. What
answers is a copy of the kiosk's own (`model.verified`), now and when the former one comes back, also after a new start.
Before it answers, its passport is verified where this clinic knows the coordinator's key, it must be no older than the
newest one seen and for this very base, and with it the model must still look at the picture (`model.canary`). Not
covered: whether it answers better.
"""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model import verified
    from model.backends import Backend


class AdapterWatch:
    """The adapter in use in the kiosk of `home`, and a sentence in `notice` where another one was refused."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._seen: Any = None  # state of the pointer when it was looked at last
        self._settled: Any = None  # state of the pointer that was taken or refused, so that it is tried once
        self.adapter: Path | None = None
        self.notice: str | None = None
        self.unsigned: str | None = None  # a sentence where nobody vouches for the adapter in use

    @property
    def name(self) -> str | None:
        """Name of the adapter in use, None for the model as it was installed."""
        return self.adapter.name if self.adapter else None

    @property
    def changed(self) -> bool:
        """Whether another adapter was installed since the last `refresh`."""
        return self._state() != self._seen

    def refresh(self, backend: "Backend") -> None:
        """Use the adapter that is installed now; when it is refused, keep the one before and say so."""
        from model import verified

        seen = self._seen = self._state()
        if seen == self._settled:
            return
        self._settled = seen
        try:
            found = verified.take(self._home, self.adapter)
            self._use(backend, found)
            verified.note_answered(self._home, found)
            self.notice = None
        except Exception as error:  # an adapter comes from outside: whatever is wrong with it must not stop answers
            self._fall_back(backend)
            using = f"the earlier one ({self.name})" if self.adapter else "the model as it was installed"
            self.notice = f"A new adapter was refused and {using} answers instead. {sentence(error)}"

    def _use(self, backend: "Backend", found: "verified.Verified | None") -> None:
        wanted, unsigned = (found.folder, found.unsigned) if found else (None, None)
        if wanted != self.adapter:
            self._swap(backend, wanted)
        self.adapter, self.unsigned = wanted, unsigned

    def _fall_back(self, backend: "Backend") -> None:
        """In a kiosk that has just started, answer with the copy that answered before it was ended."""
        from model import verified

        if self.adapter is None and (last := verified.answered(self._home)):
            with contextlib.suppress(Exception):  # then the model as it was installed
                self._use(backend, last)

    def _swap(self, backend: "Backend", wanted: Path | None) -> None:
        """Answer with `wanted`; when the canary refuses it, answer with the former one again and raise CanaryFailed."""
        from model import canary

        backend.swap_adapter(wanted)
        loaded = getattr(backend, "loaded", None)
        if wanted is None or loaded is None:
            return
        problem = canary.check(backend, loaded.path, adapter=wanted).problem
        if problem:
            try:
                backend.swap_adapter(self.adapter)
            except Exception:  # the former one is gone: the bare model answers, never the refused adapter
                self.adapter, self.unsigned = None, None
                backend.swap_adapter(None)
            raise canary.CanaryFailed(f"With {wanted.name}: {problem.split(';')[0]}; ask for another release.")

    def _state(self) -> Any:
        """Something that changes whenever another adapter is installed."""
        try:
            found = os.lstat(self._home / "adapters" / "current.json")
        except OSError:
            return "no adapter"
        return found.st_mtime_ns, found.st_ino, found.st_size


def sentence(error: BaseException) -> str:
    """The first line of an error as a sentence; its kind where it says nothing."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."
