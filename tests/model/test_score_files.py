"""`afya-model score`: answers of any program, and the mean of several runs over the same rows."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from model.cli import main
from model.metrics import Row, ScoreError, average


def dataset(folder: Path) -> Path:
    rows = [
        {"qid": n, "img_name": f"x{n // 2}/source.jpg", "question": "?", "answer": "Yes", "answer_type": kind}
        for n, kind in enumerate(["CLOSED", "OPEN", "CLOSED", "OPEN"])
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def answers(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"question_id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def test_the_mean_of_two_runs_counts_each_row_by_the_share_of_runs_that_had_it(tmp_path: Path) -> None:
    first = answers(tmp_path / "a.jsonl", ["yes", "yes", "no", "no"])
    second = answers(tmp_path / "b.jsonl", ["yes", "no", "yes", "no"])
    command = ["score", str(first), str(second), "--data", str(dataset(tmp_path)), "--json"]
    found = json.loads(CliRunner().invoke(main, command).stdout)
    assert found["mean"]["all"]["percent"] == 50
    assert (found["mean"]["closed"]["percent"], found["mean"]["open"]["percent"]) == (75, 25)
    assert found["runs"][str(first)]["all"]["percent"] == 50
    plain = CliRunner().invoke(main, command[:-1]).stdout
    assert "mean of 2 runs" in plain


def test_runs_over_different_rows_have_no_mean() -> None:
    with pytest.raises(ScoreError, match="same rows"):
        average([[Row("1", "yes", "yes")], [Row("2", "yes", "yes")]])


def test_an_answers_file_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    done = CliRunner().invoke(main, ["score", str(tmp_path / "a.jsonl"), "--data", str(dataset(tmp_path))])
    assert done.exit_code == 1
    assert "line 1 is no answer" in done.output
