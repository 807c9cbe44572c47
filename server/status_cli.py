"""`afya-server status` and `afya-server page`: what the federation has done so far, as text, JSON or a page.

The page is Streamlit on 127.0.0.1 with the flags of the kiosk: it only reads. Not here: what the page shows
(`server/page.py`).
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from server.status import Clinic, Release, Status

ADDRESS = "127.0.0.1"
NOTHING = "Nothing has happened here yet: invite clinics, start the server, run rounds."
_STATE = click.option("--state", type=click.Path(path_type=Path), default=Path("federation"), show_default=True)
_OUT = click.option("--out", type=click.Path(path_type=Path), help="Folder of the rounds.  [default: STATE/rounds]")


def _read(state: Path, out: Path | None) -> "Status":
    from server import status as statuses
    from server.cli import guard

    try:
        return guard(lambda: statuses.read(state, out))
    except ValueError as error:
        raise click.ClickException(f"A table in {state} is damaged and cannot be read ({error}).") from error


@click.command()
@_STATE
@_OUT
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(state: Path, out: Path | None, as_json: bool) -> None:
    """Show clinics, rounds, accuracy, bytes, rejections and releases; works while the server runs or not."""
    found = _read(state, out)
    click.echo(json.dumps(asdict(found)) if as_json else text(found))


@click.command()
@_STATE
@_OUT
@click.option("--port", type=click.IntRange(1, 65535), default=8502, show_default=True)
def page(state: Path, out: Path | None, port: int) -> None:
    """Open the same as a page at http://127.0.0.1:PORT until it is stopped with Ctrl-C; it only reads."""
    _check_port(port)
    environment = {**os.environ, "AFYA_SERVER_STATE": str(state.resolve()), "DO_NOT_TRACK": "1"}
    if out:
        environment["AFYA_SERVER_ROUNDS"] = str(out.resolve())
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    click.echo(f"The federation's page is at http://{ADDRESS}:{port} on this computer. Stop it with Ctrl-C.")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "streamlit", *streamlit_arguments(port)], environment)


def _check_port(port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise click.ClickException(f"Another program uses port {port}; choose another with --port.") from error


def streamlit_arguments(port: int) -> list[str]:
    """What follows `python -m streamlit`: the page and every flag that keeps it on this machine and quiet."""
    flags = {
        "server.address": ADDRESS,
        "server.port": port,
        "server.headless": "true",
        "server.maxUploadSize": 1,
        "server.fileWatcherType": "none",
        "server.enableAgentApi": "false",
        "server.enableCORS": "true",
        "server.enableXsrfProtection": "true",
        "browser.gatherUsageStats": "false",
        "browser.serverAddress": ADDRESS,
        "client.showErrorDetails": "none",
        "client.showErrorLinks": "false",
        "client.toolbarMode": "minimal",
        "global.developmentMode": "false",
        "logger.level": "warning",
        "theme.base": "light",
        "theme.primaryColor": "#0b6e5f",
        "theme.font": "sans-serif",
    }
    hosts = ["--server.allowedHosts", "localhost", "--server.allowedHosts", ADDRESS]
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return ["run", str(Path(__file__).with_name("page.py")), *pairs, *hosts]


def text(found: "Status") -> str:
    """The status as lines for a person."""
    if found.empty:
        return f"{found.root}: {NOTHING}"
    done = [row for row in found.rounds if row.changed]
    moved = sum(row.bytes_down + row.bytes_up for row in found.rounds) / 1e6
    spent = sum(row.seconds for row in found.rounds)
    lines = [f"Rounds      {len(done)} changed the adapter, {len(found.rounds) - len(done)} did not;"]
    lines[0] += f" {spent:.0f} s, {moved:.1f} MB" + (f"; round {found.running} is running" if found.running else "")
    lines += [f"  {row.number}: {row.reason}; {row.seconds:.0f} s" for row in found.rounds[-5:]]
    lines += [found.waiting] if found.waiting else []
    lines += ["Clinics", *(f"  {clinic_line(clinic)}" for clinic in found.clinics)]
    if found.refusals:
        lines.append(f"Rejections  {len(found.refusals)}, the last ones:")
        lines += [f"  round {row.round}, {row.clinic}: {row.reason}" for row in found.refusals[-5:]]
    lines += ["Releases", *(f"  {release_line(row)}" for row in found.releases[-5:])] if found.releases else []
    return "\n".join([*lines, *([f"Trouble     {found.trouble}"] if found.trouble else [])])


def clinic_line(clinic: "Clinic") -> str:
    """One clinic in a line."""
    if clinic.revoked:
        return f"{clinic.name}: key revoked on {clinic.revoked[:10]}"
    seen = f"last seen {clinic.last_seen[:16].replace('T', ' ')} UTC" if clinic.last_seen else "never seen"
    parts = [seen, f"{clinic.accepted} accepted, {clinic.rejected} rejected, {clinic.bytes_up / 1e6:.1f} MB"]
    if clinic.loss_before is not None and clinic.loss_after is not None:
        parts.append(f"loss {clinic.loss_before:.3f} -> {clinic.loss_after:.3f}")
    if clinic.accuracy and "candidate" in (last := clinic.accuracy[-1]):
        parts.append(f"right {last['candidate']} % of {last['rows']} sealed questions (before: {last['installed']} %)")
    return f"{clinic.name}: {'; '.join(parts)}"


def release_line(row: "Release") -> str:
    """One release, rollback or refusal in a line."""
    when = row.at[:16].replace("T", " ")
    if row.kind == "not-released":
        return f"{when} round {row.round} held back: {row.words}"
    where = f"installed at {', '.join(row.installed) or 'no clinic'}"
    missing = f", not at {', '.join(row.refused)}" if row.refused else ""
    return f"{when} round {row.round} {'released' if row.kind == 'release' else 'released again'}: {where}{missing}"
