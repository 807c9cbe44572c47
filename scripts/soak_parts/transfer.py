"""One transfer of known size to a clinic and back, behind a bad line: real SuperLink, proxy and SuperNode.

`python -m scripts.soak_parts.transfer --kbit 256 --mib 12 --cut-every 45` says how long it took, what passed the line
each way, and how much of it was sent twice. Both sides are started as `afya-server` and `afya-client` start them. Not
covered: training, and more than one clinic.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from client import node
from scripts.federation import Local, family, free_ports
from scripts.soak_parts.line import END, RESET, Line
from server import admission, certs, link, runs

APP = """[project]
name = "vector"
version = "1.0.0"
[tool.flwr.app]
publisher = "afya"
[tool.flwr.app.components]
serverapp = "vector_app:server"
clientapp = "vector_app:client"
[tool.flwr.app.config]
size = 0
seed = 0
seconds = 0.0
report = ""
"""


class TransferFailed(RuntimeError):
    """The transfer did not end well; the message says what is known."""


@dataclass(frozen=True)
class Transfer:
    """What one transfer took: seconds and bytes over the line each way, cuts, and connections that were made."""

    size: int
    seconds_down: float
    seconds_up: float
    bytes_down: int
    bytes_up: int
    cuts: int
    connections: int


class Office:
    """A server with one clinic, `away`, behind `line`."""

    def __init__(self, local: Local, line: Line) -> None:
        self.local, self.line, self.seed = local, line, 0
        self.link = link.Link(local.out / "certs", local.out / "state", local.ports[1])
        self.child: subprocess.Popen[bytes] | None = None

    def join(self) -> None:
        """Start the clinic's SuperNode on the other side of the line."""
        home = self.local.out / "away"
        home.mkdir(exist_ok=True)
        key = self.link.certs / "clinics/away/node.key"
        connection = node.Connection(self.line.address, self.link.certs / "ca.crt", key, free_ports(1)[0])
        with open(self.local.out / "away.log", "ab") as log:
            self.child = subprocess.Popen(
                node.command(connection), env=node.environment(home), stdout=log, stderr=subprocess.STDOUT
            )

    def leave(self) -> None:
        """Kill the SuperNode with everything it started."""
        if self.child:
            for process in family(self.child.pid):
                process.kill()
            self.child.wait()

    def transfer(self, size: int, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> Transfer:
        """Send `size` bytes there and back within `seconds`, calling `meanwhile` ten times a second.

        Raises TransferFailed.
        """
        self.seed += 2
        report = self.local.out / f"transfer-{self.seed}.json"
        before = (self.line.bytes_down, self.line.bytes_up, self.line.cuts, self.line.connections)
        run = self._submit({"size": size, "seed": self.seed, "seconds": float(seconds), "report": str(report)})
        end = time.monotonic() + seconds
        while not report.exists() and time.monotonic() < end:
            meanwhile()
            time.sleep(0.1)
        found = json.loads(report.read_text()) if report.exists() else {"error": runs.run_status(self.link, run)}
        if found["error"] or not found["whole"]:
            raise TransferFailed(f"{found['error'] or 'other bytes'}\n{self.local.tail('away.log')}")
        after = (self.line.bytes_down, self.line.bytes_up, self.line.cuts, self.line.connections)
        passed = [now - then for now, then in zip(after, before, strict=True)]
        asked, arrived, answered = (float(found[name]) for name in ("asked", "arrived", "answered"))
        return Transfer(size, round(arrived - asked, 1), round(answered - arrived, 1), *passed)

    def _submit(self, config: dict[str, object]) -> int:
        folder = self.local.out / "vector"
        folder.mkdir(exist_ok=True)
        (folder / "pyproject.toml").write_text(APP)
        shutil.copyfile(Path(__file__).with_name("vector_app.py"), folder / "vector_app.py")
        words = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
        answer = link.parsed(link.flwr(self.link, "run", str(folder), "--run-config", words, "--format", "json"))
        if "run-id" not in answer:
            raise TransferFailed(f"The run was not accepted: {answer}")
        return int(answer["run-id"])


@contextmanager
def office(
    out: Path, kbit: float, *, cut_after: int | Iterable[int] = (), cut_every: float = 0.0, how: str = RESET
) -> Iterator[Office]:
    """A running server with one clinic behind a line; everything is ended in the end."""
    with Local({}, out, out / "no-model") as local:
        certs.make(local.out / "certs", ["away"])
        target = ("127.0.0.1", local.ports[0])
        with Line(target, kbit, cut_after=cut_after, cut_every=cut_every, how=how) as line:
            here = Office(local, line)
            admission.register_all(here.link)
            here.join()
            try:
                yield here
            finally:
                here.leave()


@click.command()
@click.option("--kbit", default=256.0, help="Speed of the line each way, kbit/s; 0: as fast as it goes.")
@click.option("--mib", default=12.0, help="Size of what travels each way, MiB.")
@click.option("--cut-every", default=45.0, help="Seconds between two cuts; 0: none.")
@click.option("--how", type=click.Choice([RESET, END]), default=RESET, help="An error, or an orderly end.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for all files.")
def main(kbit: float, mib: float, cut_every: float, how: str, out: Path) -> None:
    """One transfer there and back; prints its figures as JSON."""
    with office(out, kbit, cut_every=cut_every, how=how) as here:
        found = here.transfer(int(mib * (1 << 20)), seconds=4 * 3600.0)
    click.echo(json.dumps(vars(found)))


if __name__ == "__main__":
    main()
