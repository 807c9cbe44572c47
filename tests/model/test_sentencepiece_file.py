"""SentencePiece models become the tokenizers that the same models were published with."""

import json
from pathlib import Path

import pytest

from model import sentencepiece_file as spm


@pytest.fixture(scope="module")
def vectors(shared: Path) -> Path:
    folder = shared / "vectors"
    if not (folder / "tokenizers").is_dir():
        pytest.skip("the published tokenizers are not here: shared/vectors/tokenizers")
    return folder


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_merges_are_those_of_the_published_file(vectors: Path, name: str) -> None:
    model = json.loads((vectors / "tokenizers" / name / "tokenizer.json").read_text())["model"]
    vocabulary = {text: number for text, number in model["vocab"].items() if number > 2}
    rank = dict.fromkeys(vocabulary, 0.0)
    for number, pair in reversed(list(enumerate(model["merges"]))):
        rank[pair.replace(" ", "")] = -float(number)
    assert [" ".join(pair) for pair in spm.merges(vocabulary, rank)] == model["merges"]


def test_the_frame_is_that_of_the_published_file(vectors: Path) -> None:
    published = json.loads((vectors / "tokenizers" / "llama" / "tokenizer.json").read_text())
    ours = spm.convert(vectors / "original_ckpt_tinyllava" / "checkpoint" / "tokenizer.model")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"):
        assert ours[part] == published[part], part
    assert {k: v for k, v in ours["model"].items() if k not in ("vocab", "merges")} == {
        k: v for k, v in published["model"].items() if k not in ("vocab", "merges")
    }


def test_a_damaged_file_and_another_kind_are_refused(vectors: Path, tmp_path: Path) -> None:
    whole = (vectors / "original_ckpt_tinyllava" / "checkpoint" / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    for data in (whole[: len(whole) // 2], b"", b"\xff" * 40, b"no model at all"):
        path.write_bytes(data)
        with pytest.raises(spm.TokenizerUnreadable):
            spm.convert(path)
    trainer = bytes([0x12, 2, 0x18, 1])  # field 2, two bytes: model type 1 (unigram)
    path.write_bytes(bytes([0x0A, 3, 0x0A, 1, 0x61]) + trainer)
    with pytest.raises(spm.TokenizerUnreadable, match="byte-pair"):
        spm.convert(path)
