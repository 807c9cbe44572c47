"""The server as a system service of its own user: the unit, and the commands that root runs once.

Certificates and state lie under one folder of that user. Not here: what the unit says (`server/systemd/`), and moving
an existing federation there, which is copying its two folders.
"""

import shlex
import sys
from pathlib import Path

from server.link import LinkError

USER = "afya-server"
UNIT = "afya-server.service"
STATE = Path("/var/lib/afya-server")
UNITS = Path("/etc/systemd/system")
_TEMPLATE = Path(__file__).parent / "systemd" / UNIT


def fill(listen: str, state: Path = STATE) -> str:
    """The unit's text for a server that clinics reach at `listen` ("HOST:PORT"). Raises LinkError."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise LinkError(f"--listen {listen!r} is not HOST:PORT.")
    program = Path(sys.executable).parent / "afya-server"
    here = Path(__file__).resolve().parent.parent
    software = sorted({Path(sys.prefix), Path(sys.base_prefix), here} - {Path("/"), Path("/usr")})
    for path in (program, state, *software):
        if any(mark in str(path) for mark in " :%\n'"):
            raise LinkError(f"systemd cannot take the path {path}; use one without spaces, colons and per cent signs.")
    values = {
        "USER": USER,
        "PROGRAM": str(program),
        "STATE": str(state),
        "LISTEN": listen,
        "SOFTWARE": "\n".join(f"BindReadOnlyPaths={path}" for path in software),
        "CAPABILITIES": "CAP_NET_BIND_SERVICE" if int(port) < 1024 else "",
    }
    text = _TEMPLATE.read_text(encoding="utf-8").split("[Unit]", 1)[1]
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return f"# Written by afya-server service; run that again after a change.\n[Unit]{text}"


def script(listen: str, certs: Path, state: Path = STATE, units: Path = UNITS) -> str:
    """A shell script for root: the user, its folder with a copy of `certs`, the unit, the start. Raises LinkError."""
    q, own = shlex.quote, shlex.quote(str(state))
    copy = f"[ -d {own}/certs ] || cp -R {q(str(certs.resolve()))} {own}/certs"
    lines = [
        "#!/bin/sh",
        "# Sets up Afya's server as a service of its own user. May be run again.",
        "set -eu",
        f"getent group {USER} >/dev/null || groupadd --system {USER}",
        f"id -u {USER} >/dev/null 2>&1 || useradd --system --gid {USER} --home-dir {own} --no-create-home "
        f"--shell /usr/sbin/nologin {USER}",
        f"install -d -o {USER} -g {USER} -m 0700 {own} {own}/federation",
        copy,
        f"chown -R {USER}:{USER} {own}/certs",
        f"cat > {q(str(units / UNIT))} <<'UNIT'\n{fill(listen, state)}UNIT",
        "systemctl daemon-reload",
        f"systemctl enable {UNIT}",
        f"systemctl restart {UNIT}",
    ]
    return "\n".join(lines) + "\n"
