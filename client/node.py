"""Taking part in a federation: everything is checked first, then Flower's SuperNode takes over this process.

The SuperNode gets no way to ask for less safety: TLS with the federation's own authority, a registered key, no runtime
installation, nothing sent home. Not here: the separate system user that SECURITY.md advises.
"""

import os
import shutil
import socket
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from client import limits

FLWR = "1.41.0"  # the version whose checks and faults are known here
SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}


@dataclass(frozen=True)
class Connection:
    """How a clinic reaches its federation: server "HOST:PORT", the authority's certificate, its key, a local port."""

    server: str
    ca: Path
    key: Path
    port: int = 9094


@dataclass(frozen=True)
class Check:
    """One line of `afya-client doctor`: what was looked at, whether it is well, and what to know or to do."""

    name: str
    ok: bool
    detail: str


def connection(
    home: Path, server: str | None = None, bundle: Path | None = None, port: int | None = None
) -> Connection | None:
    """Connection from the arguments, else from [client] of afya.toml; None when neither says where the server is."""
    table = limits.read_settings(home).get("client", {})
    where = server or table.get("server")
    folder = bundle or home / "federation"
    ca = folder / "ca.crt" if bundle or "ca" not in table else Path(str(table["ca"])).expanduser()
    key = folder / "node.key" if bundle or "key" not in table else Path(str(table["key"])).expanduser()
    return Connection(str(where), ca, key, port or int(table.get("port", 9094))) if where else None


def examine(home: Path, link: Connection | None) -> list[Check]:
    """All checks, none skipped because an earlier one failed; the network is touched only to reach the server."""
    steps: list[tuple[str, Callable[[], str]]] = [
        ("home", lambda: _home(home)),
        ("limits", lambda: f"{limits.read_limits(home)}"),
        ("flower", _flower),
        ("base model", lambda: _base(home)),
        ("samples", lambda: _samples(home)),
        ("adapter", lambda: _adapter(home)),
    ]
    if link is None:
        steps.append(("server", _no_server))
    else:
        steps += [("keys", lambda: _keys(link)), ("server", lambda: _reach(link))]
    return [_run(name, step) for name, step in steps]


class _Fault(Exception):
    """A check that failed; the message says what to do."""


def _run(name: str, step: Callable[[], str]) -> Check:
    from model.adapters import AdapterRejected
    from model.data import DataError
    from model.llava import ModelError
    from model.presets import PresetMissing

    try:
        return Check(name, True, step())
    except (_Fault, limits.SettingsWrong, AdapterRejected, DataError, ModelError, PresetMissing, OSError) as error:
        return Check(name, False, str(error))


def _home(home: Path) -> str:
    if home.stat().st_mode & 0o077:
        raise _Fault(f"{home} can be read by others; run chmod 700 on it.")
    free = shutil.disk_usage(home).free >> 20
    if free < 512:
        raise _Fault(f"{home} has {free} MiB free; make room for at least 512.")
    return f"{home}, {free} MiB free"


def _flower() -> str:
    try:
        found = version("flwr")
    except PackageNotFoundError as error:
        raise _Fault("flwr is not installed; run pip install 'afya[client]'.") from error
    if found != FLWR:
        raise _Fault(f"flwr is {found}, this version of Afya needs {FLWR}; run pip install flwr=={FLWR}.")
    return found


def _base(home: Path) -> str:
    from model.llava import base_sha256

    folder = limits.base_model(home)
    return f"{folder}, sha256 {base_sha256(folder)[:12]}"


def _samples(home: Path) -> str:
    from model.data import read_training

    count, least = len(read_training(home / "training")), limits.read_limits(home).min_examples
    return f"{count} consented samples" + ("" if count >= least else f"; rounds are sat out below {least}")


def _adapter(home: Path) -> str:
    from model import adapters

    folder = adapters.current(home)
    return folder.name if folder else "none yet: the bare base model answers"


def _no_server() -> str:
    raise _Fault("no server is known; pass --server HOST:PORT or set server in [client] of afya.toml.")


def _keys(link: Connection) -> str:
    for path in (link.ca, link.key):
        if not path.is_file():
            raise _Fault(f"{path} is missing; put the folder that the coordinator gave you there, or pass --bundle.")
    if link.key.stat().st_mode & 0o077:
        raise _Fault(f"{link.key} can be read by others; run chmod 600 on it.")
    return str(link.key)


def _reach(link: Connection) -> str:
    """Open a TLS connection with the federation's authority and close it again."""
    host, _, port = link.server.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        raise _Fault(f"server {link.server!r} is not HOST:PORT.")
    try:
        context = ssl.create_default_context(cafile=str(link.ca))
        with (
            socket.create_connection((host, int(port)), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname=host) as secure,
        ):
            return f"{link.server} over {secure.version()}"
    except ssl.SSLCertVerificationError as error:
        raise _Fault(
            f"{link.server} shows a certificate that is not this federation's ({error.verify_message})."
        ) from error
    except (OSError, ValueError) as error:
        raise _Fault(f"{link.server} cannot be reached ({error}); check cable, address and firewall.") from error


def command(link: Connection) -> list[str]:
    """Command line of the SuperNode with the safe flags."""
    return [
        str(Path(sys.executable).parent / "flower-supernode"),
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
    return {**os.environ, **SILENT, **offline, **own}


def join(home: Path, link: Connection) -> Any:
    """Replace this process by the SuperNode; does not return."""
    (home / "flower").mkdir(mode=0o700, parents=True, exist_ok=True)
    line, env = command(link), environment(home)
    sys.stdout.flush()
    os.execve(line[0], line, env)
