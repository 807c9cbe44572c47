"""The settings of this clinic: one table of name, default and help, read from $AFYA_HOME/afya.toml.

`afya-kiosk init` writes the file from the table, `afya-kiosk start --help` shows the same words. Tables in the file
(`[client]` and the like) belong to other programs and are not read here. Holds no secrets.
"""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "afya.toml"


class SettingsError(ValueError):
    """afya.toml cannot be used; the message lists everything that is wrong with it."""


@dataclass(frozen=True)
class Setting:
    """One line of afya.toml: its name, what it is when nobody sets it, what it does, and what it may be."""

    name: str
    default: str | int | bool
    help: str
    allowed: tuple[int, ...] | range | None = None


SETTINGS: tuple[Setting, ...] = (
    Setting("clinic", "", "Name of the clinic, shown at the top of the screen."),
    Setting("model", "", "Folder of the model that answers. Empty: the one that comes with Afya."),
    Setting("bits", 4, "Precision of the model's weights: 4 or 8 save memory, 16 and 32 do not.", (4, 8, 16, 32)),
    Setting("port", 8501, "Port of the kiosk's address, http://127.0.0.1:PORT.", range(1, 65536)),
    Setting("answer_tokens", 64, "Longest answer, in tokens (about three quarters of a word each).", range(1, 1025)),
    Setting("answer_seconds", 120, "Give up on an answer after this many seconds.", range(5, 3601)),
    Setting("reliance", True, "Check with the picture hidden whether each answer depends on it (true or false)."),
)


@dataclass(frozen=True)
class Settings:
    """What afya.toml says, completed with the defaults of `SETTINGS`; `unknown` are names that mean nothing here."""

    clinic: str = ""
    model: str = ""
    bits: int = 4
    port: int = 8501
    answer_tokens: int = 64
    answer_seconds: int = 120
    reliance: bool = True
    unknown: tuple[str, ...] = ()


def default_text() -> str:
    """The text of a new afya.toml: every setting with its help and its default."""
    lines = ["# Settings of this clinic. Lines that are missing have the value shown here.", ""]
    for setting in SETTINGS:
        lines += [f"# {setting.help}", f"{setting.name} = {json.dumps(setting.default)}", ""]
    return "\n".join(lines)


def load(home: Path) -> Settings:
    """Read $AFYA_HOME/afya.toml; defaults where there is none. Raises SettingsError with every mistake at once."""
    path = home / FILE
    if not path.is_file():
        return Settings()
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be read ({error}); correct it, or delete it and run `afya-kiosk init`."
        ) from error
    found = {name: value for name, value in found.items() if not isinstance(value, dict)}
    known = {setting.name: setting for setting in SETTINGS}
    mistakes = [mistake for name, value in found.items() if name in known and (mistake := _mistake(known[name], value))]
    if mistakes:
        raise SettingsError(f"{path}: {'; '.join(mistakes)}.")
    values = {name: value for name, value in found.items() if name in known}
    return Settings(**values, unknown=tuple(sorted(set(found) - set(known))))


def _mistake(setting: Setting, value: Any) -> str | None:
    """What is wrong with a value, or None."""
    kind = type(setting.default)
    if type(value) is not kind:
        words = {int: "a number", bool: "true or false", str: "text in quotes"}
        return f"{setting.name} must be {words[kind]}, not {value!r}"
    if setting.allowed is not None and value not in setting.allowed:
        if isinstance(setting.allowed, range):
            return f"{setting.name} must be from {setting.allowed[0]} to {setting.allowed[-1]}, not {value}"
        return f"{setting.name} must be one of {', '.join(map(str, setting.allowed))}, not {value}"
    return None
