"""Readers, splits and picture loading of model/data.py, on made files and on the real ones where they are at hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model import data
from model.data import DataError, Sample


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


SLAKE_ROW = {
    "img_name": "xmlab1/source.jpg",
    "question": " Is it CT? ",
    "answer": 2,
    "answer_type": "CLOSED ",
    "qid": 7,
}


def test_slake_row_keeps_id_trims_text_and_reads_odd_types(tmp_path: Path) -> None:
    (sample,) = data.read_slake(write(tmp_path / "a.json", [SLAKE_ROW]), tmp_path)
    assert (sample.id, sample.question, sample.answer, sample.answer_type) == ("7", "Is it CT?", "2", "closed")
    assert sample.group == "slake/xmlab1"


@pytest.mark.parametrize(
    ("spelling", "kind"),
    [("CLOSED ", "closed"), ("close", "closed"), ("Open", "open"), ("", "unknown"), (None, "unknown")],
)
def test_answer_types_in_all_spellings(spelling: object, kind: str) -> None:
    assert data.answer_type(spelling) == kind


def test_llava_conversations_become_one_sample_an_answer_with_history(tmp_path: Path) -> None:
    turns = [
        {"from": "gpt", "value": "dropped"},
        {"from": "human", "value": "<image>\nFirst?"},
        {"from": "gpt", "value": 3},
        {"from": "human", "value": "Second?\n<image>"},
        {"from": "gpt", "value": "b"},
    ]
    path = write(tmp_path / "l.json", [{"id": 5, "image": "x.png", "conversatons": turns}])
    first, second = data.read(path, tmp_path)
    assert (first.question, first.answer, first.history) == ("First?", "3", ())
    assert (second.question, second.history, second.id) == ("Second?", (("First?", "3"),), "5-1")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not valid JSON"),
        ("{}", "not a list of rows"),
        ("[]", "no rows"),
        ('[{"a": 1}]', "no known format"),
        ('[{"img_name": "x", "question": "q"}]', "row 0 has no 'answer'"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=part):
        data.read(path, tmp_path)


def test_missing_images_are_said_with_the_option_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--images DIR"):
        data.read(write(tmp_path / "a.json", [SLAKE_ROW]))


def test_training_folder_is_read_in_order_and_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "images").mkdir()
    for name in ("b", "a"):
        row = {
            "id": name,
            "image": "../images/p.png",
            "question": "q",
            "answer": "x",
            "answer_type": "open",
            "group": "g",
        }
        write(tmp_path / "samples" / f"{name}.json", row)
    assert [s.id for s in data.read(tmp_path)] == ["a", "b"]
    assert data.read(tmp_path)[0].image == tmp_path / "images" / "p.png"
    (tmp_path / "samples" / "c.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.json is damaged"):
        data.read(tmp_path)


def test_split_never_cuts_through_an_image() -> None:
    samples = [Sample(str(i), Path("x"), "q", "a", "open", f"g{i % 10}", "t") for i in range(100)]
    kept, held = data.split_by_group(samples, 0.3, seed=1)
    assert len(held) == 30
    assert not {s.group for s in kept} & {s.group for s in held}
    assert data.split_by_group(samples, 0.3, seed=1)[1] == held


def test_load_rgb_turns_any_picture_into_rgb_and_names_a_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.new("L", (5, 3), 9).save(path)
    assert data.load_rgb(Sample("1", path, "q", "a", "open", "g", "t")).shape == (3, 5, 3)
    array = np.zeros((2, 2, 3), np.uint8)
    assert data.load_rgb(Sample("1", array, "q", "a", "open", "g", "t")) is array
    with pytest.raises(DataError, match="--images"):
        data.load_rgb(Sample("1", tmp_path / "no.png", "q", "a", "open", "g", "t"))


def test_real_files_read_whole(shared: Path) -> None:
    rows = data.read(shared / "data/slake/en_validate.json")
    assert (len(rows), len({row.group for row in rows})) == (1053, 96)
    assert {row.answer_type for row in rows} == {"open", "closed"}
    rad = data.read(shared / "data/vqa_rad/train.json")
    assert len(rad) == 1152
    derived = data.read(shared / "data/llava_format_derived/slake_en_validate.json", shared / "data")
    assert [(r.question, r.answer) for r in derived] == [(r.question, r.answer) for r in rows]
