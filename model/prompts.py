"""Conversation template of the reference model: token ids and labels, masked by construction.

A prompt is put together from tokenized pieces, never cut out of a tokenized whole, so a label can never cover the
question or the image. Templates of imported models (v1, plain, mistral) are not here yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IGNORE = -100  # label of positions without loss (torch.nn.CrossEntropyLoss's default ignore_index)


@dataclass(frozen=True)
class Template:
    """Markers around a turn: `<s>` image `user` question `assistant` answer `end`, repeated for each turn."""

    name: str
    bos: str
    image: str
    user: str
    assistant: str
    end: str


AFYA = Template("afya", bos="<s>", image="<image>", user="<user>", assistant="<assistant>", end="</s>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if m['content'] is string %}{{ '<user>' + m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{{ '<user>' }}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% else %}{{ '<assistant>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def encode(
    tokenizer: Any, template: Template, turns: Sequence[tuple[str, str]], image_tokens: int, answer: str | None = None
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation about one image.

    `turns` are the finished (question, answer) pairs followed by the last question as (question, ""); `answer` is the
    last answer, or None for a prompt to generate from. Only the tokens of the last answer and its end marker carry a
    label; all other labels are `IGNORE`. `image_tokens` is the number of patch positions of the picture.
    """
    names = ("bos", "image", "user", "assistant", "end")
    mark = {name: tokenizer.convert_tokens_to_ids(getattr(template, name)) for name in names}
    ids = [mark["bos"]] + [mark["image"]] * image_tokens
    for question, reply in turns[:-1]:
        ids += [mark["user"], *_plain(tokenizer, question), mark["assistant"], *_plain(tokenizer, reply), mark["end"]]
    ids += [mark["user"], *_plain(tokenizer, turns[-1][0]), mark["assistant"]]
    labels = [IGNORE] * len(ids)
    if answer is not None:
        tail = [*_plain(tokenizer, answer), mark["end"]]
        ids, labels = ids + tail, labels + tail
    return ids, labels


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of user text: special tokens written in the text are treated as plain characters, never as markers."""
    return list(tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"])
