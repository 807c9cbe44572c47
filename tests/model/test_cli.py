"""`afya-model` as a person meets it: quick help, a streamed answer with its facts, one sentence for every mistake."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from model.cli import NOTICE, main
from tests.model.lora import random_adapter


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); from model.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) <= 0.3
    assert all(command in done.stdout for command in ("ask", "evaluate", "list"))


@pytest.mark.parametrize("command", ["ask", "evaluate", "list"])
def test_every_command_has_help(command: str) -> None:
    assert call(command, "--help")[0] == 0


def test_ask_prints_the_answer_and_how_it_came_about(tiny: Path, picture: Path) -> None:
    code, out, _ = call("ask", picture, "Is there a nodule?", "--model", tiny, "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0
    assert out.rstrip().endswith(NOTICE)
    for word in ("backend      torch: CPU", "first token", "memory", "confidence", "4 bits, adapter none", "cut off"):
        assert word in out


def test_ask_json_is_one_object_with_the_same_facts(tiny: Path, picture: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tiny, tmp_path / "adapter")
    options = ("--model", tiny, "--bits", 8, "--adapter", adapter, "--max-new-tokens", 4, "--json")
    code, out, _ = call("ask", picture, "Is there a nodule?", *options)
    facts = json.loads(out)
    assert code == 0 and facts["notice"] == NOTICE and facts["bits"] == 8
    assert len(facts["adapter_sha256"]) == len(facts["base_sha256"]) == 64
    for name in ("reason", "first_token_seconds", "tokens_per_second", "peak_bytes", "confidence", "text"):
        assert name in facts


def test_mistakes_are_one_sentence_and_exit_code_1(tiny: Path, picture: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture at all")
    cases = [
        ("ask", text, "what?", "--model", tiny),
        ("ask", tmp_path / "absent.png", "what?", "--model", tiny),
        ("ask", picture, " ", "--model", tiny),
        ("ask", picture, "what?", "--model", tmp_path),
        ("ask", picture, "what?", "--model", tiny, "--adapter", tmp_path),
        ("evaluate", "--model", tiny, "--data", tmp_path / "absent.json", "--out", tmp_path / "out"),
    ]
    for arguments in cases:
        code, out, error = call(*arguments)
        assert code == 1, arguments
        assert error.startswith("Error: ") and len(error.strip().splitlines()) == 1, error
        assert not out and "Traceback" not in error


def test_wrong_usage_is_exit_code_2(picture: Path) -> None:
    assert call("ask", picture, "what?", "--bits", "3")[0] == 2
    assert call("evaluate")[0] == 2


def test_evaluate_prints_scores_and_names_the_report(tiny: Path, picture: Path, tmp_path: Path) -> None:
    row = {"img_id": 1, "img_name": picture.name, "q_lang": "en", "qid": 1, "answer_type": "OPEN", "answer": "lung"}
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{**row, "question": "Which organ?"}, {**row, "qid": 2, "question": "What is it?"}]))
    out = tmp_path / "out"
    options = ("--model", tiny, "--data", data, "--images", tmp_path, "--out", out, "--max-new-tokens", 2)
    code, text, error = call("evaluate", *options)
    assert code == 0 and "all" in text and "of 2" in text and str(out / "report.json") in text
    assert "2/2" in error, "progress is shown"
    code, text, error = call("evaluate", *options, "--json")
    assert code == 0 and json.loads(text)["scores"]["rows"] == 2 and not error
