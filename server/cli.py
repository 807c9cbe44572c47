"""afya-server: the coordinator's commands. Heavy imports happen inside the commands, so --help answers at once."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from server.data_cli import data
from server.members_cli import invite, revoke, service
from server.rollback_cli import rollback
from server.status_cli import page, status
from server.train_cli import train
from server.usb_cli import export_release, export_round, import_round

_STATE = click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=Path("federation"),
    show_default=True,
    help="Folder of this server.",
)


@click.group()
@click.version_option(package_name="afya")
def main() -> None:
    """Coordinate a federation: train a base, make keys, start the server, run rounds."""


def _guard(call: Callable[[], Any]) -> Any:
    """Run `call`; a known kind of failure becomes one plain sentence and exit code 1."""
    from model.adapters import AdapterRejected
    from model.llava import ModelError
    from model.presets import PresetMissing
    from server.certs import CertsError
    from server.checkpoint import CheckpointDamaged
    from server.link import LinkError
    from server.settings import SettingsRejected

    known = (AdapterRejected, ModelError, PresetMissing, CertsError, CheckpointDamaged, LinkError, SettingsRejected)
    try:
        return call()
    except known as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'A file'}: {error.strerror or error}.") from error


@main.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("certs"), show_default=True, help="Folder to fill."
)
@click.option("--clinic", "clinics", multiple=True, metavar="NAME", help="A clinic to make a node key for; repeat it.")
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="Name or address that clinics use; repeat it.")
@click.option("--json", "as_json", is_flag=True, help="Print the list of files as JSON.")
def certs(out: Path, clinics: tuple[str, ...], hosts: tuple[str, ...], as_json: bool) -> None:
    """Make the authority, the server's certificate and a key for each clinic; what exists stays as it is."""
    from server import certs as keys
    from server import signing

    written = _guard(lambda: keys.make(out, clinics, hosts))
    written += _guard(lambda: signing.hand_out(out))
    if as_json:
        click.echo(json.dumps([str(path) for path in written]))
        return
    for path in written:
        click.echo(str(path))
    if clinics:
        click.echo(f"Hand each clinic its folder under {out / 'clinics'} in person; node.key is its password.")


@main.command()
@click.option("--certs", "folder", type=click.Path(path_type=Path), default=Path("certs"), show_default=True)
@_STATE
@click.option(
    "--listen", default="127.0.0.1:8443", show_default=True, metavar="HOST:PORT", help="Where clinics connect."
)
@click.option(
    "--link-port",
    type=click.IntRange(1, 65535),
    default=8000,
    show_default=True,
    help="Port of the SuperLink, on loopback only; the other commands find it by themselves.",
)
@click.option(
    "--clinic-gib-an-hour",
    "gib",
    type=click.FloatRange(0.1, 1e6),
    default=4.0,
    show_default=True,
    help="What one clinic may send in an hour; one that sends more is made to wait.",
)
def start(folder: Path, state: Path, listen: str, link_port: int, gib: float) -> None:
    """Check everything, then run the SuperLink behind its proxy until interrupted."""
    from server.link import Link, serve

    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise click.UsageError(f"--listen {listen!r} is not HOST:PORT.")
    if gib != gib:
        raise click.UsageError("--clinic-gib-an-hour is no number.")
    link = Link(folder.resolve(), state.resolve(), link_port, int(gib * (1 << 30)))
    _guard(lambda: serve(link, (host.strip("[]"), int(port)), lambda text: click.echo(text)))


@main.command()
@click.argument("name")
@click.argument("public_key", type=click.Path(exists=True, path_type=Path))
@click.option("--certs", "folder", type=click.Path(path_type=Path), default=Path("certs"), show_default=True)
@_STATE
def register(name: str, public_key: Path, folder: Path, state: Path) -> None:
    """Let a clinic that made its own key take part: its name and its public key file."""
    from server import admission
    from server import link as links

    link = links.existing(folder, state)
    _guard(lambda: admission.register(link, name, public_key))
    click.echo(f"Clinic {name} registered.")


@main.command()
@click.option("--certs", "folder", type=click.Path(path_type=Path), default=Path("certs"), show_default=True)
@_STATE
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the rounds.  [default: STATE/rounds]")
@click.option("--set", "values", multiple=True, metavar="NAME=VALUE", help="A setting; --list shows them. Repeat it.")
@click.option("--list", "show", is_flag=True, help="List the settings and end.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as a JSON line.")
def rounds(folder: Path, state: Path, out: Path | None, values: tuple[str, ...], show: bool, as_json: bool) -> None:
    """Submit a run to the started server and show its rounds; a stopped run goes on where it was.

    It goes on with the settings it had, but for those that --set names. The run is the server's: Ctrl-C ends only the
    showing, afya-server status tells how far it is, and stopping afya-server start stops it after a whole round.
    """
    from server import follow, settings, signing
    from server import link as links

    if show:
        for name, (default, meaning) in settings.names().items():
            click.echo(f"{name} = {default!r}\n    {meaning}")
        return
    link = links.existing(folder, state)
    root = (out or state / "rounds").resolve()
    given = chosen(values)
    config = {**_guard(lambda: so_far(root, given)), "checkpoint-dir": str(root), **given}
    _guard(lambda: settings.read({**{n: d for n, (d, _) in settings.names().items()}, **config}))
    config.setdefault("signing-key", str(_guard(lambda: signing.signing_key(folder.resolve()))))
    _guard(lambda: follow.follow(link, root, config, as_json))


def so_far(root: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rounds that are there already, told where they are not the defaults."""
    from server import runs, settings

    number, found = runs.settings_so_far(root)
    odd = {n: v for n, v in found.items() if n not in given and v != settings.names()[n][0]}
    if odd:
        words = ", ".join(f"{name} {value}" for name, value in odd.items())
        click.echo(f"Going on after round {number} with its settings: {words}.", err=True)
    return found


def chosen(values: Sequence[str]) -> dict[str, Any]:
    """What --set names, each NAME=VALUE. Raises UsageError."""
    return dict(_value(text) for text in values)


def _value(text: str) -> tuple[str, Any]:
    """NAME=VALUE as the setting's own type. Raises UsageError."""
    from server import settings

    name, sign, value = text.partition("=")
    known = settings.names()
    if name not in known:
        raise click.UsageError(f"--set {text!r}: there is no setting {name!r}; --list shows them.")
    if not sign:
        raise click.UsageError(f"--set {text!r}: the value is missing; write {name}=VALUE.")
    kind = type(known[name][0])
    try:
        return name, kind(value)
    except ValueError as error:
        raise click.UsageError(f"--set {text!r}: {value!r} is not of type {kind.__name__}.") from error


def guard(call: Callable[[], Any]) -> Any:
    """`_guard` for the commands in other files."""
    return _guard(call)


main.add_command(data)
main.add_command(invite)
main.add_command(revoke)
main.add_command(service)
main.add_command(page)
main.add_command(status)
main.add_command(rollback)
main.add_command(train)
main.add_command(export_release)
main.add_command(export_round)
main.add_command(import_round)
