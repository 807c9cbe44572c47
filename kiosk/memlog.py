"""Memory, seconds and speed of every answer, kept in the case database and given back for plots.

Resident memory is the whole kiosk process's as the operating system counts it; `peak_bytes` is what the backend
measured while answering. Does not sample in between: a plot shows the moments of start, loading and answers only.
"""

from typing import TYPE_CHECKING, Any

from kiosk.store import CaseStore

if TYPE_CHECKING:
    from model.backends import Answer


def resident_bytes() -> int:
    """Memory this process occupies now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def note(store: CaseStore, event: str, backend: str | None = None) -> None:
    """Record the memory at a moment other than an answer: "start" or "model loaded"."""
    store.log_memory(event, resident_bytes(), backend=backend)


def note_answer(store: CaseStore, turn_id: int, answer: "Answer") -> None:
    """Record memory, seconds to the first word, and speed of one answer."""
    measured: dict[str, Any] = {"turn_id": turn_id, "backend": answer.backend, "peak_bytes": answer.peak_bytes}
    measured |= {"first_token_seconds": answer.first_token_seconds, "seconds": answer.seconds}
    if answer.seconds > 0:
        measured["tokens_per_second"] = answer.tokens / answer.seconds
    store.log_memory("answer", resident_bytes(), **measured)
