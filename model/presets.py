"""The base models Afya knows: the reference model that comes with it, and the published ones it is made for.

Only facts: no weights are read or fetched here (`model.fetch` does that, `model.checkpoints` imports them). A revision
that has not been verified is None: it must then be given when the model is fetched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import sizes

_HERE = Path(__file__).parent


class PresetMissing(RuntimeError):
    """A model that should be on this machine is not; the message says what to do."""


@dataclass(frozen=True)
class Preset:
    """What is known about a base model before its weights are read.

    `image_size` is the side of the square image in pixels, `image_tokens` how many tokens one picture becomes,
    `template` the name of its conversation template, `supported` whether this version can load it. `source` is its
    name on the Hugging Face hub, `revision` the commit there (None: not pinned yet), `licence` the weights' (None: see
    the model card), `tower` the hub name of its vision tower, `decoder` the fields of its decoder's configuration.
    """

    name: str
    about: str
    image_size: int | None
    image_tokens: int | None
    template: str
    supported: bool
    source: str | None = None
    revision: str | None = None
    licence: str | None = None
    tower: str | None = None
    decoder: dict[str, Any] | None = None


_SIGLIP, _CLIP = "google/siglip-so400m-patch14-384", "openai/clip-vit-large-patch14-336"
_SIGLIP_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,  # as published; LLaVA runs the first 26
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
_CLIP_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
# Configurations of the towers that the known checkpoints name, by hub name.
TOWERS: dict[str, dict[str, Any]] = {
    _SIGLIP: _SIGLIP_CONFIG,
    "bczhou/TinyLLaVA-1.5B-SigLIP": _SIGLIP_CONFIG,
    _CLIP: _CLIP_CONFIG,
}
_TINYLLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
_MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}

PRESETS: tuple[Preset, ...] = (
    Preset(
        "reference",
        "trained here on open data, comes with Afya; not for clinical use",
        None,
        None,
        "afya",
        True,
        licence="Apache-2.0",
    ),
    Preset(
        "reference-few",
        "one that saw a tenth of the images, for experiments on the rest",
        None,
        None,
        "afya",
        True,
        licence="Apache-2.0",
    ),
    Preset(
        "tinyllava-1.5b",
        "TinyLLaVA 1.5B: TinyLlama, SigLIP-so400m tower",
        384,
        729,
        "v1",
        True,
        source="bczhou/TinyLLaVA-1.5B",
        tower="bczhou/TinyLLaVA-1.5B-SigLIP",
        decoder=_TINYLLAMA,
    ),
    Preset(
        "tinyllava-med-f",
        "TinyLLaVA-Med-F: TinyLLaVA 1.5B tuned on biomedical data",
        384,
        729,
        "v1",
        True,
        tower="bczhou/TinyLLaVA-1.5B-SigLIP",
        decoder=_TINYLLAMA,
    ),
    Preset(
        "llava-med-v1.5-7b",
        "LLaVA-Med v1.5: Mistral 7B, CLIP ViT-L tower",
        336,
        576,
        "mistral_instruct",
        True,
        source="microsoft/llava-med-v1.5-mistral-7b",
        licence="that of Mistral-7B-Instruct-v0.2; for research, not for clinical use",
        tower=_CLIP,
        decoder=_MISTRAL,
    ),
    Preset(
        "tiny-llava-v1-hf",
        "tiny-llava v1: TinyLlama, CLIP ViT-L tower, already converted",
        336,
        576,
        "v1",
        True,
        source="bczhou/tiny-llava-v1-hf",
        tower=_CLIP,
        decoder=_TINYLLAMA,
    ),
)


def preset(name: str) -> Preset:
    """The preset of a name. Raises PresetMissing naming those there are."""
    for found in PRESETS:
        if found.name == name:
            return found
    raise PresetMissing(f"No model is called {name}; known are {', '.join(p.name for p in PRESETS)}.")


def reference_path(name: str = "reference") -> Path:
    """Folder of a model that comes with Afya. Raises PresetMissing with one plain sentence when it is not there."""
    folder = _HERE / name.replace("-", "_")
    if not (folder / "config.json").is_file():
        raise PresetMissing(f"The {name} model is not in {folder}; clone the repository again or pass --model FOLDER.")
    return folder


def is_here(known: Preset) -> bool:
    """Whether a model that comes with Afya is in this copy of it; False for the published ones."""
    return known.source is None and (_HERE / known.name.replace("-", "_") / "config.json").is_file()


def architecture(known: Preset) -> dict[str, Any] | None:
    """The parts of a preset's configuration that its size follows from, without the `<image>` row of an import.

    Of a model that comes with Afya, its config.json; None where that is not here.
    """
    if known.decoder is None or known.tower is None:
        path = _HERE / known.name.replace("-", "_") / "config.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    tower = dict(TOWERS[known.tower])
    if tower["model_type"].startswith("siglip"):
        tower["num_hidden_layers"] -= 1
    return {"text_config": known.decoder, "vision_config": tower, "tie_word_embeddings": False}


def size_facts(known: Preset) -> dict[str, int | None]:
    """{"parameters", "bytes_16", "bytes_8", "bytes_4"} of a preset, calculated; None where its files are not here."""
    config = architecture(known)
    names = {f"bytes_{bits}": bits for bits in (16, 8, 4)}
    if config is None:
        return {"parameters": None, **dict.fromkeys(names)}
    return {"parameters": sizes.parameters(config), **{n: sizes.static_bytes(config, b) for n, b in names.items()}}
