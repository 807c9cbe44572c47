"""Names of weights: from the ways published LLaVA checkpoints spell them to the one transformers 5 uses in memory.

The originals keep the decoder under `model.`, the projector as `mm_projector` and the tower as
`vision_tower.vision_tower.vision_model`; transformers 4 and 5 have their own levels. LoRA folders put
`base_model.model.` before all of it. Pure text: no weights are read here.
"""

import re

EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
TOWER = "model.vision_tower."
_PROJECTOR = {"0": "linear_1", "2": "linear_2", "linear_1": "linear_1", "linear_2": "linear_2"}
_WRAPPER = re.compile(r"^(module\.|base_model\.model\.|base_model\.)+")
_TOWER_PREFIX = re.compile(r"^(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?")
_PROJECTOR_KEY = re.compile(r"^(?:model\.)?(?:mm_projector|multi_modal_projector)\.(\w+)\.(weight|bias)$")
_DECODER = re.compile(r"^(?:language_model\.model\.|model\.language_model\.|model\.)(?=(?:embed_tokens|layers|norm)\.)")
_LORA = re.compile(r"\.lora_([AB])(?:\.\w+)?\.weight$")
# Computed when a model is built, or never reached: no weight of what is written.
_COMPUTED = re.compile(r"(?:rotary_emb\.inv_freq|position_ids|image_newline)$")
_BESIDE_TOWER = re.compile(r"^(?:text_model\.|text_projection\.|visual_projection\.|logit_scale$|logit_bias$)")
_TOWER_PART = re.compile(r"^(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.")
_TOWER_LAYER = re.compile(r"^model\.vision_tower\.encoder\.layers\.(\d+)\.")


def bare(key: str) -> str:
    """A key without what training wrappers put before it (`module.`, `base_model.model.`)."""
    key = _WRAPPER.sub("", key)
    return re.sub(r"^(model\.)+(?=model\.)", "", key)


def canonical(key: str) -> str | None:
    """Name of the same weight in `LlavaForConditionalGeneration`; None for a key this table does not know."""
    key = bare(key)
    if _TOWER_PREFIX.match(key):
        part = _TOWER_PREFIX.sub("", key)
        return TOWER + part if _TOWER_PART.match(part) else None
    if found := _PROJECTOR_KEY.match(key):
        layer = _PROJECTOR.get(found[1])
        return f"model.multi_modal_projector.{layer}.{found[2]}" if layer else None
    if key in ("lm_head.weight", "language_model.lm_head.weight"):
        return HEAD
    return _DECODER.sub("model.language_model.", key) if _DECODER.match(key) else None


def canonical_tower(key: str) -> str | None:
    """The same for a key of a tower's own folder, whose vision part is `vision_model.` or has no prefix at all."""
    key = bare(key)
    if found := canonical(key):
        return found if found.startswith(TOWER) else None
    part = key.removeprefix("vision_model.")
    return TOWER + part if _TOWER_PART.match(part) else None


def is_dropped(key: str) -> bool:
    """Whether a checkpoint's key is known to be of no use here: tables that are computed again."""
    return bool(_COMPUTED.search(key))


def is_dropped_tower(key: str) -> bool:
    """Whether a key of a tower's folder belongs to its text half or pooling, which a LLaVA model never runs."""
    return is_dropped(key) or bool(_BESIDE_TOWER.match(bare(key)))


def is_beyond_tower(name: str, layers: int) -> bool:
    """Whether a canonical name is the tower's pooling head or one of its layers from `layers` on: not used by LLaVA."""
    layer = _TOWER_LAYER.match(name)
    return name.startswith(TOWER + "head.") or (layer is not None and int(layer[1]) >= layers)


def lora_part(key: str) -> tuple[str, str] | None:
    """(canonical name of the adapted weight, "A" or "B") of a LoRA factor's key; None for any other key."""
    if not (found := _LORA.search(key)):
        return None
    name = canonical(key[: found.start()] + ".weight")
    return (name, found[1]) if name else None


def on_disk(name: str) -> str:
    """How transformers 5 spells a canonical name in the file: decoder and head under `language_model.`."""
    if name == HEAD:
        return "language_model.lm_head.weight"
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.")
