"""Build a LLaVA model and its processor from random weights: the start of the reference model and of tests.

A SigLIP-type tower (no class token, no pooling head), a two-layer GELU projector, a Llama-type decoder with tied
embeddings and a byte-level BPE tokenizer trained on the given texts. Nothing is downloaded.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from model.prompts import AFYA, CHAT_TEMPLATE


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model; widths that are multiples of 64 can be quantized to 4 bits."""

    image_size: int = 160  # pixels, square
    patch_size: int = 16
    tower_layers: int = 6
    tower_hidden: int = 256
    tower_heads: int = 4
    tower_mlp: int = 1024
    decoder_layers: int = 6
    decoder_hidden: int = 256
    decoder_heads: int = 4
    decoder_mlp: int = 704
    vocabulary: int = 2048
    positions: int = 512
    tower_dropout: float = 0.0
    decoder_dropout: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for the configuration saved beside the weights."""
        return asdict(self)


def train_tokenizer(corpus: Iterable[str], vocabulary: int) -> Any:
    """Byte-level BPE tokenizer of at most `vocabulary` entries, with the template's markers as special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<unk>", "<pad>", AFYA.bos, AFYA.end, AFYA.image, AFYA.user, AFYA.assistant]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token=AFYA.bos,
        eos_token=AFYA.end,
        additional_special_tokens=[AFYA.image, AFYA.user, AFYA.assistant],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build(config: ModelConfig, corpus: Iterable[str], seed: int, tokenizer: Any = None) -> tuple[Any, Any]:
    """Random-weight (LlavaForConditionalGeneration, LlavaProcessor); the same seed gives the same weights.

    A `tokenizer` that is given is used instead of one trained on `corpus`.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    tokenizer = tokenizer or train_tokenizer(corpus, config.vocabulary)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(_llava_config(config, tokenizer))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, _processor(config, tokenizer)


def _llava_config(config: ModelConfig, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlavaConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=config.tower_hidden,
        intermediate_size=config.tower_mlp,
        num_hidden_layers=config.tower_layers,
        num_attention_heads=config.tower_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        attention_dropout=config.tower_dropout,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=config.decoder_hidden,
        intermediate_size=config.decoder_mlp,
        num_hidden_layers=config.decoder_layers,
        num_attention_heads=config.decoder_heads,
        num_key_value_heads=config.decoder_heads,
        max_position_embeddings=config.positions,
        attention_dropout=config.decoder_dropout,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(AFYA.image),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(config.image_size // config.patch_size) ** 2,
        tie_word_embeddings=True,
    )


def _processor(config: ModelConfig, tokenizer: Any) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.siglip import SiglipImageProcessorPil

    side = {"height": config.image_size, "width": config.image_size}
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=side),
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=AFYA.image,
        chat_template=CHAT_TEMPLATE,
    )
