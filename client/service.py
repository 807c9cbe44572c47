"""The client as a system service of its own user: the unit, and the commands that set up its folders.

Flower brings training code from the coordinator. So the service runs as `afya-client`, with a home of its own into
which systemd binds the clinic's training/ (read only) and adapters/: everything else of the clinic is out of its reach
by file modes and once more by the unit. Not here: what the unit says (`client/systemd/afya-client.service`).
"""

import os
import pwd
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from client import contact, firewall, limits
from client.node import Connection
from model.files import write_atomic

USER = "afya-client"
UNIT = "afya-client.service"
STATE = Path("/var/lib/afya-client")
UNITS = Path("/etc/systemd/system")
HANDED = ("ca.crt", "node.key", "release.pub", "invitation.json")  # what the service gets of the federation's folder
_TEMPLATE = Path(__file__).parent / "systemd" / UNIT


class ServiceError(RuntimeError):
    """The service cannot be set up; the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """The unit file's text and the shell script that installs and starts it; root runs the script."""

    unit: str
    script: str


def plan(home: Path, link: Connection, state: Path = STATE, units: Path = UNITS) -> Plan:
    """Unit and script for this clinic's home and connection. Raises ServiceError."""
    unit = fill(home, link, state)
    return Plan(unit, _script(home, link, state, units, unit))


def fill(home: Path, link: Connection, state: Path = STATE) -> str:
    """The unit's text for this clinic. Raises ServiceError."""
    program = Path(sys.executable).parent / "afya-client"
    if not program.exists():
        raise ServiceError(f"{program} is not there; install Afya with pip first.")
    model = limits.base_model(home).resolve()
    for path in (home, model, program):
        if any(mark in str(path) for mark in (" ", ":", "%", "\n", "'")):
            raise ServiceError(
                f"systemd cannot take the path {path}; use one without spaces, colons and per cent signs."
            )
    values = {
        "USER": USER,
        "PROGRAM": str(program),
        "PORT": str(link.port),
        "STATE": str(state),
        "HOME": str(home.resolve()),
        "MODEL": str(model),
        "SOFTWARE": "\n".join(f"BindReadOnlyPaths={path}" for path in _software()),
        "DEVICES": _devices(),
        "ADDRESSES": " ".join([*_addresses(link.server), *_name_servers(link.server)]),
        "FIREWALL": f"ExecStartPre=+{firewall.program()} -f {firewall.RULES}" if firewall.program() else "",
    }
    text = _TEMPLATE.read_text(encoding="utf-8").split("[Unit]", 1)[1]
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return f"# Written by afya-client join --service; run that again after a change.\n[Unit]{text}"


def _software() -> list[Path]:
    """Folders of Python and Afya; ProtectHome would hide them when they lie in somebody's home."""
    here = Path(__file__).resolve().parent.parent
    found = {Path(sys.prefix), Path(sys.base_prefix), here}
    return sorted(path for path in found if path not in (Path("/"), Path("/usr")))


def _devices() -> str:
    """No device at all, or NVIDIA's where there are any."""
    if not Path("/dev/nvidiactl").exists():
        return "PrivateDevices=yes"
    allowed = ("char-nvidia", "char-nvidia-uvm", "char-nvidia-frontend", "char-nvidia-caps")
    return "\n".join(["DevicePolicy=closed", *(f"DeviceAllow={name} rw" for name in allowed)])


def _addresses(server: str) -> list[str]:
    """The server's addresses now. Raises ServiceError."""
    try:
        host, port = contact.address(server)
        return sorted({str(row[4][0]) for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except (contact.NoContact, OSError) as error:
        raise ServiceError(
            f"The address of {server} is not known here ({error}); check its spelling and DNS."
        ) from error


def _name_servers(server: str) -> list[str]:
    """Addresses that answer what the server's name is; none when the server is given by its address."""
    if contact.address(server)[0] in _addresses(server):
        return []
    try:
        lines = Path("/etc/resolv.conf").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [words[1].split("%")[0] for words in map(str.split, lines) if len(words) > 1 and words[0] == "nameserver"]


def rules(link: Connection, user: str = USER) -> str:
    """The firewall's rules for this connection. Raises ServiceError."""
    port = contact.address(link.server)[1]
    return firewall.rules(user, link.port, _addresses(link.server), port, _name_servers(link.server))


def modes(home: Path, model: Path, group: str = USER) -> list[str]:
    """Shell lines that let the service's group, and nobody else, read the samples and exchange adapters.

    Files of the base model that not everybody may read are opened to the group, too.
    """
    q, owner = shlex.quote, shlex.quote(pwd.getpwuid(home.stat().st_uid).pw_name)
    lines = []
    for name, mode in (("training", "2750"), ("training/images", "2750"), ("training/samples", "2750")):
        lines.append(f"install -d -o {owner} -g {group} -m {mode} {q(str(home / name))}")
    lines.append(f"install -d -o {owner} -g {group} -m 2770 {q(str(home / 'adapters'))}")
    lines.append(f"install -d -o {owner} -g {group} -m 2750 {q(str(home / 'run'))}")
    for name in ("training", "adapters", "run"):
        folder = q(str(home / name))
        lines.append(f"chgrp -R {group} {folder}")
        lines.append(f"find {folder} -mindepth 1 -type d -exec chmod 2750 {{}} +")
        lines.append(f"find {folder} -type f -exec chmod 0640 {{}} +")
    for kind, mode in (("d", "rx"), ("f", "r")):
        closed = f"find {q(str(model.resolve()))} -type {kind} ! -perm -o+{mode}"
        lines.append(f"{closed} -exec chgrp {group} {{}} + -exec chmod g+{mode} {{}} +")
    lines.append(f"chmod 0700 {q(str(home))}")
    return lines


def _script(home: Path, link: Connection, state: Path, units: Path, unit: str) -> str:
    """What root runs: the user, the modes, the service's own folder, the unit, the start."""
    q, owner = shlex.quote, pwd.getpwuid(home.stat().st_uid).pw_name
    own, federation = q(str(state)), q(str(state / "federation"))
    lines = [
        "#!/bin/sh",
        "# Sets up Afya's client as a service of its own user. May be run again.",
        "set -eu",
        f"getent group {USER} >/dev/null || groupadd --system {USER}",
        f"id -u {USER} >/dev/null 2>&1 || useradd --system --gid {USER} --home-dir {own} --no-create-home "
        f"--shell /usr/sbin/nologin {USER}",
        *(
            [f"usermod -a -G {USER} {q(owner)}  # reads the adapters; counts from the next login on"]
            * (owner != "root")
        ),
        *modes(home, limits.base_model(home)),
        f"install -d -o {USER} -g {USER} -m 0700 {own} {q(str(state / 'flower'))}",
        f"install -d -o root -g {USER} -m 0750 "
        + " ".join(q(str(state / name)) for name in ("training", "adapters", "run", "model")),
        f"install -d -o {USER} -g {USER} -m 0700 {federation}",
    ]
    folder = {"ca.crt": link.ca, "node.key": link.key}
    for name in HANDED:
        source = folder.get(name, link.key.parent / name)
        if source.is_file():
            lines.append(f"install -o {USER} -g {USER} -m 0600 {q(str(source.resolve()))} {federation}/{name}")
    settings = q(str(state / "afya.toml"))
    lines.append(f"cat > {settings} <<'SETTINGS'\n{_settings(home, link)}SETTINGS")
    lines += [f"chown root:{USER} {settings}", f"chmod 0640 {settings}"]
    if firewall.program():
        lines.append(f"cat > {firewall.RULES} <<'RULES'\n{rules(link)}RULES")
    else:
        lines.append(
            "echo 'nftables is not installed: the service can reach the kiosk; install it and run this again.'"
        )
    lines.append(f"cat > {q(str(units / UNIT))} <<'UNIT'\n{unit}UNIT")
    lines += ["systemctl daemon-reload", f"systemctl enable {UNIT}", f"systemctl restart {UNIT}"]
    return "\n".join(lines) + "\n"


def _settings(home: Path, link: Connection) -> str:
    """The service's afya.toml: the clinic's own table [client], with the server's address. Raises SettingsWrong."""
    import json

    table = {**limits.read_settings(home).get("client", {}), "server": link.server}
    lines = [f"{name} = {json.dumps(value)}" for name, value in table.items() if name not in ("ca", "key", "port")]
    return "\n".join(["# Made from the clinic's afya.toml by afya-client join --service.", "[client]", *lines, ""])


def write_script(plan: Plan, home: Path) -> Path:
    """Write the script into the clinic's home for somebody who may run it; returns its path."""
    path = home / "afya-client-service.sh"
    write_atomic(path, plan.script.encode())
    return path


def install(plan: Plan) -> None:
    """Run the script; for root only. Raises ServiceError with what the failing command said."""
    if os.geteuid() != 0:
        raise ServiceError("Only root can install a service; run the script that this command writes with sudo.")
    done = subprocess.run(["/bin/sh", "-s"], input=plan.script, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ServiceError(f"The service was not installed: {' '.join((done.stderr or done.stdout).split())[-300:]}")
