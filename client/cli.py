"""afya-client: the commands of a hospital's IT person. Heavy imports happen inside them, so --help answers at once."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from client.rounds_cli import budget, export_round, import_release, import_round
from model.commands import Commands

if TYPE_CHECKING:
    from client.doctor import Check

_SERVER = click.option("--server", metavar="HOST:PORT", help="The federation's server.  [default: afya.toml]")
_BUNDLE = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Folder from the coordinator: ca.crt, node.key.  [default: HOME/federation]",
)
_PORT = click.option(
    "--port", type=int, help="Local port of the SuperNode, one for each on a machine.  [default: 9094]"
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=Commands)
@click.version_option(package_name="afya")
def main() -> None:
    """Take part in a federation with this clinic's consented samples; images never leave."""


def _guard(call: Callable[[], Any]) -> Any:
    """Run `call`; a known kind of failure becomes one plain sentence and exit code 1."""
    from client.as_root import ScriptFailed
    from client.invitation import InvitationRejected
    from client.limits import SettingsWrong
    from client.node import AlreadyJoined
    from client.service import ServiceError
    from model.adapters import AdapterRejected
    from model.data import DataError
    from model.llava import ModelError
    from model.presets import PresetMissing

    try:
        return call()
    except (AlreadyJoined, InvitationRejected, ScriptFailed, ServiceError) as error:
        raise click.ClickException(str(error)) from error
    except (AdapterRejected, DataError, ModelError, PresetMissing, SettingsWrong) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'A file'}: {error.strerror or error}.") from error


@main.command()
@_SERVER
@_BUNDLE
@_JSON
def doctor(server: str | None, bundle: Path | None, as_json: bool) -> None:
    """Look at everything that taking part needs and name every fault at once."""
    from client import doctor, node
    from model import files

    home = files.home()
    link = _guard(lambda: node.connection(home, server, bundle))
    checks = _guard(lambda: [*doctor.examine(home, link), *doctor.examine_service(home, link)])
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks]))
    else:
        for check in checks:
            word = "note " if check.note else "ok   " if check.ok else "FAULT"
            click.echo(f"{word} {check.name}: {check.detail}")
    if not all(check.ok for check in checks):
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("file", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_SERVER
@_BUNDLE
@_PORT
@click.option("--service/--foreground", "service", help="Run as a system service, or here until interrupted (default).")
@click.option(
    "--without-firewall", is_flag=True, help="Install the service even where nftables cannot keep it off other ports."
)
@click.option("--offline", is_flag=True, help="Only unpack FILE: this clinic takes part by stick.")
@click.option("--replace", is_flag=True, help="Use FILE even if this clinic has joined another federation before.")
def join(
    file: Path | None,
    server: str | None,
    bundle: Path | None,
    port: int | None,
    service: bool,
    without_firewall: bool,
    offline: bool,
    replace: bool,
) -> None:
    """Take part: unpack the coordinator's FILE (the first time), check everything, then start.

    A lost connection is taken up again by itself.
    """
    from client import doctor, invitation, node
    from model import files, passport

    home = files.home()
    if file is not None:
        folder = _guard(lambda: invitation.unpack(home, invitation.read(file), replace))
        click.echo(f"The invitation is in {folder}; {file} is no longer needed: delete it.")
    if offline:
        _guard(lambda: passport.adopt(home, home / "federation"))
        click.echo("By stick: afya-client import-round FILE trains, export-round FILE writes the answer.")
        return
    link = _guard(lambda: node.connection(home, server, bundle, port))
    _well(_guard(lambda: doctor.examine(home, link)))
    assert link is not None  # or there was a fault
    _guard(lambda: passport.adopt(home, link.ca.parent))
    if (home / "federation").is_dir():
        _guard(lambda: invitation.give(home, home / "federation"))
    if service:
        _guard(lambda: _serve(home, link, without_firewall))
        return
    click.echo(f"Taking part at {link.server}; interrupt to leave.")
    _guard(lambda: node.join(home, link))


def _well(checks: "list[Check]") -> None:
    """Tell the notes; faults end the command."""
    for check in checks:
        if check.note:
            click.echo(f"Note: {check.detail}", err=True)
    faults = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
    if faults:
        raise click.ClickException(" ".join(faults))


def _serve(home: Path, link: Any, without_firewall: bool) -> None:
    """Install and start the service when this is root, else write the script and print what root has to run."""
    from client import service, unit

    script = service.plan(home, link, without_firewall=without_firewall).script
    if _as_root(script, home, "afya-client-service.sh", "The service was not installed"):
        click.echo(f"The service {unit.UNIT} is installed and started; systemctl status {unit.UNIT} shows it.")


def _as_root(script: str, home: Path, name: str, failed: str) -> bool:
    """Run the script when this is root, else write it into the home and say how it is run; returns whether it ran."""
    from client import as_root

    if os.geteuid() == 0:
        if said := as_root.run(script, failed):
            click.echo(said)
        return True
    path = as_root.write(script, home, name)
    click.echo(f"Wrote {path}; look at it, then have it run by somebody who may:\n  sudo sh {path}")
    return False


@main.command()
@click.option("--yes", is_flag=True, help="Do it without asking.")
def leave(yes: bool) -> None:
    """Take the client's service off this machine: units, user, firewall rules and copies of keys.

    Cases, samples, adapters, the privacy ledger and the federation's file stay; `join --service` takes part again.
    """
    from client import leaving
    from model import files

    home = files.home()
    script = _guard(lambda: leaving.script(home))
    if not yes:
        click.confirm(f"Stop taking part and remove the service of {home}?", abort=True)
    if _guard(lambda: _as_root(script, home, "afya-client-leave.sh", "The service was not removed")):
        click.echo(
            "The service is removed. If this clinic leaves for good, delete "
            f"{home / 'federation'} and ask the coordinator to run afya-server revoke."
        )


@main.command()
@_JSON
def status(as_json: bool) -> None:
    """Say how many samples are consented, which adapter is in use and what a federation may ask."""
    from client import limits, service
    from model import adapters, files, installed
    from model.data import read_training

    home = files.home()

    def gather() -> dict[str, Any]:
        adapters.current(home)  # raises when the files are not the ones that were installed
        record = installed.pointer(home)
        samples = len(read_training(home / "training"))
        found = {"home": str(home), "samples": samples, "adapter": record, "limits": asdict(limits.read_limits(home))}
        return {**found, "fault": service.behind(home) or None}

    found = _guard(gather)
    if as_json:
        click.echo(json.dumps(found))
        return
    adapter = found["adapter"]
    click.echo(f"Home      {found['home']}\nSamples   {found['samples']} consented")
    click.echo(f"Adapter   {adapter['name'] + ', installed ' + adapter['installed_at'] if adapter else 'none'}")
    for name, value in found["limits"].items():
        click.echo(f"Limit     {name} = {value}")
    if found["fault"]:
        click.echo(f"FAULT     {found['fault']}")


@main.command()
@click.option("--yes", is_flag=True, help="Do it without asking.")
def rollback(yes: bool) -> None:
    """Go back to the adapter before the current one, or to the bare base model."""
    from model import files, installed

    home = files.home()
    to = installed.before(home)
    if not yes:
        click.confirm(f"Go back to {to or 'the bare base model'}?", abort=True)
    name = _guard(lambda: installed.rollback(home, to))
    click.echo(f"In use now: {name or 'the bare base model'}.")


@main.command()
def limits() -> None:
    """Explain every limit that this clinic can set, as lines for afya.toml with the values of now."""
    from dataclasses import fields

    from client import limits
    from model import files

    home = files.home()
    now = _guard(lambda: limits.read_limits(home))
    click.echo(
        f"# What a federation may ask of this clinic; what is to differ goes into {home / 'afya.toml'}.\n[client]"
    )
    for entry in fields(now):
        click.echo(f"# {entry.metadata['help']}\n{entry.name} = {json.dumps(getattr(now, entry.name))}")


main.add_command(budget)
main.add_command(export_round)
main.add_command(import_release)
main.add_command(import_round)
