"""Building train and test files from official releases: splits, languages, names, counts, refusals."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model import data
from model.data import DataError
from server.data_build import Plan, build
from server.data_sources import split_of


def picture(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), colour).save(path)


def slake_row(number: int, image: int, **more: Any) -> dict[str, Any]:
    row = {"img_name": f"xmlab{image}/source.jpg", "question": "Is it CT?", "answer": "Yes", "answer_type": "CLOSED "}
    return row | {"qid": number, "q_lang": "en", "content_type": "Modality", "modality": "CT"} | more


def slake(folder: Path) -> Path:
    for image in range(10):
        picture(folder / f"imgs/xmlab{image}/source.jpg", image * 20)
    (folder / "train.json").write_text(
        json.dumps(
            [slake_row(n, n) for n in range(6)] + [slake_row(90, 1, question="是CT吗", q_lang="zh", answer="是")]
        )
    )
    (folder / "validate.json").write_text(json.dumps([slake_row(20, 6)]))
    (folder / "test.json").write_text(json.dumps([slake_row(30 + n, 7 + n) for n in range(3)] + [slake_row(40, 5)]))
    return folder


def rad(folder: Path) -> Path:
    rows = []
    for n, phrase in enumerate(["freeform", "para", "test_freeform", "test_para"]):
        picture(folder / f"VQA_RAD Image Folder/synpic{n}.jpg", 10 + n)
        row = {"qid": n, "phrase_type": phrase, "image_name": f"synpic{n}.jpg", "image_organ": "CHEST", "answer": n}
        rows.append(row | {"answer_type": "OPEN", "question_type": "COUNT", "question": "How many?"})
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    return folder


def load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def test_official_splits_are_kept_and_mixed_into_one_training_file(tmp_path: Path) -> None:
    plan = Plan(tmp_path, slake=slake(tmp_path / "s"), vqa_rad=rad(tmp_path / "r"))
    built = build(plan, out := tmp_path / "out")
    assert {name: counts["rows"] for name, counts in built.files.items()} == {
        "slake_train.json": 6,
        "slake_validate.json": 1,
        "slake_test.json": 4,
        "vqa_rad_train.json": 2,
        "vqa_rad_test.json": 2,
        "train_all.json": 8,
    }
    assert built.shared_images == {"slake": 1, "vqa_rad": 0}
    assert load(out / "train_all.json")[6] == {
        "id": "vqarad_0",
        "image": "r/VQA_RAD Image Folder/synpic0.jpg",
        "answer_type": "OPEN",
        "question_type": "COUNT",
        "conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "0"}],
        "location": "CHEST",
    }
    assert load(out / "build.json")["files"]["train_all.json"] == {"rows": 8, "images": 8, "open": 2, "closed": 6}
    assert data.read(out / "slake_test.json", tmp_path)[0].answer_type == "closed"


@pytest.mark.parametrize(("language", "rows"), [("en", 6), ("zh", 1), ("both", 7)])
def test_languages_of_slake(tmp_path: Path, language: str, rows: int) -> None:
    built = build(Plan(tmp_path, slake=slake(tmp_path / "s"), language=language), tmp_path / "out")
    assert built.files["slake_train.json"]["rows"] == rows


def test_a_split_by_image_shares_no_picture_even_under_another_name(tmp_path: Path) -> None:
    source = slake(tmp_path / "s")
    picture(source / "imgs/xmlab9/source.jpg", 0)  # the same bytes as xmlab0
    for seed in range(4):
        plan = Plan(tmp_path, slake=source, vqa_rad=rad(tmp_path / "r"), split_by_image=0.4, seed=seed)
        built = build(plan, tmp_path / "out")
        sides = [
            {(tmp_path / row["image"]).read_bytes() for row in load(p)}
            for p in ((tmp_path / "out").glob("*_train.json"), (tmp_path / "out").glob("*_test.json"))
            for p in [sorted(p)[0]]
        ]
        assert not sides[0] & sides[1]
        assert built.shared_images["slake"] == 0
        assert "slake_validate.json" not in built.files
    assert sum(v["rows"] for k, v in built.files.items() if k != "train_all.json") == 15


def test_rows_without_answer_or_picture_are_left_out_and_counted(tmp_path: Path) -> None:
    source = slake(tmp_path / "s")
    (source / "train.json").write_text(json.dumps([slake_row(0, 0), slake_row(1, 1, answer=" "), slake_row(2, 77)]))
    built = build(Plan(tmp_path, slake=source), tmp_path / "out")
    assert built.left_out == {"slake: empty text": 1, "slake: missing image": 1}
    assert built.files["slake_train.json"]["rows"] == 1


def test_repeated_ids_get_a_number(tmp_path: Path) -> None:
    source = slake(tmp_path / "s")
    (source / "train.json").write_text(json.dumps([slake_row(0, 0), slake_row(0, 1)]))
    build(Plan(tmp_path, slake=source), tmp_path / "out")
    assert [row["id"] for row in load(tmp_path / "out/slake_train.json")] == ["slake_0", "slake_0-2"]


def path_rows() -> list[dict[str, str]]:
    return [
        {"image": "a.jpg", "question": "Is it?", "answer": "Yes"},
        {"image": "b.jpg", "question": "What?", "answer": "normal"},
        {"image": "b.jpg", "question": "Not?", "answer": "no"},
    ]


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_path_vqa_as_a_table_takes_yes_and_no_as_closed(tmp_path: Path, form: str) -> None:
    source = tmp_path / "p"
    picture(source / "images/a.jpg", 1)
    picture(source / "images/b.jpg", 2)
    path = source / f"train.{form}"
    if form == "csv":
        with open(path, "w", newline="") as lines:
            writer = csv.DictWriter(lines, ["image", "question", "answer"])
            writer.writeheader()
            writer.writerows(path_rows())
    else:
        path.write_text(json.dumps(path_rows()) if form == "json" else "\n".join(map(json.dumps, path_rows())))
    built = build(Plan(tmp_path, path_vqa=source), tmp_path / "out")
    assert built.files["path_vqa_train.json"] == {"rows": 3, "images": 2, "open": 1, "closed": 2}
    assert load(tmp_path / "out/path_vqa_train.json")[2]["id"] == "pathvqa_train_2"


def test_path_vqa_as_parquet_writes_each_picture_once(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    picture(tmp_path / "a.png", 1)
    content = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "../../escape.png"}
    rows = [row | {"image": content} for row in path_rows()]
    (tmp_path / "p/data").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p/data/validation-00000-of-00001.parquet")
    built = build(Plan(tmp_path / "images", path_vqa=tmp_path / "p"), tmp_path / "out")
    assert built.files == {"path_vqa_validate.json": {"rows": 3, "images": 1, "open": 1, "closed": 2}}
    (written,) = (tmp_path / "images").rglob("*.png")
    assert load(tmp_path / "out/path_vqa_validate.json")[0]["image"] == f"path_vqa/{written.name}"
    (tmp_path / "p/data/test.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"test\.parquet is not a Parquet file"):
        build(Plan(tmp_path / "images", path_vqa=tmp_path / "p"), tmp_path / "out")


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "p/qas/train").mkdir(parents=True)
    (tmp_path / "p/qas/train/train_qa.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"pickles.*Parquet, JSON or CSV"):
        build(Plan(tmp_path, path_vqa=tmp_path / "p"), tmp_path / "out")
    with pytest.raises(DataError, match="--slake"):
        build(Plan(tmp_path), tmp_path / "out")
    source = slake(tmp_path / "s")
    with pytest.raises(DataError, match="is not below"):
        build(Plan(tmp_path / "p", slake=source), tmp_path / "out")
    with pytest.raises(DataError, match="fraction"):
        build(Plan(tmp_path, slake=source, split_by_image=1.0), tmp_path / "out")
    (source / "odd.json").write_text("[]")
    with pytest.raises(DataError, match="train, val or test"):
        build(Plan(tmp_path, slake=source), tmp_path / "out")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/train.json").write_text(json.dumps([slake_row(1, 1)]))
    with pytest.raises(DataError, match="not beside it"):
        build(Plan(tmp_path, slake=tmp_path / "x"), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("en_train.json", "train"),
        ("val_qa.csv", "validate"),
        ("test-0.parquet", "test"),
        ("x", None),
        ("traintest", None),
    ],
)
def test_names_tell_the_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_the_real_releases(shared: Path, tmp_path: Path) -> None:
    plan = Plan(shared / "data", slake=shared / "data/slake", vqa_rad=shared / "data/vqa_rad")
    built = build(plan, tmp_path)
    assert built.files["slake_train.json"]["rows"] == 4918
    assert built.files["slake_validate.json"]["rows"] == 1053
    assert built.files["vqa_rad_train.json"]["rows"] == 1152
    assert built.left_out == {"slake: empty text": 1}
