"""Runs of the started server: what travels to the clinics, submitting it, its state, and the settings it goes on with.

Through Flower's own command line (`server.link.flwr`). Not here: what a run does (`server.rounds`).
"""

import json
import shutil
from pathlib import Path
from typing import Any

from model.files import write_atomic
from server import checkpoint as store
from server import settings
from server.link import Link, LinkError, flwr, is_up, parsed

APP_PACKAGES = ("server", "client")
OF_ONE_RUN = ("checkpoint-dir", "signing-key", "rollback")  # settings that the next run does not take over


def stage(link: Link) -> Path:
    """A clean folder with exactly what travels to the clinics: pyproject.toml, server/**/*.py, client/**/*.py."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").exists():
        raise LinkError(f"{root / 'pyproject.toml'} is not here; install Afya from its repository (pip install -e .).")
    target = link.state / "bundle" / "afya"
    shutil.rmtree(target, ignore_errors=True)
    for package in APP_PACKAGES:
        for source in sorted((root / package).rglob("*.py")):
            copy = target / source.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    shutil.copyfile(root / "pyproject.toml", target / "pyproject.toml")
    return target


def require_started(link: Link) -> None:
    """Raise LinkError where no server was ever started: Flower would start one of its own, without TLS and clinics."""
    if not (link.state / "flower" / "config.toml").is_file():
        raise LinkError(f"No server was started with {link.state} yet; run `afya-server start` first.")
    if not is_up(link):
        raise LinkError(f"The server of {link.state} is not running; run `afya-server start` first.")


def submit(link: Link, config: dict[str, Any]) -> int:
    """Submit a run with this run configuration; returns its number. Raises LinkError."""
    require_started(link)
    folder = stage(link)
    file = link.state / "bundle" / "run.toml"
    lines = [f"{name} = {_toml(value)}" for name, value in config.items()]
    write_atomic(file, ("\n".join(lines) + "\n").encode())
    answer = parsed(flwr(link, "run", str(folder), "--run-config", str(file), "--format", "json"))
    if not answer.get("success") or "run-id" not in answer:
        raise LinkError(f"The run was not accepted: {answer.get('error-message', answer)}")
    return int(answer["run-id"])


def run_status(link: Link, run_id: int) -> str:
    """State of a run in Flower's words: "running", "finished:completed", "finished:failed" and so on."""
    answer = parsed(flwr(link, "list", "--run-id", str(run_id), "--format", "json"))
    rows = answer.get("runs") or []
    return str(rows[0].get("status", "unknown")) if rows else "unknown"


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (str, bool, int)) else repr(value)


def settings_so_far(root: Path) -> tuple[int, dict[str, Any]]:
    """Number and settings of the last round in `root`, as run configuration; 0 and none where there is no round.

    Raises CheckpointDamaged where there are rounds and none can be read.
    """
    last, _ = store.latest(root)
    if last is None:
        return 0, {}
    was = {name.replace("_", "-"): value for name, value in last.config.items()}
    known = settings.names()
    return last.round, {name: was[name] for name in known if name in was and name not in OF_ONE_RUN}
