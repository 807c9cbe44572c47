"""What this clinic lets a federation ask of it: limits owned by the clinic, held against every request.

The limits stand in $AFYA_HOME/afya.toml, table [client]; a request beyond any of them is refused with the reason and
nothing is trained. This code travels with the federation's bundle, so it guards against mistakes; against a server
that means harm stand the consent gate of the kiosk and a separate system user (SECURITY.md).
"""

import datetime
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from client import schedule
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
    min_cases: int = _limit(16, "fewest patients, or pictures where patients are not known: likewise")
    min_lr: float = _limit(1e-6, "smallest learning rate")
    max_lr: float = _limit(5e-2, "largest learning rate, of either factor")
    max_batch: int = _limit(64, "most samples in a step")
    max_mu: float = _limit(1.0, "largest proximal term (FedProx)")
    max_minutes: float = _limit(30.0, "training stops after this many minutes, waiting for the kiosk included")
    hours: str = _limit("", 'hours of the day for training by this clock, as "22:00-06:00, 12:30-13:30"; empty: any')
    max_memory_mib: int = _limit(0, "most memory (MiB) of the training process; 0: no limit")
    nice: int = _limit(10, "priority of training, from 0 (as other programs) to 19 (last)")
    threads: int = _limit(0, "processor threads for training; 0: as the system says")
    dp: bool = _limit(False, "train with differential privacy (DP-SGD) for each patient")
    dp_epsilon: float = _limit(8.0, "privacy budget of this clinic over all rounds: nothing leaves beyond it")
    dp_delta: float = _limit(1e-5, "delta of that budget; must stay below one over the number of patients")
    dp_clip: float = _limit(0.5, "largest norm of one patient's gradient")
    dp_noise: float = _limit(1.0, "noise added to the sum of gradients, as a multiple of dp_clip")


_KINDS: dict[str, type] = {str(kind): kind for kind in (int, float, str)}


@dataclass(frozen=True)
class Request:
    """What the server asks in a train message; every field without a default must be there, and no other."""

    server_round: int
    factor: str
    base_sha256: str
    alpha: float
    layout: str
    local_steps: int
    lr: float
    batch_size: int
    seed: int
    proximal_mu: float
    lr_ratio: float = 1.0  # of the factors B to lr


def settings_file(home: Path) -> Path:
    """Where the settings lie: afya.toml in the clinic's home; a service is told where its copy is ($AFYA_SETTINGS)."""
    return Path(os.environ.get("AFYA_SETTINGS") or home / "afya.toml")


def read_settings(home: Path) -> dict[str, Any]:
    """The clinic's afya.toml as a dict, empty when there is none. Raises SettingsWrong, also where the copy of a
    service is missing: its clinic may be stricter than the defaults."""
    path = settings_file(home)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if path == home / "afya.toml":
            return {}
        raise SettingsWrong(f"{path} is missing; run `sudo systemctl start afya-client-settings.service`.") from error
    except (OSError, ValueError) as error:
        raise SettingsWrong(f"{path} cannot be read ({error}); correct it.") from error


def read_limits(home: Path) -> Limits:
    """Limits of the clinic, defaults where afya.toml says nothing. Raises SettingsWrong for wrong names and types."""
    path, table = settings_file(home), client_table(home)
    known = {entry.name: entry for entry in fields(Limits)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name in CONNECTION:
            continue
        if name not in known:
            raise SettingsWrong(f"{path}: [client] {name} is no limit; there are {', '.join(known)}.")
        kind = type(known[name].default)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise SettingsWrong(f"{path}: [client] {name} must be of type {kind.__name__}.")
        values[name] = value
    found = Limits(**values)
    if mistake := _mistake(found):
        raise SettingsWrong(f"{path}: [client] {mistake}.")
    return found


def client_table(home: Path) -> dict[str, Any]:
    """The table [client] of afya.toml, empty when there is none. Raises SettingsWrong where it is no table."""
    table = read_settings(home).get("client", {})
    if not isinstance(table, dict):
        raise SettingsWrong(f"{settings_file(home)}: client is no table; write its entries below a line [client].")
    return table


def niceness(home: Path) -> int:
    """Priority for training; the lowest where the settings are wrong, since the round is refused for that anyway."""
    try:
        return read_limits(home).nice
    except SettingsWrong:
        return 19


def _mistake(limits: Limits) -> str:
    """What is wrong with a value of the right type, or an empty string."""
    try:
        schedule.parse(limits.hours)
    except ValueError as error:
        return f"hours: {error}"
    try:
        re.compile(adapters.targets_pattern(limits.targets))
    except re.error as error:
        return f"targets: {limits.targets!r} is neither names such as decoder+projector nor an expression ({error})"
    bounds = (
        ("threads", limits.threads, 0, 1024),
        ("min_steps", limits.min_steps, 1, 1 << 30),
        ("min_examples", limits.min_examples, 1, 1 << 30),
        ("min_cases", limits.min_cases, 1, 1 << 30),
        ("max_batch", limits.max_batch, 1, 1 << 30),
        ("nice", limits.nice, 0, 19),
        ("max_minutes", limits.max_minutes, 0.01, 10_080),
        ("max_memory_mib", limits.max_memory_mib, 0, 1 << 30),
        ("dp_epsilon", limits.dp_epsilon, 0.01, 20),
        ("dp_delta", limits.dp_delta, 1e-12, 1e-3),
        ("dp_clip", limits.dp_clip, 1e-6, 1e3),
        ("dp_noise", limits.dp_noise, 0.3, 1e3),
    )
    wrong = [
        f"{name} is {value}, it goes from {low} to {high}"
        for name, value, low, high in bounds
        if not low <= value <= high
    ]
    return wrong[0] if wrong else ""


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
    if lacking := sorted(name for name, e in known.items() if e.default is MISSING and name not in config):
        raise Refused(f"the request lacks {lacking[0]!r}")
    values: dict[str, Any] = {}
    for name in config:
        entry = known[name]
        value, kind = config[name], _KINDS[str(entry.type)]
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise Refused(f"{name} is {str(value)[:60]!r}, expected a value of type {kind.__name__}")
        values[entry.name] = value
    return Request(**values)


def check_open(limits: Limits, now: datetime.datetime) -> float:
    """Seconds that training may take from `now` (local time) on. Raises Refused outside the clinic's hours."""
    left = schedule.seconds_left(limits.hours, now)
    if not left:
        raise Refused(f"this clinic trains at {limits.hours} only, and its clock shows {now:%H:%M}")
    return min(left, 60 * limits.max_minutes)


def check(
    request: Request, spec: adapters.AdapterSpec, limits: Limits, base_sha256: str, examples: int, cases: int
) -> None:
    """Raise Refused with the first reason why this clinic does not train what is asked."""
    if request.base_sha256 != base_sha256:
        raise Refused(f"the base model asked for is {request.base_sha256[:12]}, this clinic has {base_sha256[:12]}")
    if request.factor not in ("A", "B", "AB"):
        raise Refused(f"the factor asked for is {request.factor[:20]!r}, not A, B or AB")
    check_adapter(spec, limits)
    ranges = (
        ("local-steps", request.local_steps, limits.min_steps, limits.max_steps),
        ("lr", request.lr, limits.min_lr, limits.max_lr),
        ("lr-ratio", request.lr_ratio, 1.0, 1024.0),
        ("lr times lr-ratio", request.lr * request.lr_ratio, limits.min_lr, limits.max_lr),
        ("batch-size", request.batch_size, 1, limits.max_batch),
        ("server-round", request.server_round, 1, 1_000_000),
        ("seed", request.seed, 0, 2**31),
        ("proximal-mu", request.proximal_mu, 0.0, limits.max_mu),
    )
    _within(ranges)
    if examples < limits.min_examples:
        raise Refused(f"this clinic has {examples} consented samples and takes part from {limits.min_examples}")
    if cases < limits.min_cases:
        raise Refused(f"this clinic has samples of {cases} patients and takes part from {limits.min_cases}")


def _within(ranges: Iterable[tuple[str, float, float, float]]) -> None:
    """Raise Refused for the first (name, value, low, high) whose value lies outside."""
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise Refused(f"{name} is {value}, this clinic allows {low} to {high}")


def check_adapter(spec: adapters.AdapterSpec, limits: Limits) -> None:
    """Raise Refused unless the adapter's layers, rank and scale are ones this clinic allows."""
    _within((("rank", spec.rank, 1, limits.max_rank), ("alpha", spec.alpha, 1e-3, limits.max_alpha)))
    pattern = re.compile(adapters.targets_pattern(limits.targets))
    outside = [name for name in spec.target_modules if not pattern.fullmatch(name)]
    if outside:
        raise Refused(f"the layer {outside[0][:120]} is not among the targets this clinic allows")
