"""One model for the whole kiosk, with a queue in front of it: the questions of several people are answered together.

A worker thread lets waiting questions join, in the order they came, and computes one token for each at a time (one
question after another where the backend cannot do that). It saves the answers, so closing the browser or pressing
reload loses nothing: a screen only watches a `Job`. Another adapter that was installed is used as soon as nobody is
being answered; one that is refused leaves the adapter before it in place, and a sentence for the screens. Does not
cover stopping a library call that hangs (its question is given up instead), nor shares for each person.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kiosk import memlog
from kiosk.adapter_watch import AdapterWatch, sentence
from kiosk.busy import Inbox
from kiosk.jobs import AnswerFailed, Job
from kiosk.settings import Settings
from kiosk.store import CaseStore, StoreError

if TYPE_CHECKING:
    import numpy as np

    from model.backends import Answer, Backend, Request
    from model.batching import Serial, TorchBatch

__all__ = ["AnswerFailed", "Engine", "Job", "Status", "make_backend"]
MAX_WAITING = 32  # questions not begun yet: with more, a new one is told that the computer is busy
_POLL_SECONDS = 0.25  # how often a waiting screen looks at the clock


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
    unsigned: str | None = None  # where nobody vouches for the adapter


def make_backend(settings: Settings) -> "Backend":
    """Load the settings' model, see that it may answer (`model.canary`); seconds. Raises with one plain sentence."""
    from model import attach, backend_choice, canary, manifest
    from model.presets import reference_path

    folder = Path(settings.model).expanduser() if settings.model else reference_path()
    backend = backend_choice.open_backend(folder, None if manifest.is_quantized(folder) else settings.bits)
    canary.require(canary.check(backend, folder))
    if backend.name == "torch":
        attach.warm()
    return backend


class Engine:
    """The queue and the worker in front of one backend. `factory` makes the backend, in the worker's thread."""

    def __init__(self, store: CaseStore, home: Path, settings: Settings, factory: "Callable[[], Backend]") -> None:
        self._store, self._settings, self._factory = store, settings, factory
        self._inbox = Inbox(home)  # of Job | np.ndarray | None
        self._waiting: deque[Job] = deque()  # this and the next three belong to the worker
        self._running: dict[int, Job] = {}
        self._batch: TorchBatch | Serial | None = None
        self._picture: np.ndarray | None = None  # chosen on a screen, not asked about yet
        self._ending = False
        self._capacity = 1  # questions answered together
        self._joins = 1  # and how many of them may join between two tokens
        self._by_turn: dict[int, Job] = {}
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._adapters = AdapterWatch(home)
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._work, name="afya-answers", daemon=True)
        self._thread.start()

    def submit(self, turn_id: int, request: "Request") -> Job:
        """Queue a question whose turn is already saved; one that is on its way already is not queued again.

        With `MAX_WAITING` questions waiting it is refused: the job is done at once and the turn marked.
        """
        with self._lock:
            job = self._by_turn.get(turn_id)
            if job is not None and not job.done:
                return job
            self._by_turn = {key: other for key, other in self._by_turn.items() if not other.done}
            ahead = max(0, len(self._by_turn) - self._capacity + 1)
            waiting = sum(other.started is None for other in self._by_turn.values())
            job = Job(turn_id, request, float(self._settings.answer_seconds), ahead)
            if waiting < MAX_WAITING:
                self._by_turn[turn_id] = job
                self._inbox.put(job)
                return job
        self._give_up(job, f"The computer is busy: {waiting} questions are waiting; please ask again in a minute.")
        return job

    def prepare(self, picture: "np.ndarray") -> None:
        """A picture was chosen (RGB uint8): look at it already while the question is typed, if nothing else waits."""
        self._inbox.put(picture)

    def cancel(self, turn_id: int) -> None:
        """Stop answering a question; one that is answered already stays as it is."""
        job = self.job(turn_id)
        if job is not None:
            self._give_up(job, "The question was stopped before it was answered.")

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
        backend, on, problem = self._backend, self._adapters, self._problem
        state = "failed" if problem else "ready" if backend else "loading"
        waiting = sum(not job.done for job in list(self._by_turn.values()))
        name, reason = (backend.name, backend.reason) if backend else (None, None)
        return Status(state, problem, on.notice, name, reason, on.name, waiting, on.unsigned)

    def stop(self) -> None:
        """Answer what is queued, then end the worker."""
        self._inbox.put(None)
        self._thread.join()

    def _too_slow(self) -> str:
        return (
            f"The answer took longer than {self._settings.answer_seconds} seconds and was given up; please ask again."
        )

    def _work(self) -> None:
        """The worker: load the model, then answer question after question."""
        try:
            self._backend = self._factory()
            self._adapters.refresh(self._backend)
            memlog.note(self._store, "model loaded", self._backend.name)
        except Exception as error:  # the edge of the thread: whatever stops the model is told on the screens
            self._problem = f"The model could not be loaded: {sentence(error)}"
        while not (self._ending and not self._running and not self._waiting):
            self._receive()
            self._admit()
            self._step()
            self._look_ahead()

    def _receive(self) -> None:
        """What arrived since the last step; waits for something where there is nothing to do."""
        idle = not self._running and not self._waiting and self._picture is None
        while True:
            try:
                item = self._inbox.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if item is None:
                self._ending = True
            elif isinstance(item, Job):
                self._waiting.append(item)
            else:
                self._picture = item

    def _admit(self) -> None:
        """Let waiting questions join, those who came first first; the others follow after the next token."""
        joining: list[Job] = []
        while self._waiting and len(joining) < self._joins and self._room(self._waiting[0], joining):
            job = self._waiting.popleft()
            if self._backend is None:
                self._give_up(job, self._problem or "The model is not loaded.")
            elif not job.done:
                joining.append(job)
        if not joining or self._backend is None:
            return
        if not self._running:
            self._adapters.refresh(self._backend)
        try:
            self._join(self._backend, joining)
        except Exception:  # one of them: the others are not to suffer for it
            for job in joining:
                try:
                    self._join(self._backend, [job])
                except Exception as error:  # a question that cannot be answered is marked
                    self._give_up(job, f"The question was not answered: {sentence(error)}")
        self._rest()

    def _join(self, backend: "Backend", jobs: list[Job]) -> None:
        """Begin to answer these questions; raises what the backend raises, and then none of them has begun."""
        from model.batching import open_batch

        if self._batch is None:
            self._batch = open_batch(backend)
            self._capacity, self._joins = getattr(self._batch, "capacity", 8), getattr(self._batch, "joins", 1)
        for job in jobs:
            job.started = time.monotonic()
        self._batch.add([(job.turn_id, job.request) for job in jobs])
        self._running |= {job.turn_id: job for job in jobs}

    def _room(self, job: Job, joining: list[Job]) -> bool:
        """Whether the first of those who wait may join now: not beside one begun again, not over an adapter change."""
        others = [*self._running.values(), *joining]
        if self._backend is None or not others:
            return True
        apart = job.alone or any(other.alone for other in others)
        return not apart and len(others) < self._capacity and not self._adapters.changed

    def _step(self) -> None:
        """One more token for every question that is being answered; each is saved before it is called done."""
        batch = self._batch
        if batch is None or not self._running:
            return
        problem = "The model stopped without an answer; please ask again."
        try:
            for item in batch.step():
                if isinstance(item, tuple):
                    self._answered(self._running.pop(item[0]), item[1])
                else:
                    self._running[item.index].add(item.text)
        except Exception as error:  # the edge of the thread: a question is marked, the others are answered
            problem = f"The question was not answered: {sentence(error)}"
            if len(self._running) > 1:
                self._apart(batch)
                return
            batch.close()
        for turn_id, job in list(self._running.items()):
            if turn_id not in batch.active:
                self._give_up(job, problem)
            elif job.overdue and not job.done:
                self._give_up(job, self._too_slow())
            if job.done:
                batch.drop(turn_id)
                del self._running[turn_id]
        self._rest()

    def _apart(self, batch: "TorchBatch | Serial") -> None:
        """A batch broke down and nobody knows by whom: each of its questions is begun again, alone."""
        batch.close()
        self._batch = None
        for job in reversed(self._running.values()):
            job.restart()
            self._waiting.appendleft(job)
        self._running.clear()

    def _rest(self) -> None:
        """With nobody left to answer the backend is free for another adapter."""
        if self._batch is not None and not self._running:
            self._batch.close()
            self._batch = None

    def _look_ahead(self) -> None:
        """Compute what every question about a chosen picture needs, when nobody waits for an answer."""
        if self._running or self._waiting or self._picture is None:
            return
        picture, self._picture = self._picture, None
        prepare = getattr(self._backend, "prepare", None)
        if self._backend is None or prepare is None:
            return
        try:
            self._adapters.refresh(self._backend)
            prepare(picture)
        except Exception as error:  # only a head start is lost: the question itself will say what is wrong
            memlog.note(self._store, f"picture not prepared: {sentence(error)}")

    def _answered(self, job: Job, answer: "Answer") -> None:
        """Save an answer, unless its question was given up meanwhile."""
        try:
            if not job.done and self._store.answer_turn(job.turn_id, answer, self._adapters.name):
                memlog.note_answer(self._store, job.turn_id, answer)
            job.finish(answer, None)
        except StoreError as error:
            self._give_up(job, f"The question was not answered: {sentence(error)}")

    def _give_up(self, job: Job, problem: str) -> None:
        """Mark a question as not answered, on the disk if it can be written, and for whoever watches."""
        try:
            self._store.fail_turn(job.turn_id, problem)
        except StoreError as error:
            problem = f"{problem} {error}"
        job.finish(None, problem)
