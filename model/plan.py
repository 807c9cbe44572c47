"""Which known models fit this machine, at how many bits and with how long a conversation, by arithmetic alone.

Needed is the sum of: the weights with their scales (`model.sizes`), the keys and values of the conversation, the
largest activations on the way from picture to first word, what is kept of earlier conversations, and what the programs
themselves take: measured (`PROCESS_BYTES`, `LOADING`, `KIOSK_BYTES`) or an allowance that says so. Nothing is said
about speed: that depends on the machine, `afya-model memory` measures it. Not covered: other programs on the machine,
ONNX folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model import presets, sizes
from model.backends import KEEP_BYTES

MIB, GIB = 2**20, 2**30
# Resident memory beyond the weights of a process that answers on a CPU: Python 3.11, torch 2.13, transformers 5.23,
# bitsandbytes 0.50. Measured on two x86-64 cores with the reference model, whose own activations are small, as the
# highest resident set of one answer less the weights: 430 to 460 MiB at 4 and 8 bits, 380 at 16 and 32.
PROCESS_BYTES = 470 * MIB
# What the first answer takes on a CPU beyond the estimates, as a share of the weights; at 4 bits the fast kernel
# moreover holds its weights twice while it packs them. Measured with a 1.5B model: peaks of 2802 MiB at 4 bits and
# 2851 at 8, where 2841 and 3013 are planned.
LOADING = 0.30
# What Streamlit, pandas, Altair and the case database add in the kiosk's process; measured there: 136 MiB.
KIOSK_BYTES = 140 * MIB
SYSTEM_BYTES = GIB  # left to the operating system and a browser: an allowance, not measured
CUDA_BYTES = GIB // 2  # a CUDA context and the allocator's slack: an allowance, not measured
_TEXT_TOKENS = 128  # of question and answer, at least: less is no conversation
_POSITIONS = {"llama": 2048, "mistral": 32768}  # of the published decoders, where the configuration does not say


@dataclass(frozen=True)
class Choice:
    """One model at one precision on one device ("cpu" or "gpu"); all sizes in bytes.

    `context` is the longest conversation in tokens (picture, questions and answers) that the memory and the model
    allow; 0 where not even one question fits. `why` says in one sentence what decides.
    """

    model: str
    bits: int
    device: str
    fits: bool
    context: int
    weights: int
    conversation: int
    activations: int
    programs: int
    needed: int
    available: int
    why: str


def cache_bytes_per_token(config: dict[str, Any], width: int) -> int:
    """Bytes of keys and values for one token; `width` bytes a number (2 on a GPU, 4 on a CPU)."""
    text = config["text_config"]
    heads = text["num_attention_heads"]
    size = text.get("head_dim") or text["hidden_size"] // heads
    return int(2 * text["num_hidden_layers"] * (text.get("num_key_value_heads") or heads) * size * width)


def image_tokens(config: dict[str, Any]) -> int:
    """How many tokens a picture becomes: one for each patch."""
    vision = config["vision_config"]
    return int((vision["image_size"] // vision["patch_size"]) ** 2)


def activation_bytes(config: dict[str, Any], width: int, prompt: int) -> int:
    """An upper estimate of the largest activations: of a tower layer, or of a decoder layer over the whole prompt.

    Each layer is counted with its inner activations, six of its hidden states, and one head's attention scores; the
    weights of the largest layer count once as numbers of `width` bytes, because 4-bit products over many tokens
    unpack them.
    """
    text, vision = config["text_config"], config["vision_config"]
    largest = []
    for part, tokens in ((vision, image_tokens(config) + 1), (text, prompt)):
        inner, hidden = part["intermediate_size"], part["hidden_size"]
        largest.append(width * tokens * (3 * inner + 6 * hidden) + 4 * tokens * tokens + width * inner * hidden)
    return max(largest) + 4 * text["vocab_size"] * 4


def positions(config: dict[str, Any]) -> int:
    """The longest conversation that the decoder was made for, in tokens."""
    text = config["text_config"]
    return int(text.get("max_position_embeddings") or _POSITIONS.get(text.get("model_type", ""), 2048))


def choice(name: str, config: dict[str, Any], bits: int, device: str, memory: int, kiosk: bool = True) -> Choice:
    """Whether a model fits `memory` bytes of a "cpu"'s or a "gpu"'s memory, at 16, 8 or 4 bits.

    On a CPU what is not quantized is computed in float32 at 8 and 4 bits, and in bfloat16 at 16 bits.
    """
    width = 2 if device == "gpu" or bits == 16 else 4
    weights = sizes.static_bytes(config, bits, width)
    programs = CUDA_BYTES if device == "gpu" else PROCESS_BYTES + SYSTEM_BYTES + (KIOSK_BYTES if kiosk else 0)
    programs += KEEP_BYTES  # of earlier conversations
    if device == "cpu":
        programs += int(LOADING * weights) + (_packed_bytes(config) if bits == 4 else 0)
    least = image_tokens(config) + _TEXT_TOKENS
    each = cache_bytes_per_token(config, width)
    rest = memory - weights - programs

    def left(tokens: int) -> int:  # while a prompt is computed its keys and values are copied once, layer by layer
        return rest - tokens * each - activation_bytes(config, width, tokens)

    limit = positions(config)
    context = _largest(least, limit, lambda tokens: left(tokens) >= 0)
    shown = context or least
    active = activation_bytes(config, width, shown)
    needed = weights + programs + least * each + activation_bytes(config, width, least)
    why = _why(context, limit, needed, memory, weights)
    return Choice(
        name, bits, device, context > 0, context, weights, shown * each, active, programs, needed, memory, why
    )


def _packed_bytes(config: dict[str, Any]) -> int:
    """Bytes of the 4-bit numbers themselves, without scales."""
    return sum(part.count * part.inputs * part.outputs // 2 for part in sizes.linears(config) if part.quantized)


def _largest(least: int, most: int, fits: Any) -> int:
    """The largest number from `least` to `most` that fits (more never fits where less does not); 0 for none."""
    if most < least or not fits(least):
        return 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _why(context: int, limit: int, needed: int, memory: int, weights: int) -> str:
    if not context:
        return f"needs {needed / GIB:.2f} GiB, {weights / GIB:.2f} of them weights; {memory / GIB:.2f} are there"
    spare = (memory - needed) / GIB
    cause = "the model was made for no more" if context == limit else "the memory allows no more"
    return f"needs {needed / GIB:.2f} GiB for one question, {spare:.2f} spare; {context} tokens, {cause}"


def plan(ram: float, gpu: float = 0.0, kiosk: bool = True) -> list[Choice]:
    """All known models at 16, 8 and 4 bits on a computer with `ram` and a GPU with `gpu` GiB (0: no GPU).

    Raises ValueError where `ram` or `gpu` is no amount of memory. Models whose files are not here are left out.
    """
    if not (0 < ram < 1e6 and 0 <= gpu < 1e6):
        raise ValueError("--ram takes the computer's memory in GiB, --gpu the GPU's (0 where there is none).")
    found = []
    for known in presets.PRESETS:
        config = presets.architecture(known)
        if config is None:
            continue
        for device, memory in (("gpu", gpu), ("cpu", ram)):
            if memory:
                found += [choice(known.name, config, bits, device, int(memory * GIB), kiosk) for bits in (16, 8, 4)]
    return found


def best(choices: list[Choice]) -> list[Choice]:
    """For each model the choice to begin with: on the GPU where one fits, and the most bits that fit there."""
    chosen: dict[str, Choice] = {}
    for one in choices:
        if one.fits and one.model not in chosen:
            chosen[one.model] = one
    return list(chosen.values())
