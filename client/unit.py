"""The client's service as it is installed on this machine: its names, and which clinic's home its unit serves."""

import re
from pathlib import Path

USER = "afya-client"
UNIT, SETTINGS, WATCH = "afya-client.service", "afya-client-settings.service", "afya-client-settings.path"
STATE = Path("/var/lib/afya-client")
UNITS = Path("/etc/systemd/system")


def text() -> str:
    """The installed unit, or an empty string."""
    try:
        return (UNITS / UNIT).read_text(encoding="utf-8")
    except OSError:
        return ""


def served() -> Path | None:
    """The clinic's home that the installed unit serves."""
    found = _bound("training")
    return found.parent if found else None


def installed(home: Path) -> bool:
    """Whether a unit is installed that serves this home."""
    return served() == home.resolve()


def model() -> Path | None:
    """The folder of the base model that the installed unit answers with."""
    return _bound("model")


def _bound(place: str) -> Path | None:
    """What the installed unit binds, read only, to its own folder `place`."""
    found = re.search(rf"^BindReadOnlyPaths=([^:\n]+):[^:\n]*/{place}$", text(), re.MULTILINE)
    return Path(found[1]) if found else None
