"""Tiny checkpoints in the formats of the original code, made part by part, and what the parts give when run by hand.

Nothing of the importer is used: the keys are put together here, and `Original.logits` runs tower, projector and
decoder as separate models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model import llava
from tests.tiny import CORPUS

HIDDEN, WIDE, SIDE, PATCH = 64, 64, 28, 14  # decoder, tower, pixels: 4 patches


@dataclass
class Original:
    """The parts of a tiny LLaVA: decoder, projector and tower as separate models, and its flat configuration."""

    decoder: Any
    projector: Any
    tower: Any
    config: dict[str, Any]
    clip: bool

    def state(self, tower: bool = True) -> dict[str, torch.Tensor]:
        """All weights under the original's names; without the tower's if wanted."""
        found = dict(self.decoder.state_dict())
        found |= {f"model.mm_projector.{k}": v for k, v in self.projector.state_dict().items()}
        if tower:
            found |= {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in self.tower_state().items()}
        return {k: v.detach().clone() for k, v in found.items()}

    def tower_state(self, whole: bool = False) -> dict[str, torch.Tensor]:
        """Weights of the tower; of a SigLIP tower without the layer that the original deletes, unless `whole`."""
        last = f"encoder.layers.{self.tower.config.num_hidden_layers - 1}."
        drop = () if self.clip or whole else (last,)
        return {k: v for k, v in self.tower.state_dict().items() if not k.startswith(drop)}

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected patches (pictures, patches, hidden), as the original computes them."""
        states = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        return self.projector(states[-2][:, 1:] if self.clip else states[-2])

    def logits(self, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        """Logits (positions, vocabulary) for ids that hold -200 where the picture goes."""
        place = ids.index(-200)
        table = self.decoder.get_input_embeddings()
        before, after = torch.tensor(ids[:place]), torch.tensor(ids[place + 1 :])
        whole = torch.cat([table(before), self.features(pixels)[0], table(after)])
        return self.decoder(inputs_embeds=whole[None]).logits[0]


def original(*, clip: bool = False, mistral: bool = False, rows: int = 300, seed: int = 0) -> Original:
    """A tiny random LLaVA of the TinyLLaVA kind (Llama, SigLIP) or, with both switches, of the LLaVA-Med kind."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": rows, "tie_word_embeddings": False}
    rope = {"rope_type": "default", "rope_theta": 1e6 if mistral else 1e4}
    if mistral:
        decoder = MistralForCausalLM(MistralConfig(**sizes, rope_parameters=rope, sliding_window=None))
    else:
        decoder = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, rms_norm_eps=1e-5))
    shape: dict[str, Any] = {"hidden_size": WIDE, "intermediate_size": 128, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
    tower = CLIPVisionModel(CLIPVisionConfig(**shape)) if clip else SiglipVisionModel(SiglipVisionConfig(**shape))
    tower = tower.eval()
    projector = torch.nn.Sequential(torch.nn.Linear(WIDE, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))
    for part in (decoder, projector, tower):  # the libraries' first weights are too small to tell errors apart
        for value in part.parameters():
            torch.nn.init.normal_(value, std=0.2) if value.ndim > 1 else value.data.add_(0.1 * torch.randn_like(value))
    config = {k: v for k, v in sizes.items() if k != "tie_word_embeddings"} | {
        "model_type": "llava_mistral" if mistral else "tiny_llava",
        "rms_norm_eps": 1e-6 if mistral else 1e-5,
        "rope_theta": rope["rope_theta"],
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "mm_vision_tower": "somebody/some-tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": WIDE,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    return Original(decoder.eval(), projector, tower, config, clip)


def tokenizer_files(folder: Path, rows: int = 300) -> None:
    """A byte-pair tokenizer of at most `rows` entries with the usual three special tokens."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=rows,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_tokens([f"extra{n}" for n in range(rows - bpe.get_vocab_size())])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def write_tower(made: Original, folder: Path) -> Path:
    """The tower's own folder as published: all layers, `vision_model.` before each key."""
    folder.mkdir()
    save_file({f"vision_model.{k}": v for k, v in made.tower_state(whole=True).items()}, folder / "model.safetensors")
    config = made.tower.config.to_dict() | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def write_original(
    made: Original, folder: Path, *, kind: str = "safetensors", shards: int = 1, tower: bool = True
) -> Path:
    """Write a checkpoint as `kind` "safetensors" or "bin" in `shards` files; returns the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(made.config))
    tokenizer_files(folder, made.config["vocab_size"])
    state = made.state(tower)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    write_state(state, folder, kind, shards)
    return folder


def write_state(state: dict[str, torch.Tensor], folder: Path, kind: str, shards: int = 1) -> None:
    """Weight files of a state, with an index if they are many."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = list(state)
    places = {}
    for n in range(shards):
        part = {name: state[name] for name in names[n::shards]}
        file = f"{stem}.{kind}" if shards == 1 else f"{stem}-{n + 1:05d}-of-{shards:05d}.{kind}"
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": places}))


def image_ids(ids: list[int], loaded: Any) -> list[int]:
    """Ids with the image token as often as a picture takes where the original has -200."""
    config = loaded.config
    picture = [config.image_token_id] * config.image_seq_length
    return [token for one in ids for token in (picture if one == -200 else [one])]


def network(folder: Path) -> Any:
    """An imported model in float32 on the CPU."""
    return llava.load(folder, 32, device="cpu").core
