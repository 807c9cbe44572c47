"""Loss of a batch of conversations: logits only where labels are, no waiting for the device.

The same mean cross-entropy over answer tokens that `LlavaForConditionalGeneration` gives with labels, without the
logits of picture, question and padding positions, which are most of them. Rows are padded on the right, so causal
attention alone keeps padding out of sight and no mask is needed.
"""

from typing import Any

import torch
from torch import nn


class StageObjective(nn.Module):
    """Wraps the model so that one call of the engine gives the loss of a batch of `server.stage_batches.tensors`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss (scalar, float32) over the labelled tokens."""
        core = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        words = core.get_input_embeddings()(batch["input_ids"])
        rows, length, width = words.shape
        picture = self._pictures(core, batch["pixel_values"]).to(words.dtype).reshape(-1, width)
        places = batch["picture_places"]
        if len(places):
            flat = words.reshape(-1, width).index_copy(0, places, picture[: len(places)])
        else:  # no row has a picture: the blank one only keeps all processes in step
            flat = words.reshape(-1, width) + 0 * picture.sum()
        hidden = core.model.language_model(
            inputs_embeds=flat.view(rows, length, width), attention_mask=None, use_cache=False
        ).last_hidden_state
        logits = core.lm_head(hidden.flatten(0, 1)[batch["places"]]).float()
        total = nn.functional.cross_entropy(logits, batch["targets"], reduction="sum")
        return total / max(1, len(batch["targets"]))  # a batch whose answers were all cut off teaches nothing

    def _pictures(self, core: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Projected features (pictures, tokens, width); frozen parts need no gradient, so they keep no activations."""
        dtype = core.get_input_embeddings().weight.dtype
        found = core.model.get_image_features(pixel_values=pixels.to(dtype), return_dict=True).pooler_output
        return torch.stack(list(found)) if isinstance(found, list | tuple) else found
