"""Asking the federation's server what a doctor wants to know, without starting a node and without changing anything.

Finds out whether the address answers, whose certificate it shows, what time it is there and whether it knows this
clinic's key. Every failure is one sentence with what to do. Not here: what lies on this machine (`client.doctor`).
"""

import base64
import datetime
import http.client
import socket
import ssl
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

SECONDS = 10.0  # longest wait for the server
CALL = "/v1/fleet/activate-node"
MAX_ANSWER = 4096  # bytes read of an answer
# What Flower answers to an activation with an impossible heartbeat interval: it looks at the key first, then at the
# interval, and activates nothing.
KNOWN, UNKNOWN, UNSIGNED = 400, 412, 401


class NoContact(Exception):
    """The server cannot be reached or trusted; the message says why and what to do. `clock` is its time if it said."""

    def __init__(self, message: str, clock: datetime.datetime | None = None) -> None:
        super().__init__(message)
        self.clock = clock


@dataclass(frozen=True)
class Answer:
    """Status, text and time (None when not said) of a server's answer; `tls` is the version of the protocol."""

    status: int
    text: str
    clock: datetime.datetime | None
    tls: str


def address(server: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT". Raises NoContact."""
    host, _, port = server.rpartition(":")
    try:
        named = bool(host.strip("[]").encode("idna"))  # a label that is empty or too long is no name at all
    except UnicodeError:
        named = False
    if not named or not port.isdigit() or not 0 < int(port) < 65536:
        raise NoContact(f"server {server!r} is not HOST:PORT; correct it in [client] of afya.toml or join again.")
    return host.strip("[]"), int(port)


def ask(server: str, ca: Path, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
    """One call to the server over TLS with the federation's authority. Raises NoContact."""
    if not ca.is_file():
        raise NoContact(f"{server} was not asked: without {ca} it cannot be told from an impostor.")
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ValueError) as error:
        raise NoContact(f"{ca} is not a certificate ({error}); join again with the coordinator's file.") from error
    try:
        return _call(server, context, body, headers or {})
    except ssl.SSLCertVerificationError as error:
        raise _distrust(server, error) from error
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        raise NoContact(f"{server} does not speak TLS as Afya's server does ({reason}); check the address.") from error
    except (OSError, http.client.HTTPException) as error:
        raise NoContact(_unreachable(server, error)) from error


def _call(server: str, context: ssl.SSLContext, body: bytes, headers: dict[str, str]) -> Answer:
    host, port = address(server)
    web = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
    try:
        web.connect()
        tls = str(web.sock.version()) if isinstance(web.sock, ssl.SSLSocket) else ""
        web.request("POST", CALL, body, {"Content-Type": "application/protobuf", **headers})
        reply = web.getresponse()
        said = reply.getheader("Date")
        text = reply.read(MAX_ANSWER).decode("utf-8", "replace")
        return Answer(reply.status, text, _time(said), tls)
    finally:
        web.close()


def _time(said: str | None) -> datetime.datetime | None:
    try:
        return parsedate_to_datetime(said).astimezone(datetime.UTC) if said else None
    except ValueError:
        return None


def _distrust(server: str, error: ssl.SSLCertVerificationError) -> NoContact:
    """Why a certificate was not believed; for one out of its time also what the server says the time is."""
    who = f"{server} shows a certificate"
    if error.verify_code in (9, 10):
        clock = _unverified_clock(server)
        when = "has expired" if error.verify_code == 10 else "is not valid yet"
        todo = "set this computer's clock, or ask the coordinator for a new server certificate"
        return NoContact(f"{who} that {when} by this computer's clock; {todo}.", clock)
    if error.verify_code in (62, 64):
        return NoContact(f"{who} of another name; use the address that the coordinator gave.")
    if error.verify_code == 18:
        return NoContact(f"{who} that nobody but itself vouches for; it is not this federation's: check the address.")
    words = error.verify_message
    return NoContact(f"{who} that is not this federation's ({words}); check the address, or join with a new file.")


def _unverified_clock(server: str) -> datetime.datetime | None:
    """The time that a server says whose certificate was not believed: for the sentence to a person, nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        return _call(server, context, b"", {}).clock
    except (OSError, http.client.HTTPException, NoContact):
        return None


def _unreachable(server: str, error: Exception) -> str:
    """What is between here and the server, in one sentence."""
    if isinstance(error, socket.gaierror):
        return f"The name in {server} is not known here; check its spelling and this computer's DNS."
    if isinstance(error, ConnectionRefusedError):
        return f"{server} refuses connections; check the port, and ask the coordinator whether the server runs."
    if isinstance(error, TimeoutError):
        return f"{server} does not answer within {SECONDS:.0f} s; check cable, address and firewall."
    if isinstance(error, (ConnectionError, http.client.HTTPException)):
        return f"{server} hangs up in the middle of a call ({type(error).__name__}); check the address and the port."
    return f"{server} cannot be reached ({error}); check cable, address and firewall."


def key_status(server: str, ca: Path, key: Path, clock: datetime.datetime | None) -> Answer:
    """The server's answer to this key, signed at the server's own time so that a wrong clock here does not matter.

    Asks to activate the node with a heartbeat interval of 0, which Flower refuses after it has looked at the key.
    Raises NoContact.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        private = s.load_ssh_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise NoContact(f"{key} is not a node key ({error}); join again with the coordinator's file.") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise NoContact(f"{key} is a key of another kind; join again with the coordinator's file.")
    public = private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    here = datetime.datetime.now(datetime.UTC)
    moment = (clock.replace(microsecond=here.microsecond) if clock else here).isoformat(timespec="microseconds")
    signature = private.sign(moment.encode(), ec.ECDSA(hashes.SHA256()))
    headers = {
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-timestamp": moment,
        "flwr-signature": base64.b64encode(signature).decode(),
    }
    return ask(server, ca, activation(public), headers)


def activation(public: bytes) -> bytes:
    """Flower's ActivateNodeRequest for this key with a heartbeat interval of 0, in protobuf's encoding."""
    length, size = len(public), b""
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return b"\x0a" + size + bytes([length]) + public
