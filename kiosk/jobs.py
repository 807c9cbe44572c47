"""A question on its way from a screen to the model: what both sides know of it while it waits and is answered.

The worker adds pieces, any number of screens watch them; a screen that reads slowly or not at all holds nobody up.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.backends import Answer, Request


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
    alone: bool = False  # begun again by itself, because the batch it was in broke down
    skip: int = 0  # characters of the answer that were shown before it was begun again
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
        """Another piece of the answer; what was shown already is not shown again."""
        fresh, self.skip = piece[self.skip :], max(0, self.skip - len(piece))
        if fresh:
            with self.changed:
                self.pieces.append(fresh)
                self.changed.notify_all()

    def restart(self) -> None:
        """Begin again, alone."""
        self.alone, self.started, self.skip = True, None, sum(map(len, self.pieces))

    def finish(self, answer: "Answer | None", problem: str | None) -> None:
        """Nothing more will come; the first end counts."""
        with self.changed:
            if not self.done:
                self.answer, self.problem = answer, problem
            self.changed.notify_all()
