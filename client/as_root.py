"""Shell scripts for root: run at once when this is root, else written down for somebody who may run them."""

import os
import subprocess
from pathlib import Path

from model.files import write_atomic

SECONDS = 120.0  # longest time for a script


class ScriptFailed(RuntimeError):
    """A script did not do its work; the message holds what the failing command said."""


def run(script: str, what: str) -> str:
    """Run the script, for root only; returns what it said. `what` is what has not happened when it fails.

    Raises ScriptFailed.
    """
    if os.geteuid() != 0:
        raise ScriptFailed(f"{what}: only root can do that; run the script that this command writes with sudo.")
    try:
        done = subprocess.run(["/bin/sh", "-s"], input=script, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ScriptFailed(f"{what}: it took longer than {SECONDS:.0f} s.") from error
    if done.returncode:
        raise ScriptFailed(f"{what}: {' '.join((done.stderr or done.stdout).split())[-400:]}")
    return (done.stderr + done.stdout).strip()


def write(script: str, home: Path, name: str) -> Path:
    """Write the script into the clinic's home; returns its path."""
    path = home / name
    write_atomic(path, script.encode())
    return path
