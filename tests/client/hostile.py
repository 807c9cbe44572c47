"""A hostile ClientApp: started as root, it sets up what the unit binds, becomes the service's user, and tries.

Called with the folder that `tests/client/test_service.py` made, a user id, and the process id of a "kiosk". Prints one
JSON object: what succeeded, what was refused and how. Nothing is run that could harm the machine if it worked.
"""

import ctypes
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable

ROOT, UID, KIOSK = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
HOME, OTHER, STATE = ROOT / "clinic", ROOT / "other", ROOT / "state"
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, PR_SET_NO_NEW_PRIVS, PTRACE_ATTACH, MS_REMOUNT_BIND = 0x00020000, 38, 16, 0x1020


def libc(result: int) -> int:
    """Raise OSError when a call of the C library said no."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def sandbox() -> None:
    """The mounts of the unit in a namespace of this process, then the user, for good."""
    if LIBC.unshare(CLONE_NEWNS) or subprocess.run(["mount", "--make-rprivate", "/"]).returncode:
        sys.exit(77)  # a machine where not even root may mount
    for name, writable in (("training", False), ("run", False), ("adapters", True), ("privacy", True)):
        subprocess.run(["mount", "--bind", str(HOME / name), str(STATE / name)], check=True)
        if not writable:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(STATE / name)], check=True)
    subprocess.run(["mount", "--bind", str(STATE / "federation"), str(STATE / "federation")], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(STATE / "federation")], check=True)
    os.chdir(STATE)
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    libc(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def write(path: pathlib.Path) -> None:
    path.write_bytes(b"changed by a hostile client")


def attempts() -> dict[str, Callable[[], object]]:
    """Name -> what is tried; each either raises or has succeeded."""
    sample = STATE / "training/samples/0001.json"
    secrets = ["kiosk.db", "kiosk.db-journal", "keys/master.key", "audit.jsonl", "backups/all.db", "logs/kiosk.log"]
    secrets += ["afya.toml", "federation/node.key", "federation.before-1/node.key", "verified/newest.json"]
    tried: dict[str, Callable[[], object]] = {f"read {name}": (HOME / name).read_bytes for name in secrets}
    tried |= {
        f"list {name or 'home'}": lambda n=name: os.listdir(HOME / n)
        for name in ("", "keys", "backups", "training", "verified")
    }
    tried |= {f"other home {name}": (OTHER / name).read_bytes for name in ("id_ed25519", "notes.txt")}
    tried |= {f"read {name}": pathlib.Path(name).read_bytes for name in ("/etc/shadow", f"/proc/{KIOSK}/environ")}
    tried |= {f"list {name}": lambda n=name: os.listdir(n) for name in ("/root", str(OTHER), f"/proc/{KIOSK}/fd")}
    out = [HOME / "new", HOME / "kiosk.db", OTHER / "new", sample, STATE / "training/images/new.png"]
    out += [HOME / "verified/allowed.json", HOME / "verified/newest.json"]
    out += [STATE / "training/new", STATE / "run/asking", STATE / "federation/ca.crt", STATE / "run/afya.toml"]
    out += [pathlib.Path(name) / "afya-hostile" for name in ("/etc", "/etc/cron.d", "/usr/local/bin", "/root", "/")]
    tried |= {f"write {path}": lambda p=path: write(p) for path in out}
    tried |= {
        "stat the database": lambda: os.stat(HOME / "kiosk.db"),
        "delete a sample": lambda: os.unlink(sample),
        "rename a sample": lambda: os.rename(sample, STATE / "taken"),
        "open a sample to all": lambda: os.chmod(sample, 0o666),
        "open training to all": lambda: os.chmod(STATE / "training", 0o777),
        "open the ledger to all": lambda: os.chmod(STATE / "privacy", 0o777),
        "replace the limits": lambda: os.replace(STATE / "flower/own", STATE / "run/afya.toml"),
        "up from training": (STATE / "training/../../clinic/kiosk.db").read_bytes,
        "through a symlink": lambda: through_a_link(os.symlink),
        "through a hard link": lambda: through_a_link(os.link),
        "through /proc/1/root": lambda: pathlib.Path(f"/proc/1/root{HOME}/kiosk.db").read_bytes(),
        "through the kiosk's root": lambda: pathlib.Path(f"/proc/{KIOSK}/root{HOME}/kiosk.db").read_bytes(),
        "the kiosk's memory": lambda: open(f"/proc/{KIOSK}/mem", "rb").close(),
        "trace the kiosk": lambda: libc(LIBC.ptrace(PTRACE_ATTACH, KIOSK, 0, 0)),
        "stop the kiosk": lambda: os.kill(KIOSK, 15),
        "the kiosk's priority": lambda: os.setpriority(os.PRIO_PROCESS, KIOSK, 19),
        "become root": lambda: os.setuid(0),
        "become the kiosk": lambda: os.setuid(1),
        "take a group": lambda: os.setgroups([0]),
        "give a file to root": lambda: os.chown(STATE / "flower/own", 0, 0),
        "leave the root": lambda: os.chroot(STATE),
        "unmount training": lambda: libc(LIBC.umount2(bytes(STATE / "training"), 2)),
        "mount it writable": lambda: libc(LIBC.mount(None, bytes(STATE / "training"), None, MS_REMOUNT_BIND, None)),
        "make a device": lambda: os.mknod(STATE / "flower/disk", 0o060600, os.makedev(8, 0)),
        "sniff the network": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3),
        "change the clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
        "raise its priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -20),
        "run su": lambda: subprocess.run(
            ["su", "-c", "true"], check=True, capture_output=True, stdin=subprocess.DEVNULL
        ),
    }
    return tried


def through_a_link(make: Callable[[pathlib.Path, pathlib.Path], None]) -> bytes:
    place = STATE / "flower" / f"link-{make.__name__}"
    make(HOME / "kiosk.db", place)
    return place.read_bytes()


def duties() -> dict[str, object]:
    """What a round needs and must be able to do."""
    from model.files import write_atomic

    folder = STATE / "adapters" / ".partial"
    os.mkdir(folder, 0o700)
    write_atomic(folder / "adapter_model.safetensors", b"weights")
    os.rename(folder, STATE / "adapters/round-0001")
    write_atomic(STATE / "adapters/current.json", b"{}")
    (STATE / "flower/own").write_text("state")
    return {
        "samples": len(os.listdir(STATE / "training/samples")),
        "key": len((STATE / "federation/node.key").read_bytes()),
        "ledger": len((STATE / "privacy/ledger.json").read_bytes()),
        "settings": len((STATE / "run/afya.toml").read_bytes()),
    }


def traps() -> None:
    """What it may leave where it may write: a file for which a reader waits, ones without an end, ways elsewhere."""
    folder = STATE / "adapters"
    os.mkfifo(folder / "trap-pipe")
    for name, target in (("endless", pathlib.Path("/dev/zero")), ("home", HOME), ("case", HOME / "kiosk.db")):
        (folder / f"trap-{name}").symlink_to(target)
    with open(folder / "trap-huge", "wb") as out:
        out.truncate(2 << 30)


def main() -> None:
    """Become the user, do the duties, try everything, report."""
    import model.files  # while Python's own files can still be read

    assert model.files and shutil
    if UID == 1:  # the kiosk's own user, without the service's mounts: shows that the attempts are real
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
        able: dict[str, object] = {}
    else:
        sandbox()
        able = duties()
        traps()
    refused, succeeded = {}, []
    for name, attempt in attempts().items():
        if UID == 1 and not name.startswith(("read", "list", "stat")):
            continue
        try:
            attempt()
            succeeded.append(name)
        except (OSError, subprocess.SubprocessError) as error:
            refused[name] = type(error).__name__
    print(json.dumps({"able": able, "refused": refused, "succeeded": succeeded}))


main()
