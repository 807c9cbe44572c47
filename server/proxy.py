"""The only door clinics see: a TLS proxy that passes Flower's Fleet calls to the SuperLink and refuses all else.

Flower's Control API has no login in the open build and shares the SuperLink's port, so the SuperLink listens on
loopback only and this stands in front. The twelve Fleet calls are listed one by one: no path is ever interpreted.
Revoked keys and repeated signatures are refused by `server.guard`; what a clinic asks again because its line was cut
is answered with the help of `server.again`; what a clinic may send in all is `server.quota`'s.
Not covered: limiting how often one address may call; put a firewall in front for that.
"""

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx

from server.again import REPEATED, Again, Answer
from server.guard import KEY, Guard
from server.quota import ANNOUNCE, Quota

CALLS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "register-node",
        "activate-node",
        "deactivate-node",
        "unregister-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
MAX_BODY = 8 << 20  # bytes of one call, held in memory until it is whole; arrays come in chunks of 128 KiB
MAX_ANNOUNCED = 256 << 10  # bytes of an announced reply: 3,800 parts, 480 MB in such chunks, seconds of the database
BUSY = (1.0, 2.0, 4.0)  # seconds between repeats while the SuperLink's database is locked, which it answers with 500
BODY_SECONDS = 60.0  # longest wait for the next piece each way: a clinic's line may be slow, not silent
LARGE_AT_ONCE = 64  # calls with more than MAX_ANNOUNCED bytes; with MAX_BODY half a gigabyte at the very worst
CONNECTIONS = 1024  # open at once, most of them idle: every clinic's client keeps one
BODY_MINUTES = 10  # longest time for a whole body: 8 MiB at 256 kbit/s take half of it
_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
_NOT_SENT = _HOP | {b"host", b"content-length", b"proxy-authorization", b"proxy-authenticate", b"expect"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _TooLarge(Exception):
    """The body is larger than that call's may be."""


class _Gone(Exception):
    """The clinic hung up or fell silent in the middle of a call."""


class FleetProxy:
    """An ASGI application that forwards the Fleet calls to `upstream`, for example https://127.0.0.1:8000.

    `guard` refuses revoked keys and signatures that were used before, `quota` more than a clinic may send; `heard` is
    told the key of every call that the SuperLink has accepted, and `again` gives answers that were lost once more.
    """

    def __init__(
        self,
        upstream: str,
        ca: Path,
        guard: Guard | None = None,
        quota: Quota | None = None,
        heard: Callable[[bytes], None] = lambda _: None,
        again: Again | None = None,
    ) -> None:
        self.upstream, self.guard, self.quota, self.again = upstream.rstrip("/"), guard, quota, again or Again()
        self.heard = heard
        self.announcing = asyncio.Lock()  # one announcement at a time: each is one long transaction
        context = ssl.create_default_context(cafile=str(ca))
        self.turn = asyncio.Semaphore(LARGE_AT_ONCE)
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=32)
        timeout = httpx.Timeout(300.0, connect=10.0)
        self.client = httpx.AsyncClient(verify=context, limits=limits, timeout=timeout, trust_env=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI event: the start and end of the server, or one call."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._call(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                await self.client.aclose()
                return

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or forward one call: the path must be byte for byte one of `CALLS`, the method POST."""
        path = scope["raw_path"].split(b"?")[0] if scope.get("raw_path") else scope["path"].encode()
        known = next((call for call in CALLS if call.encode() == path), None)
        if known is None or scope["query_string"]:
            return await _answer(send, 403, "Only the Fleet API is offered here.")
        if scope["method"] != "POST":
            return await _answer(send, 405, "Fleet calls are POST calls.")
        if self.guard and (refused := self.guard.refusal(scope["headers"])):
            return await _answer(send, *refused)
        headers = [(key, value) for key, value in scope["headers"] if key.lower() not in _NOT_SENT]
        most = _most(known)
        declared = dict(scope["headers"]).get(b"content-length", str(most).encode())
        if not declared.isdigit() or int(declared) > most:
            return await _answer(send, 413, "The body is too large.")
        async with self.turn if int(declared) > MAX_ANNOUNCED else contextlib.nullcontext():
            try:
                async with asyncio.timeout(60 * BODY_MINUTES):
                    body = b"".join([piece async for piece in _pieces(receive, int(declared))])
            except _TooLarge:
                return await _answer(send, 413, "The body is too large.")
            except (_Gone, TimeoutError):
                return await _answer(send, 408, "The body did not arrive.")
            await self._forward(known, headers, body, send)

    async def _forward(self, path: str, headers: list[tuple[bytes, bytes]], body: bytes, send: Send) -> None:
        """Send the call to the SuperLink and its answer back; 502 when the SuperLink is not there."""
        key = next((value for name, value in headers if name.lower() == KEY), b"")
        request = self.client.build_request("POST", self.upstream + path, headers=headers, content=body)
        alone = self.announcing if path == ANNOUNCE else contextlib.nullcontext()
        try:
            if path not in REPEATED or not key:
                return await self._stream(path, key, request, send)
            async with self.again.lock(key), alone:
                if self.quota and (refused := self.quota.refusal(path, key)):
                    return await _answer(send, *refused)
                got = await self._patiently(request)
                if self.quota and got.status_code == 200:
                    self.quota.spend(path, key, len(body))
                answer = self.again.settle(path, key, body, (got.status_code, _kept(got), got.content))
        except httpx.HTTPError:
            return await _answer(send, 502, "The SuperLink does not answer.")
        await _whole(send, answer)

    async def _patiently(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        """The SuperLink's answer; asked again while it fails. Raises httpx.HTTPError."""
        got = await self.client.send(request, stream=stream)
        for seconds in BUSY:
            if got.status_code != 500:
                break
            await got.aclose()
            await asyncio.sleep(seconds)
            got = await self.client.send(request, stream=stream)
        if got.status_code == 200:
            self.heard(request.headers.get(KEY.decode(), "").encode())
        return got

    async def _stream(self, path: str, key: bytes, request: httpx.Request, send: Send) -> None:
        """Pass an answer on piece by piece. Raises httpx.HTTPError while there is none."""
        answer = await self._patiently(request, stream=True)
        self.again.seen(path, key, answer.status_code)
        try:
            await send({"type": "http.response.start", "status": answer.status_code, "headers": _kept(answer)})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()


def _kept(answer: httpx.Response) -> list[tuple[bytes, bytes]]:
    """The headers of an answer that go on to the clinic."""
    return [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in _HOP]


async def _whole(send: Send, answer: Answer) -> None:
    """Send an answer that is there as a whole."""
    status, headers, content = answer
    kept = [(name, value) for name, value in headers if name not in (b"content-length", b"content-encoding")]
    kept.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": kept})
    await send({"type": "http.response.body", "body": content})


def _most(call: str) -> int:
    """Bytes that the body of a call may have."""
    return MAX_ANNOUNCED if call == ANNOUNCE else MAX_BODY


async def _pieces(receive: Receive, most: int) -> AsyncIterator[bytes]:
    """Pieces of a call's body, never more than `most` bytes in all. Raises _TooLarge and _Gone."""
    total = 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), BODY_SECONDS)
        except TimeoutError as error:
            raise _Gone from error
        if message["type"] == "http.disconnect":
            raise _Gone
        total += len(message.get("body", b""))
        if total > most:
            raise _TooLarge
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    headers.append((b"date", formatdate(usegmt=True).encode()))  # a clinic's doctor holds its clock against this
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _allow_files(wanted: int) -> None:
    """Raise how many files and connections this process may have open, as far as it may."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), most))


def server(app: FleetProxy, host: str, port: int, certificate: Path, key: Path) -> Any:
    """A uvicorn server, not yet running, that offers `app` over TLS 1.3 only."""
    import uvicorn

    _allow_files(2 * CONNECTIONS)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        limit_concurrency=CONNECTIONS,
        ws="none",
    )
    config.load()
    if config.ssl is None:
        raise ValueError("The proxy does not run without TLS.")
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3

    class Server(uvicorn.Server):
        """Leaves signals to whoever runs it, who has the SuperLink to stop as well."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """As ever; and a line that goes dead within an answer holds its place for a minute, not fifteen."""
            await super().startup(sockets)
            for one in (one for listening in self.servers for one in listening.sockets):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * BODY_SECONDS))

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(config)
