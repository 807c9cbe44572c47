"""Training recipes: one TOML file says model sizes, data, optimisation, augmentation and DeepSpeed; `--set` overrides.

Every wrong key or value is collected and reported at once.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from model.build import ModelConfig
from server.augment import AugmentConfig


class RecipeError(ValueError):
    """The recipe cannot be used; the message lists every fault."""


@dataclass(frozen=True)
class Source:
    """A dataset file below the data folder; `images` is a folder there; `repeat` counts it several times an epoch."""

    file: str
    images: str
    repeat: int = 1
    optional: bool = False
    mirror: bool = False  # adds every row once more, mirrored, with left and right exchanged in the words


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and what must never be: images named in `exclude_images_of` are dropped from every source."""

    sources: tuple[Source, ...] = ()
    exclude_images_of: tuple[str, ...] = ()
    validate: str = ""
    validate_images: str = ""
    phantom_images: int = 0  # synthetic radiographs added to each epoch's data
    phantom_seed: int = 1
    phantom_parts: int = 1  # an epoch sees one of so many parts of them, in turn
    pseudo_rows: int = 0  # questions of other pictures of its kind that the teachers answer about each picture
    hold_out: float = 0.0  # share of the images of each source that is kept out, for a base that has not seen them
    hold_out_seed: int = 7


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and cosine decay.

    `batch` counts pictures over all processes, `pack` the questions asked at once about each, at most.
    """

    epochs: int = 60
    batch: int = 32
    pack: int = 8
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    beta2: float = 0.98
    ema: float = 0.999
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    seed: int = 1
    checkpoint_epochs: int = 10
    validate_epochs: int = 0
    distill: float = 0.0  # weight of the teachers' soft answers
    temperature: float = 1.0


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed: ZeRO stage and precision ("fp32" or "bf16", the latter as autocast over fp32 weights)."""

    zero_stage: int = 1
    precision: str = "bf16"
    save_dtype: str = "float32"  # of the shipped weights: float32, float16 or bfloat16
    compile: bool = False  # torch.compile for tower and decoder: about a minute at the start, faster steps on a GPU
    length_multiple: int = 1  # token rows are padded to a multiple of this, so that compiled shapes repeat


@dataclass(frozen=True)
class Recipe:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for the configuration saved beside the weights."""
        return asdict(self)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "augment": AugmentConfig,
    "engine": EngineConfig,
}


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides (TOML values). Raises `RecipeError`."""
    return from_dict(read(path, overrides), str(path))


def has_stage(path: Path) -> bool:
    """Whether a recipe is one of the stages of a published model (it has a [stage]). Raises `RecipeError`."""
    return "stage" in read(path)


def read(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The tables of a recipe file with `section.key=value` overrides applied. Raises `RecipeError`."""
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"Recipe {path} cannot be read ({error.strerror}); see server/recipes.") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"Recipe {path} is not valid TOML: {error}.") from error
    for item in overrides:
        _override(raw, item)
    return raw


def _override(raw: dict[str, Any], item: str) -> None:
    name, _, value = item.partition("=")
    section, _, key = name.partition(".")
    if not key or not value:
        raise RecipeError(f"--set {item} is not of the form section.key=value, for example optim.epochs=10.")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    raw.setdefault(section, {})[key] = parsed


def parts(raw: dict[str, Any], sections: dict[str, type]) -> tuple[dict[str, Any], list[str]]:
    """A dataclass for each section, and what is wrong with the names of sections and keys."""
    faults = [f"unknown section [{name}]" for name in raw if name not in sections]
    made: dict[str, Any] = {}
    for name, kind in sections.items():
        values = dict(raw.get(name, {}))
        known = {item.name: item for item in fields(kind)}
        faults += [f"unknown key {name}.{key}" for key in values if key not in known]
        if name == "data" and "sources" in values:
            values["sources"] = tuple(s if isinstance(s, Source) else Source(**s) for s in values["sources"])
        made[name] = kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in known})
    return made, faults


def from_dict(raw: dict[str, Any], where: str) -> Recipe:
    """Build a recipe from plain tables, collecting all faults. Raises `RecipeError`."""
    made, faults = parts(raw, SECTIONS)
    recipe = Recipe(**made)
    faults += _check(recipe)
    if faults:
        raise RecipeError(f"{where}: " + "; ".join(faults) + ".")
    return recipe


def _check(recipe: Recipe) -> list[str]:
    faults = []
    if recipe.model.image_size % recipe.model.patch_size:
        faults.append("model.image_size must be a multiple of model.patch_size")
    if recipe.engine.precision not in ("fp32", "bf16"):
        faults.append("engine.precision must be fp32 or bf16")
    if recipe.engine.save_dtype not in ("float32", "float16", "bfloat16"):
        faults.append("engine.save_dtype must be float32, float16 or bfloat16")
    if recipe.engine.zero_stage not in (0, 1, 2):
        faults.append(
            "engine.zero_stage must be 0, 1 or 2 here (the weight average needs whole weights on each process)"
        )
    if recipe.optim.epochs < 1 or recipe.optim.batch < 1 or recipe.optim.lr <= 0:
        faults.append("optim.epochs, optim.batch and optim.lr must be positive")
    if not recipe.data.sources and not recipe.data.phantom_images:
        faults.append("data.sources is empty and data.phantom_images is 0: nothing to train on")
    return faults
