"""Faults of training files are found and named; what is in order passes; the commands say it with their exit code."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from model.conversations import Conversation
from model.llava import ModelError
from server.data_check import CheckReport, check, lengths
from server.data_cli import data
from tests.server.web import serve


def picture(path: Path, colour: int = 0, form: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (40, 40), colour).save(path, form)
    return path


def row(image: str | None, question: str = "Is it CT?", answer: Any = "yes", **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\n{question}" if image else question},
        {"from": "gpt", "value": answer},
    ]
    return {"id": "x", "conversations": turns} | ({"image": image} if image else {}) | more


def write(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def kinds(report: CheckReport) -> dict[str, int]:
    return {kind: fault.count for kind, fault in report.faults.items()}


def test_a_good_file_passes(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.json", row("a.png"), row("a.png", "What?", "a lung"), row(None, "Hello?"))
    report = check([path], tmp_path)
    assert (report.rows, report.images, kinds(report), report.errors) == ({str(path): 3}, 1, {}, 0)
    assert "Nothing that would break" in report.table()


def test_every_kind_of_fault_is_counted_with_examples(tmp_path: Path) -> None:
    whole = picture(tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-30])
    (tmp_path / "text.png").write_bytes(b"no picture")
    (tmp_path / "folder.png").mkdir()
    rows = [
        row("a.png"),
        row("a.png"),
        row("a.png", answer="no"),
        row("a.png", "Why?", ""),
        {"id": 1},
        row("cut.png"),
        row("text.png"),
        row("folder.png"),
        *[row("none.png", f"q{n}") for n in range(7)],
        *[row(f"none{n}.png") for n in range(6)],
    ]
    report = check([write(tmp_path / "t.json", *rows)], tmp_path)
    assert kinds(report) == {
        "row": 1,
        "empty answer": 1,
        "missing image": 7,
        "unreadable image": 3,
        "duplicate": 1,
        "contradiction": 1,
    }
    assert report.errors == 12
    missing = report.faults["missing image"]
    assert missing.examples[0] == "none.png (7 rows, first t.json row 8)"
    assert len(missing.examples) == 5
    assert report.faults["row"].examples[0].startswith("t.json row 4: has no 'conversations'")
    assert "'yes'" in report.faults["contradiction"].examples[0]


def test_pictures_that_train_and_test_share_by_name_or_by_pixels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    picture(tmp_path / "b-again.bmp", 2, "BMP")
    picture(tmp_path / "c.png", 3)
    train = write(tmp_path / "train.json", row("a.png"), row("b.png"))
    test = write(tmp_path / "test.json", row("a.png"), row("b-again.bmp"), row("c.png"), row("c.png", "Why?"))
    report = check([train], tmp_path, test=[test])
    assert kinds(report) == {"in train and test": 1, "in train and test under another name": 1}
    assert report.faults["in train and test under another name"].examples == ["b-again.bmp is b.png"]
    assert report.errors == 0


def test_worker_processes_find_the_same(tmp_path: Path) -> None:
    for n in range(220):
        picture(tmp_path / f"{n}.png", n)
    (tmp_path / "7.png").write_bytes(b"")
    path = write(tmp_path / "t.json", *[row(f"{n}.png") for n in range(221)])
    assert kinds(check([path], tmp_path, workers=2)) == {"unreadable image": 1, "missing image": 1}


def test_long_rows_are_measured_as_the_model_sees_them(tmp_path: Path, tiny: Path) -> None:
    picture(tmp_path / "a.png")
    long = "pneumonia nodule chest effusion " * 20
    path = write(tmp_path / "t.json", row("a.png"), row("a.png", "Why?", long), row("a.png", long, "no"))
    report = check([path], tmp_path, length=lengths(tiny, 60), max_length=60)
    assert kinds(report) == {"over-long": 1, "nothing to learn": 1}
    assert report.faults["over-long"].examples[0].startswith("t.json row 1: ")
    with pytest.raises(ModelError, match="larger --max-length"):
        lengths(tiny, 10)
    with pytest.raises(ModelError, match="no model folder"):
        lengths(tmp_path, 60)


def test_a_row_said_to_fit_does_fit(tiny: Path) -> None:
    from model.prompts import encode_conversation, template_of
    from server.data_check import _tokenizer

    tokenizer, picture_tokens = _tokenizer(tiny)
    length = lengths(tiny, 400)
    for text in ("", "是" * 30, "\t\n é 🫁" * 5, "<image></s><user>" * 6, "a" * 100):
        turns = Conversation("x", "a.png", ((text, text or "a"),) * 3, "open", "", 0)
        ids, _ = encode_conversation(tokenizer, template_of(tiny), turns.pairs, picture_tokens)
        said, _ = length(turns)
        assert len(ids) <= said


def test_the_check_command(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.json", row("a.png"), row("a.png"))
    ask = ["check", str(path), "--images", str(tmp_path), "--processes", "1"]
    assert CliRunner().invoke(data, ask).exit_code == 0
    assert CliRunner().invoke(data, [*ask, "--strict"]).exit_code == 1
    write(path, row("none.png"))
    found = CliRunner().invoke(data, [*ask, "--json"])
    assert found.exit_code == 1
    assert json.loads(found.stdout)["faults"][0]["kind"] == "missing image"
    path.write_text("{")
    found = CliRunner().invoke(data, ask)
    assert found.exit_code == 1 and "not valid JSON" in found.stderr


def test_the_build_and_download_commands(tmp_path: Path) -> None:
    picture(tmp_path / "s/imgs/x/source.png")
    slake = {"img_name": "x/source.png", "question": "q", "answer": "a", "answer_type": "OPEN", "qid": 1}
    write(tmp_path / "s/train.json", slake | {"q_lang": "en"})
    out = tmp_path / "out"
    found = CliRunner().invoke(
        data, ["build", "--slake", f"{tmp_path}/s", "--images", f"{tmp_path}", "--out", f"{out}"]
    )
    assert found.exit_code == 0, found.output
    assert "train_all.json: 1 rows, 1 images, 1 open, 0 closed" in found.stdout
    assert CliRunner().invoke(data, ["build", "--images", f"{tmp_path}", "--out", f"{out}"]).exit_code == 1
    with serve() as site:
        site.files["/llava_med_image_urls.jsonl"] = b"{}\n"
        ask = ["download", "--out", f"{out}", "--base-url", site.url, "--any-size", "--keep-free", "0"]
        assert CliRunner().invoke(data, [*ask, "--file", "image-list"]).exit_code == 0
        assert CliRunner().invoke(data, [*ask, "--file", "captions"]).exit_code == 1
        found = CliRunner().invoke(data, [*ask, "--images-of", f"{out}/llava_med_image_urls.jsonl"])
        assert found.exit_code == 1 and "1 refused" in found.stdout
    assert CliRunner().invoke(data, ["download"]).exit_code == 2
    assert CliRunner().invoke(data, ["download", "--file", "odd"]).exit_code == 2
    assert "341.52 MiB" in CliRunner().invoke(data, ["download", "--list"]).stdout
