"""Conversation templates: token ids and labels, masked by construction.

Two kinds. The reference model's template `afya` marks turns with special tokens. The templates of published models
(`v1` and `llava_v1` of TinyLLaVA, `mistral_instruct` of LLaVA-Med, `plain` for alignment) are text; as in LLaVA, the
text is cut at the picture and each part is tokenized by itself, so both parts get SentencePiece's first-word mark. A
token is a label when its characters lie in an answer: nothing is found again by searching the text, so nothing can be
mistaken for a question or the picture. Special tokens written in a question or an answer are taken apart first.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IGNORE = -100  # label of positions without loss (torch.nn.CrossEntropyLoss's default ignore_index)
IMAGE = "<image>"
SETTINGS = "afya.json"  # beside the weights of an imported model; names its template

Pair = tuple[str, str | None]  # a question and its answer; None for the answer that is asked for
Ids = tuple[list[int], list[int]]


class TemplateUnknown(ValueError):
    """No conversation template has this name; the message lists those there are."""


@dataclass(frozen=True)
class MarkTemplate:
    """Turns between special tokens: `<s>` image `user` question `assistant` answer `end`, repeated for each turn."""

    name: str
    bos: str
    image: str
    user: str
    assistant: str
    end: str

    def encode(self, tokenizer: Any, pairs: Sequence[Pair], image_tokens: int) -> list[tuple[list[int], bool]]:
        """Pieces of token ids, each with whether it belongs to an answer."""
        names = ("bos", "image", "user", "assistant", "end")
        mark = {name: tokenizer.convert_tokens_to_ids(getattr(self, name)) for name in names}
        pieces = [([mark["bos"]] + [mark["image"]] * image_tokens, False)]
        for question, answer in pairs:
            pieces.append(([mark["user"], *_plain(tokenizer, question), mark["assistant"]], False))
            if answer is not None:
                pieces.append(([*_plain(tokenizer, answer), mark["end"]], True))
        return pieces


@dataclass(frozen=True)
class TextTemplate:
    """Turns as text: `system`, then for each turn `ask` around the question and `reply` around the answer.

    `picture` stands before the first question where there is a picture. `plain` drops the question: it teaches to
    describe a picture, before a model can answer anything.
    """

    name: str
    system: str
    ask: str
    reply: str
    picture: str = IMAGE + "\n"
    drops_question: bool = False

    def encode(self, tokenizer: Any, pairs: Sequence[Pair], image_tokens: int) -> list[tuple[list[int], bool]]:
        """Pieces of token ids, each with whether it belongs to an answer."""
        before, after = _cut(self._spans(pairs, tokenizer.all_special_tokens, bool(image_tokens)))
        if not image_tokens:
            return _tokenized(tokenizer, before + after)
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        head = _tokenized(tokenizer, before)
        rest = _tokenized(tokenizer, after) if after else []
        start = len(tokenizer("")["input_ids"])  # the marks that begin every text; the second part has none
        return [*head, ([image] * image_tokens, False), *rest[start:]]

    def _spans(self, pairs: Sequence[Pair], marks: Sequence[str], picture: bool) -> list[tuple[str, bool]]:
        spans = [(self.system, False)]
        for number, (question, answer) in enumerate(pairs):
            asked = "" if self.drops_question else _defused(question, marks)
            first = picture and number == 0
            asked = self.picture + asked if first else asked
            spans.append((self.ask.replace("{}", asked), False))
            if answer is not None:
                spans.append((self.reply.replace("{}", _defused(answer, marks)), True))
        return spans


Template = MarkTemplate | TextTemplate

_POLITE = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions. "
)
_TURN, _REPLY = "USER: {} ASSISTANT:", " {}</s>"

AFYA = MarkTemplate("afya", bos="<s>", image=IMAGE, user="<user>", assistant="<assistant>", end="</s>")
TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        AFYA,
        TextTemplate("v1", _POLITE.format("user"), _TURN, _REPLY),
        TextTemplate("llava_v1", _POLITE.format("human"), _TURN, _REPLY),
        TextTemplate("mistral_instruct", "", "[INST] {} [/INST]", " {} </s>"),
        TextTemplate("plain", "", "{}", "{}\n", picture=IMAGE, drops_question=True),
    )
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if m['content'] is string %}{{ '<user>' + m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{{ '<user>' }}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% else %}{{ '<assistant>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def template(name: str) -> Template:
    """The template of this name. Raises TemplateUnknown."""
    if name not in TEMPLATES:
        raise TemplateUnknown(f"There is no conversation template {name!r}; choose one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def template_of(folder: Path) -> Template:
    """The template of a model folder: the one its `afya.json` names, else `afya`. Raises TemplateUnknown."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return AFYA
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TemplateUnknown(f"{path} names no conversation template ({error}); import the model again.") from error
    return template(str(name))


def encode(
    tokenizer: Any, template: Template, turns: Sequence[tuple[str, str]], image_tokens: int, answer: str | None = None
) -> Ids:
    """Token ids and labels of a conversation about one image; only the last answer is learnt.

    `turns` are the finished (question, answer) pairs followed by the last question as (question, ""); `answer` is the
    last answer, or None for a prompt to generate from. Only the tokens of the last answer and its end mark carry a
    label; all other labels are `IGNORE`. `image_tokens` is the number of patch positions of the picture.
    """
    pieces = template.encode(tokenizer, [*turns[:-1], (turns[-1][0], answer)], image_tokens)
    first = len(pieces)
    if answer is not None:  # walk back over the pieces of the last answer
        while pieces[first - 1][1]:
            first -= 1
    return _joined([(ids, number >= first) for number, (ids, _) in enumerate(pieces)])


def encode_conversation(tokenizer: Any, template: Template, pairs: Sequence[Pair], image_tokens: int) -> Ids:
    """Token ids and labels of a whole conversation; every answer is learnt. `image_tokens` 0: no picture."""
    return _joined(template.encode(tokenizer, pairs, image_tokens))


def _joined(pieces: Sequence[tuple[list[int], bool]]) -> Ids:
    ids = [token for piece, _ in pieces for token in piece]
    labels = [token if learnt else IGNORE for piece, learnt in pieces for token in piece]
    return ids, labels


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of user text: special tokens written in the text are treated as plain characters, never as markers."""
    return list(tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _defused(text: str, marks: Sequence[str]) -> str:
    """The text with a space inside every special token written in it, so that it stays text."""
    for mark in {IMAGE, *marks}:
        text = text.replace(mark, mark[:1] + " " + mark[1:])
    return text


def _cut(spans: Sequence[tuple[str, bool]]) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """The spans before and after the picture; all of them before where there is none."""
    for number, (text, learnt) in enumerate(spans):
        if IMAGE in text:
            left, right = text.split(IMAGE, 1)
            return [*spans[:number], (left, learnt)], [(right, learnt), *spans[number + 1 :]]
    return list(spans), []


def _tokenized(tokenizer: Any, spans: Sequence[tuple[str, bool]]) -> list[tuple[list[int], bool]]:
    """One piece for each token of the joined spans; it is learnt when it begins in an answer."""
    edges, learning, end = [], [], 0
    for text, learnt in spans:
        edges.append(end)
        learning.append(learnt)
        end += len(text)
    found = tokenizer("".join(text for text, _ in spans), return_offsets_mapping=True)
    pieces, place = [], 0
    for token, (start, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        while place + 1 < len(edges) and edges[place + 1] <= start:
            place += 1
        pieces.append(([token], learning[place] and stop > start))
    return pieces
