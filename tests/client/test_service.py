"""The client's service: the unit as systemd reads it, and what a hostile ClientApp gets as its user: nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from client import as_root, node, service
from client.unit import STATE, UNIT
from model import phantoms
from model.files import read_plain, write_atomic
from server import certs
from server import service as server_service
from server.cli import main
from tests.client.clinic import fill
from tests.model.signed import at_once

ROOT = Path(__file__).resolve().parent.parent.parent
KIOSK_USER, OTHER_USER, CLIENT_USER = 1, 5, 65534  # daemon, games, nobody: there on every Debian
SECRETS = ("kiosk.db", "kiosk.db-journal", "keys/master.key", "audit.jsonl", "backups/all.db", "logs/kiosk.log")
SECRETS += ("afya.toml", "federation/node.key", "federation.before-1/node.key", "verified/newest.json")


def test_the_server_prints_its_own_script(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["service", "--listen", "0.0.0.0:8443", "--certs", str(tmp_path)])
    assert done.exit_code == 0 and f"start --certs {server_service.STATE}/certs" in done.output
    assert CliRunner().invoke(main, ["service", "--listen", "nowhere"]).exit_code == 1


@pytest.fixture
def units(afya_home: Path, tmp_path: Path, tiny: Path) -> dict[str, str]:
    certs.make(tmp_path / "c", ["north"])
    fill(afya_home, [], tiny)
    link = node.connection(afya_home, "127.0.0.1:8443", tmp_path / "c/clinics/north")
    assert link is not None
    return service.fill(afya_home, link)


@pytest.fixture
def unit(units: dict[str, str]) -> str:
    return units[UNIT]


def settings(text: str) -> dict[str, list[str]]:
    """Name -> values of a unit's lines."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(("#", "[")):
            name, sign, value = line.partition("=")
            assert sign, line
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_shows_the_client_its_own_and_hides_the_clinic(unit: str, afya_home: Path) -> None:
    assert not re.search(r"@[A-Z]+@", unit)
    found = settings(unit)
    state = STATE
    assert found["BindReadOnlyPaths"][:2] == [f"{afya_home}/training:{state}/training", f"{afya_home}/run:{state}/run"]
    assert found["BindPaths"] == [f"{afya_home}/{name}:{state}/{name}" for name in ("adapters", "privacy")]
    assert f"-{afya_home}" in found["InaccessiblePaths"]
    assert found["ReadWritePaths"] == [str(state)] and found["User"] == ["afya-client"]
    assert found["ReadOnlyPaths"] == [f"{state}/federation"]
    assert f"AFYA_SETTINGS={state}/run/afya.toml" in found["Environment"][0].split()
    assert found["CapabilityBoundingSet"] == [""] and found["NoNewPrivileges"] == ["yes"]
    assert found["IPAddressDeny"] == ["any"] and found["IPAddressAllow"] == ["localhost 127.0.0.1"]
    for name in ("MemoryMax", "TasksMax", "LimitFSIZE", "CPUWeight", "Nice", "SystemCallFilter"):
        assert found[name], name


@pytest.mark.parametrize("which", ["client", "server"])
def test_systemd_finds_no_fault_in_the_units(units: dict[str, str], tmp_path: Path, which: str) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    file = tmp_path / f"afya-{which}.service"
    texts = units if which == "client" else {file.name: server_service.fill("0.0.0.0:8443")}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in texts]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True)
    own = [line for line in (done.stdout + done.stderr).splitlines() if f"afya-{which}" in line or "Unknown" in line]
    assert not own, own
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # exposure at most 2.0 of 10


def test_the_script_is_one_that_a_shell_reads(afya_home: Path, tmp_path: Path, tiny: Path) -> None:
    certs.make(tmp_path / "c", ["north"])
    fill(afya_home, [], tiny, "max_rank = 16\n")
    link = node.connection(afya_home, "127.0.0.1:8443", tmp_path / "c/clinics/north")
    assert link is not None
    made = service.plan(afya_home, link)
    path = as_root.write(made.script, afya_home, "set-up.sh")
    assert path.stat().st_mode & 0o777 == 0o600
    for script in (made.script, server_service.script("0.0.0.0:443", tmp_path / "c")):
        done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "max_rank" not in made.script and "--server 127.0.0.1:8443 " in made.script
    assert "PRIVATE KEY" not in made.script
    assert settings(server_service.fill("0.0.0.0:443"))["AmbientCapabilities"] == ["CAP_NET_BIND_SERVICE"]


INSTALL = """
mount --make-rprivate / && mount -t tmpfs none /var/lib || exit 77
cp -a /etc {own}/etc && mount --bind {own}/etc /etc || exit 77
printf '#!/bin/sh\\necho "$@" >> {own}/systemctl.log; test $1 != is-active\\n' > {own}/bin/systemctl
chmod 755 {own}/bin/systemctl
export PATH={own}/bin:$PATH
sh {own}/script && cd /var/lib/afya-client && ln -s {own}/other flower
rmdir run training && rm -r federation && ln -s {own}/other run && ln -s {own}/other federation && touch training
sh {own}/script && cat /etc/systemd/system/afya-client.service > {own}/unit
find {home} {own}/other /var/lib/afya-client -printf '%p %u:%g %m\\n' | sort > {own}/modes
"""


def test_the_script_sets_up_user_modes_and_unit_and_may_run_twice(afya_home: Path, tmp_path: Path, tiny: Path) -> None:
    """On a copy of /etc and an empty /var/lib, with a systemctl that only writes down what it was told."""
    if os.geteuid() != 0:
        pytest.skip("only root can add a user")
    certs.make(tmp_path / "c", ["north"])
    fill(afya_home, phantoms.make(1, ["plain"], seed=0, size=32), tiny)
    link = node.connection(afya_home, "127.0.0.1:8443", tmp_path / "c/clinics/north")
    assert link is not None
    made = service.plan(afya_home, link)
    (tmp_path / "script").write_text(made.script)
    (tmp_path / "bin").mkdir()
    (tmp_path / "other").mkdir(mode=0o755)  # of somebody else, and what the service makes links to
    (afya_home / "privacy").mkdir(mode=0o700)
    (afya_home / "privacy/ledger.json").touch(mode=0o600)
    commands = INSTALL.format(own=tmp_path, home=afya_home)
    done = subprocess.run(["unshare", "-m", "sh", "-c", commands], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("this machine lets root make no mount namespace")
    assert done.returncode == 0, done.stderr
    modes = dict(line.split(" ", 1) for line in (tmp_path / "modes").read_text().splitlines())
    own, state = str(afya_home), str(STATE)
    expected = {own: "root:root 700", f"{own}/training": "root:afya-client 2750"}
    expected |= {f"{own}/adapters": "root:afya-client 2770", f"{own}/run": "root:afya-client 2750"}
    expected |= {f"{own}/training/samples/0000.json": "root:afya-client 640"}
    expected |= {f"{state}/federation/node.key": "afya-client:afya-client 600", state: "afya-client:afya-client 700"}
    expected |= {f"{own}/privacy": "root:afya-client 2770", f"{own}/privacy/ledger.json": "root:afya-client 640"}
    expected |= {f"{state}/privacy": "root:afya-client 750", f"{own}/afya.toml": "root:root 644"}
    expected |= {str(tmp_path / "other"): "root:root 755", f"{state}/run": "root:afya-client 750"}
    assert {path: modes.get(path) for path in expected} == expected
    assert (tmp_path / "unit").read_text() == made.units[UNIT]
    told = (tmp_path / "systemctl.log").read_text().splitlines()
    both = (
        "stop afya-client-settings.path afya-client.service",
        "is-active --quiet afya-client.service",
        "daemon-reload",
        "enable afya-client.service afya-client-settings.path",
        "restart afya-client-settings.path afya-client.service",
    )
    assert told == [*both] * 2


@pytest.fixture
def clinic() -> Iterator[Path]:
    """A clinic's home of one user, another home, the service's folder, with the modes that `join --service` sets."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    root = Path(tempfile.mkdtemp(prefix="afya-hostile-"))
    try:
        os.chmod(root, 0o755)
        home, state = root / "clinic", root / "state"
        for name in SECRETS:
            (home / name).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            (home / name).write_bytes(b"a patient's secret")
        for name in ("training/samples", "training/images", "adapters"):
            (home / name).mkdir(parents=True)
        write_atomic(home / "training/samples/0001.json", b"{}")
        for name in ("run/afya.toml", "privacy/ledger.json"):
            (home / name).parent.mkdir()
            write_atomic(home / name, b"the clinic's own")
        (root / "model").mkdir()
        (root / "other").mkdir(mode=0o700)
        for name in ("id_ed25519", "notes.txt"):
            (root / "other" / name).write_bytes(b"another's secret")
        _own(home, KIOSK_USER)
        _own(root / "other", OTHER_USER)
        subprocess.run(
            ["sh", "-e"], input="\n".join(service.modes(home, root / "model", "nogroup")), text=True, check=True
        )
        for name in (*service.BOUND, "federation", "flower"):
            (state / name).mkdir(parents=True)
        for name in ("federation/ca.crt", "federation/node.key"):
            (state / name).write_bytes(b"the service's own")
        _own(state, CLIENT_USER)
        os.chmod(state, 0o700)
        yield root
    finally:
        shutil.rmtree(root)


def _own(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)


def attack(root: Path, user: int) -> dict[str, object]:
    """Run the hostile program as `user` beside a process of the kiosk's user; returns what it reports."""
    kiosk = subprocess.Popen(["sleep", "60"], user=KIOSK_USER, group=KIOSK_USER, env={"SECRET": "1"})
    try:
        command = [sys.executable, str(Path(__file__).with_name("hostile.py")), str(root), str(user), str(kiosk.pid)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        if done.returncode == 77:
            pytest.skip("this machine lets root make no mount namespace")
        assert done.returncode == 0, done.stderr
        assert kiosk.poll() is None
        return json.loads(done.stdout)
    finally:
        kiosk.kill()
        kiosk.wait()


def test_a_hostile_client_gets_nothing(clinic: Path) -> None:
    before = {path: path.read_bytes() for path in (clinic / "clinic").rglob("*") if path.is_file()}
    found = attack(clinic, CLIENT_USER)
    assert found["able"] == {"samples": 1, "key": 17, "ledger": 16, "settings": 16}
    assert found["succeeded"] == []
    assert len(found["refused"]) >= 50, len(found["refused"])
    changed = {path for path in before if path.read_bytes() != before[path]}
    assert not changed
    adapter = clinic / "clinic/adapters/round-0001"
    for path, mode in ((adapter, 0o2750), (adapter / "adapter_model.safetensors", 0o640)):
        assert path.stat().st_mode & 0o7777 == mode and path.stat().st_gid == CLIENT_USER
    reading = subprocess.run(
        ["cat", str(adapter / "adapter_model.safetensors"), str(clinic / "clinic/adapters/current.json")],
        user=KIOSK_USER,
        group=KIOSK_USER,
        extra_groups=[CLIENT_USER],
        capture_output=True,
    )
    assert reading.stdout == b"weights{}", reading.stderr
    for name in ("pipe", "endless", "home/kiosk.db", "case", "huge"):
        with pytest.raises(OSError, match=r" is (a link|no plain file|larger)"):
            at_once(lambda name=name: read_plain(clinic / "clinic/adapters" / f"trap-{name}", 1 << 30))


def test_the_same_attempts_succeed_for_the_kiosks_own_user(clinic: Path) -> None:
    """The control: without the separate user and the mounts the database and the keys lie open."""
    found = attack(clinic, KIOSK_USER)
    for name in ("kiosk.db", "keys/master.key", "audit.jsonl", "backups/all.db", "federation/node.key"):
        assert f"read {name}" in found["succeeded"]
    assert "other home id_ed25519" not in found["succeeded"]
