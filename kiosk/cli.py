"""afya-kiosk: the commands of a clinic (init, start, verify, backup).

`start` checks what it can in half a second and then becomes Streamlit with safe flags: loopback only, no telemetry, no
traces in the browser. Heavy imports live inside the commands, so `--help` answers at once. Does not cover users,
passwords or restoring; a backup is restored by copying it to $AFYA_HOME/kiosk.db while the kiosk is stopped.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from kiosk.adapter_cli import adapter
from kiosk.settings import FILE, SETTINGS, Settings, SettingsError, default_text
from model.commands import Commands

_HELP = {setting.name: setting.help for setting in SETTINGS}
ADDRESS = "127.0.0.1"
MAX_UPLOAD_MB = 50  # one study's picture; larger files are refused before they are read


@click.group(cls=Commands)
@click.version_option(package_name="afya")
def main() -> None:
    """Ask about medical images on this computer, correct the answers, and keep every case in one file."""


@main.command()
def init() -> None:
    """Write $AFYA_HOME/afya.toml with the kiosk's settings explained, and make the case database.

    The limits of federated training go there, too; `afya-client limits` explains them.
    """
    from model.files import home, write_atomic

    folder = home()
    path = folder / FILE
    if path.exists():
        click.echo(f"{path} exists and was left as it is.")
    else:
        write_atomic(path, default_text().encode())
        click.echo(f"Wrote {path}.")
    _open_store(folder).close()
    click.echo(f"Cases are kept in {folder / 'kiosk.db'}. Next: afya-kiosk start")


@main.command()
@click.option("--port", type=click.IntRange(1, 65535), help=_HELP["port"])
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help=_HELP["model"])
@click.option("--bits", type=click.Choice(["4", "8", "16", "32"]), help=_HELP["bits"])
def start(port: int | None, model: Path | None, bits: str | None) -> None:
    """Open the kiosk at http://127.0.0.1:PORT until it is stopped with Ctrl-C."""
    from model.files import home

    folder = home()
    settings = _settings(folder)
    port = port or settings.port
    _check_model(model, settings)
    _check_port(port)
    _open_store(folder).close()
    environment = kiosk_environment(model, bits)
    click.echo(f"Afya is at http://{ADDRESS}:{port} on this computer. Stop it with Ctrl-C.")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "streamlit", *streamlit_arguments(port)], environment)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of sentences.")
def verify(as_json: bool) -> None:
    """Read the whole case database, check every picture, and rebuild the training folder from it."""
    from kiosk import export, safety
    from kiosk.store import StoreError
    from model.files import home

    folder = home()
    try:
        check = safety.verify(folder / "kiosk.db")
    except StoreError as error:
        raise click.ClickException(str(error)) from error
    changes = None
    if not check.problems:
        store = _open_store(folder)
        changes = export.reconcile(store, folder)
        store.close()
    if as_json:
        found: dict[str, Any] = {"cases": check.cases, "questions": check.turns, "problems": list(check.problems)}
        found["training_samples"] = changes.samples if changes else None
        click.echo(json.dumps(found))
    elif changes:
        click.echo(f"{check.cases} cases with {check.turns} questions, every picture as it was saved.")
        click.echo(
            f"Training folder: {changes.samples} samples ({changes.written} written, {changes.removed} removed)."
        )
    if check.problems:
        lines = "\n  ".join(check.problems)
        raise click.ClickException(
            f"{check.path} is damaged; keep it, and put the last backup in its place.\n  {lines}"
        )


@main.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--yes", is_flag=True, help="Replace FILE if it exists.")
def backup(file: Path, yes: bool) -> None:
    """Copy all cases to FILE, also while the kiosk runs, and check the copy before it gets its name."""
    from kiosk import safety
    from kiosk.store import StoreError
    from model.files import home

    folder = home()
    if not (folder / "kiosk.db").is_file():  # a mistyped AFYA_HOME must not look like a backup
        raise click.ClickException(f"There is no case database at {folder / 'kiosk.db'}; is AFYA_HOME right?")
    store = _open_store(folder)
    try:
        check = safety.backup(store, file, replace=yes)
    except StoreError as error:
        raise click.ClickException(str(error)) from error
    finally:
        store.close()
    click.echo(f"{check.cases} cases with {check.turns} questions are in {check.path}, checked.")


def streamlit_arguments(port: int) -> list[str]:
    """What follows `python -m streamlit`: the app and every flag that keeps it on this machine and quiet."""
    flags = {
        "server.address": ADDRESS,
        "server.port": port,
        "server.headless": "true",
        "server.maxUploadSize": MAX_UPLOAD_MB,
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
        "theme.backgroundColor": "#ffffff",
        "theme.secondaryBackgroundColor": "#eef5f3",
        "theme.textColor": "#17252a",
        "theme.font": "sans-serif",
        "theme.baseFontSize": 17,
        "theme.baseRadius": "0.6rem",
    }
    hosts = ["--server.allowedHosts", "localhost", "--server.allowedHosts", ADDRESS]
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return ["run", str(Path(__file__).with_name("app.py")), *pairs, *hosts]


def kiosk_environment(model: Path | None = None, bits: str | None = None) -> dict[str, str]:
    """The environment of the kiosk's process: nothing may go online, and the choices of the command line."""
    environment = dict(os.environ)
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if model:
        environment["AFYA_MODEL"] = str(model.absolute())
    if bits:
        environment["AFYA_BITS"] = bits
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return environment


def _settings(folder: Path) -> Settings:
    from kiosk.settings import load

    try:
        settings = load(folder)
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    for name in settings.unknown:
        click.echo(f"{folder / FILE}: the setting {name} is not known and was not used.", err=True)
    return settings


def _open_store(folder: Path) -> Any:
    from kiosk.store import CaseStore, StoreError

    try:
        return CaseStore(folder / "kiosk.db")
    except StoreError as error:
        raise click.ClickException(str(error)) from error


def _check_model(model: Path | None, settings: Settings) -> None:
    """Say now, not on the first screen, that there is no model to answer."""
    from model.presets import PresetMissing, reference_path

    try:
        folder = model or (Path(settings.model).expanduser() if settings.model else reference_path())
    except PresetMissing as error:
        raise click.ClickException(str(error)) from error
    if not (folder / "config.json").is_file():
        raise click.ClickException(
            f"There is no model in {folder} (config.json is missing); name another with --model."
        )


def _check_port(port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            todo = f"another program uses port {port}; start with --port {port % 65535 + 1}"
            raise click.ClickException(f"The kiosk cannot open {ADDRESS}:{port}: {todo}.") from error


main.add_command(adapter)

if __name__ == "__main__":
    main()
