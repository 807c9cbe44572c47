"""The client as a system service of its own user: the units, and the commands that set up its folders.

Flower brings training code from the coordinator. So the service runs as `afya-client`, with a home of its own into
which systemd binds the clinic's training/ and run/ (read only), adapters/ and privacy/: everything else of the clinic
is out of its reach by file modes and once more by the unit. The clinic's settings come as a copy in run/ that a unit of
the clinic's own user keeps up to date; ledger and seal are the home's own, so a clinic has one of each. Not here: what
the units say (`client/systemd/`).
"""

import hashlib
import pwd
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from client import contact, firewall, limits, unit
from client.node import Connection
from client.unit import SETTINGS, STATE, UNIT, USER, WATCH

HANDED = ("ca.crt", "node.key", "release.pub", "invitation.json")  # what the service gets of the federation's folder
BOUND = ("training", "run", "adapters", "privacy")  # folders of the clinic's home that the service sees
_TEMPLATES = Path(__file__).parent / "systemd"
_NFTABLES = "After=nftables.service\nPartOf=nftables.service\nReloadPropagatedFrom=nftables.service"


class ServiceError(RuntimeError):
    """The service cannot be set up; the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """The units' texts by name and the shell script that installs and starts them; root runs the script."""

    units: dict[str, str]
    script: str


def plan(
    home: Path, link: Connection, state: Path = STATE, folder: Path = unit.UNITS, *, without_firewall: bool = False
) -> Plan:
    """Units, for `folder`, and script for this clinic's home and connection. Raises ServiceError.

    A machine without nftables is refused unless `without_firewall` accepts it, and one that serves another clinic.
    """
    if (other := unit.served()) and other != home.resolve():
        raise ServiceError(
            f"The service on this machine is that of {other}; run `sudo AFYA_HOME={other} afya-client leave` first."
        )
    if not firewall.program() and not without_firewall:
        raise ServiceError(
            "nftables is not installed, and without it the service can reach the kiosk's port; install the package "
            "nftables, or pass --without-firewall to accept that."
        )
    units = fill(home, link, state)
    return Plan(units, _script(home, link, state, folder, units))


def fill(home: Path, link: Connection, state: Path = STATE) -> dict[str, str]:
    """Name -> text of each unit for this clinic. Raises ServiceError."""
    there, names = _reachable(link.server)
    return _fill(home, link, state, [*there, *names])


def _fill(home: Path, link: Connection, state: Path, addresses: list[str]) -> dict[str, str]:
    values = {**_values(home, link, state), "ADDRESSES": " ".join(addresses)}
    found = {}
    for name in (UNIT, SETTINGS, WATCH):
        text = (_TEMPLATES / name).read_text(encoding="utf-8").split("[Unit]", 1)[1]
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
        found[name] = f"# Written by afya-client join --service; run that again after a change.\n[Unit]{text}"
    return found


def _values(home: Path, link: Connection, state: Path) -> dict[str, str]:
    """What stands in the templates between @ signs, but for the addresses. Raises ServiceError."""
    program = Path(sys.executable).parent / "afya-client"
    if not program.exists():
        raise ServiceError(f"{program} is not there; install Afya with pip first.")
    model = limits.base_model(home).resolve()
    for path in (home, model, program):
        if any(mark in str(path) for mark in (" ", ":", "%", "\n", "'")):
            raise ServiceError(
                f"systemd cannot take the path {path}; use one without spaces, colons and per cent signs."
            )
    if not re.fullmatch(r"[\w.:\[\]-]+", link.server):
        raise ServiceError(f"The server {link.server!r} is not HOST:PORT; correct it in [client] of afya.toml.")
    load = f"+{firewall.program()} -f {firewall.RULES}"
    return {
        "USER": USER,
        "OWNER": owner(home),
        "PROGRAM": str(program),
        "SERVER": link.server,
        "PORT": str(link.port),
        "STATE": str(state),
        "HOME": str(home.resolve()),
        "MODEL": str(model),
        "FEDERATION": _digest(link),
        "SOFTWARE": "\n".join(f"BindReadOnlyPaths={path}" for path in _software()),
        "DEVICES": _devices(),
        "NFTABLES": _NFTABLES if firewall.program() else "",
        "FIREWALL": f"ExecStartPre={load}\nExecReload={load}" if firewall.program() else "",
    }


def owner(home: Path) -> str:
    """Name of the user to whom the clinic's home belongs."""
    return pwd.getpwuid(home.stat().st_uid).pw_name


def _handed(link: Connection) -> dict[str, Path]:
    """Name -> place of the files of the federation that the service gets a copy of; those that there are."""
    places = {name: link.key.parent / name for name in HANDED} | {"ca.crt": link.ca, "node.key": link.key}
    return {name: path for name, path in places.items() if path.is_file()}


def _digest(link: Connection) -> str:
    """Short hash of those files without the private key, by which the unit says what it was set up with."""
    public = [path.read_bytes() for name, path in sorted(_handed(link).items()) if name != "node.key"]
    return hashlib.sha256(b"\0".join(public)).hexdigest()[:16]


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


def _reachable(server: str) -> tuple[list[str], list[str]]:
    """Addresses of the server and of those that answer what its name is. Raises ServiceError."""
    try:
        return firewall.addresses(server), firewall.name_servers(server)
    except contact.NoContact as error:
        raise ServiceError(str(error)) from error


def rules(link: Connection, user: str = USER) -> str:
    """The firewall's rules for this connection. Raises ServiceError."""
    there, names = _reachable(link.server)
    return firewall.rules(user, link.port, there, contact.address(link.server)[1], names)


def modes(home: Path, model: Path, group: str = USER) -> list[str]:
    """Shell lines that let the service's group, and nobody else, read the samples, exchange adapters, use the ledger.

    Files of the base model that not everybody may read are opened to the group, too.
    """
    q, user = shlex.quote, shlex.quote(owner(home))
    lines = []
    shared = {"training": "2750", "training/images": "2750", "training/samples": "2750", "run": "2750"}
    for name, mode in {**shared, "adapters": "2770", "privacy": "2770"}.items():
        lines.append(f"install -d -o {user} -g {group} -m {mode} {q(str(home / name))}")
    for name in BOUND:
        folder = q(str(home / name))
        lines.append(f"chgrp -R {group} {folder}")
        lines.append(f"find {folder} -mindepth 1 -type d -exec chmod 2750 {{}} +")
        lines.append(f"find {folder} -type f -exec chmod 0640 {{}} +")
    for kind, mode in (("d", "rx"), ("f", "r")):
        closed = f"find {q(str(model.resolve()))} -type {kind} ! -perm -o+{mode}"
        lines.append(f"{closed} -exec chgrp {group} {{}} + -exec chmod g+{mode} {{}} +")
    lines.append(f"chmod 0700 {q(str(home))}")
    return lines


def _script(home: Path, link: Connection, state: Path, folder: Path, units: dict[str, str]) -> str:
    """What root runs: the user, the modes, the service's own folder, the units, the start."""
    lines = [
        "#!/bin/sh",
        "# Sets up Afya's client as a service of its own user. May be run again.",
        "set -eu",
        *one_ledger(home, state),
        *stopped(),
        *_user(home, state),
        *modes(home, limits.base_model(home)),
        *_state(link, state),
    ]
    if firewall.program():
        lines.append(f"cat > {firewall.RULES} <<'RULES'\n{rules(link)}RULES")
    else:
        lines.append(f"echo 'nftables is not installed: the user {USER} can reach every port of this machine.'")
    for name, text in units.items():
        path = shlex.quote(str(folder / name))
        lines += [f"cat > {path} <<'UNIT'\n{text}UNIT", f"chmod 0644 {path}"]
    lines += ["systemctl daemon-reload", f"systemctl enable {UNIT} {WATCH}", f"systemctl restart {WATCH} {UNIT}"]
    if owner(home) != "root":
        told = (
            f"{owner(home)}: log out and in again, then start the kiosk anew; before that it cannot read new adapters."
        )
        lines.append(f"echo {shlex.quote(told)}")
    return "\n".join(lines) + "\n"


def one_ledger(home: Path, state: Path) -> list[str]:
    """Lines that change nothing where the service has a ledger of its own: two budgets would be spent."""
    old = shlex.quote(str(state / "privacy"))
    told = (
        f"{state / 'privacy'} holds a privacy ledger beside that of the clinic: stop {UNIT} and move the folder to "
        f"{home / 'privacy'}; where there is one already, keep it aside and lower dp_epsilon by what it has spent."
    )
    return [f'if [ -n "$(ls -A {old} 2>/dev/null)" ]; then echo {shlex.quote(told)} >&2; exit 1; fi']


def stopped() -> list[str]:
    """Lines that stop the service: while it runs, it could lead what root does next through links of its own."""
    return [
        f"systemctl stop {WATCH} {UNIT} 2>/dev/null || true",
        f"if systemctl is-active --quiet {UNIT}; then echo 'The service {UNIT} does not stop.' >&2; exit 1; fi",
    ]


def _user(home: Path, state: Path) -> list[str]:
    """Lines that make the service's user and let the clinic's into its group."""
    lines = [
        f"getent group {USER} >/dev/null || groupadd --system {USER}",
        f"id -u {USER} >/dev/null 2>&1 || useradd --system --gid {USER} --home-dir {shlex.quote(str(state))} "
        f"--no-create-home --shell /usr/sbin/nologin {USER}",
    ]
    if owner(home) != "root":
        lines.append(f"usermod -a -G {USER} {shlex.quote(owner(home))}  # counts from the next login on")
    return lines


def _state(link: Connection, state: Path) -> list[str]:
    """Lines that make the service's own folder, with the places where the clinic's are bound and the keys."""
    q, federation = shlex.quote, shlex.quote(str(state / "federation"))
    places = " ".join(q(str(state / name)) for name in (*BOUND, "model"))
    lines = [
        f"install -d -o {USER} -g {USER} -m 0700 {q(str(state))}",
        f"for place in {places} {federation}; do",  # the service may have laid something else there
        '    if [ -L "$place" ] || [ ! -d "$place" ]; then rm -f "$place"; fi',
        "done",
        f"install -d -o root -g {USER} -m 0750 {places}",
        f"install -d -o {USER} -g {USER} -m 0700 {federation}",
        f"rm -f {q(str(state / 'afya.toml'))}  # settings as they once were",
    ]
    for name, source in _handed(link).items():
        lines.append(f"install -o {USER} -g {USER} -m 0600 {q(str(source.resolve()))} {federation}/{name}")
    return lines


def outdated(home: Path, link: Connection) -> list[str]:
    """Names of the entries in which installed units differ from what would be installed now. Raises ServiceError."""
    names = set()
    for name, text in _fill(home, link, STATE, []).items():
        path = unit.UNITS / name
        there = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
        names |= {line.partition("=")[0] for line in there ^ set(text.splitlines())}
    return sorted(names - {"IPAddressAllow"})


def behind(home: Path) -> str:
    """A sentence when a service is installed for this home and works with other settings, else an empty string."""
    if not unit.installed(home):
        return ""
    live, copy = home / "afya.toml", home / "run" / "afya.toml"
    if copy.is_file() and copy.read_bytes() == (live.read_bytes() if live.exists() else b""):
        return ""
    way = f"systemctl start {SETTINGS}" if copy.is_file() else again(home)
    return f"the service does not work with {home / 'afya.toml'} as it is now; run `sudo {way}`."


def again(home: Path) -> str:
    """The command, for root, that sets the service up once more."""
    return f"AFYA_HOME={home} afya-client join --service"
