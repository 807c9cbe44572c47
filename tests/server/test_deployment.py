"""A real federation on loopback: TLS, registered keys, the proxy, three SuperNodes, two rounds, adapters in each home.

And what must not work: Flower's Control API from the clinics' side, and a node whose key nobody registered.
"""

import json
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from client import node
from model import adapters, phantoms
from scripts.federation import Local, family, free_ports
from server import certs, contacts, link, runs
from tests.client.clinic import fill

CLINICS = ("north", "south", "west")


@pytest.mark.slow
def test_two_rounds_over_tls_with_registered_keys_behind_the_proxy(tmp_path: Path, tiny: Path) -> None:
    homes = {}
    for number, name in enumerate(CLINICS):
        samples = phantoms.make(3, ["plain"], seed=number, size=48)
        homes[name] = fill(tmp_path / name, samples, tiny)
    with Local(homes, tmp_path / "out", tiny) as local:
        _control_api_is_refused(local, tmp_path)
        stranger = _stranger(local, tmp_path)
        events = local.rounds({"num-server-rounds": 2, "rank": 2, "local-steps": 8, "batch-size": 8, "min-clinics": 3})
        _stranger_is_refused(stranger, tmp_path / "stranger.log")
        pids = [child.pid for child in local.processes.values()]
        peaks = dict(local.memory.peaks)
    assert not any(family(pid) for pid in pids)

    accepted = [(event["round"], event["clinic"]) for event in events if event["event"] == "accepted"]
    assert sorted(accepted) == [(number, name) for number in (1, 2) for name in CLINICS]
    done = [event for event in events if event["event"] == "round-done"]
    assert [(event["factor"], event["changed"]) for event in done] == [("B", True), ("A", True)]
    released = Path(next(event["folder"] for event in events if event["event"] == "release"))
    digest = adapters.sha256(released)
    for home in homes.values():
        current = adapters.current(home)
        assert current is not None and adapters.sha256(current) == digest
        assert json.loads((current / adapters.RELEASE).read_text())["contributed"] == list(CLINICS)
        state, _ = adapters.load(current)
        assert all(array.any() for array in state.values())
    assert {"server/superlink", "server/proxy", "server/serverapp", "north/supernode", "west/clientapp"} <= set(peaks)
    assert {event["clinic"] for event in events if event["event"] == "not-examined"} == set(CLINICS)
    assert set(contacts.read(tmp_path / "out/state")) == set(CLINICS), "the stranger is no contact"
    _nothing_of_the_clinics_left(tmp_path, homes["north"])


def _control_api_is_refused(local: Local, tmp_path: Path) -> None:
    """Flower's own command line, with the authority's certificate, gets nothing through the proxy."""
    home = tmp_path / "attacker"
    side = link.Link(local.out / "certs", home, int(local.server.rpartition(":")[2]))
    link.configure(side)
    for command in (("list",), ("supernode", "list"), ("run", str(runs.stage(side)))):
        with pytest.raises(link.LinkError, match=r"flwr .* failed"):
            link.flwr(side, *command, seconds=60)
    import ssl

    context = ssl.create_default_context(cafile=str(local.out / "certs/ca.crt"))
    with httpx.Client(verify=context, trust_env=False) as client:
        for path in ("/v1/control/start-run", "/v1/runtime/pull-messages", "/health"):
            assert client.post(f"https://{local.server}{path}", content=b"").status_code == 403


def _stranger(local: Local, tmp_path: Path) -> "subprocess.Popen[bytes]":
    """A SuperNode that has the authority's certificate but a key nobody registered."""
    certs.make(tmp_path / "other", ["stranger"])
    key = tmp_path / "other/clinics/stranger/node.key"
    command = [link.program("flower-supernode"), "--superlink", local.server]
    command += ["--root-certificates", str(local.out / "certs/ca.crt"), "--auth-supernode-private-key", str(key)]
    command += ["--port", str(free_ports(1)[0]), "--max-retries", "1"]
    environment = node.environment(tmp_path / "stranger")
    with open(tmp_path / "stranger.log", "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _stranger_is_refused(stranger: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 30
    try:
        assert stranger.wait(max(0.1, end - time.monotonic())) != 0
        assert "Failed to activate SuperNode" in log.read_text(), log.read_text()
    finally:
        for process in family(stranger.pid):
            process.kill()
        stranger.wait()


def _nothing_of_the_clinics_left(tmp_path: Path, home: Path) -> None:
    """No question of a clinic is in any file of the server: checkpoints, database, logs, bundle."""
    question = json.loads(next((home / "training/samples").iterdir()).read_text())["question"].encode()
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert question not in path.read_bytes(), path
