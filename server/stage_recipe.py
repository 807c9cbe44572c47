"""Recipes of the three stages (alignment, instruction, downstream): names, defaults and what may stand in them.

A recipe with a section [stage] trains an existing model on LLaVA conversations (`server.stage`); one without it makes
the reference model (`server.recipe`). Every fault is told at once.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from server.recipe import RecipeError, parts, read

TRAINABLE = ("projector", "llm+projector", "all", "lora")
AUTO = "auto"


@dataclass(frozen=True)
class StageConfig:
    """What a stage is called and what it trains; LoRA goes on every linear layer of the decoder."""

    name: str = "stage"
    trainable: str = "llm+projector"
    max_length: int = 2048  # tokens of a row, picture included; what is longer is cut at its end
    lora_rank: int = 64
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and cosine decay; a step sees batch x accumulation x processes rows."""

    epochs: int = 1
    batch: int = 32
    accumulation: int = 2
    lr: float = 2e-5
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: float = 0.03
    clip: float = 1.0
    seed: int = 42


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed and memory; "auto" takes the fastest setting that the memory estimate allows."""

    precision: str = "bf16"  # or fp32
    zero_stage: int | str = AUTO
    recompute: bool | str = AUTO  # compute activations twice instead of keeping them
    offload: bool = False  # optimizer states (and with ZeRO-3 the weights) in the computer's memory
    compile: bool = True  # torch.compile for each layer; on a GPU and below ZeRO-3 only
    length_multiple: int = 64  # token rows are padded to a multiple of this, so that compiled shapes repeat
    workers: int = 8  # processes that read pictures, for each training process


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `steps` optimizer steps; the last `keep` stay."""

    steps: int = 200
    keep: int = 2


@dataclass(frozen=True)
class WatchConfig:
    """Every `after` steps the mean loss of the last `window` must lie `fall` (relative) under the first; 0: never."""

    after: int = 200
    window: int = 50
    fall: float = 0.01


@dataclass(frozen=True)
class LogConfig:
    """Where the loss goes besides log.jsonl and loss.png."""

    tensorboard: bool = True
    wandb: bool = False
    project: str = "afya"


@dataclass(frozen=True)
class PreflightConfig:
    """Checks before anything is loaded; each can be overruled, since an estimate can be wrong."""

    images: bool = True
    disk: bool = True
    memory: bool = True


@dataclass(frozen=True)
class StageRecipe:
    """A whole recipe of a stage."""

    stage: StageConfig = field(default_factory=StageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    log: LogConfig = field(default_factory=LogConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for the configuration saved beside the weights."""
        return asdict(self)


SECTIONS: dict[str, type] = {
    "stage": StageConfig,
    "optim": OptimConfig,
    "engine": EngineConfig,
    "checkpoint": CheckpointConfig,
    "watch": WatchConfig,
    "log": LogConfig,
    "preflight": PreflightConfig,
}
_LEAST = {"optim.epochs": 1, "optim.batch": 1, "optim.accumulation": 1, "checkpoint.steps": 1, "checkpoint.keep": 1}
_LEAST |= {"stage.max_length": 16, "stage.lora_rank": 1, "engine.length_multiple": 1, "engine.workers": 0}
_LEAST |= {"watch.after": 0, "watch.window": 1}


def load(path: Path, overrides: Iterable[str] = ()) -> StageRecipe:
    """Read a stage's recipe and apply `section.key=value` overrides. Raises `RecipeError` with every fault."""
    return from_dict(read(path, overrides), str(path))


def from_dict(raw: dict[str, Any], where: str) -> StageRecipe:
    """Build a stage's recipe from plain tables, collecting all faults. Raises `RecipeError`."""
    made, faults = parts(raw, SECTIONS)
    faults += [fault for name, part in made.items() for fault in _wrong_types(name, part)]
    recipe = StageRecipe(**made)
    if not faults:
        faults = _check(recipe)
    if faults:
        raise RecipeError(f"{where}: " + "; ".join(faults) + ".")
    return recipe


def _wrong_types(section: str, part: Any) -> list[str]:
    faults = []
    for item in fields(part):
        value, like = getattr(part, item.name), item.default
        if f"{section}.{item.name}" in ("engine.zero_stage", "engine.recompute"):
            continue
        whole_for_real = isinstance(like, float) and type(value) is int
        if type(value) is not type(like) and not whole_for_real:
            faults.append(f"{section}.{item.name} must be of type {type(like).__name__}, not {value!r}")
    return faults


def _check(recipe: StageRecipe) -> list[str]:
    faults = []
    engine = recipe.engine
    for name, least in _LEAST.items():
        section, key = name.split(".")
        if getattr(getattr(recipe, section), key) < least:
            faults.append(f"{name} must be at least {least}")
    if recipe.stage.trainable not in TRAINABLE:
        faults.append(f"stage.trainable must be one of {', '.join(TRAINABLE)}")
    if engine.precision not in ("fp32", "bf16"):
        faults.append("engine.precision must be fp32 or bf16")
    if engine.zero_stage != AUTO and (type(engine.zero_stage) is not int or engine.zero_stage not in range(4)):
        faults.append('engine.zero_stage must be 0, 1, 2, 3 or "auto"')
    if engine.recompute != AUTO and not isinstance(engine.recompute, bool):
        faults.append('engine.recompute must be true, false or "auto"')
    if engine.offload and engine.zero_stage == 0:
        faults.append("engine.offload needs engine.zero_stage 1, 2 or 3")
    if recipe.optim.lr <= 0:
        faults.append("optim.lr must be positive")
    return faults
