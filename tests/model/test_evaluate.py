"""Evaluation end to end on a tiny model: right scores, resume after a torn line, refusal to mix runs, flips."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model import evaluate, llava, metrics
from model.backends import TorchBackend
from model.data import Sample
from model.evaluate import ANSWERS, EvaluationError, Settings
from tests.model.lora import random_adapter

QUESTIONS = ["Is there a nodule?", "What modality is this?", "left", "Which organ is it?"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three made-up pictures with four SLAKE-like rows each."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = []
    for number in range(3):
        name = f"xmlab{number}/source.png"
        path = folder / "imgs" / name
        path.parent.mkdir(parents=True)
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        for question in QUESTIONS:
            kind = "CLOSED " if "Is" in question else "OPEN"
            fixed = {"img_id": number, "img_name": name, "q_lang": "en", "content_type": "Organ", "answer_type": kind}
            rows.append({"qid": len(rows), "question": question, "answer": "nodule", **fixed})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def settings(tiny: Path, dataset: Path, tmp_path: Path) -> Settings:
    return Settings(
        model=tiny,
        data=dataset / "rows.json",
        images=dataset / "imgs",
        out=tmp_path / "out",
        bits=32,
        batch=5,
        max_new_tokens=4,
        device="cpu",
        progress=False,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]


def test_run_writes_answers_and_a_report(settings: Settings) -> None:
    report = evaluate.run(settings)
    written = lines(settings.out)
    assert len(written) == 12 == report["scores"]["rows"]
    assert set(written[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert {"inference_time", "tokens_generated", "memory_usage", "finish_reason", "confidence"} <= set(
        written[0]["metadata"]
    )
    assert report["scores"]["closed"]["rows"] == 3 and report["scores"]["open"]["rows"] == 9
    assert report["scores"]["images"] == 3 and report["scores"]["missing"] == 0
    assert report["base_sha256"] == llava.base_sha256(settings.model)
    assert json.loads((settings.out / evaluate.REPORT).read_text()) == report


def test_scores_are_right_where_the_answers_are_known(tiny: Path) -> None:
    """The model's own answers as references give 100 %; a third of them spoilt gives what is left."""
    backend = TorchBackend(tiny, 32, device="cpu")
    pictures = [np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8) for n in range(20)]
    asked = [Sample(str(n), p, QUESTIONS[n % 4], "", "open", f"g{n}", "test") for n, p in enumerate(pictures)]
    said = zip(asked, evaluate.answer_all(backend, asked, 7, max_new_tokens=6), strict=True)
    samples, texts = zip(*[(s, a.text) for s, a in said if metrics.normalise(a.text)][:3], strict=True)
    known = [replace(sample, answer=text) for sample, text in zip(samples, texts, strict=True)]
    full = evaluate.accuracy(backend.loaded, known, max_new_tokens=6)
    assert full.all is not None and full.all.percent == 100.0
    spoilt = [*known[:2], replace(known[2], answer=texts[2] + " indeed")]
    rest = evaluate.accuracy(backend, spoilt, max_new_tokens=6)
    assert rest.all is not None and rest.all.percent == pytest.approx(200 / 3)


def test_answers_come_in_the_order_of_the_samples(tiny: Path) -> None:
    backend = TorchBackend(tiny, 32, device="cpu")
    pictures = [np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8) for n in range(2)]
    samples = [Sample(str(n), pictures[n % 2], QUESTIONS[n % 4], "", "open", f"g{n % 2}", "t") for n in range(7)]
    together = evaluate.answer_all(backend, samples, 3, max_new_tokens=4)
    alone = [evaluate.answer_all(backend, [sample], max_new_tokens=4)[0] for sample in samples]
    assert [a.text for a in together] == [a.text for a in alone]


def test_a_stopped_run_goes_on_and_a_torn_line_is_answered_again(settings: Settings) -> None:
    evaluate.run(settings)
    whole = {row["question_id"]: row["text"] for row in lines(settings.out)}
    path = settings.out / ANSWERS
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(content[:7]) + content[7][:30])
    report = evaluate.run(settings)
    assert report["measured"]["this_run"]["rows"] == 5
    assert report["measured"]["this_run"]["torn_lines_dropped"] == 1
    again = lines(settings.out)
    assert {row["question_id"]: row["text"] for row in again} == whole and len(again) == 12
    assert path.read_bytes().splitlines(keepends=True)[:7] == content[:7]


def test_a_limit_can_be_raised(settings: Settings) -> None:
    assert evaluate.run(replace(settings, limit=5))["scores"]["rows"] == 5
    report = evaluate.run(settings)
    assert report["measured"]["this_run"]["rows"] == 7 and report["scores"]["rows"] == 12


def test_two_runs_are_never_mixed(settings: Settings, dataset: Path, tmp_path: Path) -> None:
    evaluate.run(replace(settings, limit=2))
    before = (settings.out / ANSWERS).read_bytes()
    adapter = random_adapter(settings.model, tmp_path / "adapter")
    for other in (replace(settings, bits=16), replace(settings, adapter=adapter), replace(settings, max_new_tokens=5)):
        with pytest.raises(EvaluationError, match="another run"):
            evaluate.run(other)
    changed = tmp_path / "rows.json"
    changed.write_text((dataset / "rows.json").read_text().replace("nodule", "mass"))
    with pytest.raises(EvaluationError, match="another run"):
        evaluate.run(replace(settings, data=changed))
    assert (settings.out / ANSWERS).read_bytes() == before


def test_foreign_and_damaged_files_are_refused(settings: Settings, tmp_path: Path) -> None:
    settings.out.mkdir()
    (settings.out / ANSWERS).write_text('{"question_id": "1", "text": "yes"}\n')
    with pytest.raises(EvaluationError, match="something else"):
        evaluate.run(settings)
    fresh = replace(settings, out=tmp_path / "fresh", limit=2)
    evaluate.run(fresh)
    path = fresh.out / ANSWERS
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(EvaluationError, match="line 1"):
        evaluate.run(fresh)
    with pytest.raises(EvaluationError, match="cannot be read"):
        evaluate.run(replace(settings, out=tmp_path / "third", compare=tmp_path / "nothing.jsonl"))


def test_a_second_writer_is_refused(settings: Settings) -> None:
    import fcntl

    evaluate.run(replace(settings, limit=2))
    with open(settings.out / ANSWERS, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(EvaluationError, match="Another evaluation"):
            evaluate.run(settings)


def test_flips_to_another_run_are_reported(settings: Settings, tmp_path: Path) -> None:
    evaluate.run(settings)
    adapter = random_adapter(settings.model, tmp_path / "adapter", scale=3.0)
    other = replace(settings, out=tmp_path / "other", adapter=adapter, compare=settings.out / ANSWERS)
    flips = evaluate.run(other)["flips"]
    assert flips["rows"] == 12 and flips["changed"] > 0
    assert (flips["lost"], flips["gained"]) == (0, 0), "neither model knows the answers"
