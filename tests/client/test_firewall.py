"""The rules under nftables of a network namespace: which ports the service's user reaches, and everybody else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from client import firewall, node, service

KIOSK_USER, CLIENT_USER = 1, 65534  # daemon, nobody: there on every Debian


CONNECT = """
import encodings.idna, os, socket, sys
uid, ports = int(sys.argv[1]), [int(port) for port in sys.argv[2:]]
listeners = [socket.create_server((host, port)) for port in ports for host in ("127.0.0.1", "10.9.8.7")]
listeners.append(socket.create_server(("::1", ports[0]), family=socket.AF_INET6))
os.setresuid(uid, uid, uid)
for listener in listeners:
    host, port = listener.getsockname()[:2]
    try:
        socket.create_connection((host, port), timeout=2).close()
        print(host, port)
    except OSError:
        pass
"""


def test_the_services_user_reaches_the_server_and_its_own_port_only(afya_home: Path, tmp_path: Path) -> None:
    """In a network namespace with a kiosk (8501), the SuperNode's port (9094) and a server (8443) on two addresses."""
    if os.geteuid() != 0 or not firewall.program():
        pytest.skip("needs root and nftables")
    link = node.Connection("10.9.8.7:8443", tmp_path / "ca.crt", tmp_path / "node.key", 9094)
    (tmp_path / "rules").write_text(service.rules(link, "nobody"))
    (tmp_path / "connect.py").write_text(CONNECT)

    def reached(user: int, rules: bool = True) -> set[str]:
        load = (
            f"{firewall.program()} -f {tmp_path}/rules && {firewall.program()} -f {tmp_path}/rules" if rules else "true"
        )
        commands = f"ip link set lo up && ip address add 10.9.8.7/32 dev lo || exit 77; {load} || exit 77\n"
        commands += f"{sys.executable} {tmp_path}/connect.py {user} 8501 9094 8443"
        done = subprocess.run(["unshare", "-n", "sh", "-c", commands], capture_output=True, text=True, timeout=60)
        if done.returncode == 77:
            pytest.skip("this machine lets root make no network namespace or load no rules")
        assert done.returncode == 0, done.stderr
        return set(done.stdout.splitlines())

    everything = {f"{host} {port}" for host in ("127.0.0.1", "10.9.8.7") for port in (8501, 9094, 8443)} | {"::1 8501"}
    assert reached(CLIENT_USER) == {"127.0.0.1 9094", "10.9.8.7 9094", "10.9.8.7 8443"}
    assert reached(KIOSK_USER) == everything
    assert reached(CLIENT_USER, rules=False) == everything


def test_a_server_with_a_name_leaves_the_name_servers_reachable() -> None:
    made = firewall.rules("afya-client", 9094, ["2001:db8::7", "192.0.2.7"], 443, ["192.0.2.53"])
    for line in ("ip6 daddr 2001:db8::7 tcp dport 443 accept", "ip daddr 192.0.2.53 udp dport 53 accept"):
        assert line in made
    if firewall.program() and os.geteuid() == 0:
        text = made.replace('"afya-client"', '"nobody"')
        done = subprocess.run(
            ["unshare", "-n", firewall.program(), "-f", "-"], input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
