"""The SuperLink and the proxy in front of it: checked, started together, and stopped together.

Also the way to Flower's own command line, and the registration of keys through it. Everything Flower would send home or
install by itself is switched off here. Not here: runs (`server.runs`), and starting at boot (systemd does).
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from model.files import write_atomic
from server import certs as keys
from server import quota, registry

FLWR = "1.41.0"  # the version whose routes, checks and faults are known here
UP_SECONDS = 90.0  # longest wait for a SuperLink to answer: 3 s usually, more on a machine that is busy
SILENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(128 << 10),  # bytes that a cut costs a clinic: 4 s at 256 kbit/s
}


class LinkError(RuntimeError):
    """The SuperLink cannot be started or used; the message says why and what to do."""


@dataclass(frozen=True)
class Link:
    """Where a federation's server lives: `certs` and `state` folders, `port` of the SuperLink on loopback.

    `an_hour`: bytes that a clinic may send in an hour.
    """

    certs: Path
    state: Path
    port: int = 8000
    an_hour: int = quota.AN_HOUR

    @property
    def address(self) -> str:
        """Address of the SuperLink, on this machine only."""
        return f"127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Environment of every Flower process started here."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return {**os.environ, **SILENT, "PATH": path, "FLWR_HOME": str(self.state / "flower")}

    def command(self) -> list[str]:
        """Command line of the SuperLink with the safe flags."""
        files = {"ca-certfile": "ca.crt", "certfile": "server.pem", "keyfile": "server.key"}
        tls = [word for flag, name in files.items() for word in (f"--ssl-{flag}", str(self.certs / name))]
        return [
            program("flower-superlink"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *tls,
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--database", str(self.state / "superlink.db")),
        ]


def existing(certs: Path, state: Path) -> Link:
    """The server whose folders these are, at the port with which it was started last."""
    try:
        table = tomllib.loads((state / "flower" / "config.toml").read_text(encoding="utf-8"))
        port = int(table["superlink"]["afya"]["address"].rpartition(":")[2])
    except (OSError, ValueError, KeyError, TypeError):
        port = Link.port
    return Link(certs.resolve(), state.resolve(), port)


def is_up(link: Link) -> bool:
    """Whether something listens where this server's SuperLink would."""
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex(("127.0.0.1", link.port)) == 0


def program(name: str) -> str:
    """Path of one of Flower's programs, beside this Python. Raises LinkError."""
    path = Path(sys.executable).parent / name
    found = str(path) if path.exists() else shutil.which(name)
    if not found:
        raise LinkError(f"{name} is not installed; run pip install 'afya[server]'.")
    return found


def faults(link: Link, listen: tuple[str, int]) -> list[str]:
    """Everything that stands in the way of a start, in plain sentences."""
    found = keys.check(link.certs)
    try:
        if version("flwr") != FLWR:
            found.append(f"flwr is {version('flwr')}, this version of Afya needs {FLWR}; run pip install flwr=={FLWR}")
    except PackageNotFoundError:
        found.append("flwr is not installed; run pip install 'afya[server]'")
    if told := quota.full(link.state):
        found.append(told)
    if listen[1] == link.port:
        return [*found, f"--listen and --link-port are both {link.port}; choose two ports"]
    for host, port in (("127.0.0.1", link.port), listen):
        if reason := _taken(host, port):
            found.append(f"{host}:{port} cannot be used ({reason}); stop what uses it or choose another port")
    return found


def _taken(host: str, port: int) -> str:
    """Why a port cannot be listened on, or an empty string."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return str(error.strerror or error)
    return ""


def serve(link: Link, listen: tuple[str, int], say: Callable[[str], None]) -> None:
    """Run SuperLink and proxy until a signal or until one of them ends. Raises LinkError."""
    if found := faults(link, listen):
        raise LinkError("; ".join(found) + ".")
    link.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _sole(link.state):
        _run(link, listen, say)


@contextlib.contextmanager
def _sole(state: Path) -> Iterator[None]:
    """Hold the server's folder for this process. Raises LinkError while another server works in it."""
    with open(state / "server.lock", "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LinkError(f"A server is at work in {state}; stop it first, or give --state another folder.") from None
        yield


def _run(link: Link, listen: tuple[str, int], say: Callable[[str], None]) -> None:
    from server.admission import register_all, unregister_revoked

    configure(link)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    child = None
    try:
        with open(link.state / "superlink.log", "ab") as log:
            command, bound = link.command(), bound_to_this_process()
            child = subprocess.Popen(
                command, env=link.environment(), stdout=log, stderr=subprocess.STDOUT, preexec_fn=bound
            )
        _wait_until_up(link, child)
        unregister_revoked(link)
        for name in register_all(link):
            say(f"Clinic {name} registered.")
        asyncio.run(_serve(link, listen, child, say))
    except KeyboardInterrupt:
        say("Stopping.")
    finally:
        signal.signal(signal.SIGTERM, previous)
        if child is not None:
            _stop(child)


def bound_to_this_process() -> Callable[[], None]:
    """For `preexec_fn`: the child is told to end when this process dies, however that happens (Linux).

    A SuperLink that outlived its proxy would hold the port, and no server could be started again.
    """
    import ctypes

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def bind() -> None:
        prctl(1, int(signal.SIGTERM))  # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return bind


async def _serve(
    link: Link, listen: tuple[str, int], child: "subprocess.Popen[bytes]", say: Callable[[str], None]
) -> None:
    """The proxy, until it is told to stop or the SuperLink has ended."""
    from server.again import Again
    from server.contacts import Contacts
    from server.guard import Guard
    from server.proxy import FleetProxy, server

    limit = quota.Quota(link.state, link.an_hour, say, lambda key: _clinic(link, key) or "A clinic")
    heard = Contacts(link.state, lambda key: _clinic(link, key)).heard
    upstream, ca = f"https://{link.address}", link.certs / "ca.crt"
    proxy = FleetProxy(upstream, ca, Guard(link.state), limit, heard, Again(link.state))
    web = server(proxy, *listen, link.certs / "server.pem", link.certs / "server.key")
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lambda: setattr(web, "should_exit", True))
    running = asyncio.create_task(web.serve())
    while not web.started and not running.done():
        await asyncio.sleep(0.05)
    say(f"Ready: clinics reach this server at {listen[0]}:{listen[1]}; the Control API stays on {link.address}.")
    while not running.done():
        if child.poll() is not None:
            web.should_exit = True
            await running
            raise LinkError(f"The SuperLink has ended (code {child.returncode}); see {link.state / 'superlink.log'}.")
        await asyncio.wait([running], timeout=0.5)
    await running
    say("Stopping.")


def _clinic(link: Link, header: bytes) -> str:
    """Name of the clinic that sends its key in this header; an empty string for a key of nobody."""
    from server.guard import decoded

    return registry.name_of(link.state, decoded(header) or b"")


def _wait_until_up(link: Link, child: "subprocess.Popen[bytes]") -> None:
    import ssl

    import httpx

    end = time.monotonic() + UP_SECONDS
    context = ssl.create_default_context(cafile=str(link.certs / "ca.crt"))
    with httpx.Client(verify=context, trust_env=False, timeout=5.0) as client:
        while time.monotonic() < end:
            if child.poll() is not None:
                raise LinkError(f"The SuperLink did not start; see {link.state / 'superlink.log'}.")
            with contextlib.suppress(httpx.TransportError):
                client.get(f"https://{link.address}/health")
                return
            time.sleep(0.2)
    raise LinkError(f"The SuperLink does not answer after {UP_SECONDS:.0f} s; see {link.state / 'superlink.log'}.")


def _stop(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(15)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def configure(link: Link) -> None:
    """Tell Flower's command line, in the server's own FLWR_HOME, where the SuperLink is."""
    home = link.state / "flower"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = json.dumps(str((link.certs / "ca.crt").resolve()))
    lines = ["[superlink]", 'default = "afya"', "", "[superlink.afya]", f'address = "{link.address}"']
    write_atomic(home / "config.toml", "\n".join([*lines, f"root-certificates = {authority}", ""]).encode())


def flwr(link: Link, *arguments: str, seconds: float = 120.0) -> str:
    """Run one command of Flower's own command line; returns what it printed. Raises LinkError with its words."""
    command = [program("flwr"), *arguments]
    try:
        done = subprocess.run(command, env=link.environment(), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise LinkError(f"flwr {arguments[0]} has not answered for {seconds:.0f} s; is the server started?") from error
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[-400:]
        raise LinkError(f"flwr {arguments[0]} failed: {words}")
    return done.stdout


def parsed(text: str) -> dict[str, Any]:
    """The JSON object that a Flower command printed, after any notices."""
    try:
        return json.loads(text[text.index("{") : text.rindex("}") + 1])
    except ValueError as error:
        raise LinkError(f"Flower's answer is not understood: {' '.join(text.split())[:200]}") from error
