"""A clinic's answers: trains what it allows, refuses the rest with a reason, installs only what it has checked."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, RecordDict

from client import app, courtesy, limits, received, sealed, trainer
from model import adapters, phantoms, wire
from server import release, rounds
from tests.client.clinic import fill, request
from tests.server import fakes
from tests.server.bad_replies import _huge, _object


@pytest.fixture
def clinic(tmp_path: Path, tiny: Path) -> Path:
    return fill(tmp_path / "clinic", phantoms.make(3, ["plain"], seed=2, size=48), tiny, "min_examples = 4")


@pytest.fixture(scope="module")
def state(tiny: Path) -> adapters.State:
    return adapters.initial(tiny, 2, 8.0, "decoder", 0)


def reason(content: RecordDict) -> str:
    """The reason of a refusal; fails when the answer is not one."""
    assert set(content) == {"config"}
    return str(content.config_records["config"]["refused"])


def test_a_round_answers_with_the_one_factor_and_its_measures(clinic: Path, tiny: Path, state: adapters.State) -> None:
    content = app.train_reply(request(tiny, state), clinic)
    arrays, metrics = content.array_records["arrays"], content.metric_records["metrics"]
    assert set(arrays) == {"lora_B"}
    assert arrays["lora_B"].numpy().size == sum(a.size for n, a in state.items() if adapters.factor(n) == "B")
    assert any(arrays[name].numpy().any() for name in arrays)
    assert metrics["server-round"] == 1 and metrics["steps"] == 8
    assert metrics["num-examples"] == len(list((clinic / "training/samples").iterdir()))
    assert metrics["bytes"] == sum(arrays[name].numpy().nbytes for name in arrays)
    assert metrics["seconds"] > 0 and metrics["peak-rss-mib"] > 50
    planted = [json.loads(p.read_text())["question"] for p in (clinic / "training/samples").iterdir()]
    wire = b"".join(arrays[name].data for name in arrays) + repr(metrics).encode()
    assert not any(text.encode() in wire for text in planted)


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "another base": ({"base_sha256": "0" * 64}, "base model"),
    "10^6 steps": ({"local_steps": 10**6}, "local-steps is 1000000"),
    "one step": ({"local_steps": 1}, "local-steps is 1"),
    "a rate of 1,000": ({"lr": 1e3}, "lr is 1000.0"),
    "a rate that is no number": ({"lr": float("nan")}, "lr is nan"),
    "a negative rate": ({"lr": -1.0}, "lr is -1.0"),
    "a huge batch": ({"batch_size": 10_000}, "batch-size is 10000"),
    "a negative seed": ({"seed": -5}, "seed is -5"),
    "a layout without an end": ({"layout": '{"rank": 2, "modules": [["q", Infinity, 4]]}'}, "layout"),
    "a huge scale": ({"alpha": 1e9}, "alpha"),
    "no known factor": ({"factor": "C"}, "factor"),
    "a path": ({"output_dir": "/home"}, "'output-dir'"),
    "steps as text": ({"local_steps": "8; rm -rf /"}, "local-steps"),
    "steps as truth": ({"local_steps": True}, "local-steps"),
    "no rate": ({"lr": None}, "lacks 'lr'"),
    "B at 1,000 times A's rate": ({"lr_ratio": 1000.0}, "lr times lr-ratio is 2.0"),
    "a ratio below one": ({"lr_ratio": 0.5}, "lr-ratio is 0.5"),
    "a ratio without end": ({"lr_ratio": float("inf")}, "lr-ratio is inf"),
    "a pull of 100": ({"proximal_mu": 100.0}, "proximal-mu is 100.0"),
    "round -1": ({"server_round": -1}, "server-round"),
}


@pytest.mark.parametrize("kind", ASKED)
def test_a_request_beyond_the_limits_is_refused_and_nothing_is_trained(
    clinic: Path, tiny: Path, state: adapters.State, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.trainer.train", lambda *a, **k: pytest.fail("trained all the same"))
    changes, word = ASKED[kind]
    assert word in reason(app.train_reply(request(tiny, state, **changes), clinic))


def test_layers_and_ranks_the_clinic_does_not_allow_are_refused(tmp_path: Path, tiny: Path) -> None:
    samples = phantoms.make(3, ["plain"], seed=2, size=48)
    home = fill(tmp_path / "h", samples, tiny, 'min_examples = 4\ntargets = "decoder"\nmax_rank = 4')
    tower = adapters.initial(tiny, 2, 8.0, "tower", 0)
    assert "vision_tower" in reason(app.train_reply(request(tiny, tower), home))
    head = {
        "base_model.model.lm_head.lora_A.weight": np.zeros((2, 64), np.float32),
        "base_model.model.lm_head.lora_B.weight": np.zeros((9, 2), np.float32),
    }
    assert "lm_head" in reason(app.train_reply(request(tiny, head), home))
    assert "rank is 8" in reason(app.train_reply(request(tiny, adapters.initial(tiny, 8, 8.0, "decoder", 0)), home))


def test_too_few_samples_sit_the_round_out(tmp_path: Path, tiny: Path, state: adapters.State) -> None:
    home = fill(tmp_path / "h", phantoms.make(1, ["plain"], seed=2, size=48)[:3], tiny)
    assert "3 consented samples" in reason(app.train_reply(request(tiny, state), home))


def test_arrays_that_are_not_what_they_say_are_refused(clinic: Path, tiny: Path, state: adapters.State) -> None:
    name, real = "lora_B", wire.pack(state, "B")
    bad = {
        "shape": Array(dtype="float32", shape=real.shape, stype="numpy.ndarray", data=_huge(real)),
        "dtype": Array(dtype="float32", shape=real.shape, stype="numpy.ndarray", data=_object(real)),
        "finite": Array(np.full_like(real, np.nan)),
        "float16": Array(real.astype(np.float64)),
    }
    for word, array in bad.items():
        content = request(tiny, state)
        content["arrays"][name] = array
        assert word in reason(app.train_reply(content, clinic))
    content = request(tiny, state)
    content["arrays"]["../../evil"] = Array(real)
    assert "keys" in reason(app.train_reply(content, clinic))
    good = json.loads(wire.layout(adapters.spec_of(state, 8.0, "0" * 64)))
    first = good["modules"][0]
    for rows in ([], [first, first], [[*first[:2], -1]], [["../evil", 4, 4]], [["x", 10**9, 10**9]], "many", [1]):
        content = request(tiny, state, layout=json.dumps({**good, "modules": rows}))
        assert reason(app.train_reply(content, clinic))
    for layout in ("{", "[]", json.dumps({**good, "rank": 10**9}), json.dumps({**good, "rank": "2"})):
        assert reason(app.train_reply(request(tiny, state, layout=layout), clinic))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("max_steps = 'many'", "max_steps"),
        ("unknown = 1", "unknown"),
        ("][", "afya.toml"),
        ("targets = 'decoder('", "targets"),
        ("min_steps = 0", "min_steps is 0"),
        ("min_cases = 0", "min_cases is 0"),
        ("threads = -1", "threads is -1"),
    ],
)
def test_a_clinic_with_wrong_settings_trains_nothing(
    clinic: Path, tiny: Path, state: adapters.State, text: str, word: str
) -> None:
    (clinic / "afya.toml").write_text(f"[client]\n{text}\n")
    assert word in reason(app.train_reply(request(tiny, state), clinic))
    with pytest.raises(limits.SettingsWrong):
        limits.read_limits(clinic)


def test_a_request_that_is_refused_marks_no_picture_as_trained_on(
    clinic: Path, tiny: Path, state: adapters.State
) -> None:
    def trained() -> list[str]:
        file = clinic / sealed.FILE
        return list(json.loads(file.read_bytes())["trained"]) if file.exists() else []

    for odd in ({"base_sha256": "0" * 64}, {"local_steps": 10**6}, {"lr": 1e3}):
        assert reason(app.train_reply(request(tiny, state, **odd), clinic))
        assert trained() == []
    assert set(app.train_reply(request(tiny, state), clinic)) == {"arrays", "metrics"}
    assert trained()


def released(tmp_path: Path, tiny: Path) -> tuple[Path, RecordDict]:
    """A release folder of the server with a small change in it, and the message that brings it."""
    from model.llava import base_sha256

    state = {n: a + np.float32(0.01) for n, a in adapters.initial(tiny, 2, 8.0, "decoder", 0).items()}
    spec = adapters.spec_of(state, 8.0, base_sha256(tiny))
    folder = release.build(tmp_path / "server", fakes.replace_first(state, spec))
    return folder, release.content(folder)


def test_a_release_is_installed_with_its_evidence(tmp_path: Path, tiny: Path, clinic: Path) -> None:
    folder, content = released(tmp_path, tiny)
    answer = app.release_reply(content, clinic)
    current = adapters.current(clinic)
    assert current is not None
    assert answer.config_records["config"]["installed"] == current.name
    assert answer.config_records["config"]["sha256"] == adapters.sha256(folder) == adapters.sha256(current)
    assert json.loads((current / adapters.RELEASE).read_text())["round"] == 3


def test_a_release_that_is_not_sound_is_refused_and_the_old_one_stays(tmp_path: Path, tiny: Path, clinic: Path) -> None:
    _, content = released(tmp_path, tiny)
    app.release_reply(content, clinic)
    before = adapters.current(clinic)
    name = min(content.array_records["arrays"])
    array = content.array_records["arrays"][name].numpy()
    changes: dict[str, tuple[str, str, object]] = {
        "other hash": ("config", "sha256", "0" * 64),
        "for the base": ("config", "base-sha256", "0" * 64),
        "readable": ("config", "evidence", "{"),
        "no record": ("config", "evidence", "[" * 50_000),
        "at most": ("config", "evidence", '{"round": 3, "a": "' + "x" * received.MAX_EVIDENCE + '"}'),
        "round of a release": ("config", "evidence", '{"round": 1000000000000000000}'),
        "finite": ("arrays", name, Array(np.full_like(array, np.inf))),
        "shape": ("arrays", name, Array(array[:1])),
    }
    for word, (record, key, value) in changes.items():
        _, content = released(tmp_path, tiny)
        content[record][key] = value
        assert word in reason(app.release_reply(content, clinic))
        assert adapters.current(clinic) == before


def test_outside_its_hours_a_clinic_refuses_with_the_hours(clinic: Path, tiny: Path, state: adapters.State) -> None:
    with open(clinic / "afya.toml", "a") as file:
        file.write('hours = "22:00-06:00"\n')
    noon, night = (datetime.datetime(2026, 3, 2, hour, 30) for hour in (12, 23))
    words = reason(app.train_reply(request(tiny, state), clinic, noon))
    assert words == "this clinic trains at 22:00-06:00 only, and its clock shows 12:30"
    assert set(app.train_reply(request(tiny, state), clinic, night)) == {"arrays", "metrics"}


def test_an_update_of_too_few_steps_does_not_leave_when_the_time_is_over(
    clinic: Path, tiny: Path, state: adapters.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(clinic / "afya.toml", "a") as file:
        file.write('hours = "22:00-06:00"\n')
    last = datetime.datetime(2026, 3, 2, 5, 59, 59, 999_000)
    words = reason(app.train_reply(request(tiny, state), clinic, last))
    assert words == "training stopped: the time for training ran out"
    monkeypatch.setattr(courtesy.Courtesy, "pause", lambda self: None)
    words = reason(app.train_reply(request(tiny, state), clinic, last))
    assert words == "training stopped: the time was over before the pictures were looked at"
    prepare = trainer.prepare
    monkeypatch.setattr(trainer, "prepare", lambda *given: prepare(*given[:4]))
    assert "the time was over after 1 steps" in reason(app.train_reply(request(tiny, state), clinic, last))


def test_an_update_of_few_patients_does_not_leave_however_many_the_clinic_has(
    clinic: Path, tiny: Path, state: adapters.State
) -> None:
    text = (clinic / "afya.toml").read_text()
    (clinic / "afya.toml").write_text(text.replace("min_cases = 1", "min_cases = 3\nmin_steps = 1"))
    few = request(tiny, state, batch_size=1, local_steps=1)
    assert "made of 1 patients, and this clinic sends nothing below 3" in reason(app.train_reply(few, clinic))
    assert set(app.train_reply(request(tiny, state), clinic)) == {"arrays", "metrics"}


def test_too_few_patients_sit_the_round_out_however_many_questions(
    clinic: Path, tiny: Path, state: adapters.State
) -> None:
    (clinic / "afya.toml").write_text((clinic / "afya.toml").read_text().replace("min_cases = 1", "min_cases = 4"))
    assert "samples of 3 patients and takes part from 4" in reason(app.train_reply(request(tiny, state), clinic))


def test_a_refusal_for_the_hour_is_counted_as_one_by_the_round(
    clinic: Path, tiny: Path, state: adapters.State, tmp_path: Path
) -> None:
    with open(clinic / "afya.toml", "a") as file:
        file.write('hours = "22:00-06:00"\n')
    noon = datetime.datetime(2026, 3, 2, 12, 30)
    grid = fakes.FakeGrid({1: lambda node, message: app.train_reply(message.content, clinic, noon), 2: fakes.honest()})
    clock = fakes.Clock()
    chosen = fakes.settings(tmp_path / "rounds", tiny, num_server_rounds=1, min_clinics=1, gate="off")
    after = rounds.federate(grid, chosen, sleep=clock.sleep, clock=clock)
    assert [(r.clinic, r.reason) for r in after.rejected] == [
        ("clinic-1", "the clinic refused: this clinic trains at 22:00-06:00 only, and its clock shows 12:30")
    ]
    assert after.changed
