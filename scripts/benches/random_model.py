"""A model folder of a preset's true size with random weights: speed and memory do not depend on the values.

python -m scripts.benches.random_model tinyllava-1.5b --tokenizer FILE --out DIR
"""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("preset")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json [default: made-up words].")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--seed", default=0, show_default=True)
def main(preset: str, tokenizer: Path | None, out: Path, seed: int) -> None:
    """Write a folder that `afya-model` and `afya-server train` take for a model of PRESET."""
    write(preset, tokenizer, out, seed)


def write(preset: str, tokenizer: Path | None, out: Path, seed: int = 0) -> Path:
    """Weights in bfloat16 from `seed`, processor and `afya.json`; returns `out`."""
    import json

    import torch
    from transformers import LlavaForConditionalGeneration

    from model import checkpoint_tokenizer, presets

    known = presets.preset(preset)
    text = _tokenizer(tokenizer)
    config = llava_config(preset, text.convert_tokens_to_ids("<image>"))
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            network = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    kind = "siglip" if "siglip" in config.vision_config.model_type else "clip"
    pictures = checkpoint_tokenizer.image_processor(kind, config.vision_config.image_size, "pad", {})
    network.save_pretrained(out, max_shard_size="2GB")
    checkpoint_tokenizer.processor(pictures, text, config).save_pretrained(out)
    (out / "afya.json").write_text(json.dumps({"template": known.template}) + "\n", encoding="utf-8")
    return out


def llava_config(preset: str, image_id: int) -> Any:
    """The LlavaConfig of a preset with one row for `<image>` in the vocabulary."""
    from transformers import LlavaConfig

    from model import presets

    parts = presets.architecture(presets.preset(preset)) or {}
    text, vision = dict(parts["text_config"]), dict(parts["vision_config"])
    siglip = vision["model_type"].startswith("siglip")
    text["vocab_size"] = max(text["vocab_size"], image_id) + 1
    vision |= {"vision_use_head": False} if siglip else {}
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-1 if siglip else -2,
        vision_feature_select_strategy="full" if siglip else "default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def _tokenizer(path: Path | None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if path is None:
        words = {f"w{number}": number + 3 for number in range(2000)}
        made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **words}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        made = Tokenizer.from_file(str(path))
    made.add_special_tokens(["<image>"])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **marks)


if __name__ == "__main__":
    main()
