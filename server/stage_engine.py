"""DeepSpeed for a stage: which ZeRO stage and whether to recompute, chosen by memory, and the configuration for it.

Memory of one device (bytes), for P parameters of which T are trained on W devices, bf16 with float32 master weights:
weights 2P, gradients 4T (float32 sums at ZeRO 1) or 2T, optimizer 12T/W; ZeRO 2 divides the gradients by W too, ZeRO 3
the weights as well; offload moves the optimizer to the computer's memory (Rajbhandari et al. 2020, arXiv:1910.02054).
Activations of one token in one decoder layer: 6 hidden + 3 mlp values (norms, projections, attention, gated MLP) of
2 bytes; in one tower layer 6 hidden + 2 mlp; with recomputation only each layer's input stays and one layer at work.
Held against measured peaks of the 1.5B model on one GPU (batch 32): 81.6 GiB estimated and 80.7 measured with
everything trained, 57.2 and 54.4 with a frozen tower; of ZeRO 3 with offload at batch 1 5.9 to 6.7 and 3.1 to 4.5.
"""

from dataclasses import dataclass
from typing import Any

from server.stage_recipe import AUTO, StageRecipe

GIB = 2**30
_RESERVE = 2.0 * GIB  # the device's context, kernels' workspace, fragments
_SLACK = 1.06  # what the formula for activations lacks against measured peaks
_LIVE = 10**9  # weights that ZeRO 3 keeps gathered at most (DeepSpeed's default)
_EAGER = 1.3  # measured: activations without compiled layers against compiled ones


@dataclass(frozen=True)
class Shape:
    """What memory depends on: parameters (all, trained), widths and depths, tokens of a row, labels of a row."""

    parameters: int
    trained: int
    hidden: int
    mlp: int
    layers: int
    tower_hidden: int
    tower_mlp: int
    tower_layers: int
    tower_tokens: int
    tower_trained: bool
    vocabulary: int
    tokens: int


@dataclass(frozen=True)
class Choice:
    """ZeRO stage, recomputation, offload, the estimated bytes of one device, and the reason in one sentence."""

    zero_stage: int
    recompute: bool
    offload: bool
    bytes: int
    reason: str


def shape_of(model: Any, parameters: int, trained: int, tower_trained: bool, tokens: int) -> Shape:
    """The sizes of a Llava model; `tokens` of the longest usual row, picture included."""
    text, vision = model.config.text_config, model.config.vision_config
    return Shape(
        parameters=parameters,
        trained=trained,
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        layers=text.num_hidden_layers,
        tower_hidden=vision.hidden_size,
        tower_mlp=vision.intermediate_size,
        tower_layers=vision.num_hidden_layers,
        tower_tokens=(vision.image_size // vision.patch_size) ** 2,
        tower_trained=tower_trained,
        vocabulary=text.vocab_size,
        tokens=tokens,
    )


def estimate(shape: Shape, stage: int, recompute: bool, offload: bool, batch: int, world: int, compiled: bool) -> int:
    """Bytes that one device needs, after the formulas at the top."""
    weights: float = 2 * shape.parameters / (world if stage == 3 else 1)
    if stage == 3 and offload:
        weights = min(weights, 2 * _LIVE)
    gradients = (4 if stage == 1 else 2) * shape.trained / (world if stage >= 2 else 1)
    optimizer = 0 if offload else 12 * shape.trained / (world if stage else 1)
    decoder = shape.tokens * (6 * shape.hidden + 3 * shape.mlp) * 2
    tower = shape.tower_tokens * (6 * shape.tower_hidden + 2 * shape.tower_mlp) * 2
    kept: float
    if recompute:
        kept = shape.tokens * shape.hidden * 2 * shape.layers + 2 * decoder
        if shape.tower_trained:
            kept += shape.tower_tokens * shape.tower_hidden * 2 * shape.tower_layers + 2 * tower
    else:
        kept = decoder * shape.layers + tower * shape.tower_layers * shape.tower_trained
        kept *= 1 if compiled else _EAGER
    logits = max(1, shape.tokens - shape.tower_tokens) * shape.vocabulary * 8
    return int(weights + gradients + optimizer + _SLACK * batch * (kept + logits) + _RESERVE)


def choose(recipe: StageRecipe, shape: Shape, memory: int | None, world: int, compiled: bool) -> Choice:
    """The fastest setting that fits into `memory` bytes of a device (None: unknown, a CPU).

    What the recipe fixes stays; of the rest ZeRO 1 without recomputation comes first, each step after it costs speed.
    When nothing fits the most sparing one is returned, with a reason that says so.
    """
    engine, batch = recipe.engine, recipe.optim.batch
    stages = (1, 2, 3) if engine.zero_stage == AUTO else (int(engine.zero_stage),)
    again = (False, True) if engine.recompute == AUTO else (bool(engine.recompute),)
    tried = [(s, r, engine.offload) for s, r in sorted(((s, r) for s in stages for r in again), key=lambda p: p[::-1])]
    choices = [Choice(*t, estimate(shape, *t, batch, world, compiled), "") for t in tried]
    if memory is None:
        return _because(choices[0], "no device memory to choose by")
    for choice in choices:
        if choice.bytes <= memory:
            return _because(choice, f"{choice.bytes / GIB:.1f} of {memory / GIB:.1f} GiB estimated for each device")
    least = min(choices, key=lambda choice: choice.bytes)
    return _because(least, f"{least.bytes / GIB:.1f} GiB estimated, more than the {memory / GIB:.1f} GiB there are")


def fits(choice: Choice, memory: int | None) -> bool:
    """Whether the estimate leaves room."""
    return memory is None or choice.bytes <= memory


def _because(choice: Choice, why: str) -> Choice:
    layers = "recomputing activations" if choice.recompute else "keeping activations"
    reason = f"ZeRO {choice.zero_stage}, {layers}{', optimizer in main memory' if choice.offload else ''}: {why}."
    return Choice(choice.zero_stage, choice.recompute, choice.offload, choice.bytes, reason)


def deepspeed_config(recipe: StageRecipe, choice: Choice) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage."""
    zero: dict[str, Any] = {"stage": choice.zero_stage, "contiguous_gradients": True, "overlap_comm": False}
    if choice.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if choice.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.optim.batch,
        "gradient_accumulation_steps": recipe.optim.accumulation,
        "gradient_clipping": recipe.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if recipe.engine.precision == "bf16":
        config["bf16"] = {"enabled": True}
        if choice.zero_stage == 1 and not choice.offload:  # float32 sums, taken as each gradient is ready
            config["bf16"]["immediate_grad_update"] = True
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
