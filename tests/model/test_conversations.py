"""The reader of LLaVA conversations: its spellings and quirks, and rows that are set aside instead of crashing."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.conversations import Conversation, Report, domain_of, read_conversations
from model.rows import DataError


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


def read(tmp_path: Path, *rows: Any, images: Path | None = None) -> tuple[list[Conversation], Report]:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return read_conversations(path, images)


def one(tmp_path: Path, row: dict[str, Any]) -> Conversation:
    (found,), report = read(tmp_path, row)
    assert not report.faults
    return found


@pytest.mark.parametrize("key", ["conversations", "conversatons"])
def test_both_spellings_of_the_key(tmp_path: Path, key: str) -> None:
    row = one(tmp_path, {"id": 3, "image": "a.jpg", key: [human("<image>\nWhat?"), gpt("A lung.")]})
    assert row == Conversation("3", "a.jpg", (("What?", "A lung."),), "unknown", "", 0)


@pytest.mark.parametrize("text", ["<image>\nWhat?", "What?\n<image>", "<image>\n<image> What? <image>", "What?"])
def test_marks_vanish_wherever_they_stand(tmp_path: Path, text: str) -> None:
    row = one(tmp_path, {"id": "x", "image": "a.jpg", "conversations": [human(text), gpt("b")]})
    assert row.pairs == (("What?", "b"),)


def test_quirks_of_turns_are_read_past_and_counted(tmp_path: Path) -> None:
    turns = [gpt("hello"), human("<image> 1 <image>"), gpt(2.5), human(3), gpt(4), human("unanswered")]
    (row,), report = read(tmp_path, {"image": "a.jpg", "conversatons": turns})
    assert row.pairs == (("1", "2.5"), ("3", "4"))
    assert row.id == "0"
    assert dict(report.notes) == {
        "key conversatons": 1,
        "leading answer dropped": 1,
        "last question without answer dropped": 1,
        "several <image> marks": 1,
    }


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (5, "not an object"),
        ({"id": 1}, "no conversation"),
        ({"conversations": "text"}, "no conversation"),
        ({"conversations": []}, "no conversation"),
        ({"conversations": [human("q")]}, "no answer"),
        ({"conversations": [gpt("a")]}, "no answer"),
        ({"conversations": [human("q"), human("q"), gpt("a")]}, "roles"),
        ({"conversations": [human("q"), gpt("a"), gpt("a")]}, "roles"),
        ({"conversations": [{"from": "system", "value": "s"}, human("q"), gpt("a")]}, "roles"),
        ({"conversations": [{"from": ["human"], "value": "s"}, gpt("a")]}, "roles"),
        ({"conversations": [human(None), gpt("a")]}, "turn"),
        ({"conversations": [human(True), gpt("a")]}, "turn"),
        ({"conversations": ["q", "a"]}, "turn"),
        ({"conversations": [human("q"), gpt("  ")]}, "empty answer"),
        ({"conversations": [human(" "), gpt("a")]}, "empty question"),
        ({"conversations": [human("<image>q"), gpt("a")]}, "no image name"),
        ({"image": ["a", "b"], "conversations": [human("<image>q"), gpt("a")]}, "image name"),
        ({"image": "a\0b", "conversations": [human("<image>q"), gpt("a")]}, "image name"),
    ],
)
def test_a_bad_row_is_set_aside_with_its_number(tmp_path: Path, row: Any, kind: str) -> None:
    good = {"id": "g", "image": "a.jpg", "conversations": [human("<image>q"), gpt("a")]}
    kept, report = read(tmp_path, good, row, good)
    assert [c.row for c in kept] == [0, 2]
    assert [(f.row, f.kind) for f in report.faults] == [(1, kind)]
    assert (report.rows, report.kept) == (3, 2)
    assert f"1 {kind} (first: row 1)" in report.sentence()


def test_rows_without_image_and_joined_paths(tmp_path: Path) -> None:
    turns = [human("q"), gpt("a")]
    kept, report = read(
        tmp_path, {"conversations": turns}, {"image": "d/a.jpg", "conversations": turns}, images=tmp_path
    )
    assert [c.image for c in kept] == [None, str(tmp_path / "d/a.jpg")]
    assert report.notes["without image"] == report.notes["image without <image> in the text"] == 1


@pytest.mark.parametrize(
    ("domain", "word"),
    [
        ({"chest_xray": True, "mri": False, "ct_scan": True}, "chest_xray+ct_scan"),
        ("mri", "mri"),
        (["a", "b"], "a+b"),
        (None, ""),
    ],
)
def test_domains_become_one_word(domain: Any, word: str) -> None:
    assert domain_of(domain) == word


def test_unknown_answer_types_are_counted(tmp_path: Path) -> None:
    turns = [human("q"), gpt("a")]
    kept, report = read(tmp_path, *[{"conversations": turns, "answer_type": t} for t in ("CLOSE", "Closed ", "odd")])
    assert [c.answer_type for c in kept] == ["closed", "closed", "unknown"]
    assert report.notes["unknown answer_type"] == 1


def test_json_lines_and_files_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}\n\n{"id": 1}\n'
    )
    kept, report = read_conversations(path)
    assert (len(kept), report.counts()) == (1, {"no conversation": 1})
    path.write_text("{}\n{\n")
    with pytest.raises(DataError, match="line 2"):
        read_conversations(path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="JSON"):
        read_conversations(tmp_path / "x.json")


def test_real_conversations_read_whole(shared: Path) -> None:
    folder = shared / "data" / "llava_format_derived"
    kept, report = read_conversations(folder / "slake_en_train.json", shared / "data")
    assert (report.rows, len(kept), report.counts()) == (4919, 4918, {"empty answer": 1})  # one row of SLAKE has none
    assert all(Path(c.image).is_file() for c in kept[::100] if c.image)
    assert {c.answer_type for c in kept} == {"open", "closed"}
