"""Configuration of an imported model: the original's fields in the form transformers' Llava takes.

Original (`tiny_llava`, `tinyllava`, `llava_mistral`, `llava`, `llava_llama`): one flat table for decoder and picture
side. SigLIP towers lose their last layer and their pooling head and give all patches of the last state; CLIP towers
keep their layers and give the patches of `mm_vision_select_layer`, without the class token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import checkpoint_keys as keys
from model.checkpoint_source import CheckpointError, read_json

LLAMA_TYPES = ("tiny_llava", "tinyllava", "llava", "llava_llama", "llama")
MISTRAL_TYPES = ("llava_mistral", "mistral")
_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
)
_LLAMA, _MISTRAL = ("attention_bias", "mlp_bias"), ("sliding_window",)
_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)


@dataclass(frozen=True)
class Tower:
    """A vision tower: "siglip" or "clip", its own configuration, the folder of its files if it is here, its name."""

    kind: str
    config: dict[str, Any]
    folder: Path | None
    name: str


def is_converted(config: dict[str, Any]) -> bool:
    """Whether a config.json is of transformers' own Llava, not of the original code."""
    return config.get("model_type") == "llava" and isinstance(config.get("text_config"), dict)


def tower_of(config: dict[str, Any], folder: Path | None, name: str) -> Tower:
    """The tower described by a config.json (of a tower, or of a pair of text and vision). Raises CheckpointError."""
    inner = config.get("vision_config", config)
    outer, kind = str(config.get("model_type", "")), str(inner.get("model_type", ""))
    for wanted in ("siglip", "clip"):
        if kind.removesuffix("_vision_model") == wanted or (not kind and outer == wanted):
            return Tower(wanted, dict(inner), folder, name)
    raise CheckpointError(f"{name} is a tower of type {kind or outer or 'unknown'}; SigLIP and CLIP towers are read.")


def text_config(source: dict[str, Any], rows: int, pad: int | None) -> Any:
    """LlamaConfig or MistralConfig with `rows` entries in the vocabulary. Raises CheckpointError for another family."""
    from transformers import LlamaConfig, MistralConfig

    kind = str(source.get("model_type"))
    if kind not in LLAMA_TYPES + MISTRAL_TYPES:
        raise CheckpointError(
            f"The checkpoint is of type {kind}; tiny_llava, tinyllava, llava_mistral and llava are read."
        )
    mistral = kind in MISTRAL_TYPES
    names = [*_SHARED, *(_MISTRAL if mistral else _LLAMA)]
    options = {name: source[name] for name in names if source.get(name) is not None}
    if mistral:
        options.setdefault("sliding_window", None)  # absent means the library's own default, which is 4096
    scaling = {("rope_type" if k == "type" else k): v for k, v in (source.get("rope_scaling") or {}).items()}
    theta = float(source.get("rope_theta") or 10000.0)
    return (MistralConfig if mistral else LlamaConfig)(
        vocab_size=rows,
        bos_token_id=source.get("bos_token_id", 1),
        eos_token_id=source.get("eos_token_id", 2),
        pad_token_id=pad,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": theta} | scaling,
        **options,
    )


def vision_config(tower: Tower) -> Any:
    """SiglipVisionConfig (one layer fewer than published, no pooling head) or CLIPVisionConfig of the whole tower."""
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    options = {name: tower.config[name] for name in _VISION if tower.config.get(name) is not None}
    if tower.kind == "clip":
        return CLIPVisionConfig(**options)
    layers = options.pop("num_hidden_layers", SiglipVisionConfig().num_hidden_layers)
    return SiglipVisionConfig(num_hidden_layers=layers - 1, vision_use_head=False, **options)


def llava_config(source: dict[str, Any], tower: Tower, rows: int, image_id: int, pad: int | None) -> Any:
    """The LlavaConfig of an original's flat configuration and its tower. Raises CheckpointError."""
    from transformers import LlavaConfig

    projector = source.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise CheckpointError(f"The projector is of type {projector}; only mlp2x_gelu is read.")
    if source.get("mm_use_im_start_end"):
        raise CheckpointError("The checkpoint puts its own marks around pictures (mm_use_im_start_end); not read here.")
    vision = vision_config(tower)
    layer, strategy = -1, "full"
    if tower.kind == "clip":
        layer = int(source.get("mm_vision_select_layer", -2))
        strategy = "full" if source.get("mm_vision_select_feature") == "cls_patch" else "default"
    patches = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        vision_config=vision,
        text_config=text_config(source, rows, pad),
        image_token_index=image_id,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
        image_seq_length=patches + (tower.kind == "clip" and strategy == "full"),
        tie_word_embeddings=False,
    )


def converted_config(folder: Path) -> Any:
    """The LlavaConfig of a folder that is in transformers' form already. Raises CheckpointError."""
    from transformers import LlavaConfig

    try:
        return LlavaConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be read ({error}); copy it again.") from error


def patches(config: Any) -> int:
    """Tokens that one picture takes: patches of the tower, less or with the class token as the strategy says."""
    tower = config.vision_config
    own = 0 if "siglip" in tower.model_type else 1
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return int((tower.image_size // tower.patch_size) ** 2 + own - dropped)


def expected(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name in memory, shape) of every weight the model of a LlavaConfig has; a tied head is left out."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(config)
    for name, value in empty.named_parameters():
        if name != keys.HEAD or not config.tie_word_embeddings:
            yield name, tuple(value.shape)


def save(folder: Path, config: Any, generation: dict[str, Any], dtype: Any) -> None:
    """Write config.json and generation_config.json into `folder`."""
    from transformers import GenerationConfig

    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig(**generation).save_pretrained(folder)


def generation(folder: Path, config: dict[str, Any], pad: int | None, image_id: int) -> dict[str, Any]:
    """Ids that begin, end and fill answers as the original has them; `<image>` is never generated."""
    own = read_json(folder / "generation_config.json")
    ids = {name: own.get(name, config.get(name)) for name in ("bos_token_id", "eos_token_id")}
    ids = {"bos_token_id": 1, "eos_token_id": 2} | {name: value for name, value in ids.items() if value is not None}
    return ids | {"pad_token_id": pad, "suppress_tokens": [image_id]}
