"""The SuperNode's patience: a line that breaks while TLS greets is tried again, a wrong certificate is not."""

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode.fleet_http_client import FleetHttpClient

from client import supernode
from server import certs, link

TRIES = 3


@contextlib.contextmanager
def server(treat: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port where every connection is treated like that."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    one, _ = listening.accept()
                    with one, contextlib.suppress(OSError):
                        treat(one)

        threading.Thread(target=listen, daemon=True).start()
        yield listening.getsockname()[1]


def hangs_up(one: socket.socket) -> None:
    one.recv(16)
    one.shutdown(socket.SHUT_WR)
    one.recv(65536)


def says_nothing(one: socket.socket) -> None:
    while one.recv(65536):
        pass


def tries(port: int, ca: Path, invoker: Any) -> tuple[int, Exception]:
    """How often a call is tried, at most TRIES times, and why it failed in the end."""
    invoker.max_tries, count = TRIES, 0
    invoker.wait_function = lambda seconds: None
    with FleetHttpClient.from_server_address(f"127.0.0.1:{port}", False, ca.read_bytes(), []) as web:
        web._client.timeout = httpx.Timeout(0.2)

        def call(request: PullMessagesRequest) -> object:
            nonlocal count
            count += 1
            return web.PullMessages(request)

        with pytest.raises(httpx.TransportError) as failed:
            invoker.invoke(call, PullMessagesRequest())
    return count, failed.value


@pytest.mark.parametrize("treat", [hangs_up, says_nothing])
def test_a_line_that_breaks_while_tls_greets_is_tried_again(tmp_path: Path, treat: Callable) -> None:
    certs.make(tmp_path / "c", [])
    ca = tmp_path / "c/ca.crt"
    with server(treat) as port:
        assert tries(port, ca, make_simple_http_retry_invoker())[0] == 1  # what Flower does; else this can go
        assert tries(port, ca, supernode.patient(make_simple_http_retry_invoker()))[0] == TRIES


def test_a_server_of_another_authority_is_not_tried_again(tmp_path: Path) -> None:
    certs.make(tmp_path / "c", [])
    certs.make(tmp_path / "other", [])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "other/server.pem", tmp_path / "other/server.key")
    with server(lambda one: context.wrap_socket(one, server_side=True).close()) as port:
        count, error = tries(port, tmp_path / "c/ca.crt", supernode.patient(make_simple_http_retry_invoker()))
    assert count == 1 and "CERTIFICATE_VERIFY_FAILED" in str(error)


def test_what_flower_itself_gives_up_on_stays_given_up() -> None:
    invoker = supernode.patient(make_simple_http_retry_invoker())
    for status, expected in ((400, True), (412, True), (502, False), (503, False)):
        answer = httpx.Response(status, request=httpx.Request("POST", "https://x"))
        assert invoker.should_giveup(httpx.HTTPStatusError("", request=answer.request, response=answer)) is expected


def test_what_is_replaced_in_flower_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.common.constant import HEARTBEAT_PATIENCE
    from flwr.supercore.constant import OBJECT_PUSH_SESSION_TTL_SECONDS
    from flwr.supernode import fleet_http_connection as connection

    monkeypatch.setattr(connection, "make_simple_http_retry_invoker", connection.make_simple_http_retry_invoker)
    monkeypatch.setattr(connection, "HEARTBEAT_DEFAULT_INTERVAL", connection.HEARTBEAT_DEFAULT_INTERVAL)
    supernode.mend()
    made = connection.make_simple_http_retry_invoker()
    assert made.should_giveup(httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out")) is False
    assert connection.HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE == supernode.AWAY_SECONDS
    assert supernode.AWAY_SECONDS <= OBJECT_PUSH_SESSION_TTL_SECONDS
    assert supernode.FLWR == link.FLWR


def test_it_is_flowers_supernode(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "client.supernode", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--auth-supernode-private-key" in done.stdout, done.stderr
