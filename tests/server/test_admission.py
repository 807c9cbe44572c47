"""Who gets in: a real SuperLink behind the proxy against impostors, strangers, others' keys, replays, revoked keys.

One server for the whole file. The calls are made as Flower's SuperNode makes them, with its own message types.
"""

import datetime
import json
import os
import ssl
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.node_pb2 import Node

from client import doctor, invitation, node, supernode
from client.cli import main as client_main
from scripts.federation import Local, family, free_ports, program
from server import admission, certs, guard, link, members, registry
from server.cli import main

CLINICS = ("north", "south", "east", "west")


class Server:
    """The running server with its clinics, and calls to its proxy."""

    def __init__(self, local: Local) -> None:
        self.local, self.certs, self.state = local, local.out / "certs", local.out / "state"
        self.places = local.places()
        context = ssl.create_default_context(cafile=str(self.certs / "ca.crt"))
        self.web = httpx.Client(verify=context, trust_env=False, base_url=f"https://{local.server}")

    def key(self, name: str) -> Path:
        return self.certs / "clinics" / name / "node.key"

    def node(self, name: str) -> int:
        return int(registry.node_id(self.state, registry.registered(self.state)[name]))

    def post(self, call: str, message: object, headers: dict[str, str]) -> httpx.Response:
        sent = {"content-type": "application/protobuf", **headers}
        return self.web.post(f"/v1/fleet/{call}", content=message.SerializeToString(), headers=sent)


def signed(key: Path, claimed: Path | None = None, ago: float = 0.0) -> dict[str, str]:
    """Headers as a SuperNode sends them; `claimed` shows the public key of another."""
    moment = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago)).isoformat()
    private = serialization.load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    signature = private.sign(moment.encode(), ec.ECDSA(hashes.SHA256()))
    shown = b64encode(public(claimed or key)).decode()
    return {"flwr-public-key": shown, "flwr-timestamp": moment, "flwr-signature": b64encode(signature).decode()}


def public(key: Path) -> bytes:
    """A node key's public half as Flower sends it."""
    return members.pem((key.parent / "node.pub").read_text().strip()).encode()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    out = tmp_path_factory.mktemp("admission")
    with Local({}, out, out / "no-model") as local:
        certs.make(local.out / "certs", CLINICS)
        side = link.Link(local.out / "certs", local.out / "state", local.ports[1])
        assert admission.register_all(side) == sorted(CLINICS)
        server = Server(local)
        yield server
        server.web.close()


def heartbeat(number: int) -> SendNodeHeartbeatRequest:
    return SendNodeHeartbeatRequest(node=Node(node_id=number), heartbeat_interval=30)


def activate(running: Server, name: str) -> int:
    """Activate a clinic's node as its SuperNode does; returns its number."""
    key = running.key(name)
    request = ActivateNodeRequest(public_key=public(key), heartbeat_interval=30)
    assert running.post("activate-node", request, signed(key)).status_code == 200
    return running.node(name)


def test_a_registered_key_gets_in(running: Server) -> None:
    number = activate(running, "north")
    reply = running.post("send-node-heartbeat", heartbeat(number), signed(running.key("north")))
    assert reply.status_code == 200 and SendNodeHeartbeatResponse.FromString(reply.content).success


def test_an_impostor_with_the_authority_reaches_no_control_call(running: Server) -> None:
    from flwr.supercore.routers.runtime.router import router as runtime
    from flwr.superlink.routers.control.router import router as control

    paths = [route.path for router in (control, runtime) for route in router.routes]
    assert len(paths) > 20
    for path in paths:
        for method in ("POST", "GET"):
            assert running.web.request(method, path).status_code == 403, path


def test_an_impostor_without_a_key_gets_in_nowhere(running: Server) -> None:
    for call in ("activate-node", "pull-messages", "get-run", "push-object"):
        assert running.post(call, PullMessagesRequest(node=Node(node_id=running.node("north"))), {}).status_code == 401


def test_a_key_that_nobody_registered_is_refused(running: Server, tmp_path: Path) -> None:
    certs.make(tmp_path / "own", ["stranger"])
    key = tmp_path / "own/clinics/stranger/node.key"
    request = ActivateNodeRequest(public_key=public(key), heartbeat_interval=30)
    assert running.post("activate-node", request, signed(key)).status_code == 412
    assert running.post("send-node-heartbeat", heartbeat(running.node("north")), signed(key)).status_code == 401
    joined = running.post("register-node", RegisterNodeFleetRequest(public_key=public(key)), signed(key))
    assert joined.status_code >= 400


def test_the_key_of_another_clinic_opens_only_its_own_door(running: Server) -> None:
    number, south, north = activate(running, "south"), running.key("south"), running.key("north")
    messages = PullMessagesRequest(node=Node(node_id=number))
    assert running.post("pull-messages", messages, signed(south)).status_code == 200
    assert running.post("pull-messages", messages, signed(north)).status_code == 401
    assert running.post("pull-messages", messages, signed(north, claimed=south)).status_code == 401
    request = ActivateNodeRequest(public_key=public(south), heartbeat_interval=30)
    assert running.post("activate-node", request, signed(north)).status_code == 401


def test_a_repeated_and_an_old_signature_are_refused(running: Server) -> None:
    number, key = activate(running, "east"), running.key("east")
    headers = signed(key)
    assert running.post("send-node-heartbeat", heartbeat(number), headers).status_code == 200
    again = running.post("send-node-heartbeat", heartbeat(number), headers)
    assert again.status_code == 401 and "used before" in again.text
    other = running.post("pull-messages", PullMessagesRequest(node=Node(node_id=number)), headers)
    assert other.status_code == 401
    assert running.post("send-node-heartbeat", heartbeat(number), signed(key, ago=400)).status_code == 401
    assert running.post("send-node-heartbeat", heartbeat(number), signed(key)).status_code == 200


def test_the_doctor_knows_registered_unknown_and_revoked_keys(running: Server, tmp_path: Path, afya_home: Path) -> None:
    def registration(bundle: Path) -> doctor.Check:
        found = node.connection(afya_home, running.local.server, bundle)
        return next(check for check in doctor.examine(afya_home, found) if check.name == "registration")

    certs.make(tmp_path / "own", ["stranger"])
    stranger = tmp_path / "own/clinics/stranger"
    (stranger / "ca.crt").write_bytes((running.certs / "ca.crt").read_bytes())
    done = CliRunner().invoke(main, ["invite", "guest", "--out", str(tmp_path / "guest.afya"), *_places(running)])
    assert done.exit_code == 0 and "is registered" in done.output, done.output
    folder = invitation.unpack(afya_home, invitation.read(tmp_path / "guest.afya"))
    assert registration(folder).ok, registration(folder)
    assert "does not know this clinic's key" in registration(stranger).detail
    done = CliRunner().invoke(main, ["revoke", "guest", "--yes", *running.places])
    assert done.exit_code == 0 and "refused from now on." in done.output and "not told" not in done.output
    assert "has revoked this clinic's key" in registration(folder).detail
    assert "guest" not in registry.registered(running.state) and not (running.certs / "clinics/guest").exists()
    again = CliRunner().invoke(main, ["invite", "guest", "--out", str(tmp_path / "again.afya"), *_places(running)])
    assert again.exit_code == 0, again.output
    second = invitation.read(tmp_path / "again.afya")
    assert second.key != (folder / "node.key").read_text()
    folder = invitation.unpack(afya_home, second, replace=True)
    assert registration(folder).ok


def test_one_file_and_one_command_bring_a_clinic_online(
    running: Server, tmp_path: Path, afya_home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [*running.places, "--base-model", str(tiny), "--server", running.local.server]
    done = CliRunner().invoke(main, ["invite", "fresh", "--out", str(tmp_path / "fresh.afya"), *places])
    assert done.exit_code == 0, done.output
    (afya_home / "afya.toml").write_text(f"model = {json.dumps(str(tiny))}\n[client]\nport = {free_ports(1)[0]}\n")
    with open(tmp_path / "fresh.log", "wb") as log:
        command = program("client", "join", str(tmp_path / "fresh.afya"), "--foreground")
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(lambda: '"online"' in _nodes(running, running.node("fresh")))
        assert "Taking part at" in (tmp_path / "fresh.log").read_text()
        start = time.monotonic()
        checked = CliRunner().invoke(client_main, ["doctor"])
        assert checked.exit_code == 0, checked.output
        assert time.monotonic() - start < 10
        monkeypatch.setattr(os, "geteuid", lambda: 1000)  # not root: nothing is installed, the commands are printed
        asked = CliRunner().invoke(client_main, ["join", "--service", "--without-firewall"])
        script = afya_home / "afya-client-service.sh"
        assert asked.exit_code == 0 and f"sudo sh {script}" in asked.output, asked.output
        assert "systemctl enable afya-client.service" in script.read_text()
        assert '"online"' in _nodes(running, running.node("fresh"))  # asking did not disturb the node that runs
    finally:
        for process in family(child.pid):
            process.kill()
        child.wait()


def _places(running: Server) -> list[str]:
    return [*running.places, "--base-model", str(Path(certs.__file__).parent.parent / "model/reference")]


def test_a_revoked_clinic_that_takes_part_is_thrown_out(running: Server, tmp_path: Path) -> None:
    connection = node.Connection(running.local.server, running.certs / "ca.crt", running.key("west"), free_ports(1)[0])
    (tmp_path / "west").mkdir()
    with open(tmp_path / "west.log", "wb") as log:
        child = subprocess.Popen(
            node.command(connection), env=node.environment(tmp_path / "west"), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_for(lambda: '"online"' in _nodes(running, running.node("west")))
        side = link.Link(running.certs, running.state, running.local.ports[1])
        assert members.revoke(side, "west")
        assert (running.certs / "revoked").is_dir()
        assert child.wait(60) is not None
        assert (tmp_path / "west.log").read_text().count(supernode.REFUSED) == 1
        assert admission.register_all(side) == []
    finally:
        for process in family(child.pid):
            process.kill()
        child.wait()


def test_a_key_that_only_the_superlink_knows_after_a_power_cut_is_taken_up_again(running: Server) -> None:
    side = link.Link(running.certs, running.state, running.local.ports[1])
    known, number = registry.registered(running.state)["south"], running.node("south")
    registry.forget(running.state, "south")
    (running.state / registry.NODES).unlink()
    assert admission.register_all(side) == ["south"]
    assert registry.registered(running.state)["south"] == known and running.node("south") == number


def _nodes(running: Server, number: int) -> str:
    """What the SuperLink says about one node."""
    side = link.Link(running.certs, running.state, running.local.ports[1])
    listed = link.parsed(link.flwr(side, "supernode", "list", "--format", "json"))["nodes"]
    return next(str(row).replace("'", '"') for row in listed if row["node-id"] == str(number))


def _wait_for(true: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.5)


def test_nobody_revokes_whom_nobody_knows(running: Server) -> None:
    done = CliRunner().invoke(main, ["revoke", "nobody", "--yes", *running.places])
    assert done.exit_code == 1 and "There is no clinic 'nobody'" in done.output


def test_signed_times_are_forgotten_when_flower_would_refuse_them_anyway(tmp_path: Path) -> None:
    now = [0.0]
    door = guard.Guard(tmp_path, clock=lambda: now[0])
    rows = [(b"flwr-public-key", b64encode(b"k")), (b"flwr-timestamp", b"t")]
    assert door.refusal(rows) is None and door.refusal(rows) == (401, "This signature was used before.")
    assert door.refusal([(b"Flwr-Public-Key", b64encode(b"k")), (b"FLWR-TIMESTAMP", b"t")]) is not None
    assert door.refusal([*rows, (b"flwr-timestamp", b"u")]) == (400, "A call carries one key and one time.")
    assert door.refusal([(b"flwr-public-key", b"not base64!")]) == (400, "The key is not readable.")
    longer = (400, "The key or the time is longer than any is.")
    assert door.refusal([(b"flwr-public-key", b64encode(bytes(10_000))), rows[1]]) == longer
    assert door.refusal([rows[0], (b"flwr-timestamp", b"2" * 10_000)]) == longer
    now[0] = guard.WINDOW + 1
    assert door.refusal(rows) is None
    assert len(door._seen) == 1
    for number in range(50):
        now[0] += 10
        door.refusal([rows[0], (b"flwr-timestamp", str(number).encode())])
    assert len(door._seen) <= guard.WINDOW / 10 + 2
