"""Leaving: takes the client's service off this machine again, and gives the clinic's folders back to its own user.

Cases, samples, adapters, the privacy ledger and the federation's file stay, so joining again needs nothing new. Not
here: shutting the clinic out, which is the coordinator's (`afya-server revoke`), and installing (`client.service`).
"""

import shlex
from pathlib import Path

from client import firewall, service, unit
from client.service import ServiceError
from client.unit import SETTINGS, STATE, UNIT, USER, WATCH


def script(home: Path, state: Path = STATE) -> str:
    """The shell script that root runs; may be run again. Raises ServiceError when no service serves this home."""
    if not unit.installed(home):
        raise ServiceError(
            f"No service is installed for {home}, so there is nothing to take away; a client in the foreground is left "
            "by interrupting it."
        )
    q, units = shlex.quote, (WATCH, UNIT, SETTINGS)
    lines = [
        "#!/bin/sh",
        "# Takes Afya's client service off this machine; cases, samples, adapters and the privacy ledger stay.",
        "set -eu",
        *service.one_ledger(home, state),
        *service.stopped(),
        f"systemctl disable {' '.join(units)} 2>/dev/null || true",
        *_rules(),
        *_given_back(home),
        *_emptied(state),
        f"if id -u {USER} >/dev/null 2>&1; then userdel {USER}; fi",
        f"if getent group {USER} >/dev/null; then groupdel {USER}; fi",
        # Last, so that a script that was stopped before can be made and run again.
        f"rm -f {' '.join(q(str(unit.UNITS / name)) for name in units)}",
        "systemctl daemon-reload",
    ]
    return "\n".join(lines) + "\n"


def _rules() -> list[str]:
    """Lines that take the firewall's rules out of force and away."""
    lines = [f"rm -f {firewall.RULES}"]
    return [firewall.removal(), *lines] if firewall.program() else lines


def _emptied(state: Path) -> list[str]:
    """Lines that delete the service's own folder, unless something of the clinic is still bound into it."""
    told = f"Something is still mounted in {state}; unmount it and run this again."
    return [
        f"if grep -qF {shlex.quote(f' {state}/')} /proc/self/mountinfo; then echo {shlex.quote(told)} >&2; exit 1; fi",
        f"rm -rf {shlex.quote(str(state))}  # copies of the key, Flower's own files",
    ]


def _given_back(home: Path) -> list[str]:
    """Lines that leave the shared folders, and what of the base model was opened to the group, to the clinic alone."""
    there = home.stat()
    lines = []
    for name in service.BOUND:
        folder = shlex.quote(str(home / name))
        lines += [
            f"if [ -d {folder} ]; then",
            f"    chown -hR {there.st_uid}:{there.st_gid} {folder}",
            f"    find {folder} -type d -exec chmod u=rwx,go=,g-s {{}} + -o -type f -exec chmod 0600 {{}} +",
            "fi",
        ]
    model = shlex.quote(str(unit.model() or home))
    own = f"find {model} -group {USER} -exec chgrp {there.st_gid} {{}} + -exec chmod g-rwx {{}} +"
    return [*lines, f"if [ -e {model} ] && getent group {USER} >/dev/null; then {own}; fi"]
