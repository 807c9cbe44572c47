"""Taking part in a federation: where it is, and how Flower's SuperNode takes over this process.

The SuperNode gets no way to ask for less safety: TLS with the federation's own authority, a registered key, no runtime
installation, nothing sent home. Not here: the checks before it (`client.doctor`), the system user (`client.service`).
"""

import fcntl
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import invitation, limits

SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}
# A cut of the line costs the piece that was under way: 4 s at 256 kbit/s. The server cuts up what comes down.
SMALL = {
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(128 << 10),
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS": "1",
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "1",
}


@dataclass(frozen=True)
class Connection:
    """How a clinic reaches its federation: server "HOST:PORT", the authority's certificate, its key, a local port."""

    server: str
    ca: Path
    key: Path
    port: int = 9094


def connection(
    home: Path, server: str | None = None, bundle: Path | None = None, port: int | None = None
) -> Connection | None:
    """Connection from the arguments, else from [client] of afya.toml, else from the invitation; None when none says
    where the server is. Raises SettingsWrong and InvitationRejected.
    """
    table = limits.client_table(home)
    where = server or table.get("server") or (None if bundle else invitation.record(home).get("server"))
    folder = bundle or home / "federation"
    ca = folder / "ca.crt" if bundle or "ca" not in table else Path(str(table["ca"])).expanduser()
    key = folder / "node.key" if bundle or "key" not in table else Path(str(table["key"])).expanduser()
    here = port or table.get("port", 9094)
    if type(here) is not int or not 0 < here < 65536:
        raise limits.SettingsWrong(f"{limits.settings_file(home)}: [client] port is {here!r}, no number of a port.")
    return Connection(str(where), ca, key, here) if where else None


def command(link: Connection) -> list[str]:
    """Command line of the SuperNode with the safe flags."""
    return [
        *(sys.executable, "-P", "-m", "client.supernode"),  # -P: whatever lies in the current folder is not code
        *("--superlink", link.server),
        *("--root-certificates", str(link.ca.resolve())),
        *("--auth-supernode-private-key", str(link.key.resolve())),
        *("--host", "127.0.0.1", "--port", str(link.port)),
    ]


def environment(home: Path) -> dict[str, str]:
    """Environment of the SuperNode: this clinic's home, nothing sent home, nothing installed at run time."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {"PATH": path, "AFYA_HOME": str(home), "FLWR_HOME": str(home / "flower")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **SILENT, **SMALL, **offline, **own}


class AlreadyJoined(RuntimeError):
    """This clinic takes part from this computer already, or something else uses the port."""


def join(home: Path, link: Connection) -> Any:
    """Replace this process by the SuperNode; does not return. Raises AlreadyJoined."""
    (home / "flower").mkdir(mode=0o700, parents=True, exist_ok=True)
    _hold(home / "flower" / "joined.lock", home)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", link.port))
        except OSError as error:
            raise AlreadyJoined(
                f"Port {link.port} of this computer is in use ({error.strerror}), perhaps by another clinic's client; "
                "choose another with --port."
            ) from error
    line, env = command(link), environment(home)
    sys.stdout.flush()
    os.execve(line[0], line, env)


def _hold(path: Path, home: Path) -> None:
    """Lock a file for as long as this process, and the SuperNode that takes its place, live. Raises AlreadyJoined."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    os.set_inheritable(descriptor, True)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyJoined(f"The clinic of {home} takes part already from this computer.") from None
