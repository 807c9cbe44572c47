"""The proxy: Fleet calls pass unchanged over TLS, everything else is refused before it reaches the SuperLink."""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from scripts.federation import free_ports
from server import certs, proxy
from server.quota import Quota

PATHS = [
    "/v1/control/start-run",
    "/v1/runtime/push-messages",
    "/health",
    "/",
    "/v1/fleet/",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet//get-run",
    "/v1/fleet/get-run/",
    "/v1/fleet/get-run?x=1",
    "/V1/fleet/get-run",
    "/v1/fleet/get%2Drun",
    "/v1/fleet/get-run;/../control",
    "//v1/fleet/get-run",
]


class Upstream:
    """A stand-in for the SuperLink: remembers what arrives, answers with the body turned around."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, dict[bytes, bytes]]] = []
        self.fails = 0  # how many of the next calls fail
        self.denies = False  # whether calls are refused as those of a wrong signature are

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen.append((scope["path"], body, dict(scope["headers"])))
        headers = [(b"content-type", b"application/protobuf"), (b"flwr-x", b"1")]
        self.fails, status = max(0, self.fails - 1), 500 if self.fails else 401 if self.denies else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[::-1]})


def through(
    tmp_path: Path,
    talk: Callable[[httpx.AsyncClient, str, Upstream], Awaitable[None]],
    up: bool = True,
    quota: Quota | None = None,
    heard: Callable[[bytes], None] = lambda _: None,
) -> None:
    """Run `talk` with a client in front of the proxy in front of `Upstream`, all on loopback, all over TLS."""
    certs.make(tmp_path / "c", [])
    files = {"ssl_certfile": str(tmp_path / "c/server.pem"), "ssl_keyfile": str(tmp_path / "c/server.key")}
    ports = free_ports(2)

    async def main() -> None:
        upstream = Upstream()
        config = uvicorn.Config(upstream, port=ports[0], log_level="error", lifespan="off", ws="none", **files)
        behind = uvicorn.Server(config)
        app = proxy.FleetProxy(f"https://127.0.0.1:{ports[0]}", tmp_path / "c/ca.crt", quota=quota, heard=heard)
        front = proxy.server(app, "127.0.0.1", ports[1], tmp_path / "c/server.pem", tmp_path / "c/server.key")
        servers = [front, behind] if up else [front]
        tasks = [asyncio.create_task(server._serve()) for server in servers]
        while not all(server.started for server in servers):
            await asyncio.sleep(0.01)
        context = ssl.create_default_context(cafile=str(tmp_path / "c/ca.crt"))
        async with httpx.AsyncClient(verify=context, trust_env=False, timeout=20) as client:
            await talk(client, f"https://127.0.0.1:{ports[1]}", upstream)
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_fleet_call_passes_unchanged(tmp_path: Path) -> None:
    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        body = bytes(range(256)) * 4096
        headers = {"flwr-public-key": "abc", "te": "trailers", "proxy-authorization": "secret"}
        answer = await client.post(f"{base}/v1/fleet/push-object", content=body, headers=headers)
        assert (answer.status_code, answer.content) == (200, body[::-1])
        assert answer.headers["flwr-x"] == "1"
        path, seen, arrived = upstream.seen[0]
        assert (path, seen) == ("/v1/fleet/push-object", body)
        assert arrived[b"flwr-public-key"] == b"abc"
        assert b"te" not in arrived and b"proxy-authorization" not in arrived

    through(tmp_path, talk)


def test_many_clinics_keep_their_connections_and_only_some_calls_at_a_time_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "LARGE_AT_ONCE", 8)
    monkeypatch.setattr(proxy, "MAX_ANNOUNCED", 0)

    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        context = ssl.create_default_context(cafile=str(tmp_path / "c/ca.crt"))
        lines = [httpx.AsyncClient(verify=context, trust_env=False, timeout=60) for _ in range(80)]
        for _ in range(2):  # the second time over connections that were kept
            answers = await asyncio.gather(*(one.post(f"{base}/v1/fleet/get-run", content=b"x") for one in lines))
            assert [answer.status_code for answer in answers] == [200] * len(lines)
        await asyncio.gather(*(one.aclose() for one in lines))

    through(tmp_path, talk)


def test_only_calls_that_the_superlink_accepts_are_a_sign_of_life(tmp_path: Path) -> None:
    told: list[bytes] = []

    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        for call in ("pull-messages", "get-run", "send-node-heartbeat"):
            await client.post(f"{base}/v1/fleet/{call}", content=b"x", headers={"flwr-public-key": call})
        upstream.denies = True
        await client.post(f"{base}/v1/fleet/pull-messages", content=b"y", headers={"flwr-public-key": "impostor"})
        await client.post(f"{base}/v1/control/start-run", content=b"y", headers={"flwr-public-key": "impostor"})

    through(tmp_path, talk, heard=told.append)
    assert told == [b"pull-messages", b"get-run", b"send-node-heartbeat"]


def test_everything_else_is_refused_and_never_arrives(tmp_path: Path) -> None:
    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        for path in PATHS:
            for method in ("POST", "GET"):
                url = httpx.URL(base).copy_with(raw_path=path.encode())
                answer = await client.request(method, url, content=b"x" if method == "POST" else None)
                assert answer.status_code == 403, (method, path)
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            assert (await client.request(method, f"{base}/v1/fleet/get-run")).status_code == 405
        assert upstream.seen == []

    through(tmp_path, talk)


def test_a_body_above_the_cap_is_refused_declared_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "MAX_BODY", 1000)

    async def pieces() -> Any:
        for _ in range(20):
            yield b"x" * 100

    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        url = f"{base}/v1/fleet/push-object"
        for large in (b"x" * 1001, pieces()):
            with contextlib.suppress(httpx.TransportError):  # the door may shut before the client has read why
                assert (await client.post(url, content=large)).status_code == 413
        assert (await client.post(url, content=b"x" * 1000)).status_code == 200
        assert len(upstream.seen) == 1

    through(tmp_path, talk)


def test_an_announcement_of_very_many_parts_is_refused(tmp_path: Path) -> None:
    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        url = f"{base}/v1/fleet/push-messages"
        assert (await client.post(url, content=bytes(proxy.MAX_ANNOUNCED))).status_code == 200
        with contextlib.suppress(httpx.TransportError):
            assert (await client.post(url, content=bytes(proxy.MAX_ANNOUNCED + 1))).status_code == 413
        assert len(upstream.seen) == 1

    through(tmp_path, talk)


def test_a_body_that_trickles_is_given_up_and_hinders_no_small_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "LARGE_AT_ONCE", 1)
    monkeypatch.setattr(proxy, "BODY_MINUTES", 1 / 60)

    async def trickle() -> Any:
        for _ in range(100):
            yield b"x"
            await asyncio.sleep(0.1)

    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        headers = {"content-length": str(proxy.MAX_ANNOUNCED + 1)}
        slow = asyncio.create_task(client.post(f"{base}/v1/fleet/push-object", content=trickle(), headers=headers))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        assert (await client.post(f"{base}/v1/fleet/send-node-heartbeat", content=b"x")).status_code == 200
        assert time.monotonic() - began < 0.6 and not slow.done()
        with contextlib.suppress(httpx.TransportError):
            assert (await slow).status_code == 408
        assert [path for path, _, _ in upstream.seen] == ["/v1/fleet/send-node-heartbeat"]

    through(tmp_path, talk)


def test_a_call_that_a_busy_superlink_fails_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "BUSY", (0.01, 0.01, 0.01))

    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        for number, call in enumerate(("push-object", "confirm-message-received"), 1):
            url, headers = f"{base}/v1/fleet/{call}", {"flwr-public-key": "abc"}
            upstream.fails = 3
            body = bytes([number, 9])
            assert (await client.post(url, content=body, headers=headers)).content == body[::-1]
            upstream.fails = 9
            assert (await client.post(url, content=body, headers=headers)).status_code == 500
            assert len(upstream.seen) == 8 * number

    through(tmp_path, talk)


def test_a_superlink_that_is_away_is_said(tmp_path: Path) -> None:
    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        assert (await client.post(f"{base}/v1/fleet/get-run", content=b"x")).status_code == 502

    through(tmp_path, talk, up=False)


def test_old_tls_and_plain_text_are_refused(tmp_path: Path) -> None:
    async def talk(client: httpx.AsyncClient, base: str, upstream: Upstream) -> None:
        old = ssl.create_default_context(cafile=str(tmp_path / "c/ca.crt"))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        async with httpx.AsyncClient(verify=old, trust_env=False) as other:
            with pytest.raises(httpx.TransportError):
                await other.post(f"{base}/v1/fleet/get-run", content=b"x")
        with pytest.raises(httpx.TransportError):
            await client.post(f"{base}/v1/fleet/get-run".replace("https", "http"), content=b"x")
        assert upstream.seen == []

    through(tmp_path, talk)


def test_a_line_that_goes_dead_does_not_hold_its_place_for_long(tmp_path: Path) -> None:
    certs.make(tmp_path / "c", [])
    app = proxy.FleetProxy("https://127.0.0.1:1", tmp_path / "c/ca.crt")
    port = free_ports(1)[0]
    front = proxy.server(app, "127.0.0.1", port, tmp_path / "c/server.pem", tmp_path / "c/server.key")

    async def main() -> int:
        task = asyncio.create_task(front._serve())
        while not front.started:
            await asyncio.sleep(0.01)
        context = ssl.create_default_context(cafile=str(tmp_path / "c/ca.crt"))
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        while not front.server_state.connections:
            await asyncio.sleep(0.01)
        accepted = next(iter(front.server_state.connections)).transport.get_extra_info("socket")
        found = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        writer.close()
        front.should_exit = True
        await task
        return found

    assert asyncio.run(main()) == 1000 * proxy.BODY_SECONDS


def test_the_list_of_calls_is_flowers_own() -> None:
    from flwr.superlink.routers.fleet.router import router

    assert {route.path for route in router.routes} == proxy.CALLS
