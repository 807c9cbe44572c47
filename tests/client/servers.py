"""Servers on loopback for tests of the doctor: Afya's proxy with any certificate, and one that lies about the time."""

import asyncio
import contextlib
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

from server import certs, proxy


@contextlib.contextmanager
def proxied(folder: Path, host: str = "127.0.0.1", upstream: str = "https://127.0.0.1:1") -> Iterator[str]:
    """Afya's proxy with the certificate in `folder`, before a SuperLink that is not there; yields its HOST:PORT."""
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    app = proxy.FleetProxy(upstream, folder / "ca.crt")
    web = proxy.server(app, host, port, folder / "server.pem", folder / "server.key")
    thread = threading.Thread(target=lambda: asyncio.run(web.serve()))
    thread.start()
    try:
        while not web.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"{host}:{port}"
    finally:
        web.should_exit = True
        thread.join()


@contextlib.contextmanager
def dated(folder: Path, ahead: timedelta, status: int = 401, text: str = "") -> Iterator[str]:
    """A TLS server that answers every call with `status` and with a time `ahead` of this computer's."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response_only(status)
            self.send_header("Date", format_datetime(datetime.now(UTC) + ahead, usegmt=True))
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that did not like the certificate: that is what the tests look at."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with Server(("127.0.0.1", 0), Handler) as web:
        web.socket = context.wrap_socket(web.socket, server_side=True)
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{web.server_address[1]}"
        finally:
            web.shutdown()
            thread.join()


@contextlib.contextmanager
def plain(answer: bytes) -> Iterator[str]:
    """A server without TLS that says `answer` to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connected, _ = listener.accept()
                    with connected, contextlib.suppress(OSError):
                        connected.recv(4096)
                        connected.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def self_signed(folder: Path, ca: Path) -> Path:
    """A server's folder whose certificate only its own key vouches for; `ca` is what the clinic trusts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = certs._name("impostor")
    names = [certs._host("localhost"), certs._host("127.0.0.1")]
    certificate = (
        certs._builder(name, name, key.public_key(), 30)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(certs._pem(key))
    (folder / "ca.crt").write_bytes(ca.read_bytes())
    return folder
