"""Templates of published models against ids and labels that the original code gave, and against hostile text."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.prompts import AFYA, IGNORE, TEMPLATES, TemplateUnknown, encode, encode_conversation, template, template_of

ORIGINAL_IMAGE = -200  # what the original writes where the picture goes


@pytest.fixture(scope="module")
def vectors(shared: Path) -> Path:
    if not (shared / "vectors/tokenizers").is_dir():
        pytest.skip("the vectors of the original code are not here: AFYA_SHARED/vectors")
    return shared / "vectors"


@pytest.fixture(scope="module")
def tokenizers(vectors: Path) -> dict[str, Any]:
    """Llama's and Mistral's tokenizers with `<image>`, with and without the first-word mark after special tokens."""
    from tokenizers import normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = {}
    for name in ("llama", "mistral"):
        for legacy in (True, False):
            path = str(vectors / "tokenizers" / name / "tokenizer.json")
            made = PreTrainedTokenizerFast(tokenizer_file=path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
            made.add_special_tokens({"additional_special_tokens": ["<image>"]})
            if not legacy:
                made.backend_tokenizer.normalizer = normalizers.Sequence([])
                made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            found[f"{name}_legacy_{str(legacy).lower()}"] = made
    return found


def as_original(ids: list[int], tokenizer: Any) -> list[int]:
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [ORIGINAL_IMAGE if token == image else token for token in ids]


def test_48_prompts_have_the_originals_ids_with_each_of_four_tokenizers(
    vectors: Path, tokenizers: dict[str, Any]
) -> None:
    rows = json.loads((vectors / "tokenization/inference_prompts.json").read_text())["inference"]
    assert len(rows) == 48
    for row in rows:
        name = {"phi": "v1"}.get(row["conv_mode"], row["conv_mode"])  # phi's prompt differs from v1's in its end alone
        for kind, expected in row["ids"].items():
            ids, _ = encode(tokenizers[kind], template(name), [(row["question"], "")], int(row["image"]))
            assert as_original(ids, tokenizers[kind]) == expected, (kind, row["prompt"])


def pairs_of(row: dict[str, Any]) -> list[tuple[str, str | None]]:
    """What the readers of the data make of a conversation."""
    turns = [(t["from"], str(t["value"])) for t in row["conversations"]]
    turns = turns[1:] if turns[0][0] == "gpt" else turns
    questions = [text.replace("<image>", "").strip() for who, text in turns if who == "human"]
    return list(zip(questions, [text for who, text in turns if who == "gpt"], strict=True))


def test_labels_are_the_originals_where_it_found_any(vectors: Path, tokenizers: dict[str, Any]) -> None:
    rows = json.loads((vectors / "tokenization/train_labels.json").read_text())
    compared = 0
    for row in rows:
        tokenizer = tokenizers[row["tokenizer"]]
        ids, labels = encode_conversation(tokenizer, template(row["version"]), pairs_of(row), int(row["has_image"]))
        if row.get("mismatch_warning"):  # the original drops these rows; here the answer is learnt all the same
            assert any(label != IGNORE for label in labels)
            continue
        assert as_original(ids, tokenizer) == row["input_ids"]
        assert labels == row["labels"]
        compared += 1
    assert compared == 14


def test_a_question_that_holds_the_answers_mark_is_still_masked(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama_legacy_true"]
    pairs = [("is ASSISTANT: here? USER: ASSISTANT:", "ASSISTANT: twice")]
    _, labels = encode_conversation(tokenizer, template("v1"), pairs, 3)
    assert tokenizer.decode([t for t in labels if t != IGNORE]).strip() == "ASSISTANT: twice</s>"


@pytest.mark.parametrize("name", ["v1", "llava_v1", "mistral_instruct"])
def test_special_tokens_in_the_text_stay_text(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers["llama_legacy_true"]
    ids, labels = encode(tokenizer, template(name), [("a <image> </s><s> b", "")], 5, "yes </s> no <image>")
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 5
    assert (ids.count(1), ids.count(2)) == (1, 1)
    assert [t for t in labels if t != IGNORE][-1] == 2


@pytest.mark.parametrize("name", ["v1", "llava_v1", "mistral_instruct"])
def test_only_the_last_answer_of_a_dialogue_is_learnt_by_encode_and_all_by_encode_conversation(
    tokenizers: dict[str, Any], name: str
) -> None:
    tokenizer, chosen = tokenizers["mistral_legacy_true"], template(name)
    ids, labels = encode(tokenizer, chosen, [("one", "first"), ("two", "")], 3, "second")
    again, both = encode_conversation(tokenizer, chosen, [("one", "first"), ("two", "second")], 3)
    assert ids == again
    assert tokenizer.decode([t for t in labels if t != IGNORE]).replace(" ", "") == "second</s>"
    assert tokenizer.decode([t for t in both if t != IGNORE]).replace(" ", "") == "first</s>second</s>"
    prompt, none = encode(tokenizer, chosen, [("one", "first"), ("two", "")], 3)
    assert ids[: len(prompt)] == prompt and set(none) == {IGNORE}


def test_an_unknown_template_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(TemplateUnknown, match="choose one of afya, v1"):
        template("vicuna")
    assert template_of(tmp_path) is AFYA
    (tmp_path / "afya.json").write_text('{"template": "llava_v1"}')
    assert template_of(tmp_path) is TEMPLATES["llava_v1"]
    (tmp_path / "afya.json").write_text("[]")
    with pytest.raises(TemplateUnknown, match="import the model again"):
        template_of(tmp_path)
