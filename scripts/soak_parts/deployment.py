"""A running federation that can be hurt: its processes by kind, rounds that go on in the background, what they left.

Processes are started again at once, as their systemd units do after 10 s (server) and 30 s (clinic). Every run starts
from the first round of a run that nothing happened to, so that its next rounds must be bit for bit the same (`same`).
Not here: the faults themselves.
"""

import contextlib
import datetime
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil

from scripts.federation import UP_SECONDS, FederationFailed, Local, family
from scripts.soak_parts import clinic
from scripts.soak_parts.line import Line
from server import checkpoint, link
from server import events as happened

T = TypeVar("T")
MARKS = {"superlink": "flower-superlink", "serverapp": "flwr-serverapp", "clientapp": "flwr-clientapp"}
REFERENCE = 10  # rounds of the run that nothing happens to
SETTINGS = {"rank": 2, "local-steps": 8, "batch-size": 8, "gate": "off"}
FOREVER = 10_000  # rounds of a run that is hurt: it never comes to its end


class NotSurvived(Exception):
    """A case was not survived; the message says what did not happen."""


class Deployment(Local):
    """A local federation whose run goes on in the background; `seen` holds the events of the present run folder."""

    def __init__(
        self, clinics: Mapping[str, Path], later: tuple[str, ...], behaviours: Mapping[str, Path], out: Path, base: Path
    ) -> None:
        super().__init__(clinics, out, base, later=later)
        self.behaviours = behaviours
        self.memory.every = 30.0
        self.link = link.Link(self.out / "certs", self.out / "state", self.ports[1])
        self.root = self.out / "rounds-0"
        self.seen: list[dict[str, Any]] = []
        self.mode = ""
        self.line: Line | None = None  # before north, once it is on a bad one
        self.follow = False  # whether `afya-server rounds` looks on until its run ends
        self.repeated = 0  # rounds that were begun twice in the present folder
        self._place = self._folders = 0

    def join(
        self, name: str, bundle: Path | None = None, server: str = "", env: Mapping[str, str] | None = None
    ) -> None:
        """Start a clinic's SuperNode whose ClientApp behaves as its file says."""
        super().join(name, bundle, server, {**clinic.environment(self.behaviours[name]), **(env or {})})

    def submit(self, settings: Mapping[str, Any]) -> None:
        """`afya-server rounds` in the background, in the present folder; left once it has begun, unless `follow`."""
        self.settings, count = dict(settings), len(self.look())
        config = {"base-model": str(self.base), **SETTINGS, **settings}
        chosen = [word for name, value in config.items() for word in ("--set", f"{name}={value}")]
        self._spawn("rounds", ["server", "rounds", *self.places(), "--out", str(self.root), *chosen])
        self.wait("the start of a run", UP_SECONDS, lambda: self._begun(count))
        if not self.follow:  # looking on costs processor time that rounds need
            self.leave("rounds")

    def _begun(self, count: int) -> bool | None:
        """Whether a run has written anything yet. Raises NotSurvived when it was not accepted."""
        if self.processes["rounds"].poll():
            raise NotSurvived("a run was not accepted: " + self.tail("rounds.log", 3))
        return True if len(self.seen) > count else None

    def fresh(self, mode: str, reference: Path | None, settings: Mapping[str, Any]) -> None:
        """End the present run and start one in a new folder, behind the first round of `reference` or from nothing."""
        self.end_run()
        self._folders += 1
        self.root, self.seen, self._place, self.mode = self.out / f"rounds-{self._folders}", [], 0, mode
        self.repeated = 0
        if reference is not None:
            shutil.copytree(reference / "round-00001", self.root / "round-00001")
        self.submit({"num-server-rounds": FOREVER, **settings})

    def end_run(self) -> None:
        """Stop what runs, as a coordinator would: no more `afya-server rounds`, and Flower's runs stopped."""
        self.leave("rounds")
        for _ in range(3):
            listed = link.parsed(link.flwr(self.link, "list", "--format", "json")).get("runs", [])
            running = [row for row in listed if not str(row.get("status", "")).startswith("finished")]
            for row in running:
                with contextlib.suppress(link.LinkError):  # it may end by itself meanwhile
                    link.flwr(self.link, "stop", str(row["run-id"]))
            if not running:
                return
        raise NotSurvived("a run did not stop when it was told to")

    def leave(self, name: str) -> None:
        """End one of the processes in an orderly way."""
        child = self.processes.pop(name, None)
        if child is not None and child.poll() is None:
            rest = family(child.pid)
            child.terminate()
            child.wait(20)
            gone(rest, 10)

    def is_there(self, name: str) -> bool:
        """Whether a clinic's SuperNode has been let in since it was started."""
        return "SuperNode ID" in (self.out / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """End everything, the line too."""
        super().stop()
        if self.line is not None:
            self.line.__exit__(None, None, None)
            self.line = None

    def look(self) -> list[dict[str, Any]]:
        """Every event of the present folder so far."""
        new, self._place = happened.read(self.root, self._place)
        self.seen += new
        return self.seen

    def wait(self, what: str, seconds: float, true: Callable[[], T | None]) -> T:
        """What `true` gives as soon as it gives something. Raises NotSurvived after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            self.look()
            if (found := true()) is not None:
                return found
            if time.monotonic() > end:
                raise NotSurvived(f"{what} did not happen within {seconds:.0f} s")
            time.sleep(0.1)

    def find(self, kind: str, owner: str = "server", young: float = 1e9) -> psutil.Process | None:
        """The newest process of a kind among those of `owner` that is at most `young` seconds old and has not ended."""
        found = []
        for process in family(self.processes[owner].pid):
            try:
                if MARKS[kind] in " ".join(process.cmdline()[:4]) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # it has just ended
                continue
        newest = max(found, key=lambda process: process.create_time(), default=None)
        return newest if newest and time.time() - newest.create_time() <= young else None

    def restart_server(self, rest: list[psutil.Process]) -> None:
        """Start the server again once all of the former one is gone. Raises NotSurvived when some of it stays."""
        self.processes["server"].wait(30)
        if left := gone(rest, 15):
            names = ", ".join(sorted({" ".join(p.cmdline()[1:2]) or p.name() for p in left}))
            end(left)
            raise NotSurvived(f"after the kill these went on by themselves and stood in the way of a restart: {names}")
        try:
            self.start_server()
        except FederationFailed as error:
            raise NotSurvived(f"the server did not start again: {error}") from error

    def rejoin(self, name: str, rest: list[psutil.Process], server: str = "") -> None:
        """Start a clinic's SuperNode again once all of the former one is gone. Raises NotSurvived when some stays."""
        if left := gone(rest, 15):
            end(left)
            raise NotSurvived(f"after the kill {len(left)} of the clinic's processes went on by themselves")
        self.join(name, server=server)

    def age(self, event: Mapping[str, Any]) -> float:
        """Seconds since an event was written."""
        then = datetime.datetime.fromisoformat(str(event["at"]))
        return (datetime.datetime.now(datetime.UTC) - then).total_seconds()

    def sound(self, at_least: int) -> int:
        """Round of the last checkpoint, which must load and be no older than `at_least`. Raises NotSurvived."""
        found, skipped = checkpoint.latest(self.root)
        if found is None or skipped or found.round < at_least:
            raise NotSurvived(
                f"no sound checkpoint of round {at_least} or later: {' '.join(skipped) or 'none is there'}"
            )
        return found.round

    def same(self, number: int, reference: Path) -> None:
        """Raise NotSurvived unless the adapter after a round is bit for bit that of the undisturbed run."""
        import numpy as np

        ours, theirs = (checkpoint.load(root / f"round-{number:05d}").state for root in (self.root, reference))
        if set(ours) != set(theirs) or any(not np.array_equal(ours[name], theirs[name]) for name in theirs):
            raise NotSurvived(f"the adapter after round {number} is not that of an undisturbed run")


def gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended by themselves after so long."""
    return [process for process in psutil.wait_procs(processes, timeout=seconds)[1] if process.is_running()]


def end(processes: list[psutil.Process]) -> None:
    """Kill these."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=5)


def fingerprint(home: Path) -> str:
    """Hash of everything under a clinic's training/ and adapters/."""
    found = hashlib.sha256()
    for folder in ("training", "adapters"):
        for path in sorted((home / folder).rglob("*")):
            if path.is_file():
                found.update(f"{path.relative_to(home)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()
