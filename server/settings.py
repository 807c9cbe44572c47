"""The settings of a federated run: one table of names, defaults and meanings, read from Flower's run configuration.

Every fault is collected and told at once. Not here: what a clinic allows; each clinic checks that by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from server.aggregate import MODES


class SettingsRejected(ValueError):
    """The run configuration cannot be used; the message lists every fault."""


def _setting(
    default: Any, meaning: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    return field(default=default, metadata={"help": meaning, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """What `afya-server rounds` may be told; in Flower's run configuration the names have hyphens."""

    num_server_rounds: int = _setting(6, "rounds in all; a resumed run goes on to this number", 1, 10_000)
    targets: str = _setting("decoder", "layers with an adapter: decoder, projector, tower joined by +, or a regex")
    rank: int = _setting(8, "rank of the adapter", 1, 256)
    alpha: float = _setting(16.0, "scale of the adapter (lora_alpha)", 0.01, 4096)
    local_steps: int = _setting(40, "optimizer steps a clinic takes in a round", 1, 100_000)
    lr: float = _setting(2e-3, "learning rate of the factors A", 1e-7, 1.0)
    lr_ratio: float = _setting(1.0, "times that rate for the factors B (LoRA+); clinics bound the product", 1, 1024)
    lr_final: float = _setting(
        1.0, "share of the rate left in round num-server-rounds, on a cosine; more rounds later raise it again", 0.01, 1
    )
    batch_size: int = _setting(16, "samples in a step", 1, 4096)
    proximal_mu: float = _setting(0.0, "pull towards the round's start at the clinics (FedProx); 0: none", 0, 10)
    aggregation: str = _setting(
        "alternating", "alternating, ffa, product-svd or factor-average (README: aggregation)", choices=MODES
    )
    trim: int = _setting(0, "clinics cut at each end of every value, against poison; n needs 2n+1 replies", 0, 1000)
    set_aside: int = _setting(
        0, "updates always left out, the furthest from the others' (Multi-Krum); n needs 2n+3 replies", 0, 1000
    )
    min_clinics: int = _setting(2, "accepted replies below which a round changes nothing", 1, 10_000)
    round_deadline: float = _setting(3600.0, "seconds after which a round goes on without the missing", 1, 604_800)
    wait_hours: float = _setting(
        72.0, "hours a round waits for min-clinics to be there, before it counts as one that changed nothing", 0, 8760
    )
    release_every: int = _setting(0, "release to the clinics every n rounds; 0: at the end only", 0, 10_000)
    max_update_norm: float = _setting(0.0, "cap on the norm of an update; 0: rate x steps x sqrt(values)", 0, 1e9)
    gate: str = _setting(
        "auto",
        "examine a candidate before its release; auto: judge by what was examined, require: refuse without, off",
        choices=("auto", "require", "off"),
    )
    gate_points: float = _setting(2.0, "points that right or picture-dependent answers may fall", 0, 100)
    gate_reliance: str = _setting(
        "right", "which picture-dependent answers must not fall: right ones, or all", choices=("right", "all")
    )
    gate_ece: float = _setting(0.02, "how much the calibration error may rise", 0, 1)
    gate_rows: int = _setting(200, "examined rows from which a margin counts even where it may be chance", 1, 1_000_000)
    gate_seconds: float = _setting(900.0, "seconds the clinics have for examining a candidate", 1, 604_800)
    gate_data: str = _setting("", "the server's own held-out data: a dataset file or folder; empty: none")
    gate_images: str = _setting("", "folder of the pictures of gate-data; empty: beside it")
    gate_bits: int = _setting(4, "precision of the server's examination: that of the kiosks", 4, 32)
    rollback: int = _setting(0, "no rounds: release this round's adapter again; -1: the release before", -1, 10_000)
    signing_key: str = _setting("", "file of the key that signs passports; empty: nobody signs")
    seed: int = _setting(0, "seed of the first factors and of the clinics' sample order", 0, 2**31)
    checkpoint_dir: str = _setting("", "folder of the rounds, on this server")
    base_model: str = _setting("", "folder of the base model; empty: the reference model")
    base_sha256: str = _setting("", "hash the base model must have; empty: whatever base-model has")

    @property
    def quorum(self) -> int:
        """Fewest replies with which a round changes something: `min_clinics`, and enough to trim and set aside."""
        enough = 2 * self.set_aside + 3 if self.set_aside else 0
        return max(self.min_clinics, self.set_aside + 2 * self.trim + 1, enough)

    @property
    def base(self) -> Path:
        """Folder of the base model. Raises model.presets.PresetMissing when it is the reference and absent."""
        from model.presets import reference_path

        return Path(self.base_model).expanduser() if self.base_model else reference_path()


def names() -> dict[str, tuple[Any, str]]:
    """Name with hyphens -> (default, meaning) of every setting, in order."""
    return {f.name.replace("_", "-"): (f.default, f.metadata["help"]) for f in fields(Settings)}


def read(config: Mapping[str, Any]) -> Settings:
    """Settings from a run configuration; unknown keys are faults. Raises SettingsRejected with every fault at once."""
    known = {f.name.replace("_", "-"): f for f in fields(Settings)}
    faults = [f"{name} is not a setting" for name in sorted(set(config) - set(known))]
    values: dict[str, Any] = {}
    for name in set(config) & set(known):
        entry, value = known[name], config[name]
        kind = type(entry.default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            faults.append(f"{name} = {value!r} is not of type {kind.__name__}")
            continue
        low, high, choices = (entry.metadata[key] for key in ("low", "high", "choices"))
        if choices and value not in choices:
            faults.append(f"{name} = {value!r} is none of {', '.join(choices)}")
        if low is not None and not low <= value <= high:
            faults.append(f"{name} = {value} is not between {low} and {high}")
        values[entry.name] = value
    if values.get("trim") and values.get("aggregation") == "product-svd":
        faults.append("trim does not go with product-svd; set trim = 0 or another aggregation")
    if not config.get("checkpoint-dir"):
        faults.append("checkpoint-dir is empty; give the folder for the rounds")
    if faults:
        raise SettingsRejected("The run configuration cannot be used: " + "; ".join(sorted(faults)) + ".")
    return Settings(**values)
