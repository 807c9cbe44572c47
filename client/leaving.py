"""Leaving: takes the client's service off this machine again, and gives the clinic's folders back to its own user.

Cases, samples, adapters, the privacy ledger and the federation's file stay, so joining again needs nothing new. Not
here: shutting the clinic out, which is the coordinator's (`afya-server revoke`), and installing (`client.service`).
"""

import grp
import pwd
import shlex
from pathlib import Path

from client import firewall, limits, service
from client.service import SETTINGS, STATE, UNIT, USER, WATCH, ServiceError


def script(home: Path, state: Path = STATE) -> str:
    """The shell script that root runs; may be run again. Raises ServiceError when no service serves this home."""
    if not service.installed(home):
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
        f"systemctl disable --now {' '.join(units)} 2>/dev/null || true",
        f"if systemctl is-active --quiet {UNIT}; then echo 'The service {UNIT} does not stop.' >&2; exit 1; fi",
        f"rm -f {' '.join(q(str(service.UNITS / name)) for name in units)}",
        "systemctl daemon-reload",
        *_rules(),
        f"rm -rf {q(str(state))}  # copies of the key, Flower's own files",
        *_given_back(home),
        f"if id -u {USER} >/dev/null 2>&1; then userdel {USER}; fi",
        f"if getent group {USER} >/dev/null; then groupdel {USER}; fi",
    ]
    return "\n".join(lines) + "\n"


def _rules() -> list[str]:
    """Lines that take the firewall's rules out of force and away."""
    lines = [f"rm -f {firewall.RULES}"]
    return [firewall.removal(), *lines] if firewall.program() else lines


def _given_back(home: Path) -> list[str]:
    """Lines that leave the shared folders, and what of the base model was opened to the group, to the clinic alone."""
    user = service.owner(home)
    group = grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    lines = []
    for name in service.BOUND:
        folder = shlex.quote(str(home / name))
        lines.append(f"chown -hR {user}:{group} {folder}")
        lines.append(f"find {folder} -type d -exec chmod u=rwx,go=,g-s {{}} + -o -type f -exec chmod 0600 {{}} +")
    model = shlex.quote(str(limits.base_model(home).resolve()))
    there = f"if [ -e {model} ] && getent group {USER} >/dev/null"
    lines.append(f"{there}; then find {model} -group {USER} -exec chgrp {group} {{}} +; fi")
    return lines
