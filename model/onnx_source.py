"""The weights of a model folder by name, one at a time, whatever edition of transformers wrote the names.

Names here: `text.` (the decoder), `lm_head.`, `projector.` and `tower.`, each followed by the layer's own name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from model.llava import ModelError

_RULES = (
    (re.compile(r"(?:model\.|language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"(?:language_model\.model|model\.language_model)\."), "text."),
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?"), "tower."),
    (re.compile(r"(?:model\.)?multi_modal_projector\."), "projector."),
)


class Unsupported(ModelError):
    """This model has no ONNX graph; the message says which part and what to use instead."""


class Source:
    """Weights of the safetensors files in a folder; each is read when it is asked for and not kept."""

    def __init__(self, folder: Path) -> None:
        """List the weights. Raises ModelError for a folder without or with damaged weights."""
        from safetensors import SafetensorError, safe_open

        self.folder, self._count = Path(folder), 0
        self._places: dict[str, tuple[Any, str]] = {}
        try:
            for path in sorted(self.folder.glob("*.safetensors")):
                opened = safe_open(path, framework="pt")
                self._places |= {plain(name): (opened, name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self.folder} holds damaged weights ({error}); copy the model folder again.") from error
        if not self._places:
            raise ModelError(f"{self.folder} holds no weights (*.safetensors); give the path of a model folder.")

    def has(self, name: str) -> bool:
        """Whether there is a weight of this name."""
        return name in self._places

    def torch(self, name: str) -> Any:
        """A weight as it lies in the file. Raises ModelError where it is missing."""
        if name not in self._places:
            raise ModelError(f"{self.folder} lacks the weight {name}; copy the whole model folder again.")
        opened, stored = self._places[name]
        found = opened.get_tensor(stored)
        self._count += found.numel()
        return found

    def numpy(self, name: str) -> np.ndarray:
        """A weight as float32."""
        return np.asarray(self.torch(name).float().numpy())

    def pair(self, layer: str) -> tuple[Any, Any]:
        """Weight and bias (None where there is none) of a linear layer."""
        bias = f"{layer}.bias"
        return self.torch(f"{layer}.weight"), self.torch(bias) if self.has(bias) else None

    def taken(self) -> int:
        """Parameters read since the last call, for a progress bar."""
        count, self._count = self._count, 0
        return count

    def parameters(self) -> int:
        """Number of parameters in the folder."""
        return sum(int(np.prod(opened.get_slice(name).get_shape())) for opened, name in self._places.values())


def plain(name: str) -> str:
    """Our name of a stored weight."""
    for rule, ours in _RULES:
        found = rule.match(name)
        if found:
            return ours + name[found.end() :]
    return name


def config(folder: Path) -> dict[str, Any]:
    """The whole configuration of a model folder, defaults filled in. Raises ModelError."""
    from model import llava

    llava.prepare_environment()
    from transformers import LlavaConfig

    try:
        found: dict[str, Any] = LlavaConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} cannot be read as a model: {str(error).splitlines()[0]}") from error
    return found


def end_ids(folder: Path, settings: dict[str, Any]) -> list[int]:
    """Ids that end an answer: those of generation_config.json, else the decoder's."""
    path = Path(folder) / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    found = settings["text_config"].get("eos_token_id") if found is None else found
    return sorted(found) if isinstance(found, list) else [] if found is None else [int(found)]


def inputs(folder: Path) -> tuple[Any, Callable[[np.ndarray], np.ndarray]]:
    """Tokenizer, and what makes pixel values (3, side, side) of a picture. Raises ModelError.

    Without PyTorch where the folder allows it: 280 MB and seconds less.
    """
    from model import llava, pixels

    llava.prepare_environment()
    prepared, tokenizer = pixels.load(folder), None
    try:
        if prepared is not None and (tokenizer := pixels.tokenizer(folder)) is not None:
            return tokenizer, prepared
        from transformers import AutoProcessor

        found = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} holds no usable tokenizer: {str(error).splitlines()[0]}") from error

    def prepare(image: np.ndarray) -> np.ndarray:
        return np.asarray(found.image_processor(images=[image], return_tensors="np")["pixel_values"][0], np.float32)

    return found.tokenizer, prepare
