"""A whole federation on this machine, for the demo and the tests: server, proxy, one SuperNode per clinic, real rounds.

Uses the same commands a coordinator and a clinic use (afya-server, afya-client), on loopback with TLS and registered
keys, each clinic with its own $AFYA_HOME. `run_local` does it all; `Local` gives the steps one by one.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
UP_SECONDS = 120.0  # longest wait for the server to say that it is ready


class FederationFailed(RuntimeError):
    """The local federation did not come up or did not finish; the message holds the last lines of what it said."""


@dataclass(frozen=True)
class Result:
    """What a run gave: bytes and seconds of each round, peak memory (MiB) by process, who was rejected and why."""

    bytes_per_round: list[int]
    seconds: float
    round_seconds: list[float]
    peak_memory_mib: dict[str, float]
    adapter: Path
    rejected: list[dict[str, Any]]
    installed: dict[str, str]
    cpu_seconds: dict[str, float]
    losses: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(repr=False)


class Local:
    """The processes of a federation on loopback, as a context manager that leaves none of them behind."""

    def __init__(
        self, clinics: Mapping[str, Path], out: Path, base: Path, threads: int = 1, later: Collection[str] = ()
    ) -> None:
        """`later` names clinics that get a key and are registered, but do not join at the start."""
        self.clinics, self.out, self.base = dict(clinics), out.resolve(), base.resolve()
        self.later = frozenset(later)
        self.ports = free_ports(2 + len(clinics))
        self.threads = threads
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.memory = Memory(self.processes)

    @property
    def server(self) -> str:
        """Where clinics connect: the proxy."""
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def superlink(self) -> str:
        """The SuperLink itself, on loopback, where the Control API is."""
        return f"127.0.0.1:{self.ports[1]}"

    def __enter__(self) -> "Local":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        names = [word for name in self.clinics for word in ("--clinic", name)]
        self.command("server", "certs", "--out", str(self.out / "certs"), *names)
        self.memory.start()
        self.start_server()
        for name in self.clinics:
            if name not in self.later:
                self.join(name)

    def start_server(self) -> None:
        """Start the SuperLink with its proxy, for the first time or again, and wait until clinics can connect."""
        port = ("--link-port", str(self.ports[1]))
        self._spawn("server", ["server", "start", *self.places(), *port, "--listen", self.server])
        self._wait_for_server()

    def places(self) -> list[str]:
        return ["--certs", str(self.out / "certs"), "--state", str(self.out / "state")]

    def join(
        self, name: str, bundle: Path | None = None, server: str = "", env: Mapping[str, str] | None = None
    ) -> None:
        """Start the SuperNode of a clinic; `server` is where it connects when not to the proxy itself."""
        home = self.clinics[name]
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        port = self.ports[2 + list(self.clinics).index(name)]
        bundle = bundle or self.out / "certs" / "clinics" / name
        arguments = ["client", "join", "--server", server or self.server, "--bundle", str(bundle), "--port", str(port)]
        self._spawn(name, arguments, {"AFYA_HOME": str(home), "OMP_NUM_THREADS": str(self.threads), **(env or {})})

    def rounds(self, config: Mapping[str, Any], say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
        """Submit a run and follow it to its end; returns its events. Raises FederationFailed."""
        settings = {"base-model": str(self.base), "min-clinics": len(self.clinics), **config}
        chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        command = program("server", "rounds", *self.places(), "--json", *chosen)
        events, other = [], []
        env, pipe = self.environment(), subprocess.PIPE
        with subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT) as child:
            for line in child.stdout or ():
                try:
                    events.append(json.loads(line))
                except ValueError:
                    other.append(line.decode("utf-8", "replace"))
                    continue
                if say:
                    say(sentence(events[-1]))
        if child.returncode:
            raise FederationFailed("".join(other).strip() + "\n" + self.tail("state/superlink.log"))
        return events

    def command(self, package: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Run one of Afya's commands to its end; returns what it printed. Raises FederationFailed."""
        command = program(package, *arguments)
        environment = {**self.environment(), **(env or {})}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        if done.returncode:
            raise FederationFailed(f"afya-{package} {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def environment(self) -> dict[str, str]:
        return {**os.environ, "AFYA_MODEL": str(self.base), "PYTHONWARNINGS": "ignore"}

    def _spawn(self, name: str, arguments: list[str], env: Mapping[str, str] | None = None) -> None:
        with open(self.out / f"{name}.log", "wb") as log:
            self.processes[name] = subprocess.Popen(
                program(*arguments), env={**self.environment(), **(env or {})}, stdout=log, stderr=subprocess.STDOUT
            )

    def _wait_for_server(self) -> None:
        end = time.monotonic() + UP_SECONDS
        log = self.out / "server.log"
        while b"Ready:" not in log.read_bytes():
            if self.processes["server"].poll() is not None or time.monotonic() > end:
                raise FederationFailed("The server did not start: " + self.tail("server.log"))
            time.sleep(0.1)

    def tail(self, file: str, lines: int = 20) -> str:
        """The last lines of one of the logs under `out`."""
        path = self.out / file
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else "(no log)"
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """End every process that was started here, with their children, the clinics first."""
        self.memory.stop()
        started = [self.processes[name] for name in sorted(self.processes, key="server".__eq__)]
        families = [family(child.pid) for child in started]
        for child in started:
            child.terminate()
        for child, members in zip(started, families, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(20)
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            child.wait()


class Memory:
    """Samples the resident memory of processes and of their children; keeps each one's peak by what it does."""

    def __init__(self, processes: Mapping[str, "subprocess.Popen[bytes]"], every: float = 0.25) -> None:
        self.processes, self.every = processes, every
        self.peaks: dict[str, float] = {}
        self._cpu: dict[tuple[str, int], float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin sampling in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End sampling."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self.every):
            for name, child in list(self.processes.items()):
                for member in family(child.pid):
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        line = member.cmdline()
                        if not line:
                            continue  # it has just ended
                        role = f"{name}/{_role(line)}"
                        peak = member.memory_info().rss / (1 << 20)
                        self.peaks[role] = round(max(peak, self.peaks.get(role, 0.0)), 1)
                        times = member.cpu_times()
                        self._cpu[role, member.pid] = times.user + times.system

    def cpu_seconds(self) -> dict[str, float]:
        """Processor seconds so far by what a process does; of those that have ended, up to the last sample."""
        found: dict[str, float] = {}
        for (role, _), seconds in list(self._cpu.items()):
            found[role] = round(found.get(role, 0.0) + seconds, 2)
        return dict(sorted(found.items()))


def family(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it; empty when it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _role(command: list[str]) -> str:
    """What a process of a federation does, from its command line."""
    words = " ".join(command[:4])
    for mark in ("flwr-clientapp", "flwr-serverapp", "flower-superexec", "flower-superlink", "client.supernode"):
        if mark in words:
            return mark.replace(".", "-").split("-")[1]
    return "proxy" if "server" in words else "other"


def program(package: str, *arguments: str) -> list[str]:
    """Command line of one of Afya's commands with this very Python."""
    return [sys.executable, "-c", f"from {package}.cli import main; main()", *arguments]


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def sentence(event: Mapping[str, Any]) -> str:
    """An event of a run as a line for a person."""
    from server.follow import sentence as line

    return line(dict(event))


def _of(events: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    return (event for event in events if event["event"] == kind)


def run_local(
    clinics: Mapping[str, Path],
    out: Path,
    rounds: int,
    config: Mapping[str, Any],
    base: Path,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Start a federation of `clinics` (name -> $AFYA_HOME), run `rounds` rounds from `base`, stop it, say what it took.

    `config` holds run settings by name (`afya-server rounds --list`); everything is written under `out`. Raises
    FederationFailed.
    """
    start = time.monotonic()
    with Local(clinics, out, base) as local:
        events = local.rounds({**config, "num-server-rounds": rounds}, say)
        peaks, processor = dict(sorted(local.memory.peaks.items())), local.memory.cpu_seconds()
    done = list(_of(events, "round-done"))
    if not list(_of(events, "release")):
        reasons = [str(event["reason"]) for event in _of(events, "not-released")]
        raise FederationFailed("No adapter was released: " + (" ".join(reasons) or "no round has ended."))
    losses = [
        {k: e.get(k) for k in ("round", "clinic", "loss-before", "loss-after", "seconds")}
        for e in _of(events, "accepted")
    ]
    return Result(
        bytes_per_round=[event["bytes_down"] + event["bytes_up"] for event in done],
        seconds=time.monotonic() - start,
        round_seconds=[event["seconds"] for event in done],
        peak_memory_mib=peaks,
        adapter=Path(next(_of(list(reversed(events)), "release"))["folder"]),
        rejected=[{k: e[k] for k in ("round", "clinic", "reason")} for e in _of(events, "rejected")],
        installed={event["clinic"]: event["detail"] for event in _of(events, "installed")},
        cpu_seconds=processor,
        losses=losses,
        events=events,
    )
