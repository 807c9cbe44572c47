"""The units under a systemd of their own: the settings follow the file, ledger and rules are there, nothing else is.

A second systemd is started as process 1 of namespaces, with copies of /etc and /run and units from a folder of the test
alone. In place of the client runs a shell that writes down what it sees. Skipped where root cannot make all this.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import firewall, leaving, node, service
from model import phantoms
from server import certs
from tests.client.clinic import fill

KIOSK_USER = 1  # daemon
SYSTEMD = next((path for path in ("/lib/systemd/systemd", "/usr/lib/systemd/systemd") if os.path.exists(path)), "")
SECONDS = 120.0
TARGETS = [f"{name}.target" for name in ("sysinit", "basic", "shutdown", "multi-user", "network-online")]
UNITS = {
    "nftables.service": """[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={nft} flush ruleset
ExecReload={nft} flush ruleset
ExecStop={nft} flush ruleset
""",
    "afya-client.service.d/shell.conf": """[Service]
ExecStart=
ExecStart=/bin/sh {root}/client
""",
    "steps.service": """[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
TimeoutStartSec={seconds}
StandardOutput=file:{root}/log
StandardError=inherit
ExecStart=/bin/sh -eux {root}/steps
""",
    **dict.fromkeys(TARGETS, "[Unit]\nDefaultDependencies=no\n"),
}
BOOT = """set -e
mount --make-rprivate / && mount -t proc proc /proc && umount -l /sys/fs/cgroup || exit 77
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys || exit 77
mount -t cgroup2 none /sys/fs/cgroup && ip link set lo up || exit 77
mount -t tmpfs none /run && mount -t tmpfs none /var/lib && cp -a /etc /run/etc || exit 77
rm -rf /run/etc/systemd/system && cp -r {root}/units /run/etc/systemd/system && mount --bind /run/etc /etc || exit 77
for folder in /lib/systemd/system-generators /usr/lib/systemd/system-generators; do
    [ ! -d $folder ] || mount -t tmpfs none $folder
done
export container=afya SYSTEMD_UNIT_PATH=/etc/systemd/system
exec {systemd} --system --unit=steps.service --log-target=null --show-status=no
"""
CLIENT = """cd /var/lib/afya-client
for name in run training federation; do
    touch $name/x && touch privacy/wrong
done
ls {home} && touch privacy/wrong
while :; do
    cat $AFYA_SETTINGS > privacy/.seen
    mv privacy/.seen privacy/seen
    sleep 0.2
done
"""
STEPS = """export PATH=/usr/sbin:/usr/bin:/sbin:/bin
soon() {{ for n in $(seq 60); do if sh -c "$1"; then return 0; fi; sleep 0.5; done; false; }}
rules() {{ soon "nft list tables | grep -q afya_client"; }}
running() {{ soon "systemctl is-active --quiet afya-client"; }}
seen() {{ soon "grep -q '$1' {home}/privacy/seen"; }}
echo booted
systemctl start nftables
sh {root}/script
running; rules; seen min_cases
echo 'max_batch = 11' >> {home}/afya.toml; seen 'max_batch = 11'
sed -i s/11/12/ {home}/afya.toml; seen 'max_batch = 12'
mv {home}/afya.toml {home}/before; (cat {home}/before; echo 'dp = true') > {home}/afya.toml; seen 'dp = true'
test "$(stat -c '%U:%G %a' {home}/run/afya.toml)" = 'daemon:afya-client 640'
test ! -e {home}/privacy/wrong
before=$(systemctl show -P MainPID afya-client)
systemctl reload nftables; rules
test "$before" = "$(systemctl show -P MainPID afya-client)"
systemctl restart nftables; rules; running
systemctl stop nftables
if systemctl is-active --quiet afya-client; then false; fi
systemctl start nftables; running; rules
sh {root}/leave
if systemctl is-active --quiet afya-client || systemctl is-active --quiet afya-client-settings.path; then false; fi
test -z "$(ls /etc/systemd/system | grep afya-client | grep -v shell.conf | grep -v service.d)"
test ! -e /var/lib/afya-client && test ! -e /etc/afya-client.nft
if nft list tables | grep -q afya_client || id -u afya-client || getent group afya-client; then false; fi
test "$(stat -c '%U %a' {home}/training {home}/adapters {home}/privacy/seen | sort -u)" = "daemon 600
daemon 700"
sh {root}/leave
sh {root}/script
running; rules; seen min_cases
echo done
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that PrivateTmp leaves in sight."""
    if os.geteuid() != 0 or not SYSTEMD or not firewall.program() or not os.path.isdir("/srv"):
        pytest.skip("needs root, systemd, nftables and /srv")
    root = Path(tempfile.mkdtemp(prefix="afya-systemd-", dir="/srv"))
    os.chmod(root, 0o755)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of this test alone."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    folder = next((Path(row[1]) / f"afya-test-{os.getpid()}" for row in mounts if row[2] == "cgroup2"), None)
    try:
        if folder is None:
            raise OSError("there is no cgroup2")
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield folder
    for _ in range(50):
        left = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
        try:
            for path in (*left, folder):
                path.rmdir()
            return
        except OSError:  # its processes are still ending
            time.sleep(0.1)


@pytest.mark.slow
def test_under_systemd_the_settings_follow_the_rules_come_back_and_leaving_leaves_nothing(
    place: Path, group: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = place / "clinic"
    fill(home, phantoms.make(1, ["plain"], seed=0, size=32), shutil.copytree(tiny, place / "model"))
    certs.make(place / "c", ["north"])
    for path in (home, *home.rglob("*")):
        os.chown(path, KIOSK_USER, KIOSK_USER)
    link = node.connection(home, "127.0.0.1:1", place / "c/clinics/north")
    assert link is not None
    values = {"home": home, "root": place, "nft": firewall.program(), "systemd": SYSTEMD, "seconds": int(SECONDS)}
    texts = {"client": CLIENT, "steps": STEPS, "boot": BOOT} | {f"units/{name}": text for name, text in UNITS.items()}
    for name, text in texts.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text.format(**values))
    (place / "script").write_text(service.plan(home, link).script)
    monkeypatch.setattr("client.unit.installed", lambda *_: True)
    (place / "leave").write_text(leaving.script(home))
    inside = f"echo 0 > {group}/cgroup.procs && exec unshare -mpfnuiC --kill-child sh {place}/boot"
    child = subprocess.Popen(["sh", "-c", inside], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, end = place / "log", time.monotonic() + SECONDS
    try:
        while child.poll() is None and time.monotonic() < end:
            if log.exists() and ("\ndone\n" in log.read_text() or not _going(group)):
                break
            time.sleep(0.5)
    finally:
        child.kill()
        child.wait()
    text = log.read_text() if log.exists() else ""
    if "\nbooted\n" not in text:
        pytest.skip("no second systemd starts on this machine")
    assert text.endswith("\ndone\n"), text


def _going(group: Path) -> bool:
    """Whether the steps are still being taken."""
    steps = group / "system.slice/steps.service/cgroup.procs"
    try:
        return bool(steps.read_text())
    except OSError:
        return False
