"""What a clinic may lay on the server's disk: an hour's bytes that come back evenly, and nothing on a full disk."""

import base64
import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization

from server import certs, link, quota, registry, status
from server.quota import ANNOUNCE, OBJECT, Quota
from tests.server import test_proxy

PUSH, OTHER = OBJECT, "/v1/fleet/pull-object"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_hours_bytes_come_back_evenly_and_each_key_has_its_own(tmp_path: Path) -> None:
    clock = Clock()
    door = Quota(tmp_path, 3600 * 10_000, clock=clock)
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
    door = Quota(tmp_path, 100 * quota.EACH, clock=Clock())
    for _ in range(100):
        door.spend(PUSH, b"one", 0)
    assert door.refusal(PUSH, b"one") is not None


def test_every_part_of_an_announcement_counts_much_more_than_its_name(tmp_path: Path) -> None:
    door = Quota(tmp_path, 10 * quota.PART, clock=Clock())
    door.spend(ANNOUNCE, b"one", 8 * quota.NAME)
    assert door.refusal(ANNOUNCE, b"one") is None
    door.spend(ANNOUNCE, b"one", quota.NAME)
    assert door.refusal(ANNOUNCE, b"one") is not None and door.refusal(PUSH, b"one") is not None


def test_nothing_more_is_taken_when_the_disk_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(), list[str]()
    door = Quota(tmp_path, say=said.append, clock=clock)
    assert door.refusal(PUSH, b"one") is None and quota.full(tmp_path) == ""
    monkeypatch.setattr(quota, "FREE", 1 << 60)
    assert door.refusal(PUSH, b"one") is None, "the disk is looked at every few seconds"
    for now in (10.0, 20.0, 100.0):
        clock.now = now
        assert door.refusal(PUSH, b"one") == (503, "The server's disk is nearly full.")
    assert len(said) == 2 and str(tmp_path) in said[0] and said[0].endswith("make room.")
    assert door.refusal(OTHER, b"one") is None
    assert Quota(tmp_path / "gone").refusal(PUSH, b"one") is None
    found = link.faults(link.Link(tmp_path, tmp_path), ("127.0.0.1", 0))
    assert any("no clinic's reply is taken" in fault for fault in found)
    assert "no clinic's reply is taken" in status.read(tmp_path).trouble


def test_pages_that_the_database_has_given_up_count_as_free(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "superlink.db")) as database:
        database.execute("CREATE TABLE object (content BLOB)")
        database.executemany("INSERT INTO object VALUES (?)", [(bytes(1 << 20),)] * 8)
        database.commit()
        before = quota.free(tmp_path) - shutil.disk_usage(tmp_path).free
        database.execute("DELETE FROM object")
        database.commit()
    after = quota.free(tmp_path) - shutil.disk_usage(tmp_path).free
    assert abs(before) < 1 << 20 and after - before > 7 << 20


def test_the_coordinator_is_told_which_clinic_sends_too_much(tmp_path: Path) -> None:
    certs.make(tmp_path / "c", ["north"])
    line = (tmp_path / "c/clinics/north/node.pub").read_text()
    registry.remember(tmp_path, "north", line, "7")
    pem = serialization.load_ssh_public_key(line.encode()).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert registry.name_of(tmp_path, pem) == "north" and registry.name_of(tmp_path, b"nonsense") == ""
    said: list[str] = []
    place = link.Link(tmp_path / "c", tmp_path)
    door = Quota(tmp_path, 1 << 30, said.append, lambda key: link._clinic(place, key) or "A clinic", Clock())
    header = base64.b64encode(pem)
    door.spend(PUSH, header, 2 << 30)
    for _ in range(5):
        assert door.refusal(PUSH, header) is not None
    assert said == ["north has sent 1 GiB within an hour and has to wait."]


def test_the_proxy_counts_what_was_accepted_and_asks_before_it_passes_a_push_on(tmp_path: Path) -> None:
    door = Quota(tmp_path, 3 * (1000 + quota.EACH), clock=Clock())

    async def talk(client: httpx.AsyncClient, base: str, upstream: Any) -> None:
        for number, expected in enumerate((200, 200, 200, 503)):
            headers = {"flwr-public-key": "abc"}
            answer = await client.post(base + PUSH, content=bytes([number]) * 1000, headers=headers)
            assert answer.status_code == expected
        assert (await client.post(base + OTHER, content=b"x", headers={"flwr-public-key": "abc"})).status_code == 200
        assert len(upstream.seen) == 4

    test_proxy.through(tmp_path, talk, quota=door)


def test_the_pushes_are_calls_of_the_proxy_that_wait_for_each_other() -> None:
    from server import again, proxy

    assert {ANNOUNCE, OBJECT} < proxy.CALLS and {ANNOUNCE, OBJECT} < again.REPEATED
