"""Half-sent and swollen replies: the others are taken meanwhile, and the bound of time and of bytes holds."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from flwr.supercore.inflatable import inflatable_utils as flowers
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from server import pulling, rounds
from server.pulling import Pulls
from tests.server import fakes


@pytest.fixture(autouse=True)
def _unbounded() -> Iterator[None]:
    yield
    Pulls.bounds = pulling.Bounds()


def test_a_reply_that_hangs_holds_nobody_up() -> None:
    go = threading.Event()

    def pull(message: str) -> str | None:
        if message == "slow":
            go.wait(20)
        return None if message == "late" else f"reply to {message}"

    pulls = Pulls(pull, 1 << 20)
    assert list(pulls.sweep(["slow", "quick", "late"])) == [("quick", "reply to quick")]
    assert list(pulls.sweep(["slow", "late"])) == []
    go.set()
    time.sleep(0.1)
    assert list(pulls.sweep(["slow", "late"])) == [("slow", "reply to slow")]
    pulls.close()


def test_as_many_hang_beside_the_others_as_there_are_places_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "PATIENCE", 0.02)
    taken = []
    for hanging in (pulling.WORKERS - 1, pulling.WORKERS):
        go = threading.Event()

        def pull(message: str, go: threading.Event = go) -> str | None:
            return None if message.startswith("half") and go.wait(20) else message

        pulls, waiting = Pulls(pull, 1 << 20), [*(f"half {n}" for n in range(hanging)), "one", "two"]
        taken.append([message for message, _ in pulls.sweep(waiting)])
        go.set()
        pulls.close()
    assert taken == [["one", "two"], []]


def test_what_a_pull_raises_is_raised() -> None:
    def pull(message: str) -> None:
        raise KeyError(message)

    with pytest.raises(KeyError, match="m1"):
        list(Pulls(pull, 1 << 20).sweep(["m1"]))


def test_a_clinic_that_sends_half_costs_the_round_nothing(tmp_path: Path, tiny: Path) -> None:
    go = threading.Event()

    class Half(fakes.FakeGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            numbers = list(message_ids)
            if self.sent[int(numbers[0][1:]) - 1].metadata.dst_node_id == 1:  # the first that is asked
                go.wait(30)
            return super().pull_messages(numbers)

    clock = fakes.Clock()
    grid = Half({n: fakes.honest() for n in (1, 2, 3, 4)})
    chosen = fakes.settings(tmp_path, tiny, num_server_rounds=1, gate="off")
    try:
        after = rounds.Federation(grid, chosen, sleep=clock.sleep, clock=clock).single()
    finally:
        go.set()
    assert [row.clinic for row in after.accepted] == ["clinic-2", "clinic-3", "clinic-4"]
    assert [(row.clinic, row.reason) for row in after.rejected] == [("clinic-1", "no reply before the deadline")]
    assert clock.now < 2 * chosen.round_deadline


def test_objects_that_never_come_are_waited_for_until_the_exchange_is_over() -> None:
    pulls, looks = Pulls(lambda _: None, 1 << 20), 0

    def missing(name: str) -> bytes:
        nonlocal looks
        looks += 1
        if looks == 3:
            pulls.close()
        raise flowers.ObjectUnavailableError(name)

    with pytest.raises(flowers.ObjectPullError, match="not sent in time"):
        pulling.bounded_pull(flowers.pull_objects)(["a"], missing)
    assert looks == 3


def test_a_reply_beyond_the_bound_of_bytes_is_given_up() -> None:
    pulls = Pulls(lambda _: None, 1000)
    pull = pulling.bounded_pull(flowers.pull_objects)
    assert pull(["a", "b"], lambda _: bytes(400)) == {"a": bytes(400), "b": bytes(400)}
    with pytest.raises(flowers.ObjectPullError, match="larger than 1000 bytes"):
        pull(["a", "b", "c"], lambda _: bytes(400))
    pulls.close()


def test_a_chunk_that_is_named_a_thousand_times_is_counted_before_it_is_joined() -> None:
    array = Array(np.zeros(25_000, np.float32))
    objects = get_all_nested_objects(array)
    contents = {name: found.deflate() for name, found in objects.items()}
    body = contents[array.object_id]
    swollen = body.replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [' + b", ".join([b"0"] * 1000) + b"]")
    assert swollen != body
    inflate = pulling.bounded_inflate(Array.inflate.__func__)
    children = {name: found for name, found in objects.items() if name != array.object_id}
    Pulls.bounds = pulling.Bounds(size=1 << 20)
    assert np.array_equal(inflate(Array, body, children).numpy(), array.numpy())
    with pytest.raises(ValueError, match="100128000 bytes"):
        inflate(Array, _with_length(swollen), children)


def _with_length(content: bytes) -> bytes:
    """The object with the length of its body in its head made right again."""
    head, body = content.split(b"\x00", 1)
    words = head.split(b" ")
    return b" ".join([*words[:-1], str(len(body)).encode()]) + b"\x00" + body


def test_flower_is_mended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.superlink.grid import http_grid

    monkeypatch.setattr(http_grid, "pull_objects", flowers.pull_objects)
    monkeypatch.setattr(Array, "inflate", Array.__dict__["inflate"])
    pulling.mend()
    first, inflate = http_grid.pull_objects, Array.__dict__["inflate"]
    pulling.mend()
    assert http_grid.pull_objects is first and Array.__dict__["inflate"] is inflate
    assert first is not flowers.pull_objects
