"""One model for the whole kiosk, with a queue in front of it: questions are answered one at a time, in order.

The answer is made and saved by a worker thread, so closing the browser or pressing reload loses nothing: a screen only
watches a `Job`. Before each question the worker looks whether another adapter was installed and changes to it without a
restart; one that is refused leaves the adapter before it in place, and a sentence for the screens. Does not cover
answering several questions in one batch, nor stopping a library call that hangs: its question is given up instead.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiosk import memlog
from kiosk.settings import Settings
from kiosk.store import CaseStore, StoreError

if TYPE_CHECKING:
    from model.backends import Answer, Backend, Request, Token

_POLL_SECONDS = 0.25  # how often a waiting screen looks at the clock


class AnswerFailed(RuntimeError):
    """A question got no answer; the message is one sentence for the person who asked."""


@dataclass
class Job:
    """A question on its way: the pieces of its answer so far, and in the end an answer or a problem."""

    turn_id: int
    request: "Request"
    seconds: float  # how long the answer may take once its turn has come
    ahead: int = 0  # questions that were waiting before this one
    started: float | None = None
    pieces: list[str] = field(default_factory=list)
    answer: "Answer | None" = None
    problem: str | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)
    created: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.answer is not None or self.problem is not None

    @property
    def overdue(self) -> bool:
        """Whether it took longer than allowed, counting the questions before it."""
        if self.started is not None:
            return time.monotonic() - self.started > self.seconds
        return time.monotonic() - self.created > self.seconds * (self.ahead + 1)

    def add(self, piece: str) -> None:
        """Another piece of the answer."""
        with self.changed:
            self.pieces.append(piece)
            self.changed.notify_all()

    def finish(self, answer: "Answer | None", problem: str | None) -> None:
        """Nothing more will come; the first end counts."""
        with self.changed:
            if not self.done:
                self.answer, self.problem = answer, problem
            self.changed.notify_all()


@dataclass(frozen=True)
class Status:
    """What the screens show about the model. `state`: loading, ready or failed; `problem`, `notice`: sentences."""

    state: str
    problem: str | None
    notice: str | None
    backend: str | None
    reason: str | None
    adapter: str | None
    waiting: int


def make_backend(settings: Settings) -> "Backend":
    """Load the model that the settings name, without an adapter. Takes seconds; raises with one plain sentence."""
    from model.backends import TorchBackend
    from model.presets import reference_path

    return TorchBackend(Path(settings.model).expanduser() if settings.model else reference_path(), settings.bits)


class Engine:
    """The queue and the worker in front of one backend. `factory` makes the backend, in the worker's thread."""

    def __init__(self, store: CaseStore, home: Path, settings: Settings, factory: "Callable[[], Backend]") -> None:
        self._store, self._home, self._settings, self._factory = store, home, settings, factory
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._by_turn: dict[int, Job] = {}
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._adapter: Path | None = None
        self._refused: Any = None  # the state of the adapter folder that was refused, so that it is tried once
        self._problem: str | None = None
        self._notice: str | None = None
        self._thread = threading.Thread(target=self._work, name="afya-answers", daemon=True)
        self._thread.start()

    def submit(self, turn_id: int, request: "Request") -> Job:
        """Queue a question whose turn is already saved; one that is on its way already is not queued again."""
        with self._lock:
            job = self._by_turn.get(turn_id)
            if job is None or job.done:
                ahead = sum(not other.done for other in self._by_turn.values())
                self._by_turn = {key: other for key, other in self._by_turn.items() if not other.done}
                job = self._by_turn[turn_id] = Job(turn_id, request, float(self._settings.answer_seconds), ahead)
                self._jobs.put(job)
            return job

    def job(self, turn_id: int) -> Job | None:
        """The question on its way, or None: then a turn that still waits was interrupted and can be asked again."""
        job = self._by_turn.get(turn_id)
        return job if job is not None and not job.done else None

    def stream(self, job: Job) -> Iterator[str]:
        """The answer's pieces as they come. Raises AnswerFailed. Leaving early does not stop the answer."""
        shown = 0
        while True:
            with job.changed:
                if len(job.pieces) == shown and not job.done:
                    job.changed.wait(_POLL_SECONDS)
                fresh, done = job.pieces[shown:], job.done
            yield from fresh
            shown += len(fresh)
            if done and shown == len(job.pieces):
                break
            if job.overdue and not job.done:
                self._give_up(job, self._too_slow())
        if job.problem:
            raise AnswerFailed(job.problem)

    def status(self) -> Status:
        """What the model is doing now."""
        backend = self._backend
        state = "failed" if self._problem else "ready" if backend else "loading"
        waiting = sum(not job.done for job in list(self._by_turn.values()))
        name, reason = (backend.name, backend.reason) if backend else (None, None)
        adapter = self._adapter.name if self._adapter else None
        return Status(state, self._problem, self._notice, name, reason, adapter, waiting)

    def stop(self) -> None:
        """Answer what is queued, then end the worker."""
        self._jobs.put(None)
        self._thread.join()

    def _too_slow(self) -> str:
        return (
            f"The answer took longer than {self._settings.answer_seconds} seconds and was given up; please ask again."
        )

    def _work(self) -> None:
        """The worker: load the model, then answer question after question."""
        try:
            self._backend = self._factory()
            self._refresh_adapter()
            memlog.note(self._store, "model loaded", self._backend.name)
        except Exception as error:  # the edge of the thread: whatever stops the model is told on the screens
            self._problem = f"The model could not be loaded: {_sentence(error)}"
        while (job := self._jobs.get()) is not None:
            try:
                self._answer(job)
            except Exception as error:  # the edge again: the question is marked, the next one is answered
                self._give_up(job, f"The question was not answered: {_sentence(error)}")

    def _answer(self, job: Job) -> None:
        """Answer one question, token by token, and save the answer before it is called done."""
        if self._backend is None:
            return self._give_up(job, self._problem or "The model is not loaded.")
        if job.done:
            return None
        self._refresh_adapter()
        adapter = self._adapter.name if self._adapter else None
        job.started = time.monotonic()
        with contextlib.closing(_generator(self._backend, job.request)) as items:  # leaving early frees the model
            for item in items:
                if job.done:
                    return None
                if job.overdue:
                    return self._give_up(job, self._too_slow())
                if isinstance(item, tuple):
                    answer = item[1]
                    if self._store.answer_turn(job.turn_id, answer, adapter):
                        memlog.note_answer(self._store, job.turn_id, answer)
                    return job.finish(answer, None)
                job.add(item.text)
        return self._give_up(job, "The model stopped without an answer; please ask again.")

    def _give_up(self, job: Job, problem: str) -> None:
        """Mark a question as not answered, on the disk if it can be written, and for whoever watches."""
        try:
            self._store.fail_turn(job.turn_id, problem)
        except StoreError as error:
            problem = f"{problem} {error}"
        job.finish(None, problem)

    def _refresh_adapter(self) -> None:
        """Use the adapter that is installed now; when it is refused, keep the one before and say so."""
        from model import adapters

        backend = self._backend
        assert backend is not None
        seen = _pointer_state(self._home)
        if seen == self._refused:
            return
        wanted: Path | None = None
        try:
            wanted = adapters.current(self._home)
            if wanted != self._adapter:
                backend.swap_adapter(wanted)
                self._adapter = wanted
            self._notice, self._refused = None, None
        except Exception as error:  # an adapter comes from outside: whatever is wrong with it must not stop answers
            self._refused = seen
            using = f"the earlier one ({self._adapter.name})" if self._adapter else "the model as it was installed"
            self._notice = f"A new adapter was refused and {using} answers instead. {_sentence(error)}"


def _generator(backend: "Backend", request: "Request") -> "Generator[Token | tuple[int, Answer], None, None]":
    """The backend's answer to one request, as something that can be closed before its end."""
    yield from backend.generate([request])


def _pointer_state(home: Path) -> Any:
    """Something that changes whenever another adapter is installed."""
    try:
        found = (home / "adapters" / "current.json").stat()
    except OSError:
        return "no adapter"
    return found.st_mtime_ns, found.st_ino, found.st_size


def _sentence(error: BaseException) -> str:
    """The first line of an error as a sentence; its kind where it says nothing."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."
