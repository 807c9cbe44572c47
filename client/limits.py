"""What this clinic lets a federation ask of it: limits owned by the clinic, held against every request.

The limits stand in $AFYA_HOME/afya.toml, table [client]; a request beyond any of them is refused with the reason and
nothing is trained. This code travels with the federation's bundle, so it guards against mistakes; against a server
that means harm stand the consent gate of the kiosk and a separate system user (SECURITY.md).
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from model import adapters


class Refused(ValueError):
    """The clinic does not do what was asked; the message is the reason, sent back to the server."""


class SettingsWrong(ValueError):
    """The clinic's own afya.toml cannot be used; the message says which entry."""


def _limit(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Limits:
    """The table [client] of afya.toml: name, default, meaning."""

    targets: str = _limit("decoder+projector+tower", "layers an adapter may touch: these names, or a regex")
    max_rank: int = _limit(64, "largest rank of an adapter")
    max_alpha: float = _limit(128.0, "largest scale (lora_alpha) of an adapter")
    max_steps: int = _limit(500, "most optimizer steps in a round")
    min_steps: int = _limit(8, "fewest steps: an update of one step says too much about its samples")
    min_examples: int = _limit(16, "fewest consented samples: below it this clinic sits a round out")
    min_lr: float = _limit(1e-6, "smallest learning rate")
    max_lr: float = _limit(1e-2, "largest learning rate")
    max_batch: int = _limit(64, "most samples in a step")
    max_seconds: float = _limit(1800.0, "training stops after this many seconds")
    threads: int = _limit(0, "processor threads for training; 0: as the system says")


_KINDS: dict[str, type] = {str(kind): kind for kind in (int, float, str)}


@dataclass(frozen=True)
class Request:
    """What the server asks in a train message; every field must be there, and no other."""

    server_round: int
    factor: str
    base_sha256: str
    alpha: float
    layout: str
    local_steps: int
    lr: float
    batch_size: int
    seed: int


def read_settings(home: Path) -> dict[str, Any]:
    """The clinic's afya.toml as a dict, empty when there is none. Raises SettingsWrong."""
    path = home / "afya.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingsWrong(f"{path} cannot be read ({error}); correct it.") from error


def read_limits(home: Path) -> Limits:
    """Limits of the clinic, defaults where afya.toml says nothing. Raises SettingsWrong for wrong names and types."""
    table = read_settings(home).get("client", {})
    known = {entry.name: entry for entry in fields(Limits)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name in CONNECTION:
            continue
        if name not in known:
            raise SettingsWrong(f"{home / 'afya.toml'}: [client] {name} is no limit; there are {', '.join(known)}.")
        kind = type(known[name].default)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise SettingsWrong(f"{home / 'afya.toml'}: [client] {name} must be of type {kind.__name__}.")
        values[name] = value
    return Limits(**values)


CONNECTION = ("server", "ca", "key", "port")  # entries of [client] that `afya-client join` reads


def base_model(home: Path) -> Path:
    """Folder of this clinic's base model: `model` in afya.toml, else the reference model. Raises PresetMissing."""
    from model.presets import reference_path

    named = os.environ.get("AFYA_MODEL") or read_settings(home).get("model")
    return Path(str(named)).expanduser() if named else reference_path()


def parse(config: Mapping[str, Any]) -> Request:
    """A request from a message's configuration record. Raises Refused for missing, unknown or mistyped entries."""
    known = {entry.name.replace("_", "-"): entry for entry in fields(Request)}
    if odd := sorted(set(config) - set(known)):
        raise Refused(f"the request holds {odd[0]!r}, which this clinic does not know")
    if lacking := sorted(set(known) - set(config)):
        raise Refused(f"the request lacks {lacking[0]!r}")
    values: dict[str, Any] = {}
    for name, entry in known.items():
        value, kind = config[name], _KINDS[str(entry.type)]
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise Refused(f"{name} is {str(value)[:60]!r}, expected a value of type {kind.__name__}")
        values[entry.name] = value
    return Request(**values)


def check(request: Request, spec: adapters.AdapterSpec, limits: Limits, base_sha256: str, examples: int) -> None:
    """Raise Refused with the first reason why this clinic does not train what is asked."""
    if request.base_sha256 != base_sha256:
        raise Refused(f"the base model asked for is {request.base_sha256[:12]}, this clinic has {base_sha256[:12]}")
    if request.factor not in ("A", "B", "AB"):
        raise Refused(f"the factor asked for is {request.factor[:20]!r}, not A, B or AB")
    check_targets(spec, limits)
    ranges = (
        ("local-steps", request.local_steps, limits.min_steps, limits.max_steps),
        ("lr", request.lr, limits.min_lr, limits.max_lr),
        ("batch-size", request.batch_size, 1, limits.max_batch),
        ("rank", spec.rank, 1, limits.max_rank),
        ("alpha", request.alpha, 1e-3, limits.max_alpha),
        ("server-round", request.server_round, 1, 1_000_000),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise Refused(f"{name} is {value}, this clinic allows {low} to {high}")
    if examples < limits.min_examples:
        raise Refused(f"this clinic has {examples} consented samples and takes part from {limits.min_examples}")


def check_targets(spec: adapters.AdapterSpec, limits: Limits) -> None:
    """Raise Refused unless every layer of the adapter is one this clinic allows."""
    pattern = re.compile(adapters.targets_pattern(limits.targets))
    outside = [name for name in spec.target_modules if not pattern.fullmatch(name)]
    if outside:
        raise Refused(f"the layer {outside[0][:120]} is not among the targets this clinic allows")
