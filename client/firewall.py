"""Rules for nftables: the service's user reaches the federation's server and its own helper's port, and no other port.

systemd filters by address only, and the kiosk listens on this machine too. The rules hold for one user and leave every
other one alone. Not here: loading them; the unit does so before it starts (`client.service`).
"""

import ipaddress
import shlex
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from client import contact

RULES = Path("/etc/afya-client.nft")
_TABLE = "afya_client"
_REMOVED = (f"table inet {_TABLE} {{}}", f"delete table inet {_TABLE}")  # the first, so that there is one to delete


def program() -> str:
    """Path of nft, or an empty string when nftables is not installed; root runs it, so no other folder counts."""
    return shutil.which("nft", path="/usr/sbin:/usr/bin:/sbin:/bin") or ""


def loaded() -> bool:
    """Whether the rules are in force now; only root can see that."""
    done = subprocess.run([program(), "list", "table", "inet", _TABLE], capture_output=True, check=False)
    return done.returncode == 0


def addresses(server: str) -> list[str]:
    """The addresses of "HOST:PORT" now. Raises NoContact."""
    host, port = contact.address(server)
    try:
        return sorted({str(row[4][0]) for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        raise contact.NoContact(
            f"The address of {server} is not known here ({error}); check its spelling and DNS."
        ) from error


def name_servers(server: str) -> list[str]:
    """Addresses that answer what the server's name is; none when it is given by its address. Raises NoContact."""
    if contact.address(server)[0] in addresses(server):
        return []
    try:
        lines = Path("/etc/resolv.conf").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [words[1].split("%")[0] for words in map(str.split, lines) if len(words) > 1 and words[0] == "nameserver"]


def rules(user: str, port: int, addresses: Sequence[str], server_port: int, name_servers: Sequence[str]) -> str:
    """The rules as a file for nft: `port` is the SuperNode's own on loopback, `addresses` those of the server."""
    allowed = [f'oifname "lo" tcp dport {port} accept']
    allowed += [f"{_family(text)} daddr {text} tcp dport {server_port} accept" for text in addresses]
    allowed += [
        f"{_family(text)} daddr {text} {kind} dport 53 accept" for text in name_servers for kind in ("udp", "tcp")
    ]
    lines = [
        *_REMOVED,
        f"table inet {_TABLE} {{",
        "  chain output {",
        "    type filter hook output priority 0; policy accept;",
        f'    meta skuid != "{user}" accept',
        "    ct state established,related accept",
        *(f"    {line}" for line in allowed),
        "    reject",
        "  }",
        "}",
    ]
    return "\n".join(["# Written by afya-client join --service; run that again after a change.", *lines, ""])


def removal() -> str:
    """Shell line that takes the rules out of force, whether they are or not."""
    return f"printf '%s\\n' {' '.join(map(shlex.quote, _REMOVED))} | {program()} -f -"


def _family(address: str) -> str:
    return "ip6" if ipaddress.ip_address(address).version == 6 else "ip"
