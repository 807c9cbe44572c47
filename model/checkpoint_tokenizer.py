"""The tokenizer and image processor of an imported model.

The tokenizer.json of the checkpoint is used as it is; if only `tokenizer.model` is there, it is converted. `<image>`
becomes one more special token. Whole prompts are put together from pieces in `model.prompts`, not here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.checkpoint_source import CheckpointError, read_json
from model.sentencepiece_file import TokenizerUnreadable, convert

IMAGE = "<image>"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def _text(value: Any) -> str | None:
    """A special token as text; files hold it as text or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _backend(folder: Path, settings: dict[str, Any]) -> Any:
    """The fast tokenizer of a folder, which has a tokenizer.json or a tokenizer.model."""
    from tokenizers import Tokenizer

    ready, raw = folder / "tokenizer.json", folder / "tokenizer.model"
    try:
        if ready.is_file():
            return Tokenizer.from_file(str(ready))
        bos, eos = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
        backend = Tokenizer.from_str(json.dumps(convert(raw, add_bos=bool(bos), add_eos=bool(eos))))
    except TokenizerUnreadable as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise CheckpointError(f"The tokenizer in {folder} cannot be read; copy it again ({error}).") from error
    for number, token in _added(folder, settings):
        if number != backend.get_vocab_size() and token.content not in backend.get_vocab():
            raise CheckpointError(f"{folder} adds {token.content} as token {number}, but {number - 1} is missing.")
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend


def _added(folder: Path, settings: dict[str, Any]) -> list[tuple[int, Any]]:
    """Tokens that a slow tokenizer keeps beside its model file, as (id, token) in the order of their ids."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    found = {
        int(number): AddedToken(str(row["content"]), **{name: bool(row.get(name)) for name in flags})
        for number, row in settings.get("added_tokens_decoder", {}).items()
    }
    for text, number in read_json(folder / "added_tokens.json").items():
        found.setdefault(int(number), AddedToken(text, normalized=False))
    return sorted(found.items())


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer this module reads."""
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()


def tokenizer(folders: Sequence[Path], rows: int) -> tuple[Any, int]:
    """(tokenizer with `<image>`, id of `<image>`) from the first folder that has one.

    `rows` is the number of rows of the checkpoint's embedding: `<image>` gets the id after them unless the tokenizer
    has it already. Raises CheckpointError.
    """
    from transformers import PreTrainedTokenizerFast

    folder = next((place for place in folders if has_tokenizer(place)), None)
    if folder is None:
        where = " and ".join(str(place) for place in folders)
        raise CheckpointError(f"{where} holds neither tokenizer.json nor tokenizer.model; copy one of them there.")
    settings = read_json(folder / "tokenizer_config.json")
    special = read_json(folder / "special_tokens_map.json") | settings
    backend = _backend(folder, settings)
    known = backend.get_vocab_size()
    number = backend.token_to_id(IMAGE)
    if number is None:
        number = known
        backend.add_special_tokens([IMAGE])
    if known > rows and number >= rows:
        raise CheckpointError(f"The tokenizer in {folder} has {known} tokens, the weights {rows}: not of one model.")
    roles = {
        name: text for name in _ROLES if (text := _text(special.get(name))) and backend.token_to_id(text) is not None
    }
    roles.setdefault("pad_token", roles.get("unk_token") or roles.get("eos_token", ""))
    if "eos_token" not in roles:
        raise CheckpointError(f"{folder}/tokenizer_config.json names no eos_token of this tokenizer; complete it.")
    options = {name: settings[name] for name in ("legacy", "model_max_length", "chat_template") if name in settings}
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **roles, **options
    )
    return found, int(number)


def image_processor(kind: str, size: int, aspect: str | None, settings: dict[str, Any]) -> Any:
    """The image processor of a tower: square of `size` pixels, padded first in the mean colour where `aspect` is "pad".

    `kind` is "siglip" or "clip"; `settings` is the content of the tower's preprocessor_config.json, or {}.
    """
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    if aspect not in ("pad", "square", None):
        raise CheckpointError(f"Pictures cut into tiles (image_aspect_ratio {aspect}) are not in this version.")
    options: dict[str, Any] = {"do_pad": aspect == "pad", "resample": 3, "do_convert_rgb": True}
    options |= {name: settings[name] for name in ("image_mean", "image_std") if name in settings}
    if kind == "siglip":
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        side = {"height": size, "width": size}
        return LlavaImageProcessorPil(**(half | options | {"size": side, "do_center_crop": False}))
    crop = {"height": size, "width": size}
    return LlavaImageProcessorPil(**(options | {"size": {"shortest_edge": size}, "crop_size": crop}))


def saved_processor(folder: Path, config: Any) -> Any:
    """The processor that a converted folder brings along, completed from its LlavaConfig. Raises CheckpointError."""
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder} holds no readable processor; copy all of its files ({first}).") from error
    if found.patch_size is None:
        found.patch_size = config.vision_config.patch_size
        found.num_additional_image_tokens = 0 if "siglip" in config.vision_config.model_type else 1
    found.vision_feature_select_strategy = config.vision_feature_select_strategy
    found.tokenizer.padding_side = "left"
    return found


def processor(pictures: Any, text: Any, config: Any) -> Any:
    """The LlavaProcessor of a LlavaConfig: one image becomes as many tokens as the tower's patches that are used."""
    from transformers import LlavaProcessor

    tower = config.vision_config
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=text,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if "siglip" in tower.model_type else 1,
        image_token=IMAGE,
    )
