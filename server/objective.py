"""The training objective: loss only where labels are, optional label smoothing, teachers' soft answers, drop path.

Distillation: Hinton et al. 2015, arXiv:1503.02531. Drop path (stochastic depth): Huang et al. 2016, arXiv:1603.09382.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from model.prompts import IGNORE


class Objective(nn.Module):
    """Wraps the model so that one call gives the loss of a batch and the count of fully right answers."""

    def __init__(self, model: Any, label_smoothing: float = 0.0, distill: float = 0.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing, self.distill, self.temperature = label_smoothing, distill, temperature

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, pixel_values: torch.Tensor, soft: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean loss over labelled positions; `soft` are teachers' probabilities (labelled positions, vocabulary)."""
        logits, target = labelled_logits(self.model, input_ids, labels, pixel_values)
        loss = nn.functional.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        if soft is None:
            return loss
        log_student = nn.functional.log_softmax(logits / self.temperature, dim=-1)
        divergence = nn.functional.kl_div(log_student, soft, reduction="batchmean") * self.temperature**2
        return (1 - self.distill) * loss + self.distill * divergence


def labelled_logits(
    model: Any, input_ids: torch.Tensor, labels: torch.Tensor, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (positions, vocabulary) that predict each labelled token, and those tokens (positions,).

    Rows are padded on the right, so the causal mask alone keeps padding out and no attention mask is needed.
    """
    hidden = model.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).last_hidden_state
    keep = labels[:, 1:] != IGNORE
    return model.lm_head(hidden[:, :-1][keep]).float(), labels[:, 1:][keep]


@torch.no_grad()
def soft_answers(
    teachers: Sequence[Any], input_ids: torch.Tensor, labels: torch.Tensor, pixel_values: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean of the teachers' probabilities at the labelled positions."""
    total: Any = 0.0
    for teacher in teachers:
        logits, _ = labelled_logits(teacher, input_ids, labels, pixel_values)
        total = total + (logits / temperature).softmax(-1)
    return total / len(teachers)


@torch.no_grad()
def exact_answers(model: Any, input_ids: torch.Tensor, labels: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Bool (batch,): would greedy decoding give exactly the labelled tokens? (true iff every one is the argmax)."""
    logits, target = labelled_logits(model, input_ids, labels, pixel_values)
    wrong = (logits.argmax(-1) != target).float()
    row = torch.nonzero(labels[:, 1:] != IGNORE)[:, 0]
    return torch.zeros(labels.shape[0], device=labels.device).index_add_(0, row, wrong) == 0


def add_drop_path(model: Any, rate: float) -> None:
    """Skip each tower and decoder layer's change for a random share of the batch while training."""
    towers = [model.model.vision_tower, model.model.language_model]
    for tower in towers:
        layers = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))
        for number, layer in enumerate(layers):
            layer.register_forward_hook(_dropper(rate * (number + 1) / len(layers)))


def _dropper(rate: float) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not module.training or rate <= 0:
            return None
        out = output[0] if isinstance(output, tuple) else output
        keep = (torch.rand(out.shape[0], 1, 1, device=out.device) >= rate).to(out.dtype) / (1 - rate)
        mixed = args[0] + (out - args[0]) * keep
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook
