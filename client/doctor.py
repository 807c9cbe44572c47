"""`afya-client doctor`: everything that taking part needs, every fault at once, one sentence each.

No check is skipped because an earlier one failed; only what the server would have to say is left out when it cannot be
reached. The network is touched for nothing else, and no node is started. Not here: mending what is wrong.
"""

import datetime
import grp
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from client import contact, firewall, invitation, limits, planned, service, unit
from client.node import Connection

FLWR = "1.41.0"  # the version whose checks and faults are known here
LEAST_DISK = 512  # MiB free: some rounds' messages, a released adapter and the logs
LEAST_MEMORY = 1400  # MiB: what training the reference model and Flower's two helpers were measured to take
CLOCK_SECONDS = 300.0  # Flower refuses a signature that is older


@dataclass(frozen=True)
class Check:
    """One line of `afya-client doctor`: what was looked at, whether it is well, and what to know or to do."""

    name: str
    ok: bool
    detail: str
    note: bool = False  # well enough to take part, and yet somebody should read it


class _Fault(Exception):
    """A check that failed; the message says what to do."""


class _Note(Exception):
    """Something that hinders nothing now; the message says what to know."""


def examine(home: Path, link: Connection | None) -> list[Check]:
    """All checks, in the order in which a person would mend the faults."""
    steps: list[tuple[str, Callable[[], str]]] = [
        ("home", lambda: _home(home)),
        ("permissions", lambda: _permissions(home)),
        ("disk", lambda: _disk(home)),
        ("memory", lambda: _memory(home)),
        ("limits", lambda: _limits(home)),
        ("flower", _flower),
        ("base model", lambda: _base(home)),
        ("samples", lambda: _samples(home)),
        ("adapter", lambda: _adapter(home)),
    ]
    if link is None:
        return [_run(name, step) for name, step in [*steps, ("server", _no_server)]]
    return [_run(name, step) for name, step in [*steps, ("keys", lambda: _keys(link))]] + _federation(link)


def examine_service(home: Path, link: Connection | None) -> list[Check]:
    """What belongs to the system service where one is installed for this home; no checks where none is."""
    if not unit.installed(home):
        return []
    steps: list[tuple[str, Callable[[], str]]] = [
        ("settings", lambda: _settings(home)),
        ("firewall", lambda: _firewall(home)),
        ("group", _group),
    ]
    if link is not None:
        steps.insert(0, ("service", lambda: _service(home, link)))
    return [_run(name, step) for name, step in steps]


def _run(name: str, step: Callable[[], str]) -> Check:
    from model.adapters import AdapterRejected
    from model.data import DataError
    from model.llava import ModelError
    from model.presets import PresetMissing

    known = (_Fault, limits.SettingsWrong, invitation.InvitationRejected, contact.NoContact, service.ServiceError)
    try:
        return Check(name, True, step())
    except _Note as note:
        return Check(name, True, str(note), note=True)
    except (*known, AdapterRejected, DataError, ModelError, PresetMissing, OSError) as error:
        return Check(name, False, str(error))


def _home(home: Path) -> str:
    if home.stat().st_mode & 0o077:
        raise _Fault(f"{home} can be read by others; run chmod 700 on it.")
    return str(home)


def _permissions(home: Path) -> str:
    """Whether this user can do what a round needs: read the samples, write adapters, ledger and Flower's own files."""
    every = os.R_OK | os.W_OK | os.X_OK
    wanted = {"training": os.R_OK | os.X_OK, "adapters": every, "privacy": every, "flower": os.W_OK | os.X_OK}
    refused = [name for name, mode in wanted.items() if (home / name).exists() and not os.access(home / name, mode)]
    if refused:
        names = ", ".join(str(home / name) for name in refused)
        raise _Fault(f"this user cannot use {names}; run afya-client join --service again, or chown them.")
    return "samples can be read and adapters written"


def _disk(home: Path) -> str:
    free = shutil.disk_usage(home).free >> 20
    if free < LEAST_DISK:
        raise _Fault(f"the disk of {home} has {free} MiB free; make room for at least {LEAST_DISK}.")
    return f"{free} MiB free"


def _memory(home: Path) -> str:
    """Memory that is free now against what training takes: measured for the reference, more by a model's weights."""
    import psutil

    try:
        weights = sum(path.stat().st_size for path in limits.base_model(home).glob("*.safetensors")) >> 20
    except (OSError, RuntimeError, limits.SettingsWrong):
        weights = 0  # the check of the base model says what is wrong with it
    free, needed = psutil.virtual_memory().available >> 20, LEAST_MEMORY + weights
    if free < needed:
        raise _Fault(f"{free} MiB of memory are free, training takes about {needed}; close programs or add memory.")
    return f"{free} MiB free, training takes about {needed}"


def _limits(home: Path) -> str:
    """The clinic's own limits, and whether what the federation planned at its invitation lies within them."""
    own = limits.read_limits(home)
    if words := planned.beyond(own, invitation.record(home).get("plan", {})):
        raise _Note(words)
    return f"{own}"


def _flower() -> str:
    try:
        found = version("flwr")
    except PackageNotFoundError as error:
        raise _Fault("flwr is not installed; run pip install 'afya[client]'.") from error
    if found != FLWR:
        raise _Fault(f"flwr is {found}, this version of Afya needs {FLWR}; run pip install flwr=={FLWR}.")
    return found


def _base(home: Path) -> str:
    from model.llava import base_sha256

    folder = limits.base_model(home)
    found, wanted = base_sha256(folder), invitation.record(home)
    if wanted.get("base_sha256") not in (None, "", found):
        raise _Fault(
            f"{folder} is not the federation's base model {wanted.get('base_name')!r} (sha256 {found[:12]}, "
            f"not {str(wanted['base_sha256'])[:12]}); set model in afya.toml to the folder of that model."
        )
    return f"{folder}, sha256 {found[:12]}"


def _samples(home: Path) -> str:
    from model.data import read_training

    samples, own = read_training(home / "training"), limits.read_limits(home)
    patients = len({sample.group for sample in samples})
    found = f"{len(samples)} consented samples of {patients} patients"
    enough = len(samples) >= own.min_examples and patients >= own.min_cases
    return found if enough else f"{found}; rounds are sat out below {own.min_examples} and {own.min_cases}"


def _adapter(home: Path) -> str:
    from model import adapters

    folder = adapters.current(home)
    return folder.name if folder else "none yet: the bare base model answers"


def _no_server() -> str:
    raise _Fault(
        "no server is known; run afya-client join FILE with the coordinator's file, or pass --server HOST:PORT."
    )


def _keys(link: Connection) -> str:
    for path in (link.ca, link.key):
        try:
            path.read_bytes()
        except PermissionError as error:
            raise _Fault(invitation.closed(path)) from error
        except OSError as error:
            raise _Fault(
                f"{path} is missing; run afya-client join FILE with the coordinator's file, or pass --bundle."
            ) from error
    if link.key.stat().st_mode & 0o077:
        raise _Fault(f"{link.key} can be read by others; run chmod 600 on it.")
    return str(link.key)


def _federation(link: Connection) -> list[Check]:
    """What only the server can tell: is it there and the right one, what time is it, does it know this key."""
    try:
        answer = contact.ask(link.server, link.ca)
    except contact.NoContact as error:
        fault, there = Check("server", False, str(error)), error.clock
        return [fault] if there is None else [fault, _run("clock", lambda: _clock(there))]
    except PermissionError:
        return [Check("server", False, invitation.closed(link.ca))]
    checks = [Check("server", True, f"{link.server} over {answer.tls}"), _run("clock", lambda: _clock(answer.clock))]
    return [*checks, _run("registration", lambda: _registered(link, answer.clock))]


def _clock(there: datetime.datetime | None) -> str:
    if there is None:
        raise _Fault("the server does not say what time it is; is it Afya's server?")
    ahead = (datetime.datetime.now(datetime.UTC) - there).total_seconds()
    if abs(ahead) > CLOCK_SECONDS:
        way = "ahead of" if ahead > 0 else "behind"
        span = f"{abs(ahead) / 60:.0f} minutes" if abs(ahead) < 172_800 else f"{abs(ahead) / 86_400:.0f} days"
        raise _Fault(f"this computer's clock is {span} {way} the server's; set it, or switch on time synchronization.")
    return f"{abs(ahead):.0f} s from the server's"


def _registered(link: Connection, clock: datetime.datetime | None) -> str:
    answer = contact.key_status(link.server, link.ca, link.key, clock)
    if answer.status == contact.KNOWN and "heartbeat" in answer.text:
        return "the server knows this clinic's key"
    if "revoked" in answer.text:
        raise _Fault("the coordinator has revoked this clinic's key; ask for a new invitation.")
    if answer.status == contact.UNKNOWN:
        raise _Fault("the server does not know this clinic's key; ask the coordinator to register it or invite again.")
    if answer.status == contact.UNSIGNED:
        raise _Fault("the server does not accept this key's signature; join again with the coordinator's file.")
    if answer.status == 502:
        raise _Fault("the server's proxy answers but its SuperLink does not; tell the coordinator.")
    raise _Fault(f"the server's answer about the key is not understood (status {answer.status}); is it Afya's server?")


def _service(home: Path, link: Connection) -> str:
    """Whether server, invitation, base model, programs and units are still those that the service was set up with."""
    if differing := service.outdated(home, link):
        raise _Fault(
            f"the service was set up for something else ({', '.join(differing)}); run `sudo {service.again(home)}`."
        )
    return "set up for this server, invitation and base model"


def _settings(home: Path) -> str:
    if fault := service.behind(home):
        raise _Fault(fault)
    return f"the service works with {home / 'afya.toml'}"


def _firewall(home: Path) -> str:
    """Whether nftables keep the service from the kiosk's port; that the rules are in force is seen by root only."""
    if not firewall.program():
        raise _Fault(
            "nftables is not installed, so the service can reach the kiosk's port; install the package nftables, then "
            f"run `sudo {service.again(home)}`."
        )
    if str(firewall.RULES) not in unit.text() or not firewall.RULES.exists():
        raise _Fault(
            f"the service has no firewall rules and can reach the kiosk's port; run `sudo {service.again(home)}`."
        )
    if os.geteuid() == 0 and not firewall.loaded():
        raise _Fault(f"the firewall rules are not in force; run `sudo systemctl restart {unit.UNIT}`.")
    return "the service reaches the federation's server and no other port"


def _group() -> str:
    """Whether this login may read what the service writes: a new membership counts from the next login on."""
    try:
        group = grp.getgrnam(unit.USER).gr_gid
    except KeyError as error:
        raise _Fault(f"the group {unit.USER} is gone; set the service up again.") from error
    if os.geteuid() != 0 and group not in (os.getegid(), *os.getgroups()):
        raise _Fault(
            f"this login is not in the group {unit.USER} yet; log out and in again, then start the kiosk anew."
        )
    return f"this user reads what the group {unit.USER} may"
