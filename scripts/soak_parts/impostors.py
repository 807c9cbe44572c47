"""Who must not get in while a round runs: no key, an unknown key, another's key, a used signature, a revoked key, and
whoever wants Flower's Control API through the clinics' door.

Survived: refused as it must be, and the round that was running ends with the replies of the clinics and of nobody else.
The calls are made as Flower's SuperNode makes them.
"""

import contextlib
import datetime
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from client import node
from scripts.federation import family, free_ports
from scripts.soak_parts import kills
from scripts.soak_parts.deployment import Deployment, NotSurvived, end
from scripts.soak_parts.report import Outcome
from scripts.soak_parts.schedule import Case
from scripts.soak_parts.town import HONEST, LATER, PATIENCE, Town
from server import certs, link, members, registry, runs

SHUT_OUT = LATER[1]
SECONDS = 60.0  # longest time a stranger's SuperNode may take to give up


def attempt(town: Town, case: Case) -> Outcome:
    """One impostor in the middle of a round. Raises NotSurvived when it got anywhere."""
    settings = {"min-clinics": len(HONEST), "round-deadline": PATIENCE}
    if set(LATER) & set(town.deployment().processes):  # a liar of the cases before, whose replies would count
        town.abandon()
    now = town.ready("impostor", "quick", settings)
    place = kills.into_a_round(now, 1.0)
    words = TRICKS[case.kind](now)
    number = kills.running(now, place)
    now.wait("the end of the round", PATIENCE + kills.SLACK, lambda: kills.done(now, number))
    told = {e["clinic"] for e in now.seen if e["event"] in ("accepted", "rejected") and e["round"] == number}
    counted = {e["clinic"] for e in now.seen if e["event"] == "accepted" and e["round"] == number}
    if counted != set(HONEST) or told != counted:
        raise NotSurvived(f"round {number} ended with the replies of {', '.join(sorted(told)) or 'nobody'}")
    return Outcome(True, words)


def _signed(key: Path, claimed: Path | None = None) -> dict[str, str]:
    """Headers as a SuperNode sends them; `claimed` shows the public key of another."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    moment = datetime.datetime.now(datetime.UTC).isoformat()
    private = serialization.load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    signature = private.sign(moment.encode(), ec.ECDSA(hashes.SHA256()))
    shown = members.pem(((claimed or key).parent / "node.pub").read_text().strip()).encode()
    names = {"flwr-public-key": shown, "flwr-signature": signature}
    return {"flwr-timestamp": moment, **{name: b64encode(value).decode() for name, value in names.items()}}


@contextlib.contextmanager
def _web(now: Deployment) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=str(now.out / "certs/ca.crt"))
    with httpx.Client(verify=context, trust_env=False, base_url=f"https://{now.server}", timeout=30.0) as web:
        yield web


def _pull(now: Deployment, headers: dict[str, str]) -> int:
    """Try to fetch the messages of north, whose SuperNode is connected; the HTTP status."""
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from flwr.proto.node_pb2 import Node

    state = now.out / "state"
    number = int(registry.node_id(state, registry.registered(state)[HONEST[0]]))
    body = PullMessagesRequest(node=Node(node_id=number)).SerializeToString()
    with _web(now) as web:
        sent = {"content-type": "application/protobuf", **headers}
        return web.post("/v1/fleet/pull-messages", content=body, headers=sent).status_code


def _refused(status: int, wanted: int) -> str:
    if status != wanted:
        raise NotSurvived(f"the call was answered with {status} instead of {wanted}")
    return f"refused ({wanted})"


def _key(now: Deployment, name: str) -> Path:
    return now.out / "certs" / "clinics" / name / "node.key"


def _unknown(now: Deployment) -> Path:
    certs.make(now.out / "stranger", ["stranger"])
    return now.out / "stranger/clinics/stranger/node.key"


def _unknown_node(now: Deployment) -> str:
    return _stranger(now, _unknown(now), "stranger")


def _stranger(now: Deployment, key: Path, name: str) -> str:
    """A real SuperNode with this key must give up by itself without having been let in."""
    connection = node.Connection(now.server, now.out / "certs/ca.crt", key, free_ports(1)[0])
    home, log = now.out / f"{name}-home", now.out / f"{name}-node.log"
    home.mkdir(mode=0o700, exist_ok=True)
    with open(log, "wb") as out:
        command = [*node.command(connection), "--max-retries", "1"]
        child = subprocess.Popen(command, env=node.environment(home), stdout=out, stderr=subprocess.STDOUT)
    try:
        child.wait(SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NotSurvived("its SuperNode did not give up") from error
    finally:
        end(family(child.pid))
        child.wait()
    if "SuperNode ID" in log.read_text(encoding="utf-8", errors="replace"):
        raise NotSurvived("its SuperNode was let in")
    return "its SuperNode was not let in and ended"


def _used(now: Deployment) -> str:
    headers = _signed(_key(now, HONEST[1]))
    _pull(now, headers)  # another's number: refused, but the signature is used now
    return _refused(_pull(now, headers), 401)


def _control(now: Deployment) -> str:
    """Every path of the Control and Runtime APIs, by both methods."""
    from flwr.supercore.routers.runtime.router import router as runtime
    from flwr.superlink.routers.control.router import router as control

    paths = [route.path for router in (control, runtime) for route in router.routes]
    with _web(now) as web:
        got = {web.request(method, path).status_code for path in paths for method in ("POST", "GET")}
    if got != {403} or len(paths) < 20:
        raise NotSurvived(f"{len(paths)} paths were answered with {sorted(got)}")
    return "all refused (403)"


def _flwr(now: Deployment) -> str:
    """Flower's own command line, with the authority's certificate, at the clinics' door."""
    side = link.Link(now.out / "certs", now.out / "attacker", int(now.server.rpartition(":")[2]))
    link.configure(side)
    for command in (("list",), ("run", str(runs.stage(side)))):
        try:
            link.flwr(side, *command, seconds=SECONDS)
        except link.LinkError:
            continue
        raise NotSurvived(f"flwr {command[0]} was answered")
    return "all refused"


def _revoked(now: Deployment) -> str:
    """A clinic that is connected is shut out: thrown out at once, and not let in again with the same key."""
    key = now.out / f"{SHUT_OUT}-kept" / "node.key"
    key.parent.mkdir(exist_ok=True)
    for name in ("node.key", "node.pub"):
        (key.parent / name).write_bytes(_key(now, SHUT_OUT).with_name(name).read_bytes())
    now.join(SHUT_OUT)
    now.wait("the clinic to be there", PATIENCE, lambda: True if now.is_there(SHUT_OUT) else None)
    now.command("server", "revoke", SHUT_OUT, "--yes", *now.places())
    now.wait("the end of its SuperNode", PATIENCE, lambda: now.processes[SHUT_OUT].poll())
    return _stranger(now, key, f"{SHUT_OUT}-again")


TRICKS: dict[str, Callable[[Deployment], Any]] = {
    "no key": lambda now: _refused(_pull(now, {}), 401),
    "an unknown key, calls": lambda now: _refused(_pull(now, _signed(_unknown(now))), 401),
    "an unknown key, a SuperNode": _unknown_node,
    "another clinic's own key": lambda now: _refused(_pull(now, _signed(_key(now, HONEST[1]))), 401),
    "another clinic's name": lambda now: _refused(_pull(now, _signed(_key(now, HONEST[1]), _key(now, HONEST[0]))), 401),
    "a used signature": _used,
    "the Control API": _control,
    "Flower's command line": _flwr,
    "a revoked key": _revoked,
}
