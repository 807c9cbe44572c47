"""Calls that a clinic sends again because the answer got lost, and which the SuperLink would refuse the second time."""

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from scripts.federation import free_ports
from server import again, certs, proxy
from server.again import FLEET, Again, Answer

KEY, OTHER = b"one clinic", b"another"


def ok(content: bytes) -> Answer:
    return 200, [(b"content-type", b"application/protobuf")], content


def settle(memory: Again, name: str, content: bytes, body: bytes = b"", key: bytes = KEY, status: int = 200) -> bytes:
    return memory.settle(FLEET + name, key, body, (status, [], content))[2]


def test_a_node_that_is_there_already_gets_its_number_again_and_a_stranger_does_not() -> None:
    memory = Again()
    assert memory.settle(f"{FLEET}activate-node", KEY, b"", ok(b"number 7")) == ok(b"number 7")
    assert memory.settle(f"{FLEET}activate-node", KEY, b"", (412, [], b"no")) == ok(b"number 7")
    assert memory.settle(f"{FLEET}activate-node", KEY, b"", (401, [], b"no"))[0] == 401
    assert memory.settle(f"{FLEET}activate-node", OTHER, b"", (412, [], b"no"))[0] == 412


def test_a_restart_of_the_server_still_knows_who_is_there(tmp_path: Path) -> None:
    call = f"{FLEET}activate-node"
    for number in (6, 7):
        Again(tmp_path).settle(call, KEY, b"", ok(b"number %d \xff" % number))
    Again(tmp_path).settle(call, OTHER, b"", ok(b"number 8"))
    memory = Again(tmp_path)
    assert memory.settle(call, KEY, b"", (412, [], b"no")) == ok(b"number 7 \xff")
    assert memory.settle(call, OTHER, b"", (412, [], b"no")) == ok(b"number 8")
    assert memory.settle(call, b"a stranger", b"", (412, [], b"no"))[0] == 412
    for text in ("", "[]", "{", '{"a": 1}', '{"a": ["no base64"]}', '{"a": [[1, 2], "eA=="]}', "[" * 60_000):
        (tmp_path / again.FILE).write_text(text)
        assert Again(tmp_path).settle(call, KEY, b"", (412, [], b"no"))[0] == 412


def test_a_message_is_handed_out_until_it_is_confirmed() -> None:
    memory = Again()
    assert settle(memory, "pull-messages", b"train!") == b"train!"
    assert settle(memory, "pull-messages", b"") == b"train!"
    assert settle(memory, "pull-messages", b"", key=OTHER) == b""
    memory.seen(f"{FLEET}pull-object", KEY, 200)
    memory.seen(f"{FLEET}confirm-message-received", OTHER, 200)
    memory.seen(f"{FLEET}confirm-message-received", KEY, 502)
    assert settle(memory, "pull-messages", b"") == b"train!"
    memory.seen(f"{FLEET}confirm-message-received", KEY, 200)
    assert settle(memory, "pull-messages", b"") == b""


def test_a_message_of_a_run_that_is_over_or_that_nobody_can_take_is_dropped() -> None:
    memory = Again()
    settle(memory, "pull-messages", b"train!")
    memory.seen(f"{FLEET}get-run", KEY, 403)
    assert settle(memory, "pull-messages", b"") == b""
    settle(memory, "pull-messages", b"train!")
    given = [settle(memory, "pull-messages", b"") for _ in range(again.TIMES + 5)]
    assert given == [b"train!"] * (again.TIMES - 1) + [b""] * 6
    assert settle(memory, "pull-messages", b"next") == b"next"


def test_what_was_stored_is_stored_when_it_comes_again_and_nothing_else_is() -> None:
    memory = Again()
    assert settle(memory, "push-object", b"stored", body=b"chunk 1") == b"stored"
    assert settle(memory, "push-object", b"", body=b"chunk 1") == b"stored"
    assert settle(memory, "push-object", b"", body=b"chunk 2") == b""
    assert settle(memory, "push-object", b"", body=b"chunk 2", key=OTHER) == b""
    for number in range(100):
        settle(memory, "push-object", b"stored", body=b"%d" % number)
    assert len(memory._clinics[KEY].pushes) == again.PUSHES


def test_a_reply_announced_again_gets_the_list_of_what_is_missing() -> None:
    memory = Again()
    assert settle(memory, "push-messages", b"session 1: a b c", body=b"reply") == b"session 1: a b c"
    assert settle(memory, "push-messages", b"session 2: a b c", body=b"reply") == b"session 2: a b c"
    assert settle(memory, "push-messages", b"session 3:", body=b"reply") == b"session 2: a b c"
    assert settle(memory, "push-messages", b"session 4:", body=b"other") == b"session 4:"


class Once:
    """A stand-in for the SuperLink that stores an object once, slowly, and refuses it the second time."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        stored = body not in self.bodies
        self.bodies.append(body)
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x")]})
        await send({"type": "http.response.body", "body": b"\x08\x01" if stored else b""})


def through(tmp_path: Path, upstream: Once, talk: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Run `talk` with a client in front of the proxy in front of `upstream`."""
    certs.make(tmp_path / "c", [])
    pem, key = tmp_path / "c/server.pem", tmp_path / "c/server.key"
    ports = free_ports(2)

    async def main() -> None:
        files = {"ssl_certfile": str(pem), "ssl_keyfile": str(key)}
        behind = uvicorn.Server(
            uvicorn.Config(upstream, port=ports[0], log_level="error", lifespan="off", ws="none", **files)
        )
        app = proxy.FleetProxy(f"https://127.0.0.1:{ports[0]}", tmp_path / "c/ca.crt")
        servers = [proxy.server(app, "127.0.0.1", ports[1], pem, key), behind]
        tasks = [asyncio.create_task(server._serve()) for server in servers]
        while not all(server.started for server in servers):
            await asyncio.sleep(0.01)
        context = ssl.create_default_context(cafile=str(tmp_path / "c/ca.crt"))
        base = f"https://127.0.0.1:{ports[1]}/v1/fleet/"
        try:
            async with httpx.AsyncClient(verify=context, trust_env=False, base_url=base, timeout=20) as client:
                await talk(client)
        finally:
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_repeat_that_comes_while_the_first_is_under_way_waits_for_its_answer(tmp_path: Path) -> None:
    upstream = Once()

    async def talk(client: httpx.AsyncClient) -> None:
        async def push(body: bytes, key: str = "one", **options: Any) -> httpx.Response:
            return await client.post("push-object", content=body, headers={"flwr-public-key": key}, **options)

        with contextlib.suppress(httpx.ReadTimeout):
            await push(b"chunk", timeout=httpx.Timeout(20, read=0.1))  # hangs up before the answer
        answer = await push(b"chunk")
        assert (answer.status_code, answer.content) == (200, b"\x08\x01")
        assert answer.headers["content-length"] == "2" and answer.headers["content-type"] == "application/x"
        assert (await push(b"chunk", key="two")).content == b""
        assert upstream.bodies == [b"chunk"] * 3

    through(tmp_path, upstream, talk)


@pytest.mark.parametrize("call", sorted(again.REPEATED | again.ABOUT_A_MESSAGE))
def test_the_calls_are_among_those_the_proxy_passes(call: str) -> None:
    assert call in proxy.CALLS
