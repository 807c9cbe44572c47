"""`afya-model memory`: figures of real runs, in processes of their own, with the original's keys beside ours."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from model import measure, measure_cli
from model.cli import main
from model.measure import Plan
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def test_each_precision_is_measured_and_written_down(tiny: Path, tmp_path: Path) -> None:
    command = ["memory", "--model", str(tiny), "--bits", "32,8", "--limit", "3", "--max-new-tokens", "5"]
    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    whole, eight = json.loads(done.stdout)["results"]
    assert whole["static_bytes"] > eight["static_bytes"] > 0
    assert whole["peak_bytes"] > whole["static_bytes"]
    assert whole["questions"] == 3
    assert whole["tokens_per_second"] > 0
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert json.loads((tmp_path / "memory.json").read_text())["results"] == [whole, eight]
    rows = [json.loads(line) for line in (tmp_path / "torch-32" / "answers.jsonl").read_text().splitlines()]
    assert [row["metadata"]["warm"] for row in rows] == [False, True, True]
    for row in rows:
        assert {"inference_time", "tokens_generated", "memory_usage"} <= set(row["metadata"])
        assert row["prompt"].startswith("<image>\n")
        assert row["metadata"]["memory_usage"] == pytest.approx(row["metadata"]["peak_bytes"] / 2**30)


def test_both_backends_are_measured_side_by_side(tiny: Path, tmp_path: Path) -> None:
    command = ["memory", "--model", str(tiny), "--backend", "torch,onnx", "--bits", "16,4", "--limit", "2"]
    done = CliRunner().invoke(main, [*command, "--max-new-tokens", "3", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    found = [(row["backend"], row["bits"]) for row in json.loads(done.stdout)["results"]]
    assert found == [("torch", 16), ("torch", 4), ("onnx", 4)]
    assert (tmp_path / "quantized-4/manifest.json").is_file()


def test_a_model_that_cannot_be_loaded_is_one_sentence_with_its_log(tmp_path: Path) -> None:
    command = ["memory", "--model", str(tmp_path / "nowhere"), "--bits", "8", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "torch at 8 bits could not be measured" in done.output
    assert "log.txt" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("wrong", [["--bits", "5"], ["--bits", ""], ["--backend", "abacus"]])
def test_a_wrong_choice_is_code_2(wrong: list[str], tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["memory", *wrong, "--out", str(tmp_path)]).exit_code == 2


def test_rows_of_a_dataset_are_asked_in_its_order(shared: Path) -> None:
    rows = measure.questions(Plan("m", "torch", 4, "o", data=str(shared / "data/slake/en_validate.json"), limit=3))
    raw = json.loads((shared / "data/slake/en_validate.json").read_text(encoding="utf-8"))
    assert [row.question for row in rows] == [row["question"] for row in raw[:3]]
    assert len(measure.questions(Plan("m", "torch", 4, "o", limit=7))) == 7


def test_the_table_compares_with_the_first_row() -> None:
    row = {"backend": "torch", "peak_bytes": 2**21, "first_token_warm": 0.1, "first_token_cold": 0.2, "reason": "r"}
    row |= {"tokens_per_second": None, "joules_per_question": None}
    text = measure_cli.table([{**row, "bits": 16, "static_bytes": 2**20}, {**row, "bits": 4, "static_bytes": 2**18}])
    assert "(-75 %)" in text
    assert "1.0" in text.splitlines()[1]
