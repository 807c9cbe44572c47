"""`afya-server invite`, `revoke` and `service`: letting a clinic in, shutting it out, starting the server at boot."""

from pathlib import Path
from typing import Any

import click


def _run(call: Any) -> Any:
    """Run `call`; a known kind of failure becomes one plain sentence and exit code 1."""
    from server.cli import guard

    return guard(call)


def _link(certs: Path, state: Path) -> Any:
    from server.link import existing

    return existing(certs, state)


_CERTS = click.option("--certs", type=click.Path(path_type=Path), default=Path("certs"), show_default=True)
_STATE = click.option("--state", type=click.Path(path_type=Path), default=Path("federation"), show_default=True)


@click.command()
@click.argument("clinic")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.  [default: CLINIC.afya]")
@click.option(
    "--server", metavar="HOST:PORT", help="Where clinics reach this server.  [default: its certificate's name]"
)
@click.option(
    "--base-model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Base model's folder."
)
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="NAME=VALUE",
    help="What rounds will ask, where not as in the last one of STATE/rounds; a clinic with narrower limits is told.",
)
@_CERTS
@_STATE
def invite(
    clinic: str,
    out: Path | None,
    server: str | None,
    base_model: Path | None,
    values: tuple[str, ...],
    certs: Path,
    state: Path,
) -> None:
    """Write the one file with which CLINIC joins, and let its key take part."""
    from server import cli
    from server import invite as invitations

    file, chosen = out or Path(f"{clinic}.afya"), cli.chosen(values)
    told = _run(lambda: invitations.invite(_link(certs, state), clinic, file, server, base_model, chosen))
    when = "is registered" if told else "will be registered when the server starts"
    click.echo(f"Wrote {file}; the key of {clinic} {when}.")
    click.echo(f"Hand it over in person: it holds the clinic's password. There: afya-client join {file.name}")


@click.command()
@click.argument("clinic")
@click.option("--yes", is_flag=True, help="Do it without asking.")
@_CERTS
@_STATE
def revoke(clinic: str, yes: bool, certs: Path, state: Path) -> None:
    """Shut CLINIC out for good; it can be invited again, with another key."""
    from server import members

    if not yes:
        click.confirm(f"Refuse the key of {clinic} from now on?", abort=True)
    told = _run(lambda: members.revoke(_link(certs, state), clinic))
    rest = "" if told else " The SuperLink was not told (it does not run, or never knew the key)."
    click.echo(f"The key of {clinic} is refused from now on.{rest}")


@click.command()
@click.option("--listen", default="0.0.0.0:8443", show_default=True, metavar="HOST:PORT", help="Where clinics connect.")
@_CERTS
def service(listen: str, certs: Path) -> None:
    """Print the shell script that makes the server a system service of its own user; root runs it."""
    from server import service as units

    click.echo(_run(lambda: units.script(listen, certs)), nl=False)
