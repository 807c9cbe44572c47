"""Messages to clinics over Flower's Grid, and their replies as they come, until a deadline.

A SuperLink that is busy answers 500 (its database is locked) and is asked again for a minute; one that is gone ends the
run, which goes on from its last checkpoint. Not here: what a reply may take of time and memory (`server.pulling`) and
what it may hold (`server.strategy`).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from server.pulling import Pulls, largest

POLL = 0.5  # seconds between two looks for replies
GRACE = 600.0  # seconds a message outlives its deadline on the link, so that a late clinic finds it and is told
BUSY = 60.0  # seconds for which the SuperLink may fail before that ends the run


class Exchange:
    """The clinics at the other end of a Grid. `sleep` and `clock` are there for tests that must not wait."""

    def __init__(
        self, grid: Grid, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.grid, self.sleep, self.clock = grid, sleep, clock
        self._failing: float | None = None  # since when the SuperLink has been failing

    def clinics(self) -> dict[int, str]:
        """Connected nodes and their registered names; a node without a name is called by its number."""
        nodes: list[Any] = self._patiently(lambda: list(self.grid.get_nodes()))
        return {int(node.node_id): str(getattr(node, "name", "") or f"node {node.node_id}") for node in nodes}

    def replies(
        self, content: RecordDict, kind: str, clinics: Mapping[int, str], number: int, seconds: float
    ) -> Iterator[tuple[int, Message | Exception]]:
        """Send one message to each clinic; yield (node, reply) as they come, for at most `seconds`.

        A reply that cannot be put together is yielded as the exception it caused, so that it ends nothing.
        """
        end = self.clock() + seconds
        nodes = list(clinics)
        ttl = max(1.0, seconds) + GRACE
        messages = [Message(content, node, kind, ttl=ttl, group_id=str(number)) for node in nodes]
        sent = zip(self._patiently(lambda: list(self.grid.push_messages(messages))), nodes, strict=False)
        waiting = {message_id: node for message_id, node in sent if message_id}
        pulls = Pulls(self._pull, largest(content))
        try:
            while waiting:
                for message_id, reply in pulls.sweep(list(waiting)):
                    yield waiting.pop(message_id), reply
                if not waiting or self.clock() >= end:
                    return
                self.sleep(POLL)
        finally:
            pulls.close()

    def _pull(self, message_id: str) -> Message | Exception | None:
        """The reply to one message, None while there is none, or the exception that its content caused."""
        try:
            reply = next(iter(self.grid.pull_messages([message_id])), None)
            self._failing = None
            return reply
        except httpx.HTTPError as error:
            self._bear(error)  # raises when the link itself is gone: the run is resumed from the last checkpoint
            return None
        except Exception as error:  # whatever a clinic put into its reply: it becomes a rejection with this reason
            return error

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """What the call gives, repeated while the SuperLink fails."""
        while True:
            try:
                found = call()
                self._failing = None
                return found
            except httpx.HTTPError as error:
                self._bear(error)
                self.sleep(POLL)

    def _bear(self, error: httpx.HTTPError) -> None:
        """Raise the error unless the SuperLink is there, fails, and has done so for less than `BUSY` seconds."""
        self._failing = self.clock() if self._failing is None else self._failing
        there = isinstance(error, httpx.HTTPStatusError) and error.response.status_code >= 500
        if not there or self.clock() - self._failing > BUSY:
            raise error
