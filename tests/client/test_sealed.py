"""Candidates at a clinic: examined on its sealed set, only counts leave, and only what is signed is installed."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Error, Message, RecordDict

from client import app, limits, sealed
from model import adapters, exam_counts, passport, phantoms
from model.data import read_training
from server import candidate, events, publish, release, rounds, signing
from server.candidate import Place, Thresholds
from tests.client.clinic import fill
from tests.server import fakes

KEY = {"key": "11" * 32, "trained": []}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, adapters.State]:
    """A clinic with 150 pictures and an adapter trained on those that are not sealed."""
    from client import trainer

    home = fill(tmp_path_factory.mktemp("sealed") / "clinic", phantoms.make(150, ["plain"], seed=3, size=48), tiny)
    (home / "privacy").mkdir(mode=0o700)
    (home / sealed.FILE).write_text(json.dumps(KEY))
    rows = sealed.open_to_training(home, read_training(home / "training"))
    start = adapters.initial(tiny, 8, 16.0, "decoder", 0)
    trained = trainer.train(rows, tiny, start, ("A", "B"), 120, lr=1e-2, batch=16)
    return home, trained.state


def candidate_folder(folder: Path, tiny: Path, state: adapters.State) -> Path:
    from model.llava import base_sha256

    spec = adapters.spec_of(state, 16.0, base_sha256(tiny))
    return release.build(folder, dataclasses.replace(fakes.replace_first(state, spec), round=4), "candidates")


def flipped(state: adapters.State) -> adapters.State:
    """The same adapter with the opposite effect."""
    return {name: -array if adapters.factor(name) == "B" else array for name, array in state.items()}


def reply(home: Path, folder: Path) -> RecordDict:
    return app.evaluate_reply(release.candidate(folder), home)


def judged(content: RecordDict) -> list[str]:
    found = exam_counts.read(content.metric_records["counts"])
    return [rule.what for rule in candidate.judge([Place("north", found)], Thresholds()) if not rule.kept]


@pytest.mark.slow
def test_a_poisoned_candidate_is_found_on_the_sealed_set_and_only_counts_leave(
    tmp_path: Path, tiny: Path, clinic: tuple[Path, adapters.State]
) -> None:
    home, state = clinic
    good = candidate_folder(tmp_path / "good", tiny, state)
    content = reply(home, good)
    _only_counts(content, home)
    found = exam_counts.read(content.metric_records["counts"])
    assert found.bits == 4 and found.rows >= 20 and found.installed.after > found.installed.before
    assert "right answers" not in judged(content)
    adapters.install(home, good, evidence={"round": 3})
    poisoned = reply(home, candidate_folder(tmp_path / "bad", tiny, flipped(state)))
    assert "right answers" in judged(poisoned)
    worse = exam_counts.read(poisoned.metric_records["counts"])
    assert worse.installed.before == found.installed.after > worse.installed.after
    current = adapters.current(home)
    assert current is not None and adapters.sha256(current) == adapters.sha256(good)


def test_an_examination_keeps_the_minutes_and_an_adapter_the_bounds_of_training(
    tmp_path: Path, tiny: Path, clinic: tuple[Path, adapters.State]
) -> None:
    home, state = tmp_path / "clinic", clinic[1]
    shutil.copytree(clinic[0], home)
    content = release.candidate(candidate_folder(tmp_path / "good", tiny, state))
    asked = content.config_records["config"], content.array_records["arrays"]
    text = (home / "afya.toml").read_text()
    (home / "afya.toml").write_text(text + "max_minutes = 0.01\n")
    with pytest.raises(limits.Refused, match="longer than allowed"):
        sealed.examine(*asked, home)
    (home / "afya.toml").write_text(text + "max_rank = 4\n")
    with pytest.raises(limits.Refused, match="rank is 8, this clinic allows 1 to 4"):
        sealed.examine(*asked, home)


class Handlers(fakes.FakeGrid):
    """One clinic that is the real handlers over its home."""

    def __init__(self, home: Path) -> None:
        super().__init__({1: fakes.honest()})
        self.home = home

    def examined(self, node: int, message: Message) -> RecordDict:
        return app.evaluate_reply(message.content, self.home)

    def answer(self, node: int, message: Message) -> RecordDict | Error | Exception | None:
        if message.metadata.message_type.startswith("query"):
            return app.release_reply(message.content, self.home)
        return super().answer(node, message)


@pytest.mark.slow
def test_the_server_refuses_the_poisoned_candidate_and_the_clinic_keeps_the_good_one(
    tmp_path: Path, tiny: Path, clinic: tuple[Path, adapters.State]
) -> None:
    from model.llava import base_sha256

    home, state = clinic
    key, clock = signing.signing_key(tmp_path / "certs"), fakes.Clock()
    (home / "federation").mkdir(mode=0o700)
    (home / "federation" / passport.PUBLIC).write_bytes((tmp_path / "certs" / passport.PUBLIC).read_bytes())
    # a tiny model that knows nothing is sure of nothing, so learning anything raises its calibration error
    chosen = fakes.settings(tmp_path / "rounds", tiny, signing_key=str(key), gate="require", gate_ece=1.0)
    office = rounds.Federation(Handlers(home), chosen, sleep=clock.sleep, clock=clock).office
    for number, factors in ((4, state), (5, flipped(state))):
        spec = adapters.spec_of(factors, 16.0, base_sha256(tiny))
        publish.release_now(office, dataclasses.replace(fakes.replace_first(factors, spec), round=number))
        current = adapters.current(home)
        assert current is not None and current.name.startswith("round-0004") and passport.check(home, current) is None
        assert adapters.sha256(current) == adapters.sha256(tmp_path / "rounds/releases/round-00004")
    last = events.read(tmp_path / "rounds")[0][-1]
    assert last["event"] == "not-released" and "right answers" in last["reason"]


def _only_counts(content: RecordDict, home: Path) -> None:
    """Two records: whole numbers under known names, and the hash that was sent; no text of the clinic's."""
    assert set(content) == {"counts", "config"} and set(content.config_records["config"]) == {"sha256"}
    assert set(content.metric_records["counts"]) == set(exam_counts.KNOWN)
    for value in content.metric_records["counts"].values():
        assert all(type(number) is int for number in (value if isinstance(value, list) else [value]))
    sent = repr(content).casefold()
    for sample in read_training(home / "training"):
        assert sample.question.casefold() not in sent and sample.group.casefold() not in sent


def test_a_candidate_meets_the_checks_of_an_installation(tmp_path: Path, tiny: Path) -> None:
    home = fill(tmp_path / "h", phantoms.make(60, ["plain"], seed=3, size=48), tiny)
    (home / "privacy").mkdir(mode=0o700)
    (home / sealed.FILE).write_text(json.dumps(KEY))
    folder = candidate_folder(tmp_path / "c", tiny, adapters.initial(tiny, 2, 16.0, "decoder", 0))
    changes: dict[str, tuple[str, str, object]] = {
        "other hash": ("config", "sha256", "0" * 64),
        "for the base": ("config", "base-sha256", "0" * 64),
        "layout": ("config", "layout", "{"),
        "declared": ("arrays", "lora_A", Array(np.zeros(3, np.float32))),
    }
    for word, (record, key, value) in changes.items():
        content = release.candidate(folder)
        content[record][key] = value
        assert word in str(app.evaluate_reply(content, home).config_records["config"]["refused"])
    content = release.candidate(folder)
    del content["config"]["alpha"]
    assert "not readable" in str(app.evaluate_reply(content, home).config_records["config"]["refused"])
    small = fill(tmp_path / "s", phantoms.make(3, ["plain"], seed=3, size=48), tiny)
    words = str(reply(small, folder).config_records["config"]["refused"])
    assert "the sealed set has 0 questions" in words


def signed_release(folder: Path, key: Path, serial: int = 7, **entries: Any) -> RecordDict:
    """The message that brings an adapter with a passport signed by the key in a file."""
    record = {"round": 4, "serial": serial, "adapter_sha256": adapters.sha256(folder)}
    record |= {"base_sha256": adapters.spec(folder).base_sha256, **entries}
    passport.write(folder, passport.sign(record, signing.load(key)))
    return release.content(folder)


def refused(content: RecordDict, home: Path) -> str:
    answer = app.release_reply(content, home)
    assert adapters.current(home) == home_adapter(home)
    return str(answer.config_records["config"]["refused"])


def home_adapter(home: Path) -> Path | None:
    found = json.loads((home / "adapters/current.json").read_text()) if (home / "adapters").exists() else None
    return home / "adapters" / found["name"] if found else None


def test_a_clinic_that_knows_the_key_installs_only_what_is_signed_and_not_older(tmp_path: Path, tiny: Path) -> None:
    home = fill(tmp_path / "h", phantoms.make(1, ["plain"], seed=3, size=48), tiny)
    key, other = signing.signing_key(tmp_path / "certs"), signing.signing_key(tmp_path / "elsewhere")
    state = {n: a + np.float32(0.01) for n, a in adapters.initial(tiny, 2, 16.0, "decoder", 0).items()}
    folder = candidate_folder(tmp_path / "c", tiny, state)
    second = candidate_folder(tmp_path / "d", tiny, {n: 2 * a for n, a in state.items()})
    assert "installed" in app.release_reply(release.content(folder), home).config_records["config"]  # no key yet
    (home / "federation").mkdir(mode=0o700)
    (home / "federation" / passport.PUBLIC).write_bytes((tmp_path / "certs" / passport.PUBLIC).read_bytes())
    before = adapters.current(home)
    assert "no passport" in refused(release.content(second), home)
    assert "another key" in refused(signed_release(second, other), home)
    assert "another adapter" in refused(signed_release(second, key, adapter_sha256="0" * 64), home)
    assert "another base" in refused(signed_release(second, key, base_sha256="0" * 64), home)
    content = signed_release(second, key)
    content["config"]["passport"] = str(content["config"]["passport"]).replace('"serial": 7', '"serial": 8')
    assert "changed" in refused(content, home)
    assert adapters.current(home) == before
    assert "another round than the passport" in refused(signed_release(second, key, round=5), home)
    old = signed_release(folder, key, serial=6)
    assert "installed" in app.release_reply(signed_release(second, key), home).config_records["config"]
    assert "already seen 7" in refused(old, home)
    assert "installed" in app.release_reply(signed_release(folder, key, serial=8), home).config_records["config"]
    current = adapters.current(home)
    assert current is not None and passport.check(home, current) is None
