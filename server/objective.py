"""The training objective: loss only where labels are, optional label smoothing, teachers' soft answers, drop path.

Distillation: Hinton et al. 2015, arXiv:1503.02531. Drop path (stochastic depth): Huang et al. 2016, arXiv:1603.09382.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from model.packing import visible


class Objective(nn.Module):
    """Wraps the model so that one call gives the loss of a packed batch."""

    def __init__(self, model: Any, label_smoothing: float = 0.0, distill: float = 0.0, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.label_smoothing, self.distill, self.temperature = label_smoothing, distill, temperature

    def forward(self, batch: dict[str, torch.Tensor], soft: torch.Tensor | None = None) -> torch.Tensor:
        """Mean loss over labelled positions; `soft` are teachers' probabilities (labelled positions, vocabulary)."""
        logits, target = labelled_logits(self.model, batch)
        loss = nn.functional.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        if soft is None:
            return loss
        log_student = nn.functional.log_softmax(logits / self.temperature, dim=-1)
        divergence = nn.functional.kl_div(log_student, soft, reduction="batchmean") * self.temperature**2
        return (1 - self.distill) * loss + self.distill * divergence


def labelled_logits(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (labels, vocabulary) that predict each labelled token, and those tokens (labels).

    `batch` is of `Bank.batch` with pixel_values float32 (groups, 3, S, S): input_ids, segments and positions, int64
    (groups, length), each row a start mark, the picture's tokens and questions; targets and places, int64 (labels),
    the labelled tokens and where in the flattened rows they are predicted. Nothing here waits for the device.
    """
    features = model.model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
    features = torch.stack(list(features)) if isinstance(features, list | tuple) else features
    words = model.get_input_embeddings()(batch["input_ids"])
    picture = features.to(words.dtype).view(len(words), -1, words.shape[-1])
    after = 1 + picture.shape[1]
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([words[:, :1], picture, words[:, after:]], dim=1),
        attention_mask=visible(batch["segments"]),
        position_ids=batch["positions"],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch["places"]]).float(), batch["targets"]


@torch.no_grad()
def soft_answers(teachers: Sequence[Any], batch: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """Mean of the teachers' probabilities at the labelled positions."""
    total: Any = 0.0
    for teacher in teachers:
        total = total + (labelled_logits(teacher, batch)[0] / temperature).softmax(-1)
    return total / len(teachers)


@torch.no_grad()
def exact_answers(model: Any, batch: dict[str, torch.Tensor]) -> list[list[bool]]:
    """For each group and question: would greedy decoding give exactly the labelled tokens? (iff each is the argmax)."""
    logits, target = labelled_logits(model, batch)
    right = [[True] * int(line.max()) for line in batch["segments"]]
    length = batch["segments"].shape[1]
    for place in batch["places"][logits.argmax(-1) != target].tolist():
        line, column = divmod(place, length)
        right[line][int(batch["segments"][line, column + 1]) - 1] = False
    return right


def add_drop_path(model: Any, rate: float) -> None:
    """Skip each tower and decoder layer's change for a random share of the batch while training."""
    for layers in _stacks(model):
        for number, layer in enumerate(layers):
            layer.register_forward_hook(_dropper(rate * (number + 1) / len(layers)))


def compile_layers(model: Any) -> None:
    """Compile each layer's forward: equal layers share one compiled graph, so the start stays short."""
    torch._dynamo.config.recompile_limit = 64  # one per padded length and stack
    for layers in _stacks(model):
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)


def _stacks(model: Any) -> list[nn.ModuleList]:
    towers = [model.model.vision_tower, model.model.language_model]
    return [next(m for m in tower.modules() if isinstance(m, nn.ModuleList)) for tower in towers]


def _dropper(rate: float) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not module.training or rate <= 0:
            return None
        out = output[0] if isinstance(output, tuple) else output
        keep = (torch.rand(out.shape[0], 1, 1, device=out.device) >= rate).to(out.dtype) / (1 - rate)
        mixed = args[0] + (out - args[0]) * keep
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook
