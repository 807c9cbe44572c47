"""Rules for nftables: the service's user reaches the federation's server and its own helper's port, and no other port.

systemd filters by address only, and the kiosk listens on this machine too. The rules hold for one user and leave every
other one alone. Not here: loading them; the unit does so before it starts (`client.service`).
"""

import ipaddress
import shutil
from collections.abc import Sequence
from pathlib import Path

RULES = Path("/etc/afya-client.nft")
_TABLE = "afya_client"


def program() -> str:
    """Path of nft, or an empty string when nftables is not installed."""
    return shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin") or ""


def rules(user: str, port: int, addresses: Sequence[str], server_port: int, name_servers: Sequence[str]) -> str:
    """The rules as a file for nft: `port` is the SuperNode's own on loopback, `addresses` those of the server."""
    allowed = [f'oifname "lo" tcp dport {port} accept']
    allowed += [f"{_family(text)} daddr {text} tcp dport {server_port} accept" for text in addresses]
    allowed += [
        f"{_family(text)} daddr {text} {kind} dport 53 accept" for text in name_servers for kind in ("udp", "tcp")
    ]
    lines = [
        f"table inet {_TABLE} {{}}",  # so that there is one to delete
        f"delete table inet {_TABLE}",
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


def _family(address: str) -> str:
    return "ip6" if ipaddress.ip_address(address).version == 6 else "ip"
