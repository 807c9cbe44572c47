"""The base models Afya knows: the reference model that comes with it, and the published ones it is made for.

Only facts: no weights are fetched here or anywhere else. Does not cover importing a published checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


class PresetMissing(RuntimeError):
    """A model that should be on this machine is not; the message says what to do."""


@dataclass(frozen=True)
class Preset:
    """What is known about a base model before its weights are read.

    `image_size` is the side of the square image in pixels, `image_tokens` how many tokens one picture becomes,
    `template` the name of its conversation template, `supported` whether this version can load it.
    """

    name: str
    about: str
    image_size: int | None
    image_tokens: int | None
    template: str
    supported: bool


PRESETS: tuple[Preset, ...] = (
    Preset("reference", "trained here on open data, comes with Afya; not for clinical use", None, None, "afya", True),
    Preset("reference-half", "the same from half of the images, for experiments on the rest", None, None, "afya", True),
    Preset("tinyllava-1.5b", "TinyLLaVA 1.5B: TinyLlama, SigLIP-so400m tower", 384, 729, "v1", False),
    Preset("tinyllava-med-f", "TinyLLaVA-Med-F: TinyLLaVA 1.5B tuned on biomedical data", 384, 729, "v1", False),
    Preset("llava-med-v1.5", "LLaVA-Med v1.5: Mistral 7B, CLIP ViT-L tower", 336, 576, "mistral_instruct", False),
)


def reference_path(name: str = "reference") -> Path:
    """Folder of a model that comes with Afya. Raises PresetMissing with one plain sentence when it is not there."""
    folder = _HERE / name.replace("-", "_")
    if not (folder / "config.json").is_file():
        raise PresetMissing(f"The {name} model is not in {folder}; clone the repository again or pass --model FOLDER.")
    return folder
