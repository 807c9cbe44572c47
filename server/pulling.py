"""Replies from the link within bounds: a clinic that sends half, or far too much, costs nobody else time or memory.

Flower 1.41 hands a reply out as soon as it is announced and then waits in the same call for its objects, for over an
hour if need be; and it joins the chunks of an array as often as the reply names them, before anybody has looked.
Neither has a setting, so both are replaced by name in the ServerApp, in the one version they were read in. Not here:
what a reply may hold (`server.strategy`), and pushes (`server.proxy`).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

WORKERS = 16  # half-sent replies that are waited for at once; each may hold what has arrived of it in memory
PATIENCE = 0.5  # seconds for a reply that is whole; one that takes longer is waited for beside the others
BACKOFF = 2.0  # seconds between two looks for an object that is still to come
SPARE = 4 << 20  # bytes of a reply beside its vectors: metrics, names, the tree of objects


@dataclass
class Bounds:
    """What the replies of one exchange may take: how many bytes each, and no more once the exchange is over."""

    size: int = 1 << 30
    over: bool = False


class Pulls:
    """Takes replies by message number with `pull`, which may hang; the others go on meanwhile. One at a time."""

    bounds = Bounds()  # of the exchange that is under way

    def __init__(self, pull: Callable[[str], Any], size: int) -> None:
        self._pull, self._pool = pull, ThreadPoolExecutor(WORKERS, thread_name_prefix="pull")
        self._slow: dict[str, Future[Any]] = {}
        self._own = Pulls.bounds = Bounds(size)

    def sweep(self, messages: list[str]) -> Iterator[tuple[str, Any]]:
        """(message, reply) of those whose reply is there; raises what `pull` raises."""
        for message in messages:
            future = self._slow.pop(message, None)
            if future is None and len(self._slow) >= WORKERS:
                continue
            if future is None:
                future = self._pool.submit(self._pull, message)
                wait([future], PATIENCE)
            if not future.done():
                self._slow[message] = future
            elif (reply := future.result()) is not None:
                yield message, reply

    def close(self) -> None:
        """End what is still under way, at its next look for an object."""
        self._own.over = True
        self._pool.shutdown(wait=False, cancel_futures=True)


def largest(content: Any) -> int:
    """Bytes that the reply to a message may have: its arrays in 32 bits instead of 16, and what is beside them."""
    return 2 * sum(len(array.data) for record in content.array_records.values() for array in record.values()) + SPARE


def mend() -> None:
    """Replace in Flower what this module is about; once for a process."""
    from flwr.app.message.array import Array
    from flwr.superlink.grid import http_grid

    if http_grid.pull_objects.__module__ == __name__:
        return
    http_grid.pull_objects = bounded_pull(http_grid.pull_objects)
    Array.inflate = classmethod(bounded_inflate(Array.inflate.__func__))


def bounded_pull(flowers: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's `pull_objects` that gives up, as Flower does, at the end of the exchange or the bound of bytes."""
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

    def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes], **options: Any) -> Any:
        bounds, taken = Pulls.bounds, 0

        def counted(object_id: str) -> bytes:
            nonlocal taken
            if bounds.over:
                raise ObjectPullError(object_id, "it was not sent in time")
            content = pull_object_fn(object_id)
            taken += len(content)
            if taken > bounds.size:
                raise ObjectPullError(object_id, f"the reply is larger than {bounds.size} bytes")
            return content

        return flowers(object_ids, counted, **{**options, "max_tries_per_object": None, "backoff_cap": BACKOFF})

    return pull


def bounded_inflate(flowers: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's `Array.inflate` that adds up the chunks before it joins them. Raises ValueError."""
    import json

    from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_children_ids_from_object_content

    def inflate(cls: Any, object_content: bytes, children: Any = None) -> Any:
        names = get_object_children_ids_from_object_content(object_content)
        places = json.loads(get_object_body(object_content, cls).decode())["arraychunk_ids"]
        total = sum(len((children or {})[names[place]].data) for place in places)
        if total > Pulls.bounds.size:
            raise ValueError(f"an array of {total} bytes, more than {Pulls.bounds.size}")
        return flowers(cls, object_content, children)

    return inflate
