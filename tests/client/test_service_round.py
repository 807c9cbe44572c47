"""A whole round as the service's user, behind the mounts that the unit makes: training, release, installation.

No systemd runs in tests: the mounts, the user and the lost capabilities are made with unshare, mount and setpriv as the
unit asks for them. System-call filter and limits of the unit are not in play here.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import invitation, ledger, sealed, service
from model import adapters, phantoms
from model.files import write_atomic
from scripts.federation import Local, family, free_ports
from tests.client.clinic import fill

KIOSK_USER, CLIENT_USER = 1, 65534  # daemon, nobody
ROOT = Path(__file__).resolve().parent.parent.parent
MOUNTS = """set -e
mount --make-rprivate / || exit 77
mount --bind {python} {root}/python
mount -t tmpfs -o mode=755 none /root
mkdir -p {python}
mount --move {root}/python {python}
mount --bind {home}/training {state}/training && mount -o remount,bind,ro {state}/training
mount --bind {home}/run {state}/run && mount -o remount,bind,ro {state}/run
mount --bind {home}/adapters {state}/adapters
mount --bind {home}/privacy {state}/privacy
mount --bind {model} {state}/model && mount -o remount,bind,ro {state}/model
mount --bind {state}/federation {state}/federation && mount -o remount,bind,ro {state}/federation
mount -t tmpfs -o mode=000 none {home}
cd {state}
exec setpriv --reuid={user} --regid={user} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \\
    env AFYA_HOME={state} AFYA_SETTINGS={state}/run/afya.toml AFYA_MODEL={state}/model HOME={state} \\
    PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={code} {program} -c 'from client.cli import main; main()' \\
    join --foreground --server {server} --bundle {state}/federation --port {port}
"""


@pytest.fixture
def place() -> Iterator[Path]:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")
    root = Path(tempfile.mkdtemp(prefix="afya-service-"))
    os.chmod(root, 0o755)
    yield root
    shutil.rmtree(root)


def _own(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)


def _clinic(place: Path, tiny: Path, file: Path) -> tuple[Path, Path]:
    """The clinic's home, of the kiosk's user, and the service's folder; with the modes of `join --service`."""
    home, state = place / "clinic", place / "state"
    model = shutil.copytree(tiny, place / "model")
    for path in model.iterdir():
        os.chmod(path, 0o600)
    fill(home, phantoms.make(3, ["plain"], seed=1, size=48), model, "dp = true\ndp_noise = 8.0")
    (home / "kiosk.db").write_bytes(b"cases")
    _own(home, KIOSK_USER)
    subprocess.run(["sh", "-e"], input="\n".join(service.modes(home, model, "nogroup")), text=True, check=True)
    write_atomic(home / "run/afya.toml", (home / "afya.toml").read_bytes())
    for name in (*service.BOUND, "model", "flower"):
        (state / name).mkdir(parents=True)
    invitation.unpack(state, invitation.read(file))
    _own(state, CLIENT_USER)
    os.chmod(state, 0o700)
    (place / "python").mkdir()
    return home, state


@pytest.mark.slow
def test_a_round_works_as_the_services_user(place: Path, tmp_path: Path, tiny: Path) -> None:
    with Local({}, tmp_path / "out", tiny) as local:
        file = tmp_path / "lakeside.afya"
        options = ["--out", str(file), "--server", local.server, "--base-model", str(tiny)]
        local.command("server", "invite", "lakeside", *options, *local.places())
        home, state = _clinic(place, tiny, file)
        values = {"python": sys.base_prefix, "root": place, "home": home, "state": state, "model": place / "model"}
        values |= {"user": CLIENT_USER, "code": ROOT, "program": sys.executable, "port": free_ports(1)[0]}
        values |= {"server": local.server}
        script = MOUNTS.format(**{name: shlex.quote(str(value)) for name, value in values.items()})
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"}
        with open(tmp_path / "client.log", "wb") as log:
            child = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", script], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            config = {"num-server-rounds": 1, "min-clinics": 1, "rank": 2, "local-steps": 8, "batch-size": 8}
            events = local.rounds({**config, "round-deadline": 120.0})
            assert child.poll() is None, (tmp_path / "client.log").read_text()
        finally:
            for process in family(child.pid):
                process.kill()
            if child.wait() == 77:
                pytest.skip("this machine lets root make no mount namespace")
    assert [event["clinic"] for event in events if event["event"] == "accepted"] == ["lakeside"], events
    assert [event["clinic"] for event in events if event["event"] == "installed"] == ["lakeside"], events
    record = json.loads((home / "adapters/current.json").read_text())
    folder = home / "adapters" / record["name"]
    assert folder.stat().st_uid == CLIENT_USER and (home / "kiosk.db").read_bytes() == b"cases"
    names = [str(path) for path in (home / "adapters/current.json", *folder.iterdir())]
    kiosk = {"user": KIOSK_USER, "group": KIOSK_USER, "extra_groups": [CLIENT_USER]}
    reading = subprocess.run(["cat", *names], capture_output=True, **kiosk)
    assert reading.returncode == 0, reading.stderr
    assert adapters.current(home) == folder
    charged = home / "privacy/ledger.json"  # of the clinic's own ledger, which its user reads as a member of the group
    assert charged.stat().st_uid == CLIENT_USER and [row.round for row in ledger.read(home)] == [1]
    assert subprocess.run(["cat", str(charged), str(home / sealed.FILE)], capture_output=True, **kiosk).returncode == 0
    assert {path.stat().st_mode & 0o004 for path in (place / "model").glob("*.safetensors")} == {0}
