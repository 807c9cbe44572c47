"""The queue in front of the model: order, streaming, giving up, failures on the disk, adapters changed under way."""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kiosk import queries
from kiosk.inference import AnswerFailed, Engine, Job
from kiosk.settings import Settings
from kiosk.store import CaseStore
from model import adapters, llava, verified
from model.backends import Answer, Backend, Request, Token
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import BrightnessBackend

BRIGHT = Request(np.full((8, 8, 3), 200, np.uint8), "Is it bright?")


def ask(store: CaseStore, engine: Engine, request: Request = BRIGHT) -> Job:
    _, turn_id = store.add_case(picture(), "NA", request.question)
    return engine.submit(turn_id, request)


def wait(engine: Engine, job: Job) -> str:
    return "".join(engine.stream(job))


@pytest.fixture
def settings() -> Settings:
    return Settings(answer_seconds=60)


def test_answers_stream_and_are_saved_with_how_they_were_made(
    store: CaseStore, afya_home: Path, settings: Settings
) -> None:
    engine = Engine(store, afya_home, settings, BrightnessBackend)
    first = ask(store, engine)
    second = ask(store, engine, replace(BRIGHT, image=np.zeros((8, 8, 3), np.uint8)))
    assert (wait(engine, second), wait(engine, first)) == ("It is dark", "It is bright")
    engine.stop()
    turn = queries.turn(store, first.turn_id)
    assert (turn.status, turn.answer, turn.confidence, turn.backend, turn.bits) == (
        "answered", "It is bright", 0.83, "brightness", 4)  # fmt: skip
    rows = queries.memory_rows(store)
    assert [row["event"] for row in rows] == ["model loaded", "answer", "answer"]
    assert all(row["rss_bytes"] > 10_000_000 for row in rows) and rows[1]["tokens_per_second"] == 6.0
    assert engine.status().state == "ready" and engine.status().waiting == 0


def test_nobody_watching_loses_nothing(store: CaseStore, afya_home: Path, settings: Settings) -> None:
    gate = threading.Event()
    engine = Engine(store, afya_home, settings, lambda: BrightnessBackend(gate))
    job = ask(store, engine)
    watching = engine.stream(job)
    assert next(watching) == "It "
    del watching  # the browser was closed
    assert queries.turn(store, job.turn_id).status == "pending" and engine.job(job.turn_id) is job
    assert engine.submit(job.turn_id, BRIGHT) is job  # pressed twice, asked once
    gate.set()
    assert wait(engine, job) == "It is bright"
    engine.stop()
    assert queries.turn(store, job.turn_id).status == "answered" and engine.job(job.turn_id) is None


def test_an_answer_that_takes_too_long_is_given_up_with_a_sentence(store: CaseStore, afya_home: Path) -> None:
    gate = threading.Event()
    engine = Engine(store, afya_home, Settings(answer_seconds=0), lambda: BrightnessBackend(gate))
    job = ask(store, engine)
    with pytest.raises(AnswerFailed, match="took longer than 0 seconds"):
        wait(engine, job)
    gate.set()
    engine.stop()
    turn = queries.turn(store, job.turn_id)
    assert (turn.status, turn.answer) == ("failed", None) and "please ask again" in (turn.problem or "")


class Breaking(BrightnessBackend):
    """Breaks down over a dark picture."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Token | tuple[int, Answer]]:
        if requests[0].image.mean() < 50:
            raise MemoryError("the picture needs more memory than there is\nand a second line")
        yield from super().generate(requests)


def test_a_failure_is_told_and_the_next_question_is_answered(
    store: CaseStore, afya_home: Path, settings: Settings
) -> None:
    engine = Engine(store, afya_home, settings, Breaking)
    bad, good = ask(store, engine, replace(BRIGHT, image=np.zeros((8, 8, 3), np.uint8))), ask(store, engine)
    with pytest.raises(
        AnswerFailed, match="The question was not answered: the picture needs more memory than there is"
    ):
        wait(engine, bad)
    assert wait(engine, good) == "It is bright"
    engine.stop()
    assert "second line" not in (queries.turn(store, bad.turn_id).problem or "")


def test_a_model_that_does_not_load_is_told_and_cases_stay_saved(
    store: CaseStore, afya_home: Path, settings: Settings
) -> None:
    def broken() -> BrightnessBackend:
        raise FileNotFoundError("there are no weights in /nowhere; pass --model FOLDER")

    engine = Engine(store, afya_home, settings, broken)
    job = ask(store, engine)
    with pytest.raises(AnswerFailed, match="could not be loaded: there are no weights in /nowhere"):
        wait(engine, job)
    engine.stop()
    assert engine.status().state == "failed" and queries.turn(store, job.turn_id).status == "failed"


def install(home: Path, name: str, words: tuple[str, str] | None) -> None:
    """Put an adapter in place as the federation does: a folder, then the pointer."""
    folder = home / "adapters" / name
    folder.mkdir(parents=True)
    if words:
        (folder / "words.json").write_text(json.dumps(words))
    (home / "adapters" / "current.json").write_text(json.dumps({"name": name}))


def test_an_adapter_is_used_from_the_next_question_and_a_refused_one_is_told(
    store: CaseStore, afya_home: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(home: Path, using: Path | None) -> verified.Verified | None:  # the real one also checks weights
        pointer = home / "adapters" / "current.json"
        if not pointer.exists():
            return None
        return verified.Verified(home / "adapters" / json.loads(pointer.read_text())["name"], None, "0" * 64, None)

    monkeypatch.setattr(verified, "take", take)
    engine = Engine(store, afya_home, settings, BrightnessBackend)
    assert wait(engine, ask(store, engine)) == "It is bright"
    install(afya_home, "round-1", ("gloomy", "brilliant"))
    job = ask(store, engine)
    assert wait(engine, job) == "It is brilliant"
    assert queries.turn(store, job.turn_id).adapter_name == engine.status().adapter == "round-1"
    install(afya_home, "round-2-of-another-model", None)
    job = ask(store, engine)
    assert wait(engine, job) == "It is brilliant" and queries.turn(store, job.turn_id).adapter_name == "round-1"
    notice = engine.status().notice or ""
    assert "refused and the earlier one (round-1) answers" in notice and "made for another model" in notice
    (afya_home / "adapters" / "current.json").unlink()
    assert wait(engine, ask(store, engine)) == "It is bright"
    engine.stop()
    assert engine.status().notice is None and engine.status().adapter is None


def test_a_damaged_pointer_is_told_and_the_base_model_answers(
    store: CaseStore, afya_home: Path, settings: Settings
) -> None:
    (afya_home / "adapters").mkdir()
    (afya_home / "adapters" / "current.json").write_text("{ half")
    engine = Engine(store, afya_home, settings, BrightnessBackend)
    assert wait(engine, ask(store, engine)) == "It is bright"
    engine.stop()
    assert "was refused and the model as it was installed answers" in (engine.status().notice or "")


def test_a_real_adapter_is_swapped_in_under_a_real_model(
    store: CaseStore, afya_home: Path, tiny: Path, tmp_path: Path
) -> None:
    engine = Engine(store, afya_home, Settings(model=str(tiny), bits=4, answer_tokens=4), lambda: real(tiny))
    request = Request(np.full((32, 32, 3), 200, np.uint8), "Is it bright?", (), 4)
    before = ask(store, engine, request)
    wait(engine, before)
    state = adapters.initial(tiny, 4, 8, "decoder", 0)
    changed = {name: value + np.float32(0.02) for name, value in state.items()}
    adapters.save(tmp_path / "adapter", changed, adapters.spec_of(changed, 8, llava.base_sha256(tiny)))
    name = adapters.install(afya_home, tmp_path / "adapter", evidence={"round": 3})
    after = ask(store, engine, request)
    wait(engine, after)
    engine.stop()
    first, second = queries.turn(store, before.turn_id), queries.turn(store, after.turn_id)
    assert (first.adapter_name, first.adapter_sha256) == (None, None)
    assert second.adapter_name == name and second.adapter_sha256 == adapters.sha256(tmp_path / "adapter")
    assert "nobody vouches" in (engine.status().unsigned or "")
    assert first.confidence != second.confidence


def real(folder: Path) -> Backend:
    from model.backends import TorchBackend

    return TorchBackend(folder, 4)
