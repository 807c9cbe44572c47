"""The kiosk as its command starts it, and a real Chromium to look at it: for the end-to-end test and the screenshots.

The browser is told to stay quiet, every request it makes is written down, and those that would leave this machine are
stopped. AFYA_CHROMIUM names the browser; otherwise one that is installed.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


def chromium() -> str | None:
    """Path of a Chromium, or None."""
    named = os.environ.get("AFYA_CHROMIUM")
    found = (shutil.which(name) for name in (named, "chromium", "chromium-browser", "google-chrome") if name)
    return next(filter(None, found), None)


@dataclass
class Running:
    """A kiosk that answers on `url`; `pid` is its process."""

    url: str
    pid: int


@contextlib.contextmanager
def running(home: Path, model: Path | None = None, log: Path | None = None) -> Iterator[Running]:
    """`afya-kiosk start` in a home of its own, until the block ends. RuntimeError with its output if it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "kiosk.cli", "start", "--port", str(port)]
    command += ["--model", str(model)] if model else []
    log = log or home.parent / f"kiosk-{port}.log"
    with open(log, "wb") as out:
        environment = {**os.environ, "AFYA_HOME": str(home)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the kiosk did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield Running(url, process.pid)
    finally:
        process.terminate()
        process.wait(20)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/_stcore/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def page(requests: list[str], width: int = 1280, height: int = 900) -> "Iterator[Page]":
    """A page in a real browser; the addresses of all its requests are added to `requests`."""
    from playwright.sync_api import Route, sync_playwright

    def judge(route: Route) -> None:
        if off_this_machine(route.request.url):
            route.abort()
        else:
            route.continue_()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=list(FLAGS))
        context = browser.new_context(permissions=["camera"], viewport={"width": width, "height": height})
        context.on("request", lambda request: requests.append(request.url))
        context.route("**/*", judge)
        opened = context.new_page()
        opened.on("websocket", lambda found: requests.append(found.url))
        yield opened
        browser.close()


def off_this_machine(url: str) -> bool:
    """Whether a request would leave the loopback interface."""
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1"
