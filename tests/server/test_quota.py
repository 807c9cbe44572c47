"""What a clinic may lay on the server's disk: an hour's bytes that come back evenly, and nothing on a full disk."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from server import quota
from server.quota import PUSHES, Quota
from tests.server import test_proxy

PUSH, OTHER = "/v1/fleet/push-object", "/v1/fleet/pull-object"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_hours_bytes_come_back_evenly_and_each_key_has_its_own(tmp_path: Path) -> None:
    clock = Clock()
    door = Quota(tmp_path, 3600 * 10_000, clock)
    for _ in range(36):
        assert door.refusal(PUSH, b"one") is None
        door.spend(PUSH, b"one", 1_000_000)
    refused = door.refusal(PUSH, b"one")
    assert refused and refused[0] == 503 and "in an hour" in refused[1]
    assert door.refusal(OTHER, b"one") is None, "what it asks for is still answered"
    assert door.refusal(PUSH, b"two") is None
    clock.now = 10.0
    assert door.refusal(PUSH, b"one") is None
    door.spend(PUSH, b"one", 100_000)
    assert door.refusal(PUSH, b"one") is not None
    clock.now = 5000.0
    assert door.refusal(PUSH, b"one") is None and door._now(b"one") == 0


def test_a_million_empty_objects_count_too(tmp_path: Path) -> None:
    door = Quota(tmp_path, 100 * quota.OBJECT, Clock())
    for _ in range(100):
        door.spend(PUSH, b"one", 0)
    assert door.refusal(PUSH, b"one") is not None


def test_nothing_more_is_taken_when_the_disk_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door = Quota(tmp_path)
    assert door.refusal(PUSH, b"one") is None
    monkeypatch.setattr(quota, "FREE", 1 << 60)
    assert door.refusal(PUSH, b"one") == (503, "The server's disk is nearly full.")
    assert door.refusal(OTHER, b"one") is None
    assert Quota(tmp_path / "gone").refusal(PUSH, b"one") is None


def test_the_proxy_counts_what_was_accepted_and_asks_before_it_passes_a_push_on(tmp_path: Path) -> None:
    door = Quota(tmp_path, 3 * (1000 + quota.OBJECT), Clock())

    async def talk(client: httpx.AsyncClient, base: str, upstream: Any) -> None:
        for number, status in enumerate((200, 200, 200, 503)):
            headers = {"flwr-public-key": "abc"}
            answer = await client.post(base + PUSH, content=bytes([number]) * 1000, headers=headers)
            assert answer.status_code == status
        assert (await client.post(base + OTHER, content=b"x", headers={"flwr-public-key": "abc"})).status_code == 200
        assert len(upstream.seen) == 4

    test_proxy.through(tmp_path, talk, quota=door)


def test_the_pushes_are_calls_of_the_proxy_that_wait_for_each_other() -> None:
    from server import again, proxy

    assert PUSHES < proxy.CALLS and PUSHES < again.REPEATED
